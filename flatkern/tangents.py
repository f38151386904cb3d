"""First derivatives along a direction, and second ones contracted with a cotangent, operation by operation.

uᵀ ∇²(r·f) u = Σ_ops ⟨ḡ_op, D²op[ẋ, ẋ]⟩, with ḡ_op the cotangent of the operation's output and ẋ the tangents of its
inputs: one backward pass for all ḡ, then every direction u takes a tangent forward pass and no second backward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from flatkern import kernels
from flatkern.kernels._jet_operator import DTYPES as JET_DTYPES
from flatkern.tape import Op, Value

__all__ = ["Rule", "rule_for"]

Tangents = Mapping[int, Tensor]
"""Tangents of the active inputs by index of their value."""


class Rule(ABC):
    """The derivatives of one operation; ``active`` are the inputs with a tangent."""

    curved = False
    """Whether D² can be other than 0."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        self.op, self.active = op, active

    @abstractmethod
    def push(self, tangents: Tangents) -> Tensor:
        """The tangent of the (first) output."""

    def push_all(self, tangents: Tangents) -> tuple[Tensor, ...]:
        """The tangents of all outputs, where there are several."""
        return (self.push(tangents),)

    def second(self, tangents: Tangents, image: Callable[[], Tensor]) -> Tensor:
        """D²op[ẋ, ẋ], in the output's shape; ``image`` gives :meth:`push` where it is wanted."""
        raise NotImplementedError

    def _primal(self, place: int) -> Tensor:
        value: Value = self.op.args[place]
        return value.tensor

    def _tangent(self, tangents: Tangents, place: int) -> Tensor | None:
        value = self.op.args[place]
        return tangents[value.index] if isinstance(value, Value) and value.index in self.active else None


class Linear(Rule):
    """Operations linear in all their active inputs together: the operation itself, constants replaced by 0."""

    def push(self, tangents: Tangents) -> Tensor:
        """See :class:`Rule`."""
        return self.push_all(tangents)[0]

    def push_all(self, tangents: Tangents) -> tuple[Tensor, ...]:
        """See :class:`Rule`."""
        return self.op.run(lambda v: tangents[v.index] if v.index in self.active else self._constant(v))

    def _constant(self, value: Value) -> Tensor:
        if value.tensor.is_floating_point() and self.op.name in ("cat", "stack", "where"):
            return torch.zeros_like(value.tensor)
        return value.tensor


class Sum(Rule):
    """add and sub with their factor α."""

    def push(self, tangents: Tangents) -> Tensor:
        """See :class:`Rule`."""
        alpha = self.op.kwargs.get("alpha", 1) * (-1 if self.op.name == "sub" else 1)
        a = self._tangent(tangents, 0)
        b = self._tangent(tangents, 1)
        if b is not None and alpha != 1:
            b = b * alpha
        total = a if b is None else b if a is None else a + b
        assert total is not None
        return total.expand(self.op.output.tensor.shape)


class Fill(Rule):
    """Padding and masks put a constant in places."""

    def push(self, tangents: Tangents) -> Tensor:
        """See :class:`Rule`."""
        if self.op.name == "constant_pad_nd":
            return torch.constant_pad_nd(self._need(tangents), self.op.args[1], 0.0)
        return self._need(tangents).masked_fill(self._primal(1), 0.0)

    def _need(self, tangents: Tangents) -> Tensor:
        t = self._tangent(tangents, 0)
        assert t is not None
        return t


class Pick(Rule):
    """Maxima: the entries at the indices found."""

    def push(self, tangents: Tangents) -> Tensor:
        """See :class:`Rule`."""
        t = self._tangent(tangents, 0)
        chosen = self.op.outputs[1]
        assert t is not None
        assert chosen is not None
        index = chosen.tensor
        if self.op.name.startswith("max_pool"):
            dims = 2 if self.op.name == "max_pool2d_with_indices" else 3
            flat = t.flatten(-dims).gather(-1, index.flatten(-dims))
            return flat.reshape(index.shape)
        dim = self.op.args[1]
        keep = self.op.args[2] if len(self.op.args) > 2 else self.op.kwargs.get("keepdim", False)
        picked = t.gather(dim, index if keep else index.unsqueeze(dim))
        return picked if keep else picked.squeeze(dim)


