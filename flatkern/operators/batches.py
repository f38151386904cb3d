"""Batches of any kind, for operators: pairs, dicts, whatever ``forward`` understands; read again and compared."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flatkern.problem import Batches
from flatkern.samples import tensors_in

__all__ = [
    "Forward",
    "OperatorData",
    "batch_seed",
    "fingerprint",
    "num_samples",
    "reading",
    "same_fingerprint",
    "tensors_in",
]

Forward = Callable[[nn.Module, Any], Any]


class OperatorData:
    """A single batch or a re-iterable of batches, each moved to the model's device.

    Without ``forward`` a batch is a pair (x, y) of tensors. With it, a batch is anything that holds tensors
    with the samples on axis 0; a mapping, a tensor, or a list or tuple that directly contains tensors is ONE
    batch, and any other iterable yields batches.
    """

    def __init__(self, data: Any, device: torch.device, forward: Forward | None) -> None:
        if forward is not None and not callable(forward):
            raise TypeError(
                f"forward: expected a function (model, batch) -> (output, target), got {type(forward).__name__}"
            )
        self.source, self._device = data, device
        self._pairs = Batches(data, device) if forward is None else None
        single = isinstance(data, (Mapping, Tensor)) or (
            isinstance(data, (list, tuple)) and any(isinstance(item, Tensor) for item in data)
        )
        self.single = single
        self._batches: Iterable[Any] = [data] if single else data
        if not hasattr(self._batches, "__iter__"):
            raise TypeError(f"data: expected a batch or an iterable of batches, got {type(data).__name__}")
        if hasattr(self._batches, "__next__"):
            raise TypeError("data: a one-shot iterator can be read only once; pass a list or a DataLoader")

    @property
    def in_memory(self) -> bool:
        """Whether every pass must give the very same tensors."""
        return isinstance(self._batches, (list, tuple))

    def __iter__(self) -> Iterator[Any]:
        if self._pairs is not None:
            yield from self._pairs
            return
        empty = True
        for batch in self._batches:
            if num_samples(batch) == 0:
                raise ValueError("data: a batch is empty; axis 0 holds the samples and needs at least one")
            empty = False
            yield _to_device(batch, self._device)
        if empty:
            raise ValueError("data: no batch in it")


def batch_seed(seed: int, index: int) -> int:
    """The seed of what is drawn for one batch: the same in every pass, and unrelated between batches and seeds."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0] >> 1)


def num_samples(batch: Any) -> int:
    """The length of axis 0 of the batch's first tensor that has one."""
    for tensor in tensors_in(batch):
        if tensor.ndim:
            return len(tensor)
    raise TypeError(f"data: a batch of type {type(batch).__name__} holds no tensor with samples on axis 0")


def _to_device(batch: Any, device: torch.device) -> Any:
    if all(tensor.device == device for tensor in tensors_in(batch)):
        return batch  # as it is: a class of its own keeps its attributes
    if hasattr(batch, "to"):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {key: _to_device(part, device) for key, part in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_to_device(part, device) for part in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_to_device(part, device) for part in batch)
    return batch


def fingerprint(batch: Any) -> list[Tensor]:
    """Per-sample sums of every tensor of a batch, to recognise it when it is read again.

    Sums rather than a few entries: strided pixels of images may all lie on a blank border.
    """
    sums = []
    for t in tensors_in(batch):
        t = torch.view_as_real(t) if t.is_complex() else t
        sums.append(t.reshape(len(t), -1).sum(1, dtype=torch.float64) if t.ndim else t.double())
    return sums


def same_fingerprint(old: Sequence[Tensor], new: Sequence[Tensor]) -> bool:
    """Whether two fingerprints are of the same batch, up to the rounding of sums."""
    return len(old) == len(new) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-9) for a, b in zip(old, new, strict=True)
    )


@contextmanager
def reading(source: Any) -> Iterator[None]:
    """Restore afterwards what reading data may advance: the global generators on the CPU, and a loader's own.

    A ``DataLoader`` draws a seed from torch's whenever it is read, even without shuffling.
    """
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002
    state = torch.get_rng_state()
    places = [source, getattr(source, "sampler", None), getattr(source, "batch_sampler", None)]
    places.append(getattr(places[2], "sampler", None))
    found = {id(g): g for p in places if isinstance(g := getattr(p, "generator", None), torch.Generator)}
    states = [(g, g.get_state()) for g in found.values()]
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.set_rng_state(state)
        for generator, own in states:
            generator.set_state(own)
