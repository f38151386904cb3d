"""One batch at fixed θ as a linear map; what an operator says about itself; which models it takes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

__all__ = ["KeptBatch", "Linearization", "OperatorInfo", "check_layers", "vector_kind"]


class Linearization(Protocol):
    """One batch at fixed θ as a linear map on parameter-shaped tensors."""

    @property
    def roots(self) -> Sequence[Tensor]:
        """The tensors whose autograd graphs are kept."""
        ...

    def apply(
        self,
        tangents: Sequence[Tensor | None],
        wanted: Sequence[int],
        *,
        batched: bool = False,
        places: Sequence[Tensor] | None = None,
    ) -> Sequence[Tensor | None]:
        """Curvature of this batch's loss numerator times a tangent, for the wanted parameters only.

        ``tangents`` has an entry a parameter and the result one a wanted parameter; ``None`` stands for zeros.
        ``batched``: tangents and results have a leading axis, and one pass serves all of them.
        ``places``: a tensor a result in which it may be left, and then is that tensor; others are free to write to.
        """
        ...


@dataclass(frozen=True)
class OperatorInfo:
    """How an operator does its products, and what it has done so far."""

    method: str
    mode: str
    """What happens to batches that are not kept: ``"rebuilt"``, ``"forward"`` or, before the first product has
    decided, ``"auto"``. Where all are kept: ``"kept"`` for graphs, ``"linearized"`` for tangent programs."""
    block_size: int | None
    """Vectors in one pass; ``None``: not decided yet (the first product with several vectors does)."""
    batches: int
    kept_batches: int
    """Batches whose graph is held in memory; the others are rebuilt in every product."""
    kept_bytes: int
    max_memory: int
    products: int
    linearize_seconds: float


@dataclass
class KeptBatch:
    """What an operator remembers of a batch."""

    scale: float
    """What the linearization's product is multiplied with before it is summed."""
    sums: list[Tensor]
    """The batch's fingerprint."""
    kept: Linearization | None


def vector_kind(named: Mapping[str, nn.Parameter]) -> tuple[torch.dtype, torch.device]:
    """Dtype of flat vectors (the parameters', at least float32) and the device of all parameters."""
    dtype, devices = torch.float32, {p.device for p in named.values()}
    if len(devices) > 1:
        raise ValueError(
            f"model: its parameters are spread over {', '.join(map(str, devices))}; put them on one device"
        )
    for p in named.values():
        dtype = torch.promote_types(dtype, p.dtype)
    return dtype, devices.pop()


def check_layers(model: nn.Module, chosen: Iterable[Tensor]) -> None:
    """Refuse chosen parameters whose gradients torch cannot differentiate in any form."""
    selected = {id(p) for p in chosen}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or id(module.weight) not in selected:
            continue
        if module.sparse:
            raise ValueError(
                f"model: embedding {name!r} has sparse=True, whose gradients torch differentiates only once; make it "
                "dense, or leave it out with params="
            )
        if isinstance(module, nn.EmbeddingBag) and (module.mode == "max" or module.scale_grad_by_freq):
            raise ValueError(
                f"model: torch cannot differentiate the gradient of the nn.EmbeddingBag {name!r} (mode='max' or "
                "scale_grad_by_freq); use mode='sum' or 'mean', or leave it out with params="
            )