class Choose(Rule):
    """maximum and minimum of two."""

    def push(self, tangents: Tangents) -> Tensor:
        """See :class:`Rule`."""
        first = self._primal(0) > self._primal(1)
        if self.op.name == "minimum":
            first = ~first
        parts = [self._tangent(tangents, place) for place in (0, 1)]
        zero = torch.zeros((), dtype=self.op.output.tensor.dtype, device=first.device)
        left, right = (zero if p is None else p for p in parts)
        return torch.where(first, left, right)


def _activation(op: Op) -> dict[str, Any] | None:
    """The arguments of :func:`kernels.activation_derivatives` for an operation, where it is one of its kinds."""
    name, rest = op.name, op.args[1:]
    if op.args[0].tensor.dtype not in JET_DTYPES:
        return None
    if name == "gelu":
        form = op.kwargs.get("approximate", rest[0] if rest else "none")
        return {"kind": "gelu" if form == "none" else "gelu_tanh"}
    if name == "softplus":
        beta, threshold = list(rest) + [1, 20][len(rest) :]
        return {"kind": name, "beta": beta, "threshold": threshold} if beta > 0 else None
    if name == "elu":
        alpha, scale, input_scale = list(rest) + [1, 1, 1][len(rest) :]
        return {"kind": name, "alpha": alpha} if scale == input_scale == 1 else None
    return {"kind": name} if name in ("relu", "silu", "tanh", "sigmoid") else None


class Elementwise(Rule):
    """φ of every entry: φ' and φ'' once, by a kernel or by autograd."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.bend: Tensor | None
        activation = _activation(op)
        if activation is not None:
            _, self.slope, bend = kernels.activation_derivatives(op.args[0].tensor, **activation)
            flat = op.name == "relu" or (op.name in ("elu", "softplus") and not bool((bend != 0).any()))
            self.bend = None if flat else bend
        else:
            self._differentiate(op)
        self.curved = self.bend is not None

    def _differentiate(self, op: Op) -> None:
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


def _fits(x: Tensor, y: Tensor) -> bool:
    """Whether the jets take x, and give y's dtype."""
    return x.dtype == y.dtype and x.dtype in JET_DTYPES


class Softmax(Rule):
    """y = softmax(x): with m = ⟨y, ẋ⟩, ẏ = y (ẋ − m), D² = y ((ẋ − m)² − ⟨y, (ẋ − m)²⟩); its logarithm likewise."""

    curved = True

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self._log = op.name == "_log_softmax"
        self._dim: int = op.args[1]
        self._p = op.output.tensor.exp() if self._log else op.output.tensor
        # rows without any class are 0 in a safe softmax
        self._fused = op.name != "_safe_softmax" and _fits(self._primal(0), self._p)
        self._image: tuple[Tensor, Tensor] | None = None

    def _centred(self, tangents: Tangents) -> Tensor:
        t = self._tangent(tangents, 0)
        assert t is not None
        return t - (self._p * t).sum(self._dim, keepdim=True)

    def push(self, tangents: Tangents) -> Tensor:
        """See :class:`Rule`."""
        if self._image is not None and self._image[0] is self._tangent(tangents, 0):
            return self._image[1]  # found beside the second-order term
        centred = self._centred(tangents)
        return centred if self._log else self._p * centred

    def second(self, tangents: Tangents, image: Callable[[], Tensor]) -> Tensor:
        """See :class:`Rule`."""
        if self._fused:
            t = self._tangent(tangents, 0)
            assert t is not None
            jet = kernels.softmax_jet(self._primal(0), t.unsqueeze(0), dim=self._dim, log=self._log)
            assert jet.second is not None
            self._image = t, jet.first[0]
            return jet.second[0]
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
        self._eps, self._by_entry = eps, op.name == "native_layer_norm"
        self._fused = _fits(x, op.output.tensor)
        self._image: tuple[Tensor, Tensor] | None = None
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
        if self._image is not None and self._image[0] is self._tangent(tangents, 0):
            return self._placed(self._image[1])  # found beside the second-order term
        c, p = self._parts(tangents)
        return self._scaled((c - self._unit * p) * self._inverse)

    def second(self, tangents: Tangents, image: Callable[[], Tensor]) -> Tensor:
        """See :class:`Rule`."""
        if self._fused:
            return self._second_by_kernel(tangents)
        c, p = self._parts(tangents)
        q = c.square().mean(self._dims, keepdim=True)
        return self._scaled((self._unit * (3 * p.square() - q) - 2 * p * c) * self._inverse.square())

    def _second_by_kernel(self, tangents: Tangents) -> Tensor:
        t = self._tangent(tangents, 0)
        assert t is not None
        rows = self._grouped[: self._dims[0]].numel()
        weight = None if self._gamma is None or not self._by_entry else self._gamma.reshape(-1)
        x, t_rows = self._primal(0).reshape(rows, -1), t.reshape(1, rows, -1)
        jet = kernels.layer_norm_jet(x, t_rows, weight, eps=self._eps)
        assert jet.second is not None
        self._image = t, jet.first[0]
        return self._placed(jet.second[0])

    def _placed(self, rows: Tensor) -> Tensor:
        """Results of the kernel, which has multiplied with γ where that is a factor an entry of the row."""
        return rows.reshape(self._shape) if self._by_entry else self._scaled(rows)


