"""Geometry without a Jacobian: σ_max, energies, log-volume and rank of many J_i from products, with their errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from flatkern.bidiagonal import Bidiagonals, LockstepBidiagonalization, Product
from flatkern.estimators.quadrature import Tridiagonals
from flatkern.sample_map import SampleMap
from flatkern.signs import draw_signs
from flatkern.spectra import rank_tolerance

__all__ = [
    "CONFIDENCE",
    "QUADRATURE_FLOOR",
    "KrylovChunk",
    "KrylovSettings",
    "LargestSingular",
    "largest_singular",
    "measure_krylov",
]

CONFIDENCE = 0.95
"""Of the upper bound on σ_max, over the random start."""
QUADRATURE_FLOOR = 1e-7
"""Singular values below this times the largest are lost where their squares are handled in float64."""
_CHECK_EVERY = 4


@dataclass(frozen=True)
class KrylovSettings:
    """How far to go."""

    rtol: float
    max_steps: int
    probes: int
    volume_steps: int


@dataclass(frozen=True)
class LargestSingular:
    """σ_max of n matrices, float64 [n] each."""

    values: Tensor
    residuals: Tensor
    upper: Tensor
    converged: Tensor
    leading: Tensor
    """The leading singular values that have converged for all, [n, c]."""
    bidiagonals: Bidiagonals
    basis: Tensor
    """Of the small side, [n, m, S]."""


@dataclass(frozen=True)
class KrylovChunk:
    """What a chunk of samples gives; float64 [n] where not said otherwise. ``*_error``: standard errors."""

    sigma: Tensor
    residuals: Tensor
    upper: Tensor
    converged: Tensor
    leading: Tensor
    energy: Tensor
    energy_error: Tensor
    participation: Tensor
    participation_error: Tensor
    volume: Tensor
    """½ log det of the small side's Gram matrix by Gauss quadrature; NaN where not asked for."""
    volume_error: Tensor
    volume_lower: Tensor
    """By Gauss–Radau quadrature, if no singular value is below the rank tolerance."""
    deficient: Tensor
    """bool: a Ritz value shows a singular value below the rank tolerance."""
    pseudo: Tensor
    pseudo_error: Tensor
    rank: Tensor
    rank_error: Tensor

    @staticmethod
    def concatenate(parts: Sequence[KrylovChunk]) -> KrylovChunk:
        """Consecutive chunks as one."""
        width = min(p.leading.shape[1] for p in parts)
        joined = {f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(KrylovChunk)[:4]}
        joined |= {f.name: torch.cat([getattr(p, f.name) for p in parts]) for f in fields(KrylovChunk)[5:]}
        return KrylovChunk(leading=torch.cat([p.leading[:, :width] for p in parts]), **joined)


def largest_singular(
    pull: Product, push: Product, start: Tensor, settings: KrylovSettings
) -> LargestSingular:
    """σ_max by Golub–Kahan from Gaussian starts [n, S], until the residual is within ``rtol`` for all n.

    The bound from above holds with probability :data:`CONFIDENCE` over the starts: after m steps the relative error
    of λ_max(A Aᵀ) exceeds ε with a probability of at most 1.648 √S exp(−√ε (2m − 1)), whatever the spectrum
    (Kuczyński & Woźniakowski, SIAM J. Matrix Anal. Appl. 13 (1992), theorem 4.2); the checks that might have ended
    the run share what is left to 1.
    """
    n, size = start.shape
    room = min(settings.max_steps, size)
    run = LockstepBidiagonalization(pull, push, start, room)
    while True:
        run.step()
        last = run.steps == room
        if not last and run.steps % _CHECK_EVERY:
            continue
        found = run.bidiagonals()
        top, residual = found.values[:, 0], found.residuals[:, 0]
        good = residual <= settings.rtol * top
        if last or bool(good.all()):
            break
    checks = math.ceil(room / _CHECK_EVERY)
    root = math.log(1.648 * math.sqrt(size) * checks * n / (1 - CONFIDENCE)) / (2 * run.steps - 1)
    if run.steps == size or bool((found.coupling == 0).all()):
        root = 0.0  # the whole space, or all of it that the start can see
    upper = top / math.sqrt(1 - root**2) if root < 1 else torch.full_like(top, math.inf)
    settled = (found.residuals <= settings.rtol * found.values) & (found.values > 0)
    leading = int(settled.long().cumprod(1).sum(1).min())
    return LargestSingular(top, residual, upper, good, found.values[:, :leading], found, run.basis)


