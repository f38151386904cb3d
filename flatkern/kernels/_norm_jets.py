"""LayerNorm's terms along k tangents, what was normalized read once: first order, and the second one contracted."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ._jet_operator import (
    JetOperator,
    Operands,
    Setting,
    call,
    check_like,
    check_primal,
    check_tangents,
    define,
    wide,
    wide_dtype,
)
from ._select import jets_available

__all__ = ["layer_norm_curvature", "layer_norm_tangent"]


def layer_norm_tangent(unit: Tensor, inverse: Tensor, t: Tensor, weight: Tensor | None = None) -> Tensor:
    r"""The derivative of LayerNorm along k tangents: γ ∘ (c − x̂ p)/σ, with c = ẋ − mean ẋ and p = mean(x̂ ∘ c).

    It is symmetric for γ = 1, so that it pulls cotangents γ ∘ g back as well.

    Args:
        unit: x̂ = (x − mean x)/σ over the last axis, [..., d], any strides; float32, float64 or bfloat16 (computed in
            float32).
        inverse: 1/σ of every row, [...]; float32 for bfloat16, else unit's dtype. Both are results of
            ``torch.native_layer_norm(x, [d], None, None, eps)``, the first and the third.
        t: tangents ẋ, [k, *unit.shape].
        weight: γ [d], unit's dtype; ``None``: 1.

    Returns:
        [k, *unit.shape] in unit's dtype.

    Cost: every operand read once from memory where a row fits into the caches. Derivatives of the result are PyTorch's.
        Where several axes are normalized together, flatten them first.

    Raises:
        TypeError: another dtype, layout or device.
        ValueError: shapes that do not fit.

    Example:
        >>> import torch
        >>> unit, inverse = torch.tensor([1.0, -1.0]), torch.tensor(0.5)  # of x = (2, −2)
        >>> layer_norm_tangent(unit, inverse, torch.tensor([[1.0, 1.0], [1.0, -1.0]]))  # ẋ along 1 and along x
        tensor([[0., 0.],
                [0., 0.]])
    """
    name = "layer_norm_tangent"
    _check(name, unit, inverse, t, weight)
    (tangent,) = call("norm_tangent", (), unit, inverse, t, weight)
    return tangent


def layer_norm_curvature(
    unit: Tensor, inverse: Tensor, t: Tensor, g: Tensor, weight: Tensor | None = None
) -> Tensor:
    r"""⟨g, D²y[ẋ_j, ẋ_j]⟩ of y = LayerNorm(x), row by row, for k tangents and one cotangent.

    With c = ẋ − mean ẋ, p = mean(x̂ ∘ c), q = mean(c²) and h = γ ∘ g this is (⟨h, x̂⟩ (3p² − q) − 2 p ⟨h, c⟩)/σ².

    Args:
        unit, inverse, t, weight: as of :func:`layer_norm_tangent`.
        g: the cotangent of the output, unit's shape and dtype.

    Returns:
        [k, ...], unit's shape without the last axis; float32 for bfloat16, else unit's dtype.

    Cost and errors: as :func:`layer_norm_tangent`; nothing of the size of t is written.

    Example:
        >>> import torch
        >>> unit, inverse = torch.tensor([1.0, -1.0]), torch.tensor(0.5)
        >>> layer_norm_curvature(unit, inverse, torch.tensor([[1.0, 0.0]]), unit)
        tensor([0.])
    """
    name = "layer_norm_curvature"
    _check(name, unit, inverse, t, weight)
    check_like(name, "g", g, tuple(unit.shape), unit)
    (curvature,) = call("norm_curvature", (), unit, inverse, t, g, weight)
    return curvature


def _check(name: str, unit: Tensor, inverse: Tensor, t: Tensor, weight: Tensor | None) -> None:
    check_primal(name, "unit", unit, axes=1)
    check_like(name, "inverse", inverse, tuple(unit.shape[:-1]), unit, dtype=wide_dtype(unit))
    check_tangents(name, "t", t, unit)
    if weight is not None:
        check_like(name, "weight", weight, (unit.shape[-1],), unit)


# -- the reference ---------------------------------------------------------------------------------------------


def _mean(x: Tensor) -> Tensor:
    return x.mean(-1, keepdim=True)


def _tangent_reference(_setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    unit, inverse, t = map(wide, operands[:3])
    c = t - _mean(t)
    tangent = (c - unit * _mean(unit * c)) * inverse.unsqueeze(-1)
    if operands[3] is not None:
        tangent = tangent * wide(operands[3])
    return (tangent.to(cast(Tensor, operands[0]).dtype),)


def _curvature_reference(_setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    unit, inverse, t, h = map(wide, operands[:4])
    if operands[4] is not None:
        h = h * wide(operands[4])
    c = t - _mean(t)
    p, q = _mean(unit * c).squeeze(-1), _mean(c * c).squeeze(-1)
    bent = (h * unit).sum(-1) * (3 * p * p - q) - 2 * p * (h * c).sum(-1)
    return (inverse.square() * bent,)


def _rows(parameter: Tensor, x: Tensor) -> Tensor:
    """A parameter [B, d] against rows [B, ..., d]."""
    return parameter.reshape(parameter.shape[0], *[1] * (x.dim() - 2), parameter.shape[1])


def _tangent_unbatched(setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    unit, inverse, t, weight = cast(tuple[Tensor, ...], operands)
    (tangent,) = call("norm_tangent", setting, unit, inverse, t, None)
    return (tangent * _rows(weight, unit),)


def _curvature_unbatched(setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    unit, inverse, t, g, weight = cast(tuple[Tensor, ...], operands)
    return call("norm_curvature", setting, unit, inverse, t, g * _rows(weight, unit), None)


# -- the compiled kernels --------------------------------------------------------------------------------------


def _tangent_compiled(setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    if cast(Tensor, operands[0]).shape[-1] == 0:
        return _tangent_reference(setting, operands)
    dense = (None if x is None else x.contiguous() for x in operands)
    return (torch.ops.flatkern.norm_tangent(*dense),)


def _curvature_compiled(setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    if cast(Tensor, operands[0]).shape[-1] == 0:
        return _curvature_reference(setting, operands)
    dense = (None if x is None else x.contiguous() for x in operands)
    return (torch.ops.flatkern.norm_curvature(*dense),)


define(
    "norm_tangent",
    JetOperator(_tangent_compiled, _tangent_reference, (0, 0, 1, -1), (1,), _tangent_unbatched),
)
define(
    "norm_curvature",
    JetOperator(_curvature_compiled, _curvature_reference, (0, 0, 1, 0, -1), (1,), _curvature_unbatched),
)


if jets_available():
    torch.library.register_fake(
        "flatkern::norm_tangent",
        lambda unit, inverse, t, *_: torch.empty_like(t, memory_format=torch.contiguous_format),
    )
    torch.library.register_fake(
        "flatkern::norm_curvature", lambda unit, inverse, t, *_: inverse.new_empty(t.shape[:-1])
    )
