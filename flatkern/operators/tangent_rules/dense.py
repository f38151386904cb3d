"""Matrix products: D(A B) = Ȧ B + A Ḃ, one product for all K tangents where a factor is shared by them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from flatkern.tape import Op

from .rule import Rule, Tangent, register, value

SMALL = 1 << 20
"""Multiplications up to which the calls for K products cost more than the products."""


@register("mm", "bmm", "addmm", "baddbmm", "mv", "dot")
class Product(Rule):
    """A B, or C + A B with factors."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.added = op.name in ("addmm", "baddbmm")
        self.left, self.right = (1, 2) if self.added else (0, 1)
        self.a, self.b = value(op, self.left), value(op, self.right)
        self.takes_place = op.name == "mm"
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
        return [self._run(tangents, None)]

    def run_into(self, tangents: Sequence[Tangent], place: Tensor) -> Tangent:
        """See :class:`Rule`."""
        inner = (self.a if self.a is not None else self.b).shape[0 if self.a is None else 1]  # type: ignore[union-attr]
        small = len(place) > 1 and inner * self.shape.numel() < SMALL
        return self._run(tangents, None if small else place)

    def _run(self, tangents: Sequence[Tangent], place: Tangent) -> Tangent:
        da, db = self.at(tangents, self.left), self.at(tangents, self.right)
        if db is not None and self.name in ("mv", "dot"):
            db = db.unsqueeze(-1)
        if da is not None and self.name == "dot":
            da = da.unsqueeze(1)
        total = self._batches(da, db) if self.many else self._matrices(da, db, place)
        if total is not None:
            if self.name in ("mv", "dot"):
                total = total.view(total.shape[0], *self.shape)
            if self.alpha != 1.0:
                total = total.mul_(self.alpha)
        dc = self.at(tangents, 0) if self.added else None
        if dc is None:
            return total
        dc = dc.reshape(dc.shape[0], *[1] * (len(self.shape) + 1 - dc.ndim), *dc.shape[1:])
        if total is None:
            return (dc * self.beta).expand(-1, *self.shape).contiguous()
        return total.add_(dc, alpha=self.beta)

    def _matrices(self, da: Tangent, db: Tangent, out: Tangent) -> Tangent:
        if da is None and db is None:
            return None
        if da is None:
            assert db is not None
            assert self.a is not None
            return _times(self.a, db, out)
        k, rows, inner = da.shape
        assert self.b is not None
        if out is not None:
            for part, one in zip(out, da, strict=True):
                torch.mm(one, self.b, out=part)
            total = out
        elif k == 1:
            total = torch.mm(da[0], self.b).unsqueeze(0)
        elif da.is_contiguous():
            total = torch.mm(da.view(k * rows, inner), self.b).view(k, rows, -1)
        else:
            total = torch.bmm(da, self.b.expand(k, *self.b.shape))
        if db is None:
            return total
        assert self.a is not None
        if k > 1 and db[0].numel() * rows < SMALL:
            return total.baddbmm_(self.a.expand(k, *self.a.shape), db)
        for part, one in zip(total, db, strict=True):
            part.addmm_(self.a, one)
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


def _times(a: Tensor, db: Tensor, out: Tangent) -> Tensor:
    """A Ḃ for each Ḃ."""
    if out is not None:
        for part, one in zip(out, db, strict=True):
            torch.mm(a, one, out=part)
        return out
    if len(db) == 1:
        return torch.mm(a, db[0]).unsqueeze(0)
    return torch.bmm(a.expand(len(db), *a.shape), db)
