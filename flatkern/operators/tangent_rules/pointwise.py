"""Operations entry by entry: Σ_j (∂y/∂x_j) ẋ_j, the partial derivatives taken once."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flatkern.tape import Op, UnsupportedError, Value

from .rule import Rule, Tangent, lift, register, value

Factor = Tensor | float

_FUNCTIONS = """
    abs acos acosh addcdiv addcmul asin asinh atan atan2 atanh celu clamp clamp_max clamp_min cos cosh deg2rad elu
    elu_backward erf erfc exp exp2 expm1 frac gelu gelu_backward hardshrink hardshrink_backward hardsigmoid
    hardsigmoid_backward hardswish hardswish_backward hardtanh hardtanh_backward huber_loss_backward leaky_relu
    leaky_relu_backward lerp log log10 log1p log2 log_sigmoid_backward log_sigmoid_forward logaddexp logit maximum
    minimum mish mish_backward mse_loss_backward pow reciprocal relu relu6 rsqrt selu sigmoid sigmoid_backward silu
    silu_backward sin sinc sinh smooth_l1_loss_backward softplus softplus_backward softshrink softshrink_backward sqrt
    square tan tanh tanh_backward threshold threshold_backward xlogy _prelu_kernel
""".split()  # noqa: SIM905


def _silu_backward(g: Tensor, x: Tensor) -> Tensor:
    s = x.sigmoid()
    return g * s * (1 + x * (1 - s))


def _mish_backward(g: Tensor, x: Tensor) -> Tensor:
    t = torch.nn.functional.softplus(x).tanh()
    return g * (t + x * (1 - t.square()) * x.sigmoid())


def _hardsigmoid_backward(g: Tensor, x: Tensor) -> Tensor:
    return torch.where((x > -3) & (x < 3), g / 6, torch.zeros_like(g))


_TWICE = {
    "silu_backward": _silu_backward,
    "mish_backward": _mish_backward,
    "hardsigmoid_backward": _hardsigmoid_backward,
}
"""Of those that torch does not differentiate, equal forms that it does."""


class Combination(Rule):
    """Σ_j c_j ẋ_j with factors c_j that are numbers or broadcast against the output."""

    factors: list[Factor]
    """One for each of ``terms``."""
    terms: list[int]
    """Positions in ``inputs``."""
    image_path = True

    def channels_last(self, convert: Callable[[Tensor], Tensor]) -> None:
        """See :class:`Rule`."""
        self.factors = [
            convert(f) if isinstance(f, Tensor) and f.shape == self.shape else f for f in self.factors
        ]

    def aliases(self, present: Sequence[bool]) -> bool:
        """See :class:`Rule`."""
        left = [f for f, j in zip(self.factors, self.terms, strict=True) if present[j]]
        return len(left) == 1 and isinstance(left[0], float) and left[0] == 1.0

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        ndim = len(self.shape)
        found = [
            (factor, lift(t, ndim), owned[j] and t.shape[1:] == self.shape)
            for factor, j in zip(self.factors, self.terms, strict=True)
            if (t := tangents[j]) is not None
        ]
        if not found:
            return [None]
        # the sum begins with one that may be overwritten, if any
        found.sort(key=lambda term: not term[2])
        (factor, t, mine), *rest = found
        size = (t.shape[0], *self.shape)
        if isinstance(factor, float):
            total = t if factor == 1.0 else t.mul_(factor) if mine else t * factor
            mine = mine or factor != 1.0
        else:
            total, mine = (t.mul_(factor), True) if mine else (t * factor, True)
        for factor, t, _ in rest:
            if mine and total.shape == size:
                if isinstance(factor, float):
                    total.add_(t, alpha=factor)
                else:
                    total.addcmul_(factor, t)
            else:
                total = (
                    torch.add(total, t, alpha=factor)
                    if isinstance(factor, float)
                    else torch.addcmul(total, factor, t)
                )
                mine = True
        return [total if total.shape == size else total.expand(size).contiguous()]


@register("add", "sub", "rsub", "mul", "div", "neg")
class Arithmetic(Combination):
    """Sums, differences, products and quotients."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        if op.kwargs.get("rounding_mode") is not None:
            raise UnsupportedError("no tangent rule for division with rounding")
        name, y = op.name, op.output.tensor
        alpha = float(op.kwargs.get("alpha", op.args[2] if len(op.args) > 2 else 1))
        a, b = value(op, 0), value(op, 1)
        first: Factor
        second: Factor
        if name == "add":
            first, second = 1.0, alpha
        elif name == "sub":
            first, second = 1.0, -alpha
        elif name == "rsub":
            first, second = -alpha, 1.0
        elif name == "neg":
            first, second = -1.0, 0.0
        elif name == "mul":
            first, second = _factor(b), _factor(a)
        else:
            first = 1 / _factor(b)
            second = -(y / b) if self.has(1) else 0.0
        self.terms = [self._places[place] for place in (0, 1) if self.has(place)]
        self.factors = [f for place, f in ((0, first), (1, second)) if self.has(place)]
        if any(t.is_complex() for t in (y, a, b) if isinstance(t, Tensor)):
            raise UnsupportedError("complex numbers")


