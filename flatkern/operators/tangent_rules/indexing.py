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


def _indices(op: Op) -> list[Tensor | None]:
    """Those of the tangents."""
    index: list[Tensor | None] = [None if i is None else i.tensor for i in op.args[1]]
    there = [i is not None for i in index]
    first, last = there.index(True), len(there) - there[::-1].index(True)
    if any(i is not None and i.dtype == torch.bool for i in index) or not all(there[first:last]):
        # axes that are indexed apart from one another come out first, and K would with them
        raise UnsupportedError("no tangent rule for indexing with masks, or on axes apart from one another")
    return [None, *index]


@register("index")
class Indexed(Rule):
    """Advanced indexing."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.index = _indices(op)

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        t = tangents[0]
        return [None if t is None else torch.ops.aten.index(t, self.index)]


@register("index_put", "_index_put_impl", "_unsafe_index_put", "scatter_add", "index_add")
class Added(Rule):
    """Entries added at indices to those of another value."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.scattered = op.name in ("scatter_add", "index_add")
        self.source = 3 if self.scattered else 2
        self.index: list[Tensor | None] = []
        if self.scattered:
            self.dim, self.index = op.args[1] % max(len(self.shape), 1) + 1, [value(op, 2)]
            self.alpha = op.kwargs.get("alpha", 1)
        elif value(op, 3, op.kwargs.get("accumulate", False)):
            self.index = _indices(op)
        else:
            raise UnsupportedError("no tangent rule for writing at indices")

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        base, t = self.at(tangents, 0), self.at(tangents, self.source)
        if t is None:
            return [None if base is None else base.clone()]
        out = t.new_zeros(t.shape[0], *self.shape) if base is None else base.clone()
        if not self.scattered:
            return [torch.ops.aten.index_put_(out, self.index, t, True)]
        (index,) = self.index
        assert index is not None
        if self.name == "index_add":
            return [out.index_add_(self.dim, index, t, alpha=self.alpha)]
        part = t[(slice(None), *(slice(0, size) for size in index.shape))]
        return [out.scatter_add_(self.dim, index.expand(t.shape[0], *index.shape), part)]
