"""Matrix products: D(A B) = Ȧ B + A Ḃ, one product for all K tangents where a factor is shared by them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flatkern.tape import Op

from .rule import Rule, Tangent, register, value


@register("mm", "bmm", "addmm", "baddbmm", "mv", "dot")
class Product(Rule):
    """A B, or C + A B with factors."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.added = op.name in ("addmm", "baddbmm")
        self.left, self.right = (1, 2) if self.added else (0, 1)
        self.a, self.b = value(op, self.left), value(op, self.right)
        self.many = op.name in ("bmm", "baddbmm")
        if op.name in ("mv", "dot"):
            self.b = self.b.unsqueeze(1)
        if op.name == "dot":
            self.a = self.a.unsqueeze(0)
        self.alpha, self.beta = float(op.kwargs.get("alpha", 1)), float(op.kwargs.get("beta", 1))
        if not self.has(self.left):  # a factor without a tangent beside it is multiplied with the other's
            self.b = None
        if not self.has(self.right):
            self.a = None

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        da, db = self.at(tangents, self.left), self.at(tangents, self.right)
        if db is not None and self.name in ("mv", "dot"):
            db = db.unsqueeze(-1)
        if da is not None and self.name == "dot":
            da = da.unsqueeze(1)
        if self.many:
            total = self._batches(da, db)
        else:
            total = self._matrices(da, db)
        if total is not None:
            total = total.view(total.shape[0], *self.shape)
            if self.alpha != 1.0:
                total = total.mul_(self.alpha)
        dc = self.at(tangents, 0) if self.added else None
        if dc is None:
            return [total]
        dc = dc.reshape(dc.shape[0], *[1] * (len(self.shape) + 1 - dc.ndim), *dc.shape[1:])
        if total is None:
            return [(dc * self.beta).expand(-1, *self.shape).contiguous()]
        return [total.add_(dc, alpha=self.beta)]

    def _matrices(self, da: Tangent, db: Tangent) -> Tangent:
        total = None
        if da is not None:
            assert self.b is not None
            k, rows, inner = da.shape
            if da.is_contiguous():
                total = torch.mm(da.view(k * rows, inner), self.b).view(k, rows, -1)
            else:
                total = torch.bmm(da, self.b.expand(k, *self.b.shape))
        if db is not None:
            assert self.a is not None
            wide = self.a.expand(db.shape[0], *self.a.shape)
            total = torch.bmm(wide, db) if total is None else total.baddbmm_(wide, db)
        return total

    def _batches(self, da: Tangent, db: Tangent) -> Tangent:
        total = None
        if da is not None:
            assert self.b is not None
            k = da.shape[0]
            shared = self.b.expand(k, *self.b.shape).reshape(k * self.b.shape[0], *self.b.shape[1:])
            total = torch.bmm(da.flatten(0, 1), shared)
        if db is not None:
            assert self.a is not None
            k = db.shape[0]
            shared = self.a.expand(k, *self.a.shape).reshape(k * self.a.shape[0], *self.a.shape[1:])
            other = db.flatten(0, 1)
            total = torch.bmm(shared, other) if total is None else total.baddbmm_(shared, other)
        return None if total is None else total.view(k, -1, *total.shape[1:])
