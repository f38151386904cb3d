"""The activations that have jets: their names, parameters, and value, φ' and φ'' in plain PyTorch.

The formulas are the reference of the compiled kernels and what their derivatives of any order are taken from: every
one is made of functions that autograd differentiates without 0 · ∞, and neither φ' nor φ'' is a difference that
cancels near 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Kind = Literal["relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "softplus", "elu"]
KINDS: tuple[str, ...] = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "softplus", "elu")
"""In the order of csrc/common/activation_math.h."""
Numbers = tuple[int, float, float]
"""Place of the kind, and its two parameters: α (elu), or β and the threshold (softplus)."""


def numbers(
    name: str, kind: str, alpha: float | None, beta: float | None, threshold: float | None
) -> Numbers:
    """The kind and its parameters, checked; ``None`` stands for torch's default (1, 1, 20).

    Raises:
        ValueError: an unknown kind, a parameter that the kind does not have, or β ≤ 0.
    """
    if kind not in KINDS:
        raise ValueError(f"{name}: kind {kind!r} is not known; the kinds are {', '.join(KINDS)}")
    given = {"alpha": alpha, "beta": beta, "threshold": threshold}
    own = {"elu": ("alpha",), "softplus": ("beta", "threshold")}.get(kind, ())
    for key, number in given.items():
        if number is not None and key not in own:
            raise ValueError(f"{name}: {kind} has no parameter {key}; leave it out")
    if kind == "softplus":
        slope = 1.0 if beta is None else float(beta)
        if not slope > 0:
            raise ValueError(f"{name}: beta must be positive, got {beta}")
        return KINDS.index(kind), slope, 20.0 if threshold is None else float(threshold)
    return KINDS.index(kind), 1.0 if alpha is None else float(alpha), 0.0


def derivatives(z: Tensor, which: Numbers) -> tuple[Tensor, Tensor, Tensor]:
    """φ(z), φ'(z), φ''(z), computed in float32 at least."""
    place, a, b = which
    wide = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
    value, slope, bend = _FORMS[KINDS[place]](wide, a, b)
    return value.to(z.dtype), slope.to(z.dtype), bend.to(z.dtype)


Three = tuple[Tensor, Tensor, Tensor]


def _relu(z: Tensor, _a: float, _b: float) -> Three:
    return torch.relu(z), (z > 0).to(z.dtype), torch.zeros_like(z)


def _gelu(z: Tensor, _a: float, _b: float) -> Three:
    below = 0.5 * torch.special.erfc(z * -(0.5**0.5))
    x = z.clamp(-40, 40)  # beyond, the density is 0 in any precision
    density = torch.exp(-0.5 * x * x) * (0.5 / torch.pi) ** 0.5
    return z * below, below + x * density, (2 - x * x) * density


def _logistic(x: Tensor) -> Three:
    """σ(x), σ'(x), σ''(x)."""
    s = torch.sigmoid(x)
    first = s * torch.sigmoid(-x)
    return s, first, -first * torch.tanh(0.5 * x)


def _gelu_tanh(z: Tensor, _a: float, _b: float) -> Three:
    # z σ(w) with w = 2 κ (z + c z³); beyond 25 σ is 0 or 1 to the last bit in any precision
    rate, cubic = 2 * (2 / torch.pi) ** 0.5, 0.044715
    x = z.clamp(-25, 25)
    w1 = rate * (1 + 3 * cubic * x * x)
    s, s1, s2 = _logistic(rate * x * (1 + cubic * x * x))
    first = s1 * w1
    second = s2 * w1 * w1 + s1 * (6 * rate * cubic) * x
    return z * s, s + x * first, 2 * first + x * second


def _silu(z: Tensor, _a: float, _b: float) -> Three:
    s, s1, s2 = _logistic(z)
    return z * s, s + z * s1, 2 * s1 + z * s2


def _tanh(z: Tensor, _a: float, _b: float) -> Three:
    y = torch.tanh(z)
    slope = (1 - y) * (1 + y)
    return y, slope, -2 * y * slope


def _sigmoid(z: Tensor, _a: float, _b: float) -> Three:
    return _logistic(z)


def _softplus(z: Tensor, beta: float, threshold: float) -> Three:
    x = z * beta
    linear = x > threshold
    s, s1, _ = _logistic(x)
    return F.softplus(z, beta, threshold), torch.where(linear, 1.0, s), torch.where(linear, 0.0, beta * s1)


def _elu(z: Tensor, alpha: float, _b: float) -> Three:
    positive, x = z > 0, z.clamp(max=0)
    growth = alpha * torch.exp(x)
    value = torch.where(positive, z, alpha * torch.expm1(x))
    return value, torch.where(positive, 1.0, growth), torch.where(z < 0, growth, 0.0)


_FORMS: dict[str, Callable[[Tensor, float, float], Three]] = {
    "relu": _relu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "softplus": _softplus,
    "elu": _elu,
}
