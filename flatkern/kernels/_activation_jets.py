"""Activations with their first and second-order terms for k tangents, the primal read once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from ._activation_forms import Kind, Numbers, derivatives, numbers
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
from ._select import jets_available, runs_elementwise

__all__ = [
    "ActivationDerivatives",
    "Jet",
    "Pullback",
    "activation_derivatives",
    "activation_jet",
    "activation_pullback",
]


class ActivationDerivatives(NamedTuple):
    """φ, φ' and φ'' of every entry, each in the primal's shape."""

    value: Tensor
    slope: Tensor
    bend: Tensor


class Jet(NamedTuple):
    """A function's value and what it has of first and second order along k tangents."""

    value: Tensor
    """f(z), in the shape of the output."""
    first: Tensor
    """Df[ż_j], [k, *output]."""
    second: Tensor | None
    """D²f[ż_j, ż_j] (and Df[z̈_j] where z̈ was given), [k, *output]; ``None`` where only the first order was wanted."""


class Pullback(NamedTuple):
    """A cotangent pulled back through a function, and the tangents of that along k directions."""

    cotangent: Tensor
    """Jᵀ g, in the primal's shape."""
    tangents: Tensor
    """Jᵀ ġ_j + (∇²⟨g, f⟩) ż_j, [k, *primal]."""


def activation_derivatives(
    z: Tensor,
    kind: Kind,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    threshold: float | None = None,
    out: Sequence[Tensor] | None = None,
) -> ActivationDerivatives:
    r"""φ(z), φ'(z) and φ''(z) of an activation, in one pass over z.

    Kinds: ``relu``; ``gelu`` z Φ(z); ``gelu_tanh`` z σ(2√(2/π)(z + 0.044715 z³)); ``silu`` z σ(z); ``tanh``;
    ``sigmoid`` σ(z); ``softplus`` log(1 + e^{βz})/β, and z itself where βz > threshold; ``elu`` z for z > 0, else
    α(e^z − 1). At z = 0, relu has φ' = 0 and elu φ' = α, as torch has it; φ'' leaves out the jumps of φ'.

    Args:
        z: any shape and strides; float32, float64 or bfloat16 (computed in float32).
        kind: which activation.
        alpha: of elu, default 1.
        beta: of softplus, default 1.
        threshold: of softplus, default 20.
        out: three contiguous tensors in z's shape and dtype to write to; no derivative is taken then. Fresh memory
            costs as much as the computation where z is large.

    Returns:
        (value, slope, bend), each [*z.shape], contiguous, in z's dtype.

    Cost: z read once, three arrays written; the arithmetic hides behind memory traffic. Derivatives of the results
        of any order are PyTorch's, of the same formulas.

    Raises:
        TypeError: another dtype or layout.
        ValueError: an unknown kind, a parameter that it does not have, ``out`` of another shape.

    Example:
        >>> import torch
        >>> activation_derivatives(torch.tensor([0.0]), "tanh")
        ActivationDerivatives(value=tensor([0.]), slope=tensor([1.]), bend=tensor([-0.]))
    """
    name = "activation_derivatives"
    which = numbers(name, kind, alpha, beta, threshold)
    check_primal(name, "z", z)
    if out is not None:
        return ActivationDerivatives(*_into(name, which, (z,), out, [z.shape] * 3))
    return ActivationDerivatives(*call(name, which, z))


