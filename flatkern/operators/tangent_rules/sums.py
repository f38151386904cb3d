"""Sums and means over axes."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from flatkern.tape import Op

from .rule import Rule, Tangent, register, value

AXES = ("sum", "mean")


@register(*AXES)
class Summed(Rule):
    """Σ or mean over some axes, or all of them."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        shape = value(op, 0).shape
        dims = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim")
        dims = range(len(shape)) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
        dims = [d % len(shape) for d in dims] if shape else []
        self.dims = [d + 1 for d in dims]
        self.scale = 1.0 / prod(shape[d] for d in dims) if op.name == "mean" else 1.0
        self.dtype = op.output.tensor.dtype

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        t = tangents[0]
        if t is None:
            return [None]
        total: Tensor = t.sum(self.dims, dtype=self.dtype) if self.dims else t.clone()
        total = total.reshape(t.shape[0], *self.shape)
        return [total if self.scale == 1.0 else total.mul_(self.scale)]
