"""Loss functions as sums over samples: numerator, denominator and output Hessian.

A mean-reduced loss over a data set is Σ numerators / Σ denominators, with both sums over the WHOLE data set; a mean
of batch means is another number as soon as batches differ. A :class:`Loss` therefore never divides.

The output Hessian of the numerator, per sample, H = ∂²(numerator)/∂f² [N, N], is block diagonal over samples and
comes in two forms: its product with a vector, and a square root S (S Sᵀ = H) given as cotangents [K, n, *output].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Loss", "resolve_loss"]

Reduction = Literal["mean", "sum"]
LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss split into numerator and denominator; see the module's text.

    Attributes:
        name: what it is called in results.
        reduction: ``"mean"`` (divide by Σ denominators) or ``"sum"`` (divide by 1).
        numerator: (output, target) → scalar, the sum over samples; differentiable in the output.
        weight: (output, target) → this batch's part of the mean's denominator, 0-d.
        product: (output, target, v [..., *output]) → H v of the numerator; ``None``: not known in closed form.
        root: (output, target) → cotangents S [K, *output] with Σ_k s_k s_kᵀ = H; ``None`` likewise.
    """

    name: str
    reduction: Reduction
    numerator: LossFunction
    weight: LossFunction
    product: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    root: LossFunction | None = None

    def denominator(self, total_weight: Tensor | float) -> float:
        """What the summed numerators are divided by, from the summed weights; raises where it is not positive."""
        if self.reduction == "sum":
            return 1.0
        value = float(total_weight)
        if not value > 0:
            raise ValueError("loss_fn: the mean's denominator is 0 (are all targets ignored?)")
        return value


def resolve_loss(loss_fn: object, reduction: Reduction | None = None) -> Loss:
    """Recognise a loss function.

    Args:
        loss_fn: ``nn.CrossEntropyLoss`` (class weights, label smoothing, ignore_index, probability targets),
            ``nn.MSELoss``, ``nn.BCEWithLogitsLoss``, or any callable (output, target) → scalar that is a sum or a mean
            over samples.
        reduction: required for a callable; for the losses of torch it is theirs.

    Raises:
        TypeError: not callable.
        ValueError: ``reduction`` missing, contradicting, or ``"none"``.
    """
    if isinstance(loss_fn, (nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss)):
        own = loss_fn.reduction
        if own not in ("mean", "sum"):
            raise ValueError(f"loss_fn: reduction={own!r} gives no scalar; use 'mean' or 'sum'")
        if reduction is not None and reduction != own:
            raise ValueError(f"reduction: {reduction!r} contradicts loss_fn.reduction={own!r}; leave it out")
        kind: Reduction = "mean" if own == "mean" else "sum"
        if isinstance(loss_fn, nn.CrossEntropyLoss):
            return _cross_entropy(loss_fn, kind)
        return _mse(kind) if isinstance(loss_fn, nn.MSELoss) else _bce_with_logits(loss_fn, kind)
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn: expected a callable (output, target) -> scalar, got {type(loss_fn).__name__}"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(
            "reduction: say 'mean' or 'sum' for a loss_fn that is not one of torch's loss modules"
        )
    return _from_callable(loss_fn, reduction)


def _from_callable(loss_fn: Callable[..., Tensor], reduction: Reduction) -> Loss:
    def numerator(output: Tensor, target: Tensor) -> Tensor:
        value = loss_fn(output, target)
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError("loss_fn: it must return one scalar tensor")
        return value.reshape(()) * (len(output) if reduction == "mean" else 1)

    name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
    return Loss(
        name,
        reduction,
        numerator,
        lambda output, _: output.new_tensor(float(len(output)), dtype=torch.float64),
    )


def _numel(output: Tensor, _: Tensor) -> Tensor:
    return output.new_tensor(float(output.numel()), dtype=torch.float64)


def _same_shape(output: Tensor, target: Tensor) -> None:
    # torch broadcasts with a mere warning, which turns [n, 1] against [n] into n² residuals
    if output.shape != target.shape:
        raise ValueError(
            f"target: shape {tuple(target.shape)} differs from the output's {tuple(output.shape)}"
        )


def _mse(reduction: Reduction) -> Loss:
    """Numerator Σ (f − y)² (no ½), so H = 2 I; the mean divides by the number of output ENTRIES."""

    def numerator(output: Tensor, target: Tensor) -> Tensor:
        _same_shape(output, target)
        return (output - target).square().sum()

    def root(output: Tensor, _: Tensor) -> Tensor:
        return identity_cotangents(output) * 2**0.5

    return Loss("MSELoss", reduction, numerator, _numel, lambda _o, _t, v: 2 * v, root)


def _bce_with_logits(loss_fn: nn.BCEWithLogitsLoss, reduction: Reduction) -> Loss:
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

    return Loss("BCEWithLogitsLoss", reduction, numerator, _numel, lambda o, t, v: diagonal(o, t) * v, root)


def _cross_entropy(loss_fn: nn.CrossEntropyLoss, reduction: Reduction) -> Loss:
    """H_i = ω_i (diag p − p pᵀ) for every position; classes on axis 1, as torch has it.

    ω_i = (1 − ε) w_{y_i} + (ε/C) Σ_c w_c for class indices (0 where ignored) and Σ_c w_c ((1 − ε) q_ic + ε/C) for
    probability targets q. The mean's denominator is Σ_i w_{y_i} over the kept positions for indices and the number of
    positions for probabilities.
    """
    weight, smoothing, ignore = loss_fn.weight, loss_fn.label_smoothing, loss_fn.ignore_index

    def class_weights(output: Tensor) -> Tensor:
        return output.new_ones(output.shape[1]) if weight is None else weight.to(output)

    def numerator(output: Tensor, target: Tensor) -> Tensor:
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
        p = output.softmax(1)
        axis = v.ndim - output.ndim + 1
        # H takes a constant to 0: measured from the likeliest class, nothing cancels where p is nearly 1
        top = output.argmax(1, keepdim=True)
        v = v - v.gather(axis, top.expand(*v.shape[: axis - 1], *top.shape))
        mean = (p * v).sum(axis, keepdim=True)
        return omega(output, target).unsqueeze(1) * p * (v - mean)

    def root(output: Tensor, target: Tensor) -> Tensor:
        return _softmax_root(output) * omega(output, target).sqrt().unsqueeze(1)

    return Loss("CrossEntropyLoss", reduction, numerator, denominator, product, root)


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


def identity_cotangents(output: Tensor) -> Tensor:
    """The unit cotangents of one sample's N output entries, for all samples: [N, n, *output.shape[1:]]."""
    n, entries = len(output), output[0].numel()
    eye = torch.eye(entries, dtype=output.dtype, device=output.device)
    return eye.reshape(entries, 1, *output.shape[1:]).expand(entries, n, *output.shape[1:])
