"""Convolutions: D(w * x) = w * ẋ + ẇ * x, and the same for both parts of the backward pass.

Where the weight is shared by the K tangents they are one larger batch; where the input is, their weights are one weight
with K times the channels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flatkern.tape import Op

from .rule import Rule, Tangent, register, value

aten = torch.ops.aten


@register("convolution")
class Convolution(Rule):
    """x, w, b → w * x + b."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.x = value(op, 0) if self.has(1) else None
        self.w = value(op, 1) if self.has(0) else None
        self.settings = op.args[3:]
        self.plain = not op.args[6] and op.args[8] == 1
        self.axes = len(self.shape) - 2
        self.image_source = _images(op)

    def channels_last(self, convert: Callable[[Tensor], Tensor]) -> None:
        """See :class:`Rule`."""
        self.x, self.w = (None if t is None else convert(t) for t in (self.x, self.w))

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        dx, dw, db = (self.at(tangents, place) for place in range(3))
        total: Tensor | None = None
        if dx is not None:
            k = dx.shape[0]
            total = aten.convolution(dx.flatten(0, 1), self.w, None, *self.settings).view(k, *self.shape)
        if dw is not None:
            assert self.x is not None
            part = self._of_weights(self.x, dw)
            total = part if total is None else total.add_(part)
        if db is not None:
            db = db.reshape(*db.shape[:1], 1, -1, *[1] * self.axes)
            total = db.expand(-1, *self.shape).contiguous() if total is None else total.add_(db)
        return [total]

    def _of_weights(self, x: Tensor, dw: Tensor) -> Tensor:
        if self.plain:
            found = aten.convolution(x, dw.flatten(0, 1), None, *self.settings)
            return found.unflatten(1, (dw.shape[0], -1)).transpose(0, 1)
        return torch.stack([aten.convolution(x, w, None, *self.settings) for w in dw])


@register("convolution_backward")
class ConvolutionBackward(Rule):
    """g, x, w → the gradients in x, w and b."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.g, self.x, self.w = (value(op, place) for place in range(3))
        self.settings = op.args[4:10]
        asked = op.args[10]
        self.needed = [
            a and (v is not None and v.index in active) for a, v in zip(asked, op.outputs, strict=True)
        ]
        self.image_source = _images(op)

    def channels_last(self, convert: Callable[[Tensor], Tensor]) -> None:
        """See :class:`Rule`."""
        self.g, self.x, self.w = convert(self.g), convert(self.x), convert(self.w)

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        dg, dx, dw = (self.at(tangents, place) for place in range(3))
        k = next(len(t) for t in tangents if t is not None)
        rows = [self._row(*(None if t is None else t[i] for t in (dg, dx, dw))) for i in range(k)]
        results: list[Tangent] = []
        for place, needed in enumerate(self.needed):
            if needed:
                results.append(_joined([t for row in rows if (t := row[place]) is not None]))
        return results

    def _row(self, dg: Tangent, dx: Tangent, dw: Tangent) -> list[Tangent]:
        found: list[Tangent] = [None] * 3
        if dg is not None:
            bias = [self.g.shape[1]] if self.needed[2] else None
            found = list(aten.convolution_backward(dg, self.x, self.w, bias, *self.settings, self.needed))
        mask = [self.needed[0] and dw is not None, self.needed[1] and dx is not None, False]
        if any(mask):
            x, w = (self.x if dx is None else dx), (self.w if dw is None else dw)
            more = aten.convolution_backward(self.g, x, w, None, *self.settings, mask)
            found = [
                b if a is None else a if b is None else a.add_(b) for a, b in zip(found, more, strict=True)
            ]
        return found


def _joined(parts: list[Tensor]) -> Tangent:
    """[K, ...] of K tensors; torch.stack would not keep their order in memory."""
    if not parts:
        return None
    return torch.cat(parts).unflatten(0, (len(parts), -1)) if len(parts) > 1 else parts[0].unsqueeze(0)


def _images(op: Op) -> bool:
    """Whether oneDNN convolves images here, which it does faster with the channels last in memory."""
    x: Tensor = value(op, 0)
    if x.ndim != 4 or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return bool(torch.backends.mkldnn.enabled) and torch.backends.mkldnn.is_available()
