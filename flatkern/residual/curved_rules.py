"""Tangent rules of operations that are curved: elementwise functions, products, softmax, normalization."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flatkern.residual.rule import Rule, Tangents
from flatkern.tape import Op, Value

__all__ = ["Elementwise", "Normalized", "Product", "Quotient", "Softmax"]


class Elementwise(Rule):
    """φ of every entry: φ' and φ'' once, by autograd."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        source = op.args[0]
        z = source.tensor.detach().requires_grad_()
        with torch.enable_grad():
            y = op.run(lambda v: z if v is source else v.tensor)[0]
            (slope,) = torch.autograd.grad(y.sum(), z, create_graph=True)
            bend: Tensor | None = None
            if slope.requires_grad and op.name != "hardsigmoid":  # which torch cannot differentiate twice
                (bend,) = torch.autograd.grad(slope.sum(), z, allow_unused=True)
        self.slope = slope.detach()
        self.bend = bend if bend is not None and bool((bend != 0).any()) else None
        self.curved = self.bend is not None

    def push(self, tangents: Tangents) -> Tensor:
        """See :class:`Rule`."""
        t = self._tangent(tangents, 0)
        assert t is not None
        return self.slope * t

    def second(self, tangents: Tangents, image: Callable[[], Tensor]) -> Tensor:
        """See :class:`Rule`."""
        t = self._tangent(tangents, 0)
        assert t is not None
        assert self.bend is not None
        return self.bend * t * t


class Product(Rule):
    """Bilinear operations: D(x y) = ẋ y + x ẏ, D² = 2 ẋ ẏ."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self._places = (1, 2) if op.name in ("addmm", "baddbmm") else (0, 1)
        self._both = all(isinstance(op.args[p], Value) and op.args[p].index in active for p in self._places)
        self.curved = self._both
        self._scale = op.kwargs.get("alpha", 1)
        if op.name == "convolution":
            self._both = self.curved = False

    def _times(self, a: Tensor, b: Tensor) -> Tensor:
        name = self.op.name
        if name == "convolution":
            result: Tensor = self.op.func(a, b, None, *self.op.args[3:])
            return result
        if name in ("mul", "_prelu_kernel"):
            return a * b
        return torch.matmul(a, b) if self._scale == 1 else torch.matmul(a, b) * self._scale

    def push(self, tangents: Tangents) -> Tensor:
        """See :class:`Rule`."""
        p, q = self._places
        a, b = self._tangent(tangents, p), self._tangent(tangents, q)
        total: Tensor | None = None
        if a is not None:
            total = self._times(a, self._operand(q))
        if b is not None:
            part = self._times(self._primal(p), b)
            total = part if total is None else total + part
        if p == 1 and (c := self._tangent(tangents, 0)) is not None:
            c = c * self.op.kwargs.get("beta", 1)
            total = c if total is None else total + c
        assert total is not None
        return total.expand(self.op.output.tensor.shape)

    def _operand(self, place: int) -> Any:
        value = self.op.args[place]
        return value.tensor if isinstance(value, Value) else value

    def second(self, tangents: Tangents, image: Callable[[], Tensor]) -> Tensor:
        """See :class:`Rule`."""
        p, q = self._places
        a, b = self._tangent(tangents, p), self._tangent(tangents, q)
        assert a is not None
        assert b is not None
        return 2 * self._times(a, b)


class Quotient(Rule):
    """y = a/b: ẏ = (ȧ − y ḃ)/b, and a'' = 0 gives y'' = −2 ḃ ẏ/b."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.curved = isinstance(op.args[1], Value) and op.args[1].index in active

    def push(self, tangents: Tangents) -> Tensor:
        """See :class:`Rule`."""
        a, b = self._tangent(tangents, 0), self._tangent(tangents, 1)
        below = self.op.args[1]
        below = below.tensor if isinstance(below, Value) else below
        top = 0.0 if a is None else a
        if b is not None:
            top = top - self.op.output.tensor * b
        assert isinstance(top, Tensor)
        return (top / below).expand(self.op.output.tensor.shape)

    def second(self, tangents: Tangents, image: Callable[[], Tensor]) -> Tensor:
        """See :class:`Rule`."""
        b = self._tangent(tangents, 1)
        assert b is not None
        return -2 * b * image() / self._primal(1)


class Softmax(Rule):
    """y = softmax(x): with m = ⟨y, ẋ⟩, ẏ = y (ẋ − m), D² = y ((ẋ − m)² − ⟨y, (ẋ − m)²⟩); its logarithm likewise."""

    curved = True

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self._log = op.name == "_log_softmax"
        self._dim: int = op.args[1]
        self._p = op.output.tensor.exp() if self._log else op.output.tensor

    def _centred(self, tangents: Tangents) -> Tensor:
        t = self._tangent(tangents, 0)
        assert t is not None
        return t - (self._p * t).sum(self._dim, keepdim=True)

    def push(self, tangents: Tangents) -> Tensor:
        """See :class:`Rule`."""
        centred = self._centred(tangents)
        return centred if self._log else self._p * centred

    def second(self, tangents: Tangents, image: Callable[[], Tensor]) -> Tensor:
        """See :class:`Rule`."""
        square = self._centred(tangents).square()
        variance = (self._p * square).sum(self._dim, keepdim=True)
        return (-variance).expand_as(square) if self._log else self._p * (square - variance)


class Normalized(Rule):
    """x̂ = (x − μ)/σ, scaled. With c = ẋ − mean ẋ, p = mean(x̂ c), q = mean(c²): Dx̂ = (c − x̂ p)/σ and
    D²x̂ = (x̂ (3p² − q) − 2 p c)/σ²."""

    curved = True

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        x, self._shape = self._primal(0), op.output.tensor.shape
        if op.name == "native_layer_norm":
            self._dims = tuple(range(x.ndim - len(op.args[1]), x.ndim))
            self._grouped = x.shape
            gamma, eps = op.args[2], op.args[4]
            self._gamma = None if gamma is None else gamma.tensor
        else:  # native_group_norm(x, weight, bias, N, C, HxW, groups, eps)
            groups, eps = op.args[6], op.args[7]
            self._grouped = torch.Size((x.shape[0], groups, x.numel() // (x.shape[0] * groups)))
            self._dims = (2,)
            gamma = op.args[1]
            self._gamma = None if gamma is None else gamma.tensor.reshape(-1, *[1] * (x.ndim - 2))
        grouped = x.reshape(self._grouped)
        centred = grouped - grouped.mean(self._dims, keepdim=True)
        self._inverse = (centred.square().mean(self._dims, keepdim=True) + eps).rsqrt()
        self._unit = centred * self._inverse

    def _parts(self, tangents: Tangents) -> tuple[Tensor, Tensor]:
        t = self._tangent(tangents, 0)
        assert t is not None
        t = t.reshape(self._grouped)
        c = t - t.mean(self._dims, keepdim=True)
        return c, (self._unit * c).mean(self._dims, keepdim=True)

    def _scaled(self, grouped: Tensor) -> Tensor:
        result = grouped.reshape(self._shape)
        return result if self._gamma is None else result * self._gamma

    def push(self, tangents: Tangents) -> Tensor:
        """See :class:`Rule`."""
        c, p = self._parts(tangents)
        return self._scaled((c - self._unit * p) * self._inverse)

    def second(self, tangents: Tangents, image: Callable[[], Tensor]) -> Tensor:
        """See :class:`Rule`."""
        c, p = self._parts(tangents)
        q = c.square().mean(self._dims, keepdim=True)
        return self._scaled((self._unit * (3 * p.square() - q) - 2 * p * c) * self._inverse.square())