def _factor(operand: Tensor | float) -> Factor:
    if isinstance(operand, Tensor):
        return float(operand) if operand.ndim == 0 and operand.device.type == "cpu" else operand
    return float(operand)


@register(*_FUNCTIONS)
class Pointwise(Combination):
    """Any function of the entries: its partial derivatives by autograd."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        y = op.output.tensor
        leaves: dict[int, Tensor] = {}

        def replacement(v: Value) -> Tensor:
            if v.index not in self.inputs:
                return v.tensor
            if v.index not in leaves:
                whole = v.tensor.expand(y.shape).clone()
                leaves[v.index] = whole.requires_grad_()
            return leaves[v.index]

        with torch.enable_grad():
            twice = _TWICE.get(op.name)
            result = op.run(replacement)[0] if twice is None else twice(*map(replacement, op.args[:2]))
            order = list(leaves)
            if not result.requires_grad:
                found: Sequence[Tensor | None] = [None] * len(order)
            else:
                try:
                    found = torch.autograd.grad(result.sum(), [leaves[i] for i in order], allow_unused=True)
                except (RuntimeError, NotImplementedError) as error:
                    raise UnsupportedError(f"{op.name} cannot be differentiated: {error}") from error
        self.terms, self.factors = [], []
        for i, partial in zip(order, found, strict=True):
            factor = 0.0 if partial is None else _compact(partial)
            if not (isinstance(factor, float) and factor == 0.0):
                self.terms.append(self.inputs.index(i))
                self.factors.append(factor)


def _compact(partial: Tensor) -> Factor:
    """A number where all entries are equal."""
    if not partial.numel():
        return 0.0
    first = partial.reshape(-1)[0]
    return float(first) if bool((partial == first).all()) else partial


@register("_prelu_kernel_backward")
class LeakyBackward(Rule):
    """(g, x, w) → (g or w g, 0 or x g), by the sign of x."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.g, self.x, self.w = (value(op, place) for place in range(3))
        self.below = self.x <= 0
        self.found = [v is not None and v.index in active for v in op.outputs]

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        dg, dx, dw = (self.at(tangents, place) for place in range(3))
        like = next(t for t in tangents if t is not None)
        zero = like.new_zeros(like.shape[0], *self.x.shape)
        dg, dx = (zero if t is None else t for t in (dg, dx))
        slope = dg * self.w if dw is None else dg * self.w + lift(dw, self.x.ndim) * self.g
        results = (
            torch.where(self.below, slope, dg),
            torch.where(self.below, dx * self.g + self.x * dg, 0.0),
        )
        return [r for r, here in zip(results, self.found, strict=True) if here]
