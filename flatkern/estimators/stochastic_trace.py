"""The trace of a linear operator: a pilot plans the number of probes, fresh probes make the estimate."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from tqdm import tqdm

from flatkern.estimators.common import (
    check_count,
    check_positive,
    make_generator,
    progress_bar,
    require_finite,
    square_operator,
)
from flatkern.estimators.probes import Hutchinson, HutchPlusPlus, TraceSampler, exact_trace
from flatkern.operators.base import LinearOperator
from flatkern.results import Estimate, standard_error

__all__ = ["trace"]

PILOT = 16
"""Probes whose spread plans the number of those that make the estimate."""
RESERVE = 1.5
"""Planned probes over (sd/tolerance)²: the spread of 16 probes is itself known to some 18 % only."""
SKETCH = 32
"""Sketch size of Hutch++ where the number of samples is not given."""
DEFAULT_RTOL = 0.05

Method = Literal["auto", "hutchinson", "hutch++", "exact"]


@dataclass(frozen=True)
class _Goal:
    rtol: float | None
    atol: float | None

    def tolerance(self, value: float) -> float:
        """The standard error aimed at, given a value of the trace."""
        return max((self.rtol or 0.0) * abs(value), self.atol or 0.0)

    @property
    def given(self) -> bool:
        return self.rtol is not None or self.atol is not None


def trace(
    op: Any,
    *,
    rtol: float | None = None,
    atol: float | None = None,
    samples: int | None = None,
    max_matvecs: int = 2000,
    method: Method = "auto",
    seed: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Estimate:
    """Tr A of a square operator, with the standard error of the estimate.

    Hutchinson: mean of vᵀ A v over independent sign vectors v; unbiased, stderr = sd/√k. With a tolerance, a
    pilot of 16 probes fixes k = 1.5 (sd/tolerance)², at least 16; the pilot is then discarded and k fresh
    probes make the estimate. Neither the value nor its error bar therefore depends on when it looked good
    enough: stopping on a running interval is overconfident. The interval value ± 2 stderr covers the truth
        about 95 times in 100.

    Args:
        op: a flatkern operator, matrix, or any object with ``shape``, ``dtype`` and ``@``; need not be
            symmetric.
        rtol: aim at stderr ≤ rtol · |trace|; 0.05 where neither ``atol`` nor ``samples`` is given.
        atol: aim at stderr ≤ atol; with both, the looser one counts.
        samples: number of probes, at least 2; then there is no pilot.
        max_matvecs: all products together, pilot and sketch included.
        method: ``"hutchinson"``; ``"hutch++"`` (exact on a sketched range of size ``samples``, or 32 with a
            tolerance, then Hutchinson on the rest: for spectra that decay); ``"exact"`` (P products);
            ``"auto"`` (Hutchinson, or exact where that takes no more products).
        seed: integer seed; or ``generator``: a ``torch.Generator`` to draw from. The global one is never
            used.
        generator: see ``seed``.
        progress: show a bar.

    Returns:
        An :class:`flatkern.results.Estimate`. ``samples`` holds the k single values, [k] float64.
        ``converged`` is true when the run was not cut by ``max_matvecs`` and the final stderr met the
        tolerance. Quadratic forms are summed in float64, products are in the operator's dtype.

    Raises:
        TypeError, ValueError: an argument that cannot be used, named.
        FloatingPointError: products gave NaN or Inf.

    Example:
        >>> import torch
        >>> from flatkern.estimators import trace
        >>> float(trace(torch.diag(torch.arange(1.0, 101.0)), samples=4, seed=0))  # diagonal: no variance
        5050.0
    """
    start = time.perf_counter()
    operator = square_operator(op)
    if method not in get_args(Method):
        raise ValueError(f"method: {method!r} is unknown; expected one of {', '.join(get_args(Method))}")
    goal = _Goal(check_positive(rtol, "rtol"), check_positive(atol, "atol"))
    check_count(max_matvecs, "max_matvecs", least=2)
    if samples is not None:
        check_count(samples, "samples", least=2)
    elif not goal.given:
        goal = _Goal(DEFAULT_RTOL, None)
    source = make_generator(seed, generator, operator.device)
    size = operator.shape[0]
    if method == "exact" and size > max_matvecs:
        raise ValueError(f"max_matvecs: the exact trace takes {size} products, more than {max_matvecs}")
    with progress_bar(samples or max_matvecs, enabled=progress, what="trace") as bar:
        outright = samples if samples is not None else 2 * PILOT
        if method == "exact" or (method == "auto" and size <= min(outright, max_matvecs)):
            return _exact(op, operator, 0, start, bar)
        sampler = _sampler(operator, method, samples, max_matvecs, source, bar)
        left = max_matvecs - sampler.setup_matvecs
        wanted, pilot = samples or left, 0
        if samples is None and left > 2 * PILOT:
            pilot = PILOT
            wanted = _plan(sampler, goal, source, bar)
            left -= pilot
            if method == "auto" and size <= min(wanted, left):
                return _exact(op, operator, pilot, start, bar)
        bar.total = sampler.setup_matvecs + pilot + min(wanted, left)
        values = sampler.offset + sampler.draw(min(wanted, left), source, bar)
    values = require_finite(values.cpu(), "trace")
    value, stderr = float(values.mean()), standard_error(values) or 0.0
    met = not goal.given or stderr <= goal.tolerance(value)
    return Estimate(
        value=value,
        stderr=stderr,
        method="hutch++" if method == "hutch++" else "hutchinson",
        num_data=getattr(op, "num_data", None),
        matvecs=sampler.setup_matvecs + pilot + len(values),
        seconds=time.perf_counter() - start,
        converged=met and wanted <= left,
        samples=values,
        notes=_notes(wanted, left, met, planned=samples is not None or pilot > 0),
    )


def _sampler(
    op: LinearOperator, method: str, samples: int | None, max_matvecs: int, source: torch.Generator, bar: tqdm
) -> TraceSampler:
    if method != "hutch++":
        return Hutchinson(op)
    rank = min(samples or SKETCH, op.shape[0])
    if max_matvecs < 2 * rank + 2:
        raise ValueError(
            f"max_matvecs: Hutch++ with a sketch of {rank} takes at least {2 * rank + 2} products"
        )
    return HutchPlusPlus(op, rank, source, bar)


def _plan(sampler: TraceSampler, goal: _Goal, source: torch.Generator, bar: tqdm) -> int:
    values: Tensor = require_finite((sampler.offset + sampler.draw(PILOT, source, bar)).cpu(), "trace")
    spread, tolerance = float(values.std()), goal.tolerance(float(values.mean()))
    if spread == 0.0:
        return PILOT
    # a trace of zero leaves a relative tolerance of zero: no number of probes is enough
    return max(PILOT, math.ceil(RESERVE * (spread / tolerance) ** 2)) if tolerance > 0 else 1 << 62


def _exact(op: Any, operator: LinearOperator, spent: int, start: float, bar: tqdm) -> Estimate:
    value = float(require_finite(exact_trace(operator, bar).cpu(), "trace"))
    return Estimate(
        value=value,
        method="exact",
        num_data=getattr(op, "num_data", None),
        matvecs=spent + operator.shape[0],
        seconds=time.perf_counter() - start,
    )


def _notes(wanted: int, left: int, met: bool, *, planned: bool) -> tuple[str, ...]:
    if not met and not planned:
        return (f"max_matvecs left {left} probes, too few for a pilot and an estimate",)
    if wanted > left:
        plan = (
            f"{wanted} probes were planned"
            if wanted < 1 << 62
            else "the trace is about zero beside its spread"
        )
        return (f"max_matvecs left {left} probes; {plan}",)
    return () if met else ("the probes spread more than the pilot's did; run again with more samples",)
