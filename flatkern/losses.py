"""Loss functions as sums over samples: numerator, denominator and output Hessian.

A mean-reduced loss over a data set is Σ numerators / Σ denominators, with both sums over the WHOLE data set; a mean
of batch means is another number as soon as batches differ. A :class:`Loss` therefore never divides.

The output Hessian of the numerator, per sample, H = ∂²(numerator)/∂f² [N, N], is block diagonal over samples and
comes in two forms: its product with a vector, and a square root S (S Sᵀ = H) given as cotangents [K, n, *output].
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatkern import _loss_forms as forms
from flatkern._loss import Loss, Reduction, check_classes, classes_second, identity_cotangents

__all__ = ["Loss", "Reduction", "TokenCrossEntropyLoss", "identity_cotangents", "resolve_loss"]


class TokenCrossEntropyLoss(nn.CrossEntropyLoss):
    """Cross-entropy with the classes on the LAST axis: outputs [B, T, V] (or [n, ..., C]), targets [B, T].

    ``nn.CrossEntropyLoss`` has them on axis 1, [B, V, T]. Class weights, ``ignore_index``, ``label_smoothing`` and
    ``reduction`` are those of ``nn.CrossEntropyLoss``; a mean divides by the summed weights of the kept tokens of the
    WHOLE data set. Probability targets [B, T, V] are taken as well. Cost: no copy beyond torch's own.

    Example:
        >>> import torch
        >>> from flatkern.losses import TokenCrossEntropyLoss
        >>> TokenCrossEntropyLoss()(torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.long))
        tensor(1.3863)
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """The loss of outputs [..., C] at class indices [...] or probabilities [..., C]."""
        check_classes(input, target, -1)
        classes_last = target.is_floating_point()
        return super().forward(classes_second(input), classes_second(target) if classes_last else target)


def resolve_loss(loss_fn: object, reduction: Reduction | None = None) -> Loss:
    """Recognise a loss function.

    Args:
        loss_fn: ``nn.CrossEntropyLoss`` (class weights, label smoothing, ignore_index, probability targets; classes on
            axis 1), :class:`TokenCrossEntropyLoss` (classes last), ``nn.NLLLoss``, ``nn.MSELoss``,
            ``nn.BCEWithLogitsLoss``, ``nn.HuberLoss``, ``nn.SmoothL1Loss``, the functions of
            ``torch.nn.functional`` of these names (with their default arguments), or any callable (output, target) →
            scalar that is a sum or a mean over samples.
        reduction: required for a callable; for the losses of torch it is theirs.

    Raises:
        TypeError: not callable.
        ValueError: ``reduction`` missing, contradicting, or ``"none"``.
    """
    with contextlib.suppress(TypeError):  # unhashable
        loss_fn = _FUNCTIONS.get(loss_fn, lambda: loss_fn)()
    for kind, make in _KNOWN:
        # a subclass with a forward of its own is another loss: it is taken as a callable
        if isinstance(loss_fn, kind) and type(loss_fn).forward is kind.forward:
            return make(loss_fn, _own_reduction(loss_fn, reduction))
    if isinstance(loss_fn, type):
        raise TypeError(f"loss_fn: {loss_fn.__name__} is a class; give an instance, {loss_fn.__name__}()")
    if not callable(loss_fn):
        raise TypeError(
            f"loss_fn: expected a callable (output, target) -> scalar, got {type(loss_fn).__name__}"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError(
            "reduction: say 'mean' or 'sum' for a loss_fn that is not one of torch's loss modules"
        )
    return _from_callable(loss_fn, reduction)


def _own_reduction(loss_fn: Any, reduction: Reduction | None) -> Reduction:
    own: Reduction = loss_fn.reduction
    if own not in ("mean", "sum"):
        raise ValueError(f"loss_fn: reduction={own!r} gives no scalar; use 'mean' or 'sum'")
    if reduction is not None and reduction != own:
        raise ValueError(f"reduction: {reduction!r} contradicts loss_fn.reduction={own!r}; leave it out")
    return own


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
        callable=True,
    )


_KNOWN: tuple[tuple[type[nn.Module], Callable[[Any, Reduction], Loss]], ...] = (
    (TokenCrossEntropyLoss, forms.token_cross_entropy),
    (nn.CrossEntropyLoss, forms.cross_entropy),
    (nn.MSELoss, lambda _, reduction: forms.mse(reduction)),
    (nn.BCEWithLogitsLoss, forms.bce_with_logits),
    (nn.NLLLoss, forms.nll),
    (nn.HuberLoss, forms.huber),
    (nn.SmoothL1Loss, forms.huber),
)
_FUNCTIONS: dict[Any, Callable[[], object]] = {
    F.cross_entropy: nn.CrossEntropyLoss,
    F.mse_loss: nn.MSELoss,
    F.binary_cross_entropy_with_logits: nn.BCEWithLogitsLoss,
    F.nll_loss: nn.NLLLoss,
    F.huber_loss: nn.HuberLoss,
    F.smooth_l1_loss: nn.SmoothL1Loss,
}
