"""Tangent rule of functions of every entry, with the first two derivatives of the common ones in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from flatkern import kernels
from flatkern.kernels._activation_forms import Kind
from flatkern.kernels._jet_operator import DTYPES
from flatkern.residual.rule import Rule, Spread, Tangents
from flatkern.tape import Op, Value

__all__ = ["Elementwise"]

_PIECEWISE_LINEAR = frozenset(
    {"abs", "clamp", "clamp_max", "clamp_min", "hardshrink", "hardsigmoid", "hardtanh", "leaky_relu", "relu"}
    | {"softshrink", "threshold"}
)


class Elementwise(Rule):
    """φ of every entry: φ' and φ'' once."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.curved = op.name not in _PIECEWISE_LINEAR
        self._weight: Tensor | None = None
        self._slope: Tensor | None = None

    @property
    def slope(self) -> Tensor:
        """φ', kept once it was asked for."""
        if self._slope is None:
            self._slope = _derivatives(self.op)[0]
        return self._slope

    def reads(self) -> Iterable[Value]:
        """See :class:`Rule`."""
        return (self.op.output,) if self.op.name in _BY_OUTPUT else (*self.op.inputs, self.op.output)

    def prepare(self) -> None:
        """See :class:`Rule`."""
        _ = self.slope

    def keeps(self) -> Iterable[Value]:
        """See :class:`Rule`."""
        return ()

    def push(self, tangents: Tangents) -> Tensor:
        """See :class:`Rule`."""
        t = self._tangent(tangents, 0)
        assert t is not None
        return self.slope * t

    def fold(self, cotangent: Tensor) -> None:
        """See :class:`Rule`."""
        self._slope, bend = _derivatives(self.op)
        self._weight = None if bend is None else bend * cotangent

    def contracted(self, tangents: Tangents, image: Callable[[], Tensor]) -> Tensor | None:
        """See :class:`Rule`."""
        t = self._tangent(tangents, 0)
        return None if t is None or self._weight is None else (self._weight * t).mul_(t)

    def expected(self, spread: Spread) -> Tensor | None:
        """See :class:`Rule`."""
        return None if self._weight is None else self._weight * spread.variance


_BY_OUTPUT = frozenset({"sigmoid", "tanh"})
"""Derivatives in terms of y, which autograd keeps as well."""


def _kind(op: Op) -> Kind | None:
    """The kernel's name of an activation that has one and no parameters."""
    if op.args[0].tensor.dtype not in DTYPES:
        return None
    if op.name == "gelu":
        form = op.kwargs.get("approximate", op.args[1] if len(op.args) > 1 else "none")
        return "gelu" if form == "none" else "gelu_tanh"
    return "silu" if op.name == "silu" else None


def _derivatives(op: Op) -> tuple[Tensor, Tensor | None]:
    """φ' and φ'' at the operation's input; ``None`` for φ'' = 0."""
    z, y = op.args[0].tensor, op.output.tensor
    if op.name == "tanh":
        slope = 1 - y.square()
        return slope, (slope * y).mul_(-2)
    if op.name == "sigmoid":
        slope = y * (1 - y)
        return slope, slope * (1 - 2 * y)
    kind = _kind(op)
    if kind is not None:
        return kernels.activation_derivatives(z, kind)[1:]
    if op.name == "silu":
        s = torch.sigmoid(z)
        rise = s * (1 - s)
        return torch.addcmul(s, z, rise), rise.mul_(2 + z * (1 - 2 * s))
    if op.name == "gelu" and op.kwargs.get("approximate", "none") == "none":
        square = z.square()
        density = square.mul(-0.5).exp_().mul_((2 * math.pi) ** -0.5)
        below = z.mul(2**-0.5).erf_().add_(1).mul_(0.5)
        return torch.addcmul(below, z, density), density.mul_(2 - square)
    return _by_autograd(op)


def _by_autograd(op: Op) -> tuple[Tensor, Tensor | None]:
    source = op.args[0]
    z = source.tensor.detach().requires_grad_()
    with torch.enable_grad():
        y = op.run(lambda v: z if v is source else v.tensor)[0]
        (slope,) = torch.autograd.grad(y.sum(), z, create_graph=True)
        bend: Tensor | None = None
        if slope.requires_grad and op.name != "hardsigmoid":  # which torch cannot differentiate twice
            (bend,) = torch.autograd.grad(slope.sum(), z, allow_unused=True)
    return slope.detach(), bend if bend is not None and bool((bend != 0).any()) else None
