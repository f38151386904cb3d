"""Entries by index: lookup tables, gathers, and what their backward passes add up."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flatkern.tape import Op, UnsupportedError

from .rule import Rule, Tangent, register, value


@register("embedding")
class Looked(Rule):
    """Rows of a table."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.rows = value(op, 1).reshape(-1)

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        t = tangents[0]
        return [None if t is None else t.index_select(1, self.rows).view(t.shape[0], *self.shape)]


@register("embedding_dense_backward")
class LookedBackward(Rule):
    """Cotangents added up row by row."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.rows, self.padding = value(op, 1).reshape(-1), int(op.args[3])
        if op.args[4]:
            raise UnsupportedError("no tangent rule for scale_grad_by_freq")

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        t = tangents[0]
        if t is None:
            return [None]
        k, width = t.shape[0], self.shape[-1]
        table = t.new_zeros(k, *self.shape).index_add_(1, self.rows, t.reshape(k, -1, width))
        if self.padding >= 0:
            table[:, self.padding] = 0.0
        return [table]


@register("gather", "index_select")
class Gathered(Rule):
    """Entries along one axis."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        ndim = value(op, 0).ndim
        self.dim, self.index = op.args[1] % max(ndim, 1) + 1, value(op, 2)

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        t = tangents[0]
        if t is None:
            return [None]
        if self.name == "index_select":
            return [t.index_select(self.dim, self.index)]
        return [t.gather(self.dim, self.index.expand(t.shape[0], *self.index.shape))]


@register("index")
class Indexed(Rule):
    """Advanced indexing."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.index: list[Tensor | None] = [None if i is None else i.tensor for i in op.args[1]]
        if any(i is not None and i.dtype == torch.bool for i in self.index):
            raise UnsupportedError("no tangent rule for indexing with a mask")
        # axes that are indexed apart from one another come out first, and K with them
        there = [i is not None for i in self.index]
        first = there.index(True)
        if not all(there[first : len(there) - there[::-1].index(True)]):
            raise UnsupportedError("no tangent rule for indexing of axes apart from one another")

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        t = tangents[0]
        return [None if t is None else torch.ops.aten.index(t, [None, *self.index])]


@register("index_put", "_unsafe_index_put")
class Put(Rule):
    """Cotangents added at their indices, onto zeros."""

    ignored = (0,)

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        base = op.args[0]
        if base.index in active or not (len(op.args) > 3 and op.args[3]):
            raise UnsupportedError("no tangent rule for writing at indices")
        self.index: list[Tensor | None] = [None if i is None else i.tensor for i in op.args[1]]
        if any(i is not None and i.dtype == torch.bool for i in self.index):
            raise UnsupportedError("no tangent rule for indexing with a mask")
        there = [i is not None for i in self.index]
        first = there.index(True)
        if not all(there[first : len(there) - there[::-1].index(True)]):
            raise UnsupportedError("no tangent rule for indexing of axes apart from one another")

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        t = self.at(tangents, 2)
        if t is None:
            return [None]
        out = t.new_zeros(t.shape[0], *self.shape)
        return [torch.ops.aten.index_put_(out, [None, *self.index], t, True)]
