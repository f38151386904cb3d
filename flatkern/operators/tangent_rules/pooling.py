"""Pooling: the entries at the indices found, or averages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flatkern.tape import Op, Value

from .rule import Rule, Tangent, register, value


@register("max_pool2d_with_indices", "max_pool3d_with_indices", "adaptive_max_pool2d", "adaptive_max_pool3d")
class MaxPool(Rule):
    """Entry by entry the place of its maximum in the whole input."""

    image_path = True

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.pooling = Places(op.outputs[1].tensor, value(op, 0).shape, 3 if "3d" in op.name else 2)  # type: ignore[union-attr]

    def constants(self) -> list[Tensor]:
        """See :class:`Rule`."""
        return [self.pooling.places]

    def channels_last(self, convert: Callable[[Tensor], Tensor]) -> None:
        """See :class:`Rule`."""
        self.pooling.channels_last()

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        t = tangents[0]
        if t is None:
            return [None]
        t = self.pooling.in_memory(t)
        out = t.new_empty(t.shape[0], *self.pooling.in_memory_shape(self.shape))
        for source, target in zip(t, out, strict=True):
            torch.index_select(source.reshape(-1), 0, self.pooling.places, out=target.view(-1))
        return [self.pooling.as_images(out)]


class Places:
    """Flat places in a tensor of ``shape``, from places within its last axes."""

    def __init__(self, indices: Tensor, shape: torch.Size, axes: int) -> None:
        self.indices, self.last = indices.shape, False
        self.area = shape[-axes:].numel()
        self.channels = shape[-axes - 1]
        images = shape.numel() // self.area
        offsets = torch.arange(images, device=indices.device) * self.area
        self.places = (indices.reshape(images, -1) + offsets.unsqueeze(1)).reshape(-1)

    def channels_last(self) -> None:
        """Count in that order of memory."""
        image, place = self.places // self.area, self.places % self.area
        sample, channel = image // self.channels, image % self.channels
        moved = (sample * self.area + place) * self.channels + channel
        self.places, self.last = moved.view(self.indices).permute(0, 2, 3, 1).reshape(-1), True

    def in_memory(self, t: Tensor) -> Tensor:
        """[K, n, C, H, W] with its axes as they lie in memory."""
        return t.permute(0, 1, 3, 4, 2) if self.last else t

    def in_memory_shape(self, shape: torch.Size) -> tuple[int, ...]:
        """Of a value of this shape."""
        return (shape[0], shape[2], shape[3], shape[1]) if self.last else tuple(shape)

    def as_images(self, t: Tensor) -> Tensor:
        """The reverse of :meth:`in_memory`."""
        return t.permute(0, 1, 4, 2, 3) if self.last else t


@register(
    "max_pool2d_with_indices_backward", "max_pool3d_with_indices_backward", "adaptive_max_pool2d_backward"
)
class MaxPoolBackward(Rule):
    """Cotangents at the places of the maxima; linear in them."""

    ignored = (1,)
    image_path = True

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        indices = next(a for a in reversed(op.args) if isinstance(a, Value)).tensor
        self.pooling = Places(indices, self.shape, 3 if "3d" in op.name else 2)

    def constants(self) -> list[Tensor]:
        """See :class:`Rule`."""
        return [self.pooling.places]

    def channels_last(self, convert: Callable[[Tensor], Tensor]) -> None:
        """See :class:`Rule`."""
        self.pooling.channels_last()

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        t = tangents[0]
        if t is None:
            return [None]
        t = self.pooling.in_memory(t)
        out = t.new_zeros(t.shape[0], *self.pooling.in_memory_shape(self.shape))
        for source, target in zip(t, out, strict=True):
            target.view(-1).index_add_(0, self.pooling.places, source.reshape(-1))
        return [self.pooling.as_images(out)]


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


@register(
    "avg_pool2d_backward",
    "avg_pool3d_backward",
    "_adaptive_avg_pool2d_backward",
    "_adaptive_avg_pool3d_backward",
)
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
