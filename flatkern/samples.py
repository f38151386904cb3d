"""Samples of a batch of any kind: how many there are, and some of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["count_samples", "take", "tensors_in"]


def tensors_in(batch: Any) -> list[Tensor]:
    """All tensors in a batch: mappings, lists and tuples are searched."""
    if isinstance(batch, Tensor):
        return [batch]
    parts: Iterable[Any] = ()
    if isinstance(batch, Mapping):
        parts = batch.values()
    elif isinstance(batch, (list, tuple)):
        parts = batch
    return [tensor for part in parts for tensor in tensors_in(part)]


def count_samples(batch: Any) -> int:
    """The length of axis 0 of the batch's first tensor that has one; mappings, lists and tuples are searched."""
    found = _count(batch)
    if found is None:
        raise TypeError(
            f"data: a batch of type {type(batch).__name__} holds no tensor with samples on axis 0"
        )
    return found


def _count(batch: Any) -> int | None:
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else None
    parts = (
        batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else ()
    )
    return next((n for part in parts if (n := _count(part)) is not None), None)


def take(batch: Any, samples: slice | Sequence[int]) -> Any:
    """Some samples: of every tensor whose axis 0 is as long as there are samples; the rest is passed on."""
    return _take(batch, samples, count_samples(batch))


def _take(batch: Any, samples: slice | Sequence[int], n: int) -> Any:
    if isinstance(batch, Tensor):
        if not batch.ndim or len(batch) != n:
            return batch
        return batch[samples if isinstance(samples, slice) else torch.tensor(samples, device=batch.device)]
    if isinstance(batch, Mapping):
        return {key: _take(part, samples, n) for key, part in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(_take(part, samples, n) for part in batch))
    if isinstance(batch, (list, tuple)):
        return type(batch)(_take(part, samples, n) for part in batch)
    return batch