def activation_jet(
    z: Tensor,
    t: Tensor,
    kind: Kind,
    *,
    s: Tensor | None = None,
    order: int = 2,
    alpha: float | None = None,
    beta: float | None = None,
    threshold: float | None = None,
    out: Sequence[Tensor] | None = None,
) -> Jet:
    r"""φ(z), φ'(z) ż_j and φ''(z) ż_j² (+ φ'(z) z̈_j) for k tangents ż_j: z is read once.

    With z̈ = 0 the last is the second derivative of ε ↦ φ(z + ε ż); with z̈ the coefficients of a curve
    z(ε) = z + ε ż + ε² z̈/2 go in and those of φ(z(ε)) come out, so that whole networks can be pushed through.

    Args:
        z: any shape and strides; float32, float64 or bfloat16 (computed in float32).
        t: the tangents ż, [k, *z.shape].
        kind: see :func:`activation_derivatives`, as alpha, beta and threshold.
        s: the second-order coefficients z̈, [k, *z.shape]; ``None``: zero.
        order: 2, or 1 to leave the second-order terms out.
        out: contiguous tensors (value, first, second) to write to (without second for ``order=1``); no derivative is
            taken then.

    Returns:
        ``Jet(value [*z.shape], first [k, *z.shape], second [k, *z.shape] or None)``, contiguous.

    Cost: z and the tangents read once, the results written once.

    Raises:
        TypeError: another dtype, layout or device.
        ValueError: shapes that do not fit, an unknown kind or order.

    Source: Griewank and Walther, Evaluating Derivatives (2008), chapter 13.

    Example:
        >>> import torch
        >>> jet = activation_jet(torch.tensor([0.0]), torch.tensor([[1.0], [2.0]]), "sigmoid")
        >>> jet.first.tolist()
        [[0.25], [0.5]]
    """
    name = "activation_jet"
    which = numbers(name, kind, alpha, beta, threshold)
    check_primal(name, "z", z)
    check_tangents(name, "t", t, z)
    if order not in (1, 2):
        raise ValueError(f"{name}: order must be 1 or 2, got {order}")
    if s is not None:
        if order == 1:
            raise ValueError(f"{name}: s has no effect on the first order; leave it out or set order=2")
        check_like(name, "s", s, tuple(t.shape), z)
    if out is not None:
        shapes = [z.shape] + [t.shape] * order
        return _jet(_into(name, (*which, order), (z, t, s), out, shapes))
    return _jet(call(name, (*which, order), z, t, s))


def activation_pullback(
    z: Tensor,
    g: Tensor,
    t: Tensor,
    dg: Tensor,
    kind: Kind,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    threshold: float | None = None,
    out: Sequence[Tensor] | None = None,
) -> Pullback:
    r"""The cotangent g φ'(z) and its tangents ġ_j φ'(z) + g φ''(z) ż_j: an activation's step backwards in a
    Hessian-vector product of k vectors.

    Args:
        z: the primal, any shape and strides; float32, float64 or bfloat16 (computed in float32).
        g: the cotangent of φ(z), [*z.shape].
        t: the tangents ż of z, [k, *z.shape].
        dg: the tangents ġ of g, [k, *z.shape].
        kind: see :func:`activation_derivatives`, as alpha, beta and threshold.
        out: contiguous tensors (cotangent, tangents) to write to; no derivative is taken then.

    Returns:
        ``Pullback(cotangent [*z.shape], tangents [k, *z.shape])``, contiguous.

    Cost: every operand read once, the results written once.

    Raises:
        TypeError: another dtype, layout or device.
        ValueError: shapes that do not fit, or an unknown kind.

    Source: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6 (1994).

    Example:
        >>> import torch
        >>> one = torch.ones(3)
        >>> activation_pullback(0 * one, one, one[None], 0 * one[None], "softplus").tangents
        tensor([[0.2500, 0.2500, 0.2500]])
    """
    name = "activation_pullback"
    which = numbers(name, kind, alpha, beta, threshold)
    check_primal(name, "z", z)
    check_like(name, "g", g, tuple(z.shape), z)
    check_tangents(name, "t", t, z)
    check_like(name, "dg", dg, tuple(t.shape), z)
    if out is not None:
        return Pullback(*_into(name, which, (z, g, t, dg), out, [z.shape, t.shape]))
    return Pullback(*call(name, which, z, g, t, dg))


def _jet(outputs: Sequence[Tensor]) -> Jet:
    return Jet(outputs[0], outputs[1], outputs[2] if len(outputs) > 2 else None)


