"""Softmax, its logarithm, and their backward passes.

y = softmax(x): ẏ = w − y Σ w with w = y ẋ. Backward, g_x = y (g − m) with m = Σ y g: with c = g − m and
w = y ġ + c ẏ, ġ_x = w − y Σ w, as Σ ẏ = 0.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from flatkern.tape import Op, UnsupportedError

from .rule import Rule, Tangent, register, value


@register("_softmax", "_safe_softmax")
class Softmax(Rule):
    """See the module's text."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        if op.output.tensor.dtype != value(op, 0).dtype:
            raise UnsupportedError("softmax with a dtype")
        self.y = op.output.tensor
        self.dim = op.args[1] % max(self.y.ndim, 1) + 1

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        t = tangents[0]
        if t is None:
            return [None]
        w = t.mul_(self.y) if self.free(tangents, owned, 0) else t * self.y
        return [w.addcmul_(w.sum(self.dim, keepdim=True), self.y, value=-1)]


@register("_softmax_backward_data")
class SoftmaxBackward(Rule):
    """See the module's text."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        g, self.y = value(op, 0), value(op, 1)
        self.dim = op.args[2] % max(self.y.ndim, 1) + 1
        self.c = g - (self.y * g).sum(self.dim - 1, keepdim=True) if self.has(1) else None

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        dg, dy = self.at(tangents, 0), self.at(tangents, 1)
        if dg is None and dy is None:
            return [None]
        if dg is not None:
            w = dg.mul_(self.y) if self.free(tangents, owned, 0) else dg * self.y
            if dy is not None:
                assert self.c is not None
                w.addcmul_(dy, self.c)
        else:
            assert dy is not None
            assert self.c is not None
            w = dy * self.c
        return [w.addcmul_(w.sum(self.dim, keepdim=True), self.y, value=-1)]


@register("_log_softmax")
class LogSoftmax(Rule):
    """y = x − log Σ exp x: ẏ = ẋ − Σ p ẋ."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.p = op.output.tensor.exp()
        self.dim = op.args[1] % max(self.p.ndim, 1) + 1

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        t = tangents[0]
        return [None if t is None else t - (self.p * t).sum(self.dim, keepdim=True)]


@register("_log_softmax_backward_data")
class LogSoftmaxBackward(Rule):
    """g_x = g − p Σ g with p = exp y."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        g, y = value(op, 0), value(op, 1)
        self.p, self.dim = y.exp(), op.args[2] % max(y.ndim, 1) + 1
        self.c = self.p * g.sum(self.dim - 1, keepdim=True)

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        dg, dy = self.at(tangents, 0), self.at(tangents, 1)
        total: Tensor | None = None
        if dg is not None:
            total = dg - dg.sum(self.dim, keepdim=True) * self.p
        if dy is not None:
            part = dy * self.c
            total = part.neg_() if total is None else total.sub_(part)
        return [total]
