"""Whether data and model are the same when they are asked twice, and what makes them differ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flatkern.operators.batches import OperatorData, fingerprint, same_fingerprint

__all__ = ["CHANGED_DATA", "check_output_again", "check_second_pass"]

CHANGED_DATA = (
    "data: {} from the pass at linearization, so samples would be counted twice or left out; pass data that "
    "is the same in every pass (shuffle=False, no random augmentation), or raise max_memory until all is kept"
)
_OPT_OUT = "; check_determinism=False skips this check"


def check_second_pass(data: OperatorData, first: Sequence[Sequence[Tensor]], *, order_matters: bool) -> None:
    """Read the data again and compare with the first pass.

    Args:
        data: the batches.
        first: the first pass's fingerprints.
        order_matters: whether batches are read again later. Where all are kept, another order of the same
            samples is the same operator.

    Raises:
        ValueError: they differ, with the likeliest cause.
    """
    if data.in_memory:
        return
    second = [fingerprint(batch) for batch in data]
    if len(first) == len(second) and all(map(same_fingerprint, first, second)):
        return
    old, new = _columns(first), _columns(second)
    if [len(c) for c in old] != [len(c) for c in new]:
        raise ValueError(
            "data: a second pass gives another number of samples (random sampling, drop_last with shuffling, "
            f"a stream?); pass the same samples in every pass{_OPT_OUT}"
        )
    if all(
        torch.allclose(a.sort().values, b.sort().values, rtol=1e-9) for a, b in zip(old, new, strict=True)
    ):
        if order_matters:
            raise ValueError(
                "data: a second pass gives the same samples in another order (shuffling), and not all batches are "
                f"kept; pass shuffle=False, or raise max_memory until all is kept{_OPT_OUT}"
            )
        return
    some_same = any(
        torch.allclose(a.sort().values, b.sort().values, rtol=1e-9) for a, b in zip(old, new, strict=True)
    )
    cause = "random augmentation of the inputs" if some_same else "random augmentation or sampling"
    raise ValueError(
        f"data: a second pass gives other values ({cause}), so the operator would be that of one random draw; pass "
        f"fixed data{_OPT_OUT}"
    )


def _columns(passes: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Fingerprints of batches → one vector a tensor of the batch, over all samples."""
    width = min((len(p) for p in passes), default=0)
    return [torch.cat([p[j].reshape(-1) for p in passes]) for j in range(width)]


def check_output_again(first: Tensor, second: Tensor) -> None:
    """Compare the outputs of two forward passes on one batch.

    Raises:
        ValueError: they differ by far more than rounding.
    """
    if first.shape == second.shape:
        a, b = first.detach().float(), second.detach().float()
        if bool((a - b).abs().max() <= 1e-2 * a.abs().max() + 1e-6):
            return
    raise ValueError(
        "model: two forward passes on the same batch differ although torch's generator was not used (numbers drawn "
        f"from Python's or NumPy's generator, or a state kept between calls); remove what changes{_OPT_OUT}"
    )
