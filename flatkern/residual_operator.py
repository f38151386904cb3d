"""The residual of a loss's Hessian beyond the Gauss-Newton matrix, as a linear operator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.linearize import Forward
from flatkern.loss_data import output_gradient
from flatkern.losses import Loss
from flatkern.operators import LinearOperator, hessian

__all__ = ["residual_operator"]

_LARGE = 100_000
"""Entries above which vectors go one by one: trying which block is faster would cost as much as tens of products."""


def residual_operator(
    model: nn.Module,
    loss: Loss,
    data: Any,
    params: Sequence[str],
    denominator: float,
    forward: Forward | None,
    max_memory: int,
) -> LinearOperator:
    """R = Σ_i Σ_c r_ic ∂²f_c(x_i)/∂θ² / denominator [P, P] of some parameters, r_i = ∂(numerator)/∂f_i at this θ.

    It is the Hessian of Σ_i ⟨r_i, f(x_i)⟩ with r held fixed, so a product costs one with the Hessian of the loss, and
    no Gauss-Newton product has to be taken away from it.
    """

    def linearized(output: Tensor, target: Any) -> Tensor:
        with torch.enable_grad():
            slope = output_gradient(loss, output.detach(), target)
        return (output * slope).sum()

    named = dict(model.named_parameters())
    large = sum(named[name].numel() for name in params) > _LARGE
    linearized.__name__ = f"residual of {loss.name}"
    op = hessian(
        model, linearized, data,
        params=list(params), reduction="sum", forward=forward, max_memory=max_memory, mode="kept",
        block_size=1 if large else None,
    )  # fmt: skip
    return op * (1.0 / denominator)
