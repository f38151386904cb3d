"""LayerNorm and RMSNorm with first and second-order terms for k tangents, the primal read once."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ._activation_jets import Jet, Pullback
from ._jet_operator import (
    JetOperator,
    Operands,
    Setting,
    call,
    check_like,
    check_primal,
    check_tangents,
    define,
)
from ._select import jets_available

__all__ = ["layer_norm_jet", "layer_norm_pullback", "rms_norm_jet", "rms_norm_pullback"]


def layer_norm_jet(
    x: Tensor,
    t: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
) -> Jet:
    r"""γ ∘ x̂ + β with x̂ = (x − μ)/σ over the last axis, σ² = mean (x − μ)² + eps, and its terms along k tangents.

    With c = ẋ − mean ẋ, p = mean(x̂ ∘ c) and q = mean(c²): Dx̂ = (c − x̂ p)/σ, D²x̂ = (x̂ (3p² − q) − 2 p c)/σ².

    Args:
        x: [..., d], any strides; float32, float64 or bfloat16 (computed in float32).
        t: tangents [k, *x.shape].
        weight: γ [d], x's dtype; ``None``: 1.
        bias: β [d], x's dtype; ``None``: 0.
        eps: added to the variance.

    Returns:
        ``Jet(value [*x.shape], first [k, *x.shape], second [k, *x.shape])``.

    Cost: x and every tangent read once from memory where k + 1 rows fit into the caches. Derivatives of the results
        are PyTorch's. For the last several axes flatten them first.

    Raises:
        TypeError: another dtype, layout or device.
        ValueError: shapes that do not fit.

    Example:
        >>> import torch
        >>> layer_norm_jet(torch.tensor([1.0, -1.0]), torch.tensor([[1.0, 1.0]]), eps=0.0).first
        tensor([[0., 0.]])
    """
    return Jet(*_jet("layer_norm_jet", x, t, weight, bias, eps, centred=True))


def rms_norm_jet(x: Tensor, t: Tensor, weight: Tensor | None = None, *, eps: float | None = None) -> Jet:
    r"""γ ∘ x/σ with σ² = mean x² + eps over the last axis, and its terms along k tangents.

    The formulas are those of :func:`layer_norm_jet` with μ = 0 and c = ẋ.

    Args:
        x: [..., d], any strides; float32, float64 or bfloat16 (computed in float32).
        t: tangents [k, *x.shape].
        weight: γ [d], x's dtype; ``None``: 1.
        eps: added to the mean square; ``None``: the epsilon of x's dtype, as in ``torch.nn.RMSNorm``.

    Returns, cost and errors: as :func:`layer_norm_jet`.

    Example:
        >>> import torch
        >>> rms_norm_jet(torch.tensor([3.0, 3.0]), torch.tensor([[3.0, 3.0]]), eps=0.0).first
        tensor([[0., 0.]])
    """
    return Jet(*_jet("rms_norm_jet", x, t, weight, None, _eps(x, eps), centred=False))


def layer_norm_pullback(
    x: Tensor, g: Tensor, t: Tensor, dg: Tensor, weight: Tensor | None = None, *, eps: float = 1e-5
) -> Pullback:
    r"""A cotangent pulled back through LayerNorm, and the tangents of that: its step in an HVP of k vectors.

    With h = γ ∘ g and x̂' = Dx̂[ẋ]: Jᵀg = (h − mean h − x̂ mean(h ∘ x̂))/σ, and the tangent
    (ḣ − mean ḣ − x̂' mean(h ∘ x̂) − x̂ mean(ḣ ∘ x̂ + h ∘ x̂'))/σ − (p/σ) Jᵀg. Where γ moves too, pass
    ``weight=None`` with γ ∘ g and its tangent.

    Args:
        x: [..., d], any strides; float32, float64 or bfloat16 (computed in float32).
        g: the cotangent of the output, [*x.shape].
        t: tangents ẋ, [k, *x.shape].
        dg: tangents ġ of g, [k, *x.shape].
        weight: γ [d], x's dtype; ``None``: 1.
        eps: added to the variance.

    Returns:
        ``Pullback(cotangent [*x.shape], tangents [k, *x.shape])``.

    Cost and errors: as :func:`layer_norm_jet`.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, -1.0])
        >>> layer_norm_pullback(x, x, x[None], 0 * x[None], eps=0.0).cotangent
        tensor([0., 0.])
    """
    return Pullback(*_pullback("layer_norm_pullback", x, g, t, dg, weight, eps, centred=True))


def rms_norm_pullback(
    x: Tensor, g: Tensor, t: Tensor, dg: Tensor, weight: Tensor | None = None, *, eps: float | None = None
) -> Pullback:
    r"""As :func:`layer_norm_pullback` for RMSNorm: μ = 0, and no means of h and ḣ.

    Example:
        >>> import torch
        >>> x = torch.tensor([1.0, -1.0])
        >>> rms_norm_pullback(x, x, x[None], 0 * x[None], eps=0.0).cotangent
        tensor([0., 0.])
    """
    return Pullback(*_pullback("rms_norm_pullback", x, g, t, dg, weight, _eps(x, eps), centred=False))


def _eps(x: Tensor, eps: float | None) -> float:
    return float(torch.finfo(x.dtype).eps) if eps is None and isinstance(x, Tensor) else float(eps or 0.0)


def _check(name: str, x: Tensor, t: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    check_primal(name, "x", x, axes=1)
    check_tangents(name, "t", t, x)
    for argument, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None:
            check_like(name, argument, parameter, (x.shape[-1],), x)
    if eps < 0:
        raise ValueError(f"{name}: eps must not be negative, got {eps}")


def _jet(
    name: str, x: Tensor, t: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, centred: bool
) -> tuple[Tensor, ...]:
    _check(name, x, t, weight, bias, eps)
    return call("norm_jet", (eps, float(centred)), x, t, weight, bias)


def _pullback(
    name: str,
    x: Tensor,
    g: Tensor,
    t: Tensor,
    dg: Tensor,
    weight: Tensor | None,
    eps: float,
    *,
    centred: bool,
) -> tuple[Tensor, ...]:
    _check(name, x, t, weight, None, eps)
    check_like(name, "g", g, tuple(x.shape), x)
    check_like(name, "dg", dg, tuple(t.shape), x)
    return call("norm_pullback", (eps, float(centred)), x, g, t, dg, weight)


# -- the reference ---------------------------------------------------------------------------------------------


def _wide(t: Tensor | None) -> Tensor:
    assert t is not None
    return t.float() if t.dtype == torch.bfloat16 else t


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def _unit(x: Tensor, setting: Setting) -> tuple[Tensor, Tensor]:
    """x̂ and 1/σ."""
    eps, centred = setting
    c = x - _mean(x) if centred else x
    inverse = (_mean(c * c) + eps).rsqrt()
    return c * inverse, inverse


def _jet_reference(setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    dtype, (x, t) = cast(Tensor, operands[0]).dtype, map(_wide, operands[:2])
    unit, inverse = _unit(x, setting)
    c = t - _mean(t) if setting[1] else t
    p, q = _mean(unit * c), _mean(c * c)
    outputs = [unit, (c - unit * p) * inverse, (unit * (3 * p * p - q) - 2 * p * c) * (inverse * inverse)]
    if operands[2] is not None:
        outputs = [o * _wide(operands[2]) for o in outputs]
    if operands[3] is not None:
        outputs[0] = outputs[0] + _wide(operands[3])
    return tuple(o.to(dtype) for o in outputs)


def _pullback_reference(setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    dtype, (x, h, t, dh) = cast(Tensor, operands[0]).dtype, map(_wide, operands[:4])
    if operands[4] is not None:
        h, dh = h * _wide(operands[4]), dh * _wide(operands[4])
    unit, inverse = _unit(x, setting)
    if setting[1]:
        h, dh, t = h - _mean(h), dh - _mean(dh), t - _mean(t)
    p, along = _mean(unit * t), _mean(h * unit)
    moved = (t - unit * p) * inverse
    cotangent = (h - unit * along) * inverse
    turned = dh - moved * along - unit * _mean(dh * unit + h * moved)
    return cotangent.to(dtype), (turned * inverse - p * inverse * cotangent).to(dtype)


def _rows(parameter: Tensor, x: Tensor) -> Tensor:
    """A parameter [B, d] (or [d]) against rows [B, ..., d]."""
    if parameter.dim() == 1:
        return parameter
    return parameter.reshape(parameter.shape[0], *[1] * (x.dim() - 2), parameter.shape[1])


def _jet_unbatched(setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    x, t, weight, bias = operands
    assert x is not None
    outputs = list(call("norm_jet", setting, x, t, None, None))
    if weight is not None:
        outputs = [o * _rows(weight, x) for o in outputs]
    if bias is not None:
        outputs[0] = outputs[0] + _rows(bias, x)
    return tuple(outputs)


def _pullback_unbatched(setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    x, g, t, dg, weight = operands
    assert x is not None
    assert g is not None
    assert dg is not None
    assert weight is not None
    rows = _rows(weight, x)
    return call("norm_pullback", setting, x, g * rows, t, dg * rows, None)


# -- the compiled kernels --------------------------------------------------------------------------------------


def _jet_compiled(setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    dense = (None if x is None else x.contiguous() for x in operands)
    return cast(tuple[Tensor, ...], torch.ops.flatkern.norm_jet(*dense, setting[0], bool(setting[1])))


def _pullback_compiled(setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    dense = (None if x is None else x.contiguous() for x in operands)
    return cast(tuple[Tensor, ...], torch.ops.flatkern.norm_pullback(*dense, setting[0], bool(setting[1])))


define("norm_jet", JetOperator(_jet_compiled, _jet_reference, (0, 1, -1, -1), (0, 1, 1), _jet_unbatched))
define(
    "norm_pullback",
    JetOperator(_pullback_compiled, _pullback_reference, (0, 0, 1, 1, -1), (0, 1), _pullback_unbatched),
)


def _fresh(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


if jets_available():
    torch.library.register_fake("flatkern::norm_jet", lambda x, t, *_: (_fresh(x), _fresh(t), _fresh(t)))
    torch.library.register_fake("flatkern::norm_pullback", lambda x, g, t, *_: (_fresh(x), _fresh(t)))
