"""Pooling: the entries at the indices found, or averages."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flatkern.tape import Op, Value

from .rule import Rule, Tangent, register, value


@register("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d")
class MaxPool(Rule):
    """Entry by entry the place of its maximum in the whole input."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.places = _places(op.outputs[1].tensor, value(op, 0).shape, 3 if "3d" in op.name else 2)  # type: ignore[union-attr]

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        t = tangents[0]
        if t is None:
            return [None]
        out = t.new_empty(t.shape[0], *self.shape)
        for source, target in zip(t, out, strict=True):
            torch.index_select(source.reshape(-1), 0, self.places, out=target.view(-1))
        return [out]


def _places(indices: Tensor, shape: torch.Size, axes: int) -> Tensor:
    """Flat places in a tensor of ``shape``, from places within its last axes."""
    area = shape[-axes:].numel()
    images = shape.numel() // area
    offsets = torch.arange(images, device=indices.device) * area
    return (indices.reshape(images, -1) + offsets.unsqueeze(1)).reshape(-1)


@register("max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward", "adaptive_max_pool2d_backward")
class MaxPoolBackward(Rule):
    """Cotangents at the places of the maxima; linear in them."""

    ignored = (1,)

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        indices = next(a for a in reversed(op.args) if isinstance(a, Value)).tensor
        self.places = _places(indices, self.shape, 3 if "3d" in op.name else 2)

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        t = tangents[0]
        if t is None:
            return [None]
        out = t.new_zeros(t.shape[0], *self.shape)
        for source, target in zip(t, out, strict=True):
            target.view(-1).index_add_(0, self.places, source.reshape(-1))
        return [out]


@register("avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "upsample_nearest2d")
class Averaged(Rule):
    """Linear in one input: the operation itself on each tangent."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.func, self.rest, self.kwargs = op.func, list(op.args[1:]), op.kwargs

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        t = tangents[0]
        return [None if t is None else torch.stack([self.func(row, *self.rest, **self.kwargs) for row in t])]


@register("avg_pool2d_backward", "avg_pool3d_backward", "_adaptive_avg_pool2d_backward", "_adaptive_avg_pool3d_backward")
class AveragedBackward(Rule):
    """Linear in the cotangent; the input's shape alone matters."""

    ignored = (1,)

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.func = op.func
        self.rest: list[Any] = [a.tensor if isinstance(a, Value) else a for a in op.args[1:]]

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        t = tangents[0]
        return [None if t is None else torch.stack([self.func(row, *self.rest) for row in t])]
