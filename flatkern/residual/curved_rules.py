"""Tangent rules of operations that are curved: products, quotients, softmax, normalization."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from flatkern.kernels._jet_operator import run
from flatkern.residual.rule import Rule, Spread, Tangents
from flatkern.tape import Op, Value

__all__ = ["Normalized", "Product", "Quotient", "Softmax"]


def _wide(t: Tensor) -> Tensor:
    """Half precision as float32, which the kernels compute and sum in."""
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


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

    def keeps(self) -> Iterable[Value]:
        """See :class:`Rule`."""
        p, q = self._places
        pairs = ((p, q), (q, p))  # each factor where the other has a tangent
        return (
            v for own, other in pairs if self._is_active(other) and isinstance(v := self.op.args[own], Value)
        )

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

    def contracted(self, tangents: Tangents, image: Callable[[], Tensor]) -> Tensor | None:
        """See :class:`Rule`."""
        p, q = self._places
        a, b = self._tangent(tangents, p), self._tangent(tangents, q)
        return None if a is None or b is None else self._times(a, b).mul_(2 * self._cotangent)

    def constant_beside(self, value: Value) -> Tensor | float | None:
        """What a scaled ``value`` or the left factor of a matrix product is multiplied with, where it is constant."""
        p, q = self._places
        if self.op.name == "mul":
            q = q if self.op.args[p] is value else p
        elif self.op.name not in ("mm", "addmm") or self.op.args[p] is not value:
            return None
        other = self.op.args[q]
        if isinstance(other, Value):
            return None if other.index in self.active else other.tensor * self._scale
        return float(other) * self._scale


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

    def contracted(self, tangents: Tangents, image: Callable[[], Tensor]) -> Tensor | None:
        """See :class:`Rule`."""
        b = self._tangent(tangents, 1)
        if b is None:
            return None
        return -2 * b * image() / self._primal(1) * self._cotangent


class Softmax(Rule):
    """y = softmax(x): with m = ⟨y, ẋ⟩, ẏ = y (ẋ − m), D² = y ((ẋ − m)² − ⟨y, (ẋ − m)²⟩); its logarithm likewise."""

    curved = True

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self._log = op.name == "_log_softmax"
        self._dim: int = op.args[1]
        self._dtype = op.output.tensor.dtype  # not always the input's
        y = _wide(op.output.tensor)
        self._p = y.exp() if self._log else y
        self._kept = [*y.shape]
        self._kept[self._dim] = 1

    def keeps(self) -> Iterable[Value]:
        """See :class:`Rule`."""
        return ()  # it holds what it reads

    def push(self, tangents: Tangents) -> Tensor:
        """See :class:`Rule`."""
        t = self._tangent(tangents, 0)
        assert t is not None
        if self._log:
            return (t - (self._p * t).sum(self._dim, keepdim=True)).to(self._dtype)
        # the Jacobian is symmetric: torch's own backward pass
        return torch._softmax_backward_data(_wide(t), self._p, self._dim, self._p.dtype).to(self._dtype)

    def fold(self, cotangent: Tensor) -> None:
        """See :class:`Rule`."""
        self._rows, self._weight = (
            x.movedim(self._dim, -1).contiguous() for x in (self._p, _wide(cotangent))
        )

    def contracted(self, tangents: Tangents, image: Callable[[], Tensor]) -> Tensor | None:
        """See :class:`Rule`."""
        t = self._tangent(tangents, 0)
        if t is None:
            return None
        t = _wide(t).movedim(self._dim, -1).unsqueeze(0)
        (bent,) = run("softmax_curvature", (float(self._log),), (self._rows, t, self._weight))
        return bent.view(self._kept)


class Normalized(Rule):
    """x̂ = (x − μ)/σ, then scaled by γ: with c = ẋ − mean ẋ, p = mean(x̂ c) and q = mean(c²), Dx̂ = (c − x̂ p)/σ and
    D²x̂ = (x̂ (3p² − q) − 2 p c)/σ²."""

    curved = True

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        x, self._shape = self._primal(0), op.output.tensor.shape
        if op.name == "native_layer_norm":
            size = torch.Size(op.args[1]).numel()
            self._lead = self._shape[: -len(op.args[1])]
            gamma, eps = op.args[2], op.args[4]
            self._gamma = None if gamma is None else gamma.tensor
            self._scale = None if self._gamma is None else _wide(self._gamma).reshape(-1)
        else:  # native_group_norm(x, weight, bias, N, C, HxW, groups, eps)
            groups, eps = op.args[6], op.args[7]
            size = x.numel() // (x.shape[0] * groups)
            self._lead = torch.Size((x.shape[0], groups))
            gamma = op.args[1]
            self._gamma = None if gamma is None else gamma.tensor.reshape(-1, *[1] * (x.ndim - 2))
            self._scale = None
        # what is normalized together, and 1 / σ
        self._unit, _, inverse = torch.native_layer_norm(_wide(x).reshape(-1, size), [size], None, None, eps)
        self._inverse = inverse[:, 0].contiguous()
        self._one = (1, *self._unit.shape)

    def keeps(self) -> Iterable[Value]:
        """See :class:`Rule`."""
        return ()  # it holds what it reads

    def push(self, tangents: Tangents) -> Tensor:
        """See :class:`Rule`."""
        t = self._tangent(tangents, 0)
        assert t is not None
        rows = _wide(t).reshape(self._one)
        (image,) = run("norm_tangent", (), (self._unit, self._inverse, rows, self._scale))
        result = image.view(self._shape).to(t.dtype)
        return result if self._gamma is None or self._scale is not None else result * self._gamma

    def fold(self, cotangent: Tensor) -> None:
        """See :class:`Rule`."""
        scaled = cotangent if self._gamma is None else cotangent * self._gamma
        self._weight = _wide(scaled).reshape(self._unit.shape).contiguous()
        self._along = (self._weight * self._unit).sum(1)

    def contracted(self, tangents: Tangents, image: Callable[[], Tensor]) -> Tensor | None:
        """See :class:`Rule`."""
        t = self._tangent(tangents, 0)
        if t is None:
            return None
        rows = _wide(t).reshape(self._one)
        (bent,) = run("norm_curvature", (), (self._unit, self._inverse, rows, self._weight, None))
        return bent.view(self._lead)

    def expected(self, spread: Spread) -> Tensor | None:
        """See :class:`Rule`: for variances v, E p² = mean(x̂² v)/d, E q = (1 − 1/d) mean v, E p c = (x̂ v − mean(x̂ v))/d
        in D²x̂ = (x̂ (3p² − q) − 2 p c)/σ², c = ẋ − mean ẋ, q = mean(c²)."""
        if self.op.name != "native_layer_norm" or len(self.op.args[1]) != 1:
            return None
        if spread.axis != len(self._shape) - 1:
            return None
        variance = _wide(spread.variance).reshape(self._unit.shape)
        d = variance.shape[1]
        weighted = self._unit * variance
        squared = (self._unit * weighted).mean(1) / d
        q = variance.mean(1) * (1 - 1 / d)
        spoken = (self._weight * (weighted - weighted.mean(1, keepdim=True))).sum(1) * (2 / d)
        bent = (self._along * (3 * squared - q) - spoken) * self._inverse.square()
        return bent.reshape(self._lead)