class FixedStatistics(Rule):
    """Batch norm in eval mode: a factor a channel."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        gamma, variance, eps = op.args[1], op.args[4].tensor, op.args[7]
        self.factor = (variance + eps).rsqrt() * (1 if gamma is None else gamma.tensor)
        self.factor = self.factor.reshape(-1, *[1] * (self._primal(0).ndim - 2))

    def push(self, tangents: Tangents) -> Tensor:
        """See :class:`Rule`."""
        t = self._tangent(tangents, 0)
        assert t is not None
        return t * self.factor


_LINEAR = frozenset(
    """
    _adaptive_avg_pool2d _adaptive_avg_pool3d _reshape_alias _to_copy _unsafe_view alias as_strided avg_pool2d
    avg_pool3d cat clone cumsum detach diagonal expand flip gather index index_select mean movedim neg permute
    pixel_shuffle reflection_pad1d reflection_pad2d repeat replication_pad1d replication_pad2d reshape roll select
    slice split split_with_sizes squeeze stack sum t transpose tril triu unbind unfold unsqueeze upsample_bilinear2d
    upsample_linear1d upsample_nearest1d upsample_nearest2d view where im2col col2im unsafe_split
    """.split()  # noqa: SIM905
)
_ELEMENTWISE = frozenset(
    """
    abs celu clamp clamp_max clamp_min cos elu erf exp expm1 gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu
    log log1p mish reciprocal relu rsqrt selu sigmoid silu sin softplus softshrink sqrt square tanh threshold
    """.split()  # noqa: SIM905
)
_RULES: dict[str, type[Rule]] = {
    **dict.fromkeys(_LINEAR, Linear),
    **dict.fromkeys(_ELEMENTWISE, Elementwise),
    **dict.fromkeys(("add", "sub"), Sum),
    **dict.fromkeys(("mul", "mm", "bmm", "addmm", "baddbmm", "mv", "convolution"), Product),
    **dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax"), Softmax),
    **dict.fromkeys(("native_layer_norm", "native_group_norm"), Normalized),
    **dict.fromkeys(("constant_pad_nd", "masked_fill"), Fill),
    **dict.fromkeys(("maximum", "minimum"), Choose),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices"), Pick),
    "div": Quotient,
    "native_batch_norm": FixedStatistics,
}
# these have a rule in their first argument only
_FIRST_ONLY = frozenset(_ELEMENTWISE | (_LINEAR - {"cat", "stack", "where"}))


def rule_for(op: Op, active: frozenset[int]) -> Rule | None:
    """The rule of an operation whose inputs ``active`` have tangents; ``None`` where there is none."""
    name = op.name
    kind = _RULES.get(name)
    if name == "pow" and isinstance(op.args[0], Value) and not isinstance(op.args[1], Value):
        kind = Elementwise
    if name in ("max", "min") and len(op.args) > 1 and len(op.outputs) == 2:
        kind = Pick
    if kind is None:
        return None
    inputs = [v for v in op.inputs if v.index in active]
    first = op.args[0]
    alone = name in _FIRST_ONLY or kind in (Elementwise, Softmax, Normalized, FixedStatistics, Fill, Pick)
    if alone and any(v is not first for v in inputs):
        return None
    if name == "where" and op.args[0] in inputs:
        return None
    if name == "native_batch_norm" and op.args[5]:
        return None
    if name == "convolution" and any(v is not first for v in inputs):
        return None
    if name == "div" and op.kwargs.get("rounding_mode") is not None:
        return None
    return kind(op, active)