def measure_krylov(jacobians: SampleMap, settings: KrylovSettings, generator: torch.Generator) -> KrylovChunk:
    """All quantities of a chunk of samples, on the smaller side S = min(N, M) of their Jacobians."""
    n, outputs, inputs = jacobians.n, jacobians.outputs, jacobians.inputs
    size = min(outputs, inputs)
    there, back = (jacobians.pull, jacobians.push) if outputs <= inputs else (jacobians.push, jacobians.pull)
    like = jacobians.like

    def rows(product: Product) -> Product:
        return lambda r: product(r.reshape(-1, n, r.shape[-1])).flatten(0, 1)

    start = torch.randn(n, size, generator=generator, dtype=torch.float64).to(like)
    top = largest_singular(rows(there), rows(back), start, settings)
    probes = [draw_signs((n, size), generator, like.device, like.dtype) for _ in range(settings.probes)]
    energy, quartic = (t.to(like.device) for t in top.bidiagonals.captured)
    nothing = torch.full((n,), math.nan, dtype=torch.float64)
    spread = _energies(there, back, top.basis, probes, energy, quartic) if probes else (nothing,) * 4
    limit = rank_tolerance(size, like.dtype) * top.values
    if probes and settings.volume_steps:
        starts = torch.cat([p / math.sqrt(size) for p in probes])
        run = LockstepBidiagonalization(rows(there), rows(back), starts, min(size, settings.volume_steps))
        for _ in range(min(size, settings.volume_steps)):
            run.step()
        volume = _volumes(run.bidiagonals(), len(probes), size, limit)
    else:
        volume = (*(nothing,) * 3, torch.zeros(n, dtype=torch.bool), *(nothing,) * 4)
    host = [top.values, top.residuals, top.upper, top.converged, top.leading, *spread, *volume]
    return KrylovChunk(*(t.cpu() for t in host))


def _energies(
    there: Product, back: Product, basis: Tensor, probes: Sequence[Tensor], energy: Tensor, quartic: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tr C and the participation ratio, C = A Aᵀ, with their errors.

    With Q the Krylov basis, Tr C = Tr QᵀCQ + Tr PCP and ‖C‖_F² = ‖CQ‖_F² + ‖CP‖_F², P = I − QQᵀ; the first parts are
    known and signs z estimate the others: E ‖AᵀPz‖² and E ‖CPz‖² (Hutch++, with the basis at hand for its sketch).
    """
    signs = torch.stack(list(probes))  # [k, n, S]
    within = torch.einsum("nms,kns->knm", basis, signs)
    outside = signs - torch.einsum("nms,knm->kns", basis, within)
    image = there(outside)
    a = image.double().square().sum(2)
    b = back(image).double().square().sum(2)
    k = len(probes)
    first, second = energy + a.mean(0), quartic + b.mean(0)
    zero = second <= 0
    ratio = torch.where(zero, 0.0, first.square() / torch.where(zero, 1.0, second))
    if k < 2:
        unknown = torch.full_like(first, math.nan)
        return first, unknown, ratio, unknown
    per_first = torch.where(zero, 0.0, 2 * first / torch.where(zero, 1.0, second))
    per_second = torch.where(zero, 0.0, ratio / torch.where(zero, 1.0, second))
    slopes = per_first * (a - a.mean(0)) - per_second * (b - b.mean(0))  # delta method
    return first, (a.var(0) / k).sqrt(), ratio, (slopes.square().sum(0) / (k - 1) / k).sqrt()


def _volumes(found: Bidiagonals, probes: int, size: int, limit: Tensor) -> tuple[Tensor, ...]:
    """Volume, its error and lower bound, deficiency, pseudo-volume and rank with their errors, from the k runs."""
    limit = limit.cpu()
    over_runs = limit.repeat(probes)
    tiny = torch.finfo(torch.float64).tiny
    seen = found.weights > 1e-24  # what an exhausted run put there has none
    logs = found.values.clamp_min(tiny).log()
    gauss = size * torch.where(seen, found.weights * logs, 0.0).sum(1)
    least = torch.where(seen, found.values, math.inf).min(1).values
    deficient = (least.reshape(probes, -1) <= limit).any(0) | (limit == 0)
    # the lower bound: one node at the least value a λ_min may have, as far as squares resolve it
    floor = torch.minimum(torch.maximum(over_runs, QUADRATURE_FLOOR * found.values[:, 0]), least).square()
    diagonal = found.lower.diagonal(dim1=1, dim2=2)
    below = torch.nn.functional.pad(found.lower.diagonal(offset=-1, dim1=1, dim2=2), (1, 0))
    following = torch.cat([below[:, 1:], found.coupling[:, None]], 1)
    rule = Tridiagonals.of_runs(diagonal.square() + below.square(), diagonal * following).radau(floor)
    nodes = torch.maximum(rule.nodes, floor[:, None]).clamp_min(tiny)
    lower = size / 2 * (rule.weights * nodes.log()).sum(1)
    values, weights = found.from_zero()
    kept = values > over_runs[:, None]
    pseudo = size * torch.where(kept, weights * values.clamp_min(tiny).log(), 0.0).sum(1)
    rank = size * torch.where(kept, weights, 0.0).sum(1)
    by_probe = [v.reshape(probes, -1) for v in (gauss, pseudo, rank)]
    (volume, volume_error), (pseudo_mean, pseudo_error), (rank_mean, rank_error) = map(_mean, by_probe)
    least_volume = lower.reshape(probes, -1).mean(0)
    return (
        volume,
        volume_error,
        torch.where(deficient, -math.inf, least_volume),
        deficient,
        pseudo_mean,
        pseudo_error,
        rank_mean,
        rank_error,
    )


def _mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard error over the probes, [k, n] → [n] each; NaN for the error of one probe."""
    k = len(values)
    return values.mean(0), (values.var(0) / k).sqrt() if k > 1 else torch.full_like(values[0], math.nan)
