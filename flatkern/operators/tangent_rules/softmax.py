"""Softmax, its logarithm, and their backward passes.

y = softmax(x): ẏ = w − y Σ w with w = y ẋ. Backward, g_x = y (g − m) with m = Σ y g: with c = g − m and
w = y ġ + c ẏ, ġ_x = w − y Σ w, as Σ ẏ = 0.

y = log softmax(x), p = exp y: ẏ = ẋ − Σ p ẋ. Backward, g_x = g − p Σ g and ġ_x = ġ − p Σ ġ − p ẏ Σ g. Behind
cross-entropy, where nothing else takes ẏ, the last term is −Σ g times the Hessian of log Σ exp x: one kernel for both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flatkern import kernels
from flatkern.kernels._jet_operator import DTYPES
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
    """See the module's text."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        y = op.output.tensor
        self.p: Tensor | None = y.exp()
        self.dim = op.args[1] % max(y.ndim, 1) + 1

    def meet(self, consumers: Sequence[Rule]) -> None:
        """Leave the work to the way back, which takes constants to 0."""
        if self.shape and self.p is not None and self.p.dtype in DTYPES and consumers:
            backs = [rule for rule in consumers if isinstance(rule, LogSoftmaxBackward) and rule.output_only]
            if len(backs) == len(consumers):
                self.p = None
                for rule in backs:
                    rule.take_over()

    def aliases(self, present: Sequence[bool]) -> bool:
        """See :class:`Rule`."""
        return self.p is None

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        t = tangents[0]
        return [t if t is None or self.p is None else t - (self.p * t).sum(self.dim, keepdim=True)]


@register("_log_softmax_backward_data")
class LogSoftmaxBackward(Rule):
    """See the module's text."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        g, self.y = value(op, 0), value(op, 1)
        self.dim = op.args[2] % max(self.y.ndim, 1) + 1
        wide = torch.float32 if g.dtype == torch.bfloat16 else g.dtype
        self.total = g.sum(self.dim - 1, dtype=wide)
        self.p: Tensor | None = self.y.exp()
        self.c: Tensor | None = self.p * g.sum(self.dim - 1, keepdim=True)
        self.output_only = self.has(1) and not self.has(0)

    def take_over(self) -> None:
        """The tangent of y comes as that of x; y is kept with the classes side by side."""
        self.p = self.c = None
        self.y = self.y.movedim(self.dim - 1, -1).contiguous()

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        dg, dy = self.at(tangents, 0), self.at(tangents, 1)
        if self.p is None:
            assert dy is not None
            image = kernels.cross_entropy_hvp(self.y, dy.movedim(self.dim, -1), scale=-self.total)
            return [image.movedim(-1, self.dim)]
        total: Tensor | None = None
        if dg is not None:
            total = dg - dg.sum(self.dim, keepdim=True) * self.p
        if dy is not None:
            assert self.c is not None
            part = dy * self.c
            total = part.neg_() if total is None else total.sub_(part)
        return [total]
