"""Tr Wᵀ H_t W of a loss's output Hessian at every position, for losses whose H is known, in one product with W."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flatkern.losses import Loss

__all__ = ["row_form"]

Form = Callable[[Tensor, Any, Tensor], Tensor]

_SOFTMAX = ("CrossEntropyLoss", "TokenCrossEntropyLoss")
_DIAGONAL = ("MSELoss", "BCEWithLogitsLoss", "HuberLoss", "SmoothL1Loss")


def row_form(loss: Loss, output: Tensor) -> Form | None:
    """(output [n, ..., C], target, W [C, d]) → Tr Wᵀ H W at every position, float64 [n, ...]; H of the numerator.

    Σ_c h_c ‖w_c‖² for a diagonal H, ω (Σ_c p_c ‖w_c‖² − ‖Wᵀp‖²) for cross-entropy with the classes on the last axis. No
    H is formed. ``None``: there is no such form.
    """
    if loss.callable:
        return None
    if loss.name in _DIAGONAL:
        return lambda f, target, w: _diagonal(loss, f.double(), target, w)
    if loss.name in _SOFTMAX and (output.ndim == 2 or loss.name == "TokenCrossEntropyLoss"):
        return lambda f, target, w: _softmax(loss, f.double(), target, w)
    return None


def _diagonal(loss: Loss, output: Tensor, target: Any, w: Tensor) -> Tensor:
    assert loss.product is not None
    entries = loss.product(output, target, torch.ones_like(output))
    return entries @ w.double().square().sum(1)


def _softmax(loss: Loss, output: Tensor, target: Any, w: Tensor) -> Tensor:
    assert loss.product is not None
    w = w.double()
    p = output.softmax(-1)
    top = output.argmax(-1, keepdim=True)
    # ω from one entry of H: H_kk = ω p_k (1 − p_k), the second factor summed and not subtracted
    rest = p.scatter(-1, top, 0.0).sum(-1)
    unit = torch.zeros_like(p).scatter_(-1, top, 1.0)
    target = target.double() if target.is_floating_point() else target
    entry = loss.product(output, target, unit).gather(-1, top).squeeze(-1)
    weight = torch.where(rest > 0, entry / (p.gather(-1, top).squeeze(-1) * rest), 0.0)
    return weight * (p @ w.square().sum(1) - (p @ w).square().sum(-1))
