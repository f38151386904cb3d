"""Average-case adaptive sharpness: its limit ½ Σ θ_k² H_kk, and antithetic pairs of perturbations at a finite ρ."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.adaptive_result import AdaptiveSharpness
from flatkern.diagonal_traces import diagonal_traces
from flatkern.estimators.rounds import in_rounds
from flatkern.ggn_entries import ggn_diagonal
from flatkern.hessian_parts import EXACT_UP_TO, HessianParts, why_no_split
from flatkern.operators import ggn
from flatkern.perturbed_loss import PerturbedLoss

__all__ = ["Control", "finite_average", "infinitesimal_average", "make_control"]

_PILOT = 8
"""Pairs whose spread tells how many are needed and whether the control variate pays; they count."""
_CONTROL_COST = 3
"""A pair with its control variate (two forward passes and a Gauss-Newton product) over a pair without."""


def infinitesimal_average(
    parts: HessianParts, rtol: float, samples: int | None, max_samples: int, generator: torch.Generator
) -> AdaptiveSharpness:
    """½ Σ θ_k² H_kk from the exact part of the diagonal and sign vectors for the rest, by layer."""
    theta = parts.layout.flatten({n: p.detach() for n, p in parts.parameters.items()})
    found = diagonal_traces(
        parts, theta.abs(), rtol=rtol, samples=samples, max_samples=max_samples, generator=generator
    )
    return AdaptiveSharpness(
        value=found.value / 2,
        stderr=found.stderr / 2,
        method=found.method,
        num_data=parts.num_data,
        matvecs=found.matvecs,
        passes=found.passes,
        converged=found.converged,
        samples=None if found.samples is None else found.samples / 2,
        per_layer={layer: value / 2 for layer, value in found.per_layer.items()},
        per_layer_stderr={layer: error / 2 for layer, error in found.per_layer_stderr.items()},
        notes=found.notes,
        dof=found.dof,
        loss=parts.loss,
        exact=parts.exact,
        sampled=parts.sampled,
    )


@dataclass(frozen=True)
class Control:
    """½ vᵀ D G D v of a direction v, whose mean over standard normal v is known."""

    form: Callable[[Tensor], float]
    mean: float


def make_control(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    loss: PerturbedLoss,
    same: dict[str, Any],
    *,
    forced: bool,
) -> Control | str:
    """The control variate, or why there is none.

    ``same``: ``params``, ``reduction``, ``forward`` and ``max_memory`` of the call. Unless ``forced`` it is not made
    where its mean would take more than 64 cotangents a sample.
    """
    obstacle = why_no_split(
        model, loss_fn, data, same["reduction"], same["forward"], same["max_memory"],
        None if forced else EXACT_UP_TO,
    )  # fmt: skip
    if obstacle is not None:
        return obstacle.reason
    entries = ggn_diagonal(model, loss_fn, data, **same)
    op = ggn(model, loss_fn, data, **same)
    scales = loss.theta.abs()

    def form(v: Tensor) -> float:
        moved = (scales * v).to(op.dtype)
        return 0.5 * float(moved.double() @ (op @ moved).double())

    return Control(form, 0.5 * float(entries.values @ loss.theta.double().square()))


def finite_average(
    loss: PerturbedLoss,
    rho: float,
    seed: int,
    control: Control | None,
    *,
    forced: bool,
    rtol: float,
    samples: int | None,
    max_samples: int,
) -> AdaptiveSharpness:
    """(E L(θ + δ) − L(θ))/ρ² from pairs ±δ_j, δ_j = ρ |θ| ∘ v_j.

    Args:
        loss: with θ.
        rho: ρ.
        seed: pair j's v depends on (seed, j) alone.
        control: subtracted from each pair's value where it pays (or always, ``forced``), its mean added.
        rtol, samples, max_samples: as for :func:`flatkern.adaptive_sharpness`.
    """
    scales = rho * loss.theta.abs()

    def pair(index: int, with_control: bool) -> tuple[float, float]:
        v = loss.normal(seed, index)
        delta = scales * v
        plain = (0.5 * (loss.at(delta) + loss.at(-delta)) - loss.value) / rho**2
        known = control.form(v) - control.mean if control is not None and with_control else 0.0
        return plain, known

    first = [pair(j, True) for j in range(min(_PILOT, samples or _PILOT, max_samples))]
    plain, known = torch.tensor(first, dtype=torch.float64).unbind(1)
    with_control = control is not None and (
        forced or float((plain - known).var()) * _CONTROL_COST < float(plain.var())
    )
    begun = plain - known if with_control else plain

    def draw(start: int, count: int) -> Tensor:
        fresh = [pair(j, with_control) for j in range(max(start, len(begun)), start + count)]
        found = torch.tensor([y - x for y, x in fresh], dtype=torch.float64)
        return torch.cat([begun[start : start + count], found])

    run = in_rounds(
        draw, _error, lambda values: rtol * abs(float(values.mean())),
        first=_PILOT, samples=samples, most=max_samples,
    )  # fmt: skip
    values, notes = run.values, run.notes("pairs", "max_samples")
    how = f"{len(values)} antithetic pairs" + (" with a Gauss-Newton control variate" if with_control else "")
    return AdaptiveSharpness(
        value=float(values.mean()),
        stderr=_error(values),
        method=how,
        num_data=loss.num_data,
        passes=2 * len(values) + 1,
        matvecs=len(values) if with_control else (len(begun) if control is not None else 0),
        converged=not notes,
        samples=values,
        notes=notes,
        dof=len(values) - 1,
        rho=rho,
        loss=loss.value,
    )


def _error(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5)
