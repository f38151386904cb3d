"""Second-order terms of softmax and its logarithm, and cross-entropy with its Hessian, in two passes over a row."""

from __future__ import annotations

from typing import NamedTuple, cast

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

__all__ = ["CrossEntropyJet", "cross_entropy_hvp", "cross_entropy_jet", "softmax_curvature"]


class CrossEntropyJet(NamedTuple):
    """Cross-entropy a position, its gradient in the logits, and its Hessian times k tangents."""

    loss: Tensor
    """[*positions], not reduced; float32 for bfloat16 logits."""
    gradient: Tensor
    """ω p − q, [*logits]."""
    product: Tensor
    """ω (p ∘ ż_j − p ⟨p, ż_j⟩), [k, *logits]."""


def softmax_curvature(p: Tensor, t: Tensor, g: Tensor, *, dim: int = -1, log: bool = False) -> Tensor:
    r"""⟨g, D²p[ż_j, ż_j]⟩ of p = softmax(z), or of log p, position by position, for k tangents and one cotangent.

    With m_j = ⟨p, ż_j⟩: Σ_c p_c (g_c − ⟨p, g⟩) (ż_jc − m_j)²; for the logarithm −Σ_c g_c · Σ_c p_c (ż_jc − m_j)².

    Args:
        p: softmax(z), any shape and strides; float32, float64 or bfloat16 (accumulated in float32).
        t: tangents ż, [k, *p.shape].
        g: the cotangent of the output, p's shape and dtype.
        dim: the axis of the classes; the last one is quickest.
        log: of the logarithm.

    Returns:
        [k, ...], p's shape without ``dim``; float32 for bfloat16, else p's dtype.

    Cost: every operand read once from memory where a row fits into the caches, and nothing of the size of t written.
        Derivatives of the result are PyTorch's.

    Raises:
        TypeError: another dtype, layout or device.
        ValueError: shapes that do not fit.

    Example:
        >>> import torch
        >>> p, t = torch.tensor([0.5, 0.5]), torch.tensor([[1.0, 0.0]])
        >>> softmax_curvature(p, t, torch.tensor([1.0, 0.0]), log=True)  # of log p_1: −p (1 − p)
        tensor([-0.2500])
    """
    name = "softmax_curvature"
    check_primal(name, "p", p, axes=1)
    check_tangents(name, "t", t, p)
    check_like(name, "g", g, tuple(p.shape), p)
    axis = _axis(name, p, dim)
    (curvature,) = call(name, (float(log),), _last(p, axis), _last(t, axis + 1), _last(g, axis))
    return curvature


def cross_entropy_hvp(z: Tensor, v: Tensor, *, scale: Tensor | None = None, dim: int = -1) -> Tensor:
    r"""The Hessian of cross-entropy in the logits times k vectors: ω (p ∘ v_j − p ⟨p, v_j⟩) at every position.

    The Hessian does not depend on the label, only on its weight ω: pass 0 for ignored positions. H takes constants
    to 0; v is measured from its entry at the likeliest class, so that nothing cancels where p is nearly 1.

    Args:
        z: logits, any shape and strides; float32, float64 or bfloat16 (accumulated in float32).
        v: vectors [k, *z.shape].
        scale: ω, z's shape without ``dim``, float32 for bfloat16 logits and else z's dtype; ``None``: 1.
        dim: the axis of the classes; the last one is quickest.

    Returns:
        [k, *z.shape] in z's dtype.

    Cost: as :func:`softmax_curvature`, and the product is written.

    Raises:
        TypeError: another dtype, layout or device.
        ValueError: shapes that do not fit.

    Example:
        >>> import torch
        >>> cross_entropy_hvp(torch.zeros(2), torch.tensor([[1.0, 0.0]]))
        tensor([[ 0.2500, -0.2500]])
    """
    name = "cross_entropy_hvp"
    check_primal(name, "z", z, axes=1)
    check_tangents(name, "v", v, z)
    axis = _axis(name, z, dim)
    rows = (*z.shape[:axis], *z.shape[axis + 1 :])
    if scale is not None:
        check_like(name, "scale", scale, rows, z, dtype=wide_dtype(z))
    (product,) = call(name, (), _last(z, axis), scale, _last(v, axis + 1))
    return _back(product, axis + 1)


