"""Worst-case adaptive sharpness: the expansion of the maximum, and ascent in the ball ‖δ/|θ|‖₂ ≤ ρ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flatkern.adaptive_result import AdaptiveSharpness
from flatkern.estimators.eigenpairs import eigsh
from flatkern.operators import hessian
from flatkern.operators.congruence import Congruence, Scaling
from flatkern.perturbed_loss import PerturbedLoss

__all__ = ["expansion", "find_worst"]

_GROWTH, _SHRINK = 2.0, 4.0
"""What the step of an ascent is multiplied with where the loss rose, and divided by where it fell."""


def expansion(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    loss: PerturbedLoss,
    same: dict[str, Any],
    generator: torch.Generator,
) -> AdaptiveSharpness:
    """½ λ_max(DHD) with ‖g‖ and the curvature along g = θ∘∇L.

    ``same``: ``params``, ``reduction``, ``forward`` and ``max_memory`` of the call.
    """
    op = hessian(model, loss_fn, data, **same)
    scaled = Congruence(op, Scaling(loss.theta.abs().to(op.dtype)))
    pairs = eigsh(scaled, 1, which="LA", tol=1e-3, generator=generator)
    _, gradient = loss.gradient_at(torch.zeros_like(loss.theta))
    g = (loss.theta.abs() * gradient).to(op.dtype)
    slope = float(g.double().norm())
    along = float(g.double() @ (scaled @ g).double()) / slope**2 if slope else 0.0
    converged = bool(pairs.converged[0])
    return AdaptiveSharpness(
        value=float(pairs.values[0]) / 2,
        method="Lanczos on |θ| H |θ|",
        num_data=op.num_data,
        matvecs=pairs.matvecs + 1,
        converged=converged,
        notes=pairs.notes,
        kind="worst",
        loss=loss.value,
        slope=slope,
        slope_curvature=along,
        error_bound=float(pairs.residuals[0]) / 2,
    )


def find_worst(loss: PerturbedLoss, rho: float, seed: int, steps: int, restarts: int) -> AdaptiveSharpness:
    """The largest L(θ + |θ|∘τ) − L(θ), ‖τ‖₂ ≤ ρ, that projected gradient ascent finds; never below 0.

    Steps go along the normalized gradient; a step that lowers the loss is taken back and a shorter one tried. One
    ascent starts at ρ g/‖g‖, the ASAM point, ``restarts`` others at random points of the sphere.
    """
    scales = loss.theta.abs()

    def at(tau: Tensor) -> tuple[float, Tensor]:
        value, gradient = loss.gradient_at(scales * tau)
        return value, scales * gradient

    _, gradient = at(torch.zeros_like(loss.theta))
    slope = float(gradient.double().norm())
    starts = [gradient] if slope else []
    starts += [loss.normal(seed, j) for j in range(restarts if slope else max(1, restarts))]
    best, passes = loss.value, 2
    for start in starts:
        tau = _on_ball(start * (rho / float(start.double().norm())), rho)
        value, gradient = at(tau)
        step, passes = 2.0 * rho, passes + 1 + steps
        best = max(best, value)
        for _ in range(steps):
            size = float(gradient.double().norm())
            if size == 0.0:
                break
            trial = _on_ball(tau + gradient * (step / size), rho)
            reached, there = at(trial)
            if reached > value:
                tau, value, gradient, step = trial, reached, there, min(_GROWTH * step, 1e3 * rho)
            else:
                step /= _SHRINK
        best = max(best, value)
    return AdaptiveSharpness(
        value=best - loss.value,
        method=f"lower bound: best of {len(starts)} ascents of {steps} steps",
        num_data=loss.num_data,
        passes=passes,
        kind="worst",
        rho=rho,
        loss=loss.value,
        slope=slope,
    )


def _on_ball(tau: Tensor, rho: float) -> Tensor:
    size = float(tau.double().norm())
    return tau * (rho / size) if size > rho else tau