def _into(
    name: str, setting: Setting, operands: Operands, out: Sequence[Tensor], shapes: Sequence[torch.Size]
) -> tuple[Tensor, ...]:
    """The results written to ``out``."""
    z = operands[0]
    assert z is not None
    if len(out) != len(shapes):
        raise ValueError(f"{name}: out must hold {len(shapes)} tensors, got {len(out)}")
    for i, (o, shape) in enumerate(zip(out, shapes, strict=True)):
        check_like(name, f"out[{i}]", o, tuple(shape), z)
        if not o.is_contiguous():
            raise ValueError(f"{name}: out[{i}] must be contiguous")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*operands, *out)):
        raise ValueError(f"{name}: out= takes no derivatives; leave it out, or detach the operands")
    dense = [None if t is None else t.contiguous() for t in operands]
    if runs_elementwise(z):
        _OUT[name](setting, dense, out)
    else:
        for o, result in zip(out, _REFERENCES[name](setting, operands), strict=True):
            o.copy_(result)
    return tuple(out)


# -- the reference ---------------------------------------------------------------------------------------------


def _which(setting: Setting) -> Numbers:
    return int(setting[0]), setting[1], setting[2]


def _wide(t: Tensor) -> Tensor:
    return t.float() if t.dtype == torch.bfloat16 else t


def _derivatives_reference(setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    (z,) = operands
    assert z is not None
    return derivatives(z, _which(setting))


def _jet_reference(setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    z, t, s = operands
    assert z is not None
    assert t is not None
    value, slope, bend = derivatives(_wide(z), _which(setting))
    dtype, t = z.dtype, _wide(t)
    if setting[3] == 1:
        return value.to(dtype), (slope * t).to(dtype)
    second = bend * t * t
    if s is not None:
        second = second + slope * _wide(s)
    return value.to(dtype), (slope * t).to(dtype), second.to(dtype)


def _pullback_reference(setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    z, g, t, dg = (_wide(cast(Tensor, x)) for x in operands)
    dtype = cast(Tensor, operands[0]).dtype
    _, slope, bend = derivatives(z, _which(setting))
    return (g * slope).to(dtype), (dg * slope + (g * bend) * t).to(dtype)


# -- the compiled kernels --------------------------------------------------------------------------------------


def _derivatives_compiled(setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    (z,) = operands
    assert z is not None
    return cast(
        tuple[Tensor, ...], torch.ops.flatkern.activation_derivatives(z.contiguous(), *_which(setting))
    )


def _jet_compiled(setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    z, t, s = (None if x is None else x.contiguous() for x in operands)
    outputs = torch.ops.flatkern.activation_jet(z, t, s, *_which(setting), int(setting[3]))
    return cast(tuple[Tensor, ...], outputs[: 1 + int(setting[3])])


def _pullback_compiled(setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    dense = (cast(Tensor, x).contiguous() for x in operands)
    return cast(tuple[Tensor, ...], torch.ops.flatkern.activation_pullback(*dense, *_which(setting)))


_REFERENCES = {
    "activation_derivatives": _derivatives_reference,
    "activation_jet": _jet_reference,
    "activation_pullback": _pullback_reference,
}
_OUT = {
    "activation_derivatives": lambda setting, dense, out: torch.ops.flatkern.activation_derivatives_out(
        *dense, *_which(setting), *out
    ),
    "activation_jet": lambda setting, dense, out: torch.ops.flatkern.activation_jet_out(
        *dense, *_which(setting), *out, *[None] * (3 - len(out))
    ),
    "activation_pullback": lambda setting, dense, out: torch.ops.flatkern.activation_pullback_out(
        *dense, *_which(setting), *out
    ),
}
define(
    "activation_derivatives",
    JetOperator(_derivatives_compiled, _derivatives_reference, (0,), (0, 0, 0)),
)
define("activation_jet", JetOperator(_jet_compiled, _jet_reference, (0, 1, 1), (0, 1, 1)))
define("activation_pullback", JetOperator(_pullback_compiled, _pullback_reference, (0, 0, 1, 1), (0, 1)))


def _fresh(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


if jets_available():
    torch.library.register_fake(
        "flatkern::activation_derivatives", lambda z, *_: (_fresh(z), _fresh(z), _fresh(z))
    )
    torch.library.register_fake(
        "flatkern::activation_jet",
        lambda z, t, s, _kind, _a, _b, order: (
            _fresh(z),
            _fresh(t),
            _fresh(t) if order == 2 else t.new_empty(0),
        ),
    )
    torch.library.register_fake(
        "flatkern::activation_pullback", lambda z, g, t, dg, *_: (_fresh(z), _fresh(t))
    )
