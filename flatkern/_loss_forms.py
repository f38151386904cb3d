"""Closed forms of torch's losses: numerator, denominator, output Hessian, its root, sampled gradients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatkern import kernels
from flatkern._loss import (
    Loss,
    Reduction,
    check_classes,
    classes_second,
    draw,
    draw_classes,
    identity_cotangents,
)
from flatkern.kernels._jet_operator import DTYPES as JET_DTYPES

__all__ = ["bce_with_logits", "cross_entropy", "huber", "mse", "nll", "token_cross_entropy"]


_BLOCK_BYTES = 1 << 24
"""Logits a sketch takes at a time: its temporaries are several times as large."""
_EIGENVECTORS_UP_TO = 16
"""Classes up to which a sketch of one output a sample takes eigenvectors (about 10 µs a sample for ten). On a CPU only:
elsewhere ``eigh`` makes the host wait."""


def _numel(output: Tensor, _: Tensor) -> Tensor:
    return output.new_tensor(float(output.numel()), dtype=torch.float64)


def _same_shape(output: Tensor, target: Tensor) -> None:
    # torch broadcasts with a mere warning, which turns [n, 1] against [n] into n² residuals
    if output.shape != target.shape:
        raise ValueError(
            f"target: shape {tuple(target.shape)} differs from the output's {tuple(output.shape)}"
        )


def mse(reduction: Reduction) -> Loss:
    """Numerator Σ (f − y)² (no ½), so H = 2 I; the mean divides by the number of output ENTRIES."""

    def numerator(output: Tensor, target: Tensor) -> Tensor:
        _same_shape(output, target)
        return (output - target).square().sum()

    def root(output: Tensor, _: Tensor) -> Tensor:
        return identity_cotangents(output) * 2**0.5

    def sampled(output: Tensor, _: Tensor, generator: torch.Generator) -> Tensor:
        # labels from N(f, ½), whose negative log-likelihood is (f − y)²
        return 2**0.5 * draw(torch.randn, output, generator)

    return Loss(
        "MSELoss",
        reduction,
        numerator,
        _numel,
        lambda _o, _t, v: 2 * v,
        root,
        lambda o, _t, signs: 2**0.5 * signs.to(o.dtype),
        sampled=sampled,
    )


def huber(loss_fn: nn.HuberLoss | nn.SmoothL1Loss, reduction: Reduction) -> Loss:
    """H is diagonal: 1 (Huber) or 1/β (smooth L1) where |f − y| < δ (β), else 0; a mean is over output entries."""
    own = isinstance(loss_fn, nn.HuberLoss)
    threshold = float(loss_fn.delta if isinstance(loss_fn, nn.HuberLoss) else loss_fn.beta)

    def numerator(output: Tensor, target: Tensor) -> Tensor:
        _same_shape(output, target)
        if own:
            return F.huber_loss(output, target, delta=threshold, reduction="sum")
        return F.smooth_l1_loss(output, target, beta=threshold, reduction="sum")

    def diagonal(output: Tensor, target: Tensor) -> Tensor:
        inside = ((output - target).abs() < threshold).to(output.dtype)
        return inside if own or not threshold else inside / threshold

    def root(output: Tensor, target: Tensor) -> Tensor:
        return identity_cotangents(output) * diagonal(output, target).sqrt()

    name = type(loss_fn).__name__
    return Loss(
        name,
        reduction,
        numerator,
        _numel,
        lambda o, t, v: diagonal(o, t) * v,
        root,
        lambda o, t, signs: diagonal(o, t).sqrt() * signs,
    )


def nll(loss_fn: nn.NLLLoss, reduction: Reduction) -> Loss:
    """Outputs are log-probabilities; linear in them, so the output Hessian is 0 (see ``fk.ggn``)."""
    weight, ignore = loss_fn.weight, loss_fn.ignore_index

    def numerator(output: Tensor, target: Tensor) -> Tensor:
        check_classes(output, target, 1)
        return F.nll_loss(output, target, weight=weight, ignore_index=ignore, reduction="sum")

    def label_weights(output: Tensor, target: Tensor) -> Tensor:
        kept = target != ignore
        w = output.new_ones(output.shape[1]) if weight is None else weight.to(output)
        return w[torch.where(kept, target, 0)] * kept

    def denominator(output: Tensor, target: Tensor) -> Tensor:
        return label_weights(output, target).sum(dtype=torch.float64)

    def sampled(output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        return -label_weights(output, target).sqrt().unsqueeze(1) * draw_classes(output.exp(), generator)

    return Loss("NLLLoss", reduction, numerator, denominator, sampled=sampled)


def bce_with_logits(loss_fn: nn.BCEWithLogitsLoss, reduction: Reduction) -> Loss:
    """H = w (1 + (pos_weight − 1) t) σ(1 − σ), diagonal; the mean divides by the number of output entries."""

    def numerator(output: Tensor, target: Tensor) -> Tensor:
        _same_shape(output, target)
        return F.binary_cross_entropy_with_logits(
            output, target, weight=loss_fn.weight, pos_weight=loss_fn.pos_weight, reduction="sum"
        )

    def diagonal(output: Tensor, target: Tensor) -> Tensor:
        curvature = torch.sigmoid(output) * torch.sigmoid(-output)
        if loss_fn.pos_weight is not None:
            curvature = curvature * (1 + (loss_fn.pos_weight - 1) * target)
        return curvature if loss_fn.weight is None else curvature * loss_fn.weight

    def root(output: Tensor, target: Tensor) -> Tensor:
        return identity_cotangents(output) * diagonal(output, target).sqrt()

    def sampled(output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        p = torch.sigmoid(output)
        weights = torch.ones_like(p)
        if loss_fn.pos_weight is not None:
            weights = weights * (1 + (loss_fn.pos_weight - 1) * target)
        if loss_fn.weight is not None:
            weights = weights * loss_fn.weight
        return weights.sqrt() * (p - (draw(torch.rand, p, generator) < p).to(p.dtype))

    def product(output: Tensor, target: Tensor, v: Tensor) -> Tensor:
        return diagonal(output, target) * v

    def sketch(output: Tensor, target: Tensor, signs: Tensor) -> Tensor:
        return diagonal(output, target).sqrt() * signs

    return Loss("BCEWithLogitsLoss", reduction, numerator, _numel, product, root, sketch, sampled=sampled)


def cross_entropy(loss_fn: nn.CrossEntropyLoss, reduction: Reduction) -> Loss:
    """H_i = ω_i (diag p − p pᵀ) for every position; classes on axis 1, as torch has it.

    ω_i = (1 − ε) w_{y_i} + (ε/C) Σ_c w_c for class indices (0 where ignored) and Σ_c w_c ((1 − ε) q_ic + ε/C) for
    probability targets q. The mean's denominator is Σ_i w_{y_i} over the kept positions for indices and the number of
    positions for probabilities.
    """
    weight, smoothing, ignore = loss_fn.weight, loss_fn.label_smoothing, loss_fn.ignore_index

    def class_weights(output: Tensor) -> Tensor:
        return output.new_ones(output.shape[1]) if weight is None else weight.to(output)

    def numerator(output: Tensor, target: Tensor) -> Tensor:
        check_classes(output, target, 1)
        return F.cross_entropy(
            output, target, weight=weight, ignore_index=ignore, reduction="sum", label_smoothing=smoothing
        )

    def label_weights(output: Tensor, target: Tensor) -> Tensor:
        kept = target != ignore
        return class_weights(output)[torch.where(kept, target, 0)] * kept

    def denominator(output: Tensor, target: Tensor) -> Tensor:
        if target.is_floating_point():
            return output.new_tensor(float(output.numel() // output.shape[1]), dtype=torch.float64)
        return label_weights(output, target).sum(dtype=torch.float64)

    def omega(output: Tensor, target: Tensor) -> Tensor:
        w, classes = class_weights(output), output.shape[1]
        if target.is_floating_point():
            smoothed = (1 - smoothing) * target + smoothing / classes
            return torch.tensordot(smoothed.movedim(1, -1), w, dims=1)
        kept = target != ignore
        return (1 - smoothing) * label_weights(output, target) + smoothing / classes * w.sum() * kept

    def product(output: Tensor, target: Tensor, v: Tensor) -> Tensor:
        scale = omega(output, target)
        if output.dtype in JET_DTYPES and v.dtype == output.dtype:
            wide = scale.float() if output.dtype == torch.bfloat16 else scale
            vectors = v.reshape(-1, *output.shape)
            return kernels.cross_entropy_hvp(output, vectors, scale=wide, dim=1).reshape(v.shape)
        p = output.softmax(1)
        axis = v.ndim - output.ndim + 1
        # H takes a constant to 0: measured from the likeliest class, nothing cancels where p is nearly 1
        top = output.argmax(1, keepdim=True)
        v = v - v.gather(axis, top.expand(*v.shape[: axis - 1], *top.shape))
        mean = (p * v).sum(axis, keepdim=True)
        return scale.unsqueeze(1) * p * (v - mean)

    def root(output: Tensor, target: Tensor) -> Tensor:
        return _softmax_root(output) * omega(output, target).sqrt().unsqueeze(1)

    def sampled(output: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
        p = output.softmax(1)
        return omega(output, target).sqrt().unsqueeze(1) * (p - draw_classes(p, generator))

    def small(output: Tensor) -> bool:
        return output.ndim == 2 and output.shape[1] <= _EIGENVECTORS_UP_TO and output.device.type == "cpu"

    def orthogonal(output: Tensor, target: Tensor) -> Tensor:
        if not small(output):
            return root(output, target)
        columns = _softmax_eigenvectors(output)[:, :, 1:]  # the first is 0
        return columns.permute(2, 0, 1).to(output.dtype) * omega(output, target).sqrt().unsqueeze(1)

    def sketch(output: Tensor, target: Tensor, signs: Tensor) -> Tensor:
        out = torch.empty_like(signs, dtype=output.dtype)
        root_times = _softmax_eigensketch if small(output) else _softmax_sketch
        for block in _blocks(output):
            out[block] = root_times(output[block], signs[block].to(output.dtype))
        return out.mul_(omega(output, target).sqrt().unsqueeze(1))

    return Loss(
        "CrossEntropyLoss",
        reduction,
        numerator,
        denominator,
        product,
        root,
        sketch,
        lambda output: output[0].numel() // output.shape[1] * (output.shape[1] - 1),
        sampled,
        orthogonal=orthogonal,
    )


def token_cross_entropy(loss_fn: nn.CrossEntropyLoss, reduction: Reduction) -> Loss:
    """:func:`cross_entropy` with the classes of output, target, vectors and roots on the last axis."""
    inner = cross_entropy(loss_fn, reduction)
    assert inner.product is not None
    assert inner.root is not None
    assert inner.sketch is not None
    assert inner.sampled is not None
    product, root, sketch, sampled = inner.product, inner.root, inner.sketch, inner.sampled

    def moved(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        check_classes(output, target, -1)
        return classes_second(output), classes_second(target) if target.is_floating_point() else target

    def product_last(output: Tensor, target: Tensor, v: Tensor) -> Tensor:
        axis = v.ndim - output.ndim + 1
        return product(*moved(output, target), v.movedim(-1, axis)).movedim(axis, -1)

    return Loss(
        "TokenCrossEntropyLoss",
        reduction,
        lambda o, t: inner.numerator(*moved(o, t)),
        lambda o, t: inner.weight(*moved(o, t)),
        product_last,
        lambda o, t: root(*moved(o, t)).movedim(2, -1),
        lambda o, t, signs: sketch(*moved(o, t), classes_second(signs)).movedim(1, -1),
        lambda output: inner.columns(classes_second(output)),
        lambda o, t, generator: sampled(*moved(o, t), generator).movedim(1, -1),
    )


def _softmax_root(output: Tensor) -> Tensor:
    """Cotangents S [(C − 1)·T, n, C, ...] with S Sᵀ = diag p − p pᵀ at each of the T positions of a sample.

    S₀ = diag √p − p √pᵀ has S₀ S₀ᵀ = diag p − p pᵀ and S₀ √p = 0, so C − 1 columns suffice: S₀ times an orthonormal
    basis of √p^⊥, taken from the Householder reflection that maps the unit vector of the largest entry to −√p.
    """
    n, classes = output.shape[:2]
    p = output.softmax(1).movedim(1, -1)  # [n, *positions, C]
    root_p = p.sqrt()
    top = p.argmax(-1, keepdim=True)
    e_top = torch.zeros_like(p).scatter_(-1, top, 1.0)
    u = root_p + e_top  # ‖u‖² = 2 (1 + √p_top): no cancellation, whatever p
    scale = 2 / u.square().sum(-1, keepdim=True)
    # columns of (I − scale u uᵀ) except column `top`, as rows: others [n, *positions, C − 1] are their indices
    everything = torch.arange(classes, device=p.device).expand_as(p)
    others = everything.masked_select(e_top == 0).reshape(*p.shape[:-1], classes - 1)
    picked = torch.zeros(*p.shape[:-1], classes - 1, classes, dtype=p.dtype, device=p.device)
    picked.scatter_(-1, others.unsqueeze(-1), 1.0)
    basis = picked - (scale * u.gather(-1, others)).unsqueeze(-1) * u.unsqueeze(-2)
    # basis rows are orthogonal to √p exactly in exact arithmetic; S₀ b = √p ∘ b − p ⟨√p, b⟩ = √p ∘ b, kept in full for
    # rounding
    inner = (basis * root_p.unsqueeze(-2)).sum(-1, keepdim=True)
    rows = root_p.unsqueeze(-2) * basis - p.unsqueeze(-2) * inner  # [n, *positions, C − 1, C]
    positions = p.shape[1:-1].numel()
    rows = rows.reshape(n, positions, classes - 1, classes)
    if positions == 1:
        return rows.movedim(2, 0).reshape(classes - 1, *output.shape)
    spread = torch.zeros(positions, classes - 1, n, classes, positions, dtype=p.dtype, device=p.device)
    for_all = torch.arange(positions, device=p.device)
    spread[for_all, :, :, :, for_all] = rows.permute(1, 2, 0, 3)
    return spread.reshape(positions * (classes - 1), *output.shape)


def _blocks(output: Tensor) -> Iterator[tuple[slice, ...]]:
    """Samples, and positions of one sample, of [n, C, ...] some at a time: about ``_BLOCK_BYTES`` each."""
    sample_bytes = output[0].numel() * output.element_size()
    step = max(1, _BLOCK_BYTES // max(1, sample_bytes))
    positions = output.shape[2] if output.ndim > 2 else 1
    part = positions if step > 1 else max(1, positions * _BLOCK_BYTES // max(1, sample_bytes))
    for start in range(0, len(output), step):
        samples = slice(start, start + step)
        if part == positions:
            yield (samples,)
        else:
            for first in range(0, positions, part):
                yield samples, slice(None), slice(first, first + part)


def _softmax_eigenvectors(output: Tensor) -> Tensor:
    """S = V √Λ [n, C, C], float64, for V Λ Vᵀ = diag p − p pᵀ, smallest eigenvalue first; output [n, C].

    The variance of a sketch is 2 Σ_{a≠b} [(Sᵀ J Jᵀ S)_ab]²: with orthogonal columns it is 0 where J Jᵀ is a multiple of
    1, and small where outputs are driven alike (of one draw on a trained MLP or VGG 0.7 %, for 5 % with
    S = diag √p − p √pᵀ).
    """
    p = output.double().softmax(1)
    curvature = -p.unsqueeze(2) * p.unsqueeze(1)
    diagonal = curvature.diagonal(dim1=1, dim2=2)
    diagonal.zero_()
    diagonal.copy_(-curvature.sum(2))  # p (1 − p), whatever p: nothing is subtracted
    values, vectors = torch.linalg.eigh(curvature)
    return vectors * values.clamp_(min=0).sqrt_().unsqueeze(1)


def _softmax_eigensketch(output: Tensor, signs: Tensor) -> Tensor:
    """S ε for :func:`_softmax_eigenvectors`, output and signs [n, C]."""
    columns = _softmax_eigenvectors(output)
    return (columns @ signs.to(columns.dtype).unsqueeze(2)).squeeze(2).to(output.dtype)


def _softmax_sketch(output: Tensor, signs: Tensor) -> Tensor:
    """S ε for S = diag √p − p √pᵀ at every position (classes on axis 1), without cancellation where p is nearly 1.

    S √p = 0, so ε may be replaced by ε − ε_k √p with k the likeliest class. Its entry k is ε_k (1 − √p_k), taken as
    ε_k ρ/(1 + √p_k) with ρ = Σ_{c≠k} p_c summed and not subtracted from 1.
    """
    p = output.softmax(1)
    root_p = p.sqrt()
    top = output.argmax(1, keepdim=True)
    rest = p.scatter(1, top, 0).sum(1, keepdim=True)
    at_top = signs.gather(1, top)
    shifted = signs - at_top * root_p
    shifted.scatter_(1, top, at_top * rest / (1 + root_p.gather(1, top)))
    mean = (root_p * shifted).sum(1, keepdim=True)
    return root_p.mul_(shifted).sub_(p.mul_(mean))
