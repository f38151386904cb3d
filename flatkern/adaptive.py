"""Adaptive sharpness: how a loss answers to changes of its parameters in proportion to their size."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any, get_args

import torch
from torch import nn

from flatkern.adaptive_average import Control, finite_average, infinitesimal_average, make_control
from flatkern.adaptive_result import AdaptiveSharpness, Kind
from flatkern.adaptive_worst import expansion, find_worst
from flatkern.estimators.common import check_count, check_positive, make_generator
from flatkern.hessian_parts import EXACT_UP_TO, hessian_parts
from flatkern.left_as_found import left_as_found
from flatkern.linearize import Forward, budget
from flatkern.losses import Reduction
from flatkern.perturbed_loss import PerturbedLoss
from flatkern.problem import ParameterSelection, check_model, differentiation

__all__ = ["AdaptiveSharpness", "adaptive_sharpness"]

DEFAULT_RTOL = 0.05


@differentiation()
def adaptive_sharpness(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    *,
    kind: Kind = "average",
    rho: float | None = None,
    params: ParameterSelection = None,
    reduction: Reduction | None = None,
    forward: Forward | None = None,
    rtol: float | None = None,
    samples: int | None = None,
    max_samples: int = 1000,
    control_variate: bool | None = None,
    steps: int = 20,
    restarts: int = 1,
    per_layer: bool = False,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    max_memory: int | None = None,
) -> AdaptiveSharpness:
    """Elementwise-adaptive sharpness, in four forms. D = diag |θ|, H = ∂²L/∂θ², g = θ∘∇L.

    ========= ======== ==================================================================================
    ``kind``  ``rho``  ``value``
    ========= ======== ==================================================================================
    average   None     ½ Σ_k θ_k² H_kk, the limit of the next one for ρ → 0
    average   ρ        (E L(θ + δ) − L(θ))/ρ², δ ~ N(0, ρ² diag θ²)
    worst     None     ½ λ_max(DHD), with ``slope`` = ‖g‖₂; ``at(rho)`` bounds the maximum of the expansion
    worst     ρ        max L(θ + δ) − L(θ) over ‖δ/|θ|‖₂ ≤ ρ: a LOWER bound, the best that ascent found
    ========= ======== ==================================================================================

    All but the last are divided by ρ² (Andriushchenko et al. plot the undivided S_avg and S_max, and some authors leave
    the ½ out: Σ_k θ_k² H_kk is twice the first value).

    **Average, ρ → 0**: exact for parameters in whose entries the outputs are piecewise affine (Σ θ_k² GGN_kk by layer
    rules, see :func:`flatkern.hessian_diagonal`; with more than 64 cotangents a sample by sign draws); for the others
    the residual Tr D R D is sampled with sign vectors.

    **Average, ρ > 0**: pairs (+δ, −δ), which cancel all odd orders. Where it pays, ½ δᵀGδ (G the Gauss-Newton matrix)
    is taken from each pair's value and its exact mean ½ρ² Σ θ_k² G_kk put back: unbiased at any ρ, and nearly free of
    noise for small ones where G dominates H. With one ``seed`` all models, θ and ρ see the same random numbers, so that
    differences between them are sharper than each value.

    **Kinks**: the limits are those of the almost-everywhere Hessian. In a ReLU network a finite ρ also sees the kinks,
    whose contribution to (E L(θ + δ) − L)/ρ² does not vanish as ρ → 0: the two forms differ there, by any sign, and
    neither is wrong. In float32 a finite ρ below about 1e-3 drowns in rounding (eps·L/ρ²); take float64.

    Args:
        model: left exactly as found; changed parameters exist in functional calls only.
        loss_fn, data, params, reduction, forward: as for :func:`flatkern.ggn_trace`; the loss need not be convex.
        kind, rho: see the table.
        rtol: relative standard error aimed at (average); 0.05.
        samples: number of sign vectors or of pairs instead, at least 2.
        max_samples: most of them.
        control_variate: (average, ρ > 0) force or forbid it; default: 8 pairs decide.
        steps: (worst, ρ > 0) gradients of each ascent.
        restarts: (worst, ρ > 0) ascents from random points, beside the one from the gradient's direction.
        per_layer: (average, ρ → 0) also split value and error by layer.
        seed: an integer, or ``generator``; the global generator is never used.
        generator: see ``seed``.
        max_memory: bytes of the working set; default 1 GiB.

    Returns:
        An :class:`AdaptiveSharpness`.

    Cost: average, ρ → 0: as :func:`flatkern.hessian_diagonal`, 1.2 to 2.1 gradients a sign vector. Average, ρ > 0: two
    forward passes a pair, a Gauss-Newton product more with the control variate, and once the GGN diagonal. Worst,
    ρ → 0: as :func:`flatkern.max_eigenvalue`. Worst, ρ > 0: (1 + restarts)(steps + 1) + 1 gradients.

    Raises:
        TypeError, ValueError: bad arguments, named; a callable loss that uses parameters itself (finite ρ).

    Source: Andriushchenko, Croce, Müller, Hein & Flammarion, "A Modern Look at the Relationship between Sharpness and
    Generalization", ICML 2023, arXiv 2302.07011; worst case: Kwon et al., "ASAM", ICML 2021, arXiv 2102.11600.

    Example:
        >>> import torch, flatkern as fk
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> data = (torch.tensor([[1.0, 0.0], [0.0, 3.0]]), torch.zeros(2, 1))
        >>> round(fk.adaptive_sharpness(model, torch.nn.MSELoss(), data).value, 4)  # ½ 2² (1 + 9)
        20.0
    """
    started = time.perf_counter()
    limit = budget(max_memory)
    _check(kind, rho, rtol, samples, max_samples, steps, restarts, per_layer)
    source = make_generator(seed, generator, torch.device("cpu"))
    goal = rtol or DEFAULT_RTOL
    same: dict[str, Any] = {
        "params": params, "reduction": reduction, "forward": forward, "max_memory": limit
    }  # fmt: skip
    check_model(model)
    with left_as_found(model, data):
        if kind == "average" and rho is None:
            parts = hessian_parts(model, loss_fn, data, **same, max_columns=EXACT_UP_TO)
            found = infinitesimal_average(parts, goal, samples, max_samples, source)
            if not per_layer:
                found = replace(found, per_layer=None, per_layer_stderr=None)
        else:
            loss = PerturbedLoss(model, loss_fn, data, **same)
            base = seed if seed is not None else int(torch.randint(1 << 62, (), generator=source))
            if rho is None:
                found = expansion(model, loss_fn, data, loss, same, source)
            elif kind == "worst":
                found = find_worst(loss, rho, base, steps, restarts)
            else:
                control = None
                if control_variate is not False:
                    forced = control_variate is True
                    control = make_control(model, loss_fn, data, loss, same, forced=forced)
                if isinstance(control, str) and control_variate:
                    raise ValueError(f"control_variate: not possible here: {control}")
                found = finite_average(
                    loss, rho, base, control if isinstance(control, Control) else None,
                    forced=control_variate is True, rtol=goal, samples=samples, max_samples=max_samples,
                )  # fmt: skip
    if not math.isfinite(found.value):
        raise ValueError("model: the loss overflows or is NaN near this θ; take a smaller rho or float64")
    return replace(found, seconds=time.perf_counter() - started)


def _check(
    kind: str,
    rho: float | None,
    rtol: float | None,
    samples: int | None,
    max_samples: int,
    steps: int,
    restarts: int,
    per_layer: bool,
) -> None:
    if kind not in get_args(Kind):
        raise ValueError(f"kind: {kind!r} is unknown; expected one of {', '.join(get_args(Kind))}")
    check_positive(rho, "rho")
    check_positive(rtol, "rtol")
    check_count(max_samples, "max_samples", least=2)
    check_count(steps, "steps")
    check_count(restarts, "restarts", least=0)
    if samples is not None:
        check_count(samples, "samples", least=2)
    if per_layer and (kind == "worst" or rho is not None):
        raise ValueError("per_layer: only kind='average' with rho=None is a sum over layers")