def cross_entropy_jet(
    z: Tensor,
    target: Tensor,
    t: Tensor,
    *,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    dim: int = -1,
) -> CrossEntropyJet:
    r"""Cross-entropy at class indices with gradient and k Hessian-vector products, position by position.

    With class weights w and smoothing ε the targets are q = (1 − ε) w_y e_y + (ε/C) w, the loss Σ_c q_c (lse(z) − z_c),
    ω = Σ_c q_c, the gradient ω p − q, and the Hessian ω (diag p − p pᵀ); all zero where y = ``ignore_index``. Nothing
    is summed or averaged: divide as the reduction wants it.

    Args:
        z: logits, any shape and strides; float32, float64 or bfloat16 (accumulated in float32).
        target: class indices, int64, z's shape without ``dim``.
        t: tangents [k, *z.shape].
        weight: w [C], float32 for bfloat16 logits and else z's dtype.
        ignore_index: the label of positions left out.
        label_smoothing: ε in [0, 1].
        dim: the axis of the classes; the last one is quickest.

    Returns:
        ``CrossEntropyJet(loss, gradient, product)``.

    Cost: as :func:`cross_entropy_hvp`; smoothing reads the logits once more.

    Raises:
        TypeError: another dtype, layout or device.
        ValueError: shapes that do not fit, or ε outside [0, 1].

    Example:
        >>> import torch
        >>> jet = cross_entropy_jet(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([[[1.0, 0.0]]]))
        >>> jet.loss, jet.gradient
        (tensor([0.6931]), tensor([[-0.5000,  0.5000]]))
    """
    name = "cross_entropy_jet"
    check_primal(name, "z", z, axes=1)
    check_tangents(name, "t", t, z)
    axis = _axis(name, z, dim)
    rows = (*z.shape[:axis], *z.shape[axis + 1 :])
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        raise TypeError(f"{name}: target must be an int64 tensor of class indices")
    if tuple(target.shape) != rows:
        raise ValueError(f"{name}: target must have shape {rows}, got {tuple(target.shape)}")
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{name}: label_smoothing must lie in [0, 1], got {label_smoothing}")
    classes, dtype = z.shape[axis], wide_dtype(z)
    if weight is not None:
        check_like(name, "weight", weight, (classes,), z, dtype=dtype)
    last = _last(z, axis)
    kept = (target != ignore_index).to(dtype)
    label = torch.where(target != ignore_index, target, 0).unsqueeze(-1)
    own = kept if weight is None else weight[label.squeeze(-1)] * kept
    own = own * (1 - label_smoothing)
    scale = own
    if label_smoothing:
        scale = own + kept * (label_smoothing * (1.0 if weight is None else weight.mean()))
    excess, gradient, product = call("logsumexp_jet", (), last, scale, _last(t, axis + 1))
    top = last.amax(-1, keepdim=True).to(dtype)
    below = (top - last.gather(-1, label)).squeeze(-1)
    loss = own * (below + excess)
    gradient = gradient.scatter_add(-1, label, -own.unsqueeze(-1).to(z.dtype))
    if label_smoothing:
        even = z.new_ones(classes, dtype=dtype) if weight is None else weight
        even = (label_smoothing / classes) * even
        spread = kept.unsqueeze(-1) * even
        gradient = gradient - spread.to(z.dtype)
        loss = loss + kept * (((top - last) * even).sum(-1) + even.sum() * excess)
    return CrossEntropyJet(loss, _back(gradient, axis), _back(product, axis + 1))


def _axis(name: str, z: Tensor, dim: int) -> int:
    if not -z.dim() <= dim < z.dim():
        raise ValueError(f"{name}: dim={dim} is not an axis of shape {tuple(z.shape)}")
    return dim % z.dim()


def _last(x: Tensor, axis: int) -> Tensor:
    return x if axis == x.dim() - 1 else x.movedim(axis, -1)


def _back(x: Tensor, axis: int) -> Tensor:
    return x if axis == x.dim() - 1 else x.movedim(-1, axis)


# -- the reference ---------------------------------------------------------------------------------------------


def _softmax_reference(setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    p, t, g = map(wide, operands)
    square = p * (t - (p * t).sum(-1, keepdim=True)).square()
    if setting[0]:
        return (-g.sum(-1) * square.sum(-1),)
    return (((g - (p * g).sum(-1, keepdim=True)) * square).sum(-1),)


def _product_reference(setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    return _logsumexp_reference(setting, operands)[2:]


def _logsumexp_reference(_setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    """log Σ exp(z − max z), ω p and ω p ∘ (v − ⟨p, v⟩)."""
    z, v = wide(operands[0]), wide(operands[2])
    dtype = cast(Tensor, operands[0]).dtype
    top = z.detach().argmax(-1, keepdim=True)
    excess = torch.logsumexp(z - z.gather(-1, top), -1)
    p = torch.softmax(z, -1)
    shifted = v - v.gather(-1, top.expand(*v.shape[:-1], 1))
    mean = (p * shifted).sum(-1, keepdim=True)
    scaled = p if operands[1] is None else p * operands[1].unsqueeze(-1)
    return excess, scaled.to(dtype), (scaled * (shifted - mean)).to(dtype)


# -- the compiled kernels --------------------------------------------------------------------------------------


def _softmax_compiled(setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    p, t, g = (cast(Tensor, x).contiguous() for x in operands)
    if p.shape[-1] == 0:
        return _softmax_reference(setting, operands)
    return (torch.ops.flatkern.softmax_curvature(p, t, g, bool(setting[0])),)


def _product_compiled(_setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    z, scale, v = (None if x is None else x.contiguous() for x in operands)
    return (torch.ops.flatkern.cross_entropy_hvp(z, scale, v),)


def _logsumexp_compiled(_setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    z, scale, v = (None if x is None else x.contiguous() for x in operands)
    return cast(tuple[Tensor, ...], torch.ops.flatkern.logsumexp_jet(z, scale, v))


define("softmax_curvature", JetOperator(_softmax_compiled, _softmax_reference, (0, 1, 0), (1,)))
define("cross_entropy_hvp", JetOperator(_product_compiled, _product_reference, (0, 0, 1), (1,)))
define("logsumexp_jet", JetOperator(_logsumexp_compiled, _logsumexp_reference, (0, 0, 1), (0, 0, 1)))


def _fresh(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


if jets_available():
    torch.library.register_fake(
        "flatkern::softmax_curvature", lambda p, t, g, log: t.new_empty(t.shape[:-1], dtype=wide_dtype(t))
    )
    torch.library.register_fake("flatkern::cross_entropy_hvp", lambda z, scale, v: _fresh(v))
    torch.library.register_fake(
        "flatkern::logsumexp_jet",
        lambda z, scale, v: (z.new_empty(z.shape[:-1], dtype=wide_dtype(z)), _fresh(z), _fresh(v)),
    )
