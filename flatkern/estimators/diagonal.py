"""The diagonal of a linear operator, entry by entry with its standard error."""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flatkern.estimators.checkpoint import Checkpoint, require_seed
from flatkern.estimators.common import (
    NotSymmetricError,
    check_count,
    check_positive,
    in_own_precision,
    make_generator,
    progress_bar,
    require_finite,
    square_operator,
)
from flatkern.estimators.decay import Decay, observe
from flatkern.estimators.hutchinson import unit_images
from flatkern.estimators.interrupt import Interruptible
from flatkern.estimators.probes import Probes
from flatkern.estimators.sampling_run import Run
from flatkern.estimators.sketch import Sketch, largest_sketch
from flatkern.estimators.trace_plan import PILOT, UNREACHABLE, next_size, samples_for, vectors_for
from flatkern.estimators.xdiag import xdiag

__all__ = ["Diagonal", "diagonal"]

DEFAULT_RTOL = 0.1

Method = Literal["auto", "hutchinson", "xdiag", "exact"]


@dataclass(frozen=True)
class Diagonal:
    """The P diagonal entries and their standard errors, float64 on the operator's device."""

    values: Tensor = field(repr=False)
    stderr: Tensor = field(repr=False)
    """One standard error an entry, of the estimator; zeros where the method is exact."""
    method: str
    samples: int
    """How many vectors each entry is a mean over; 0 where it is exact."""
    matvecs: int
    seconds: float
    converged: bool
    notes: tuple[str, ...] = ()

    @property
    def relative_error(self) -> float:
        """‖stderr‖₂ / ‖values‖₂; one host synchronization."""
        error, size = float(self.stderr.norm()), float(self.values.norm())
        return 0.0 if error == 0 else (error / size if size else math.inf)

    def __len__(self) -> int:
        return len(self.values)


@in_own_precision
def diagonal(
    op: Any,
    *,
    rtol: float | None = None,
    samples: int | None = None,
    max_matvecs: int = 2000,
    method: Method = "auto",
    max_memory: int = 1 << 30,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
    progress: bool = False,
) -> Diagonal:
    """The diagonal A_kk of a square operator.

    Args:
        op: a flatkern operator, matrix, or any object with ``shape``, ``dtype`` and ``@``.
        rtol: aim at ‖stderr‖₂ ≤ rtol · ‖diagonal‖₂; 0.1 where ``samples`` is not given. A pilot of at least 16
            vectors fixes the method and the number of vectors.
        samples: number k of random vectors, at least 2; then there is no pilot.
        max_matvecs: all products together, pilot included.
        method: ``"hutchinson"``: mean of v ∘ Av over sign vectors v; one product a vector, variance of entry i
            Σ_{j≠i} A_ij². ``"xdiag"``: exact on the range that the other vectors have found, two products a
            vector, for symmetric operators whose spectrum decays. ``"exact"``: P products with unit vectors.
            ``"auto"``: what the pilot predicts to be cheapest; with ``samples`` Hutchinson's, or exact where
            P ≤ k.
        max_memory: bytes for vectors that are kept (XDiag and its pilot, 4 k P numbers).
        seed: integer seed; or ``generator``: a ``torch.Generator`` to draw from. The global one is never used.
        generator: see ``seed``.
        checkpoint: a file; a run with the same arguments continues from it to bit-identical results.
        checkpoint_seconds: least time between two writes.
        progress: show a bar.

    Returns:
        A :class:`Diagonal`. Sums are float64, products in the operator's dtype. On Ctrl-C, what is there.

    Raises:
        TypeError, ValueError: an argument that cannot be used, named.
        NotSymmetricError: ``"xdiag"`` on an operator that is not symmetric.
        FloatingPointError: products gave NaN or Inf.

    Sources: Bekas, Kokiopoulou, Saad, Applied Numerical Mathematics 57 (2007); Epperly, Tropp, Webber, SIAM J.
    Matrix Anal. Appl. 45 (2024).

    Example:
        >>> import torch
        >>> from flatkern.estimators import diagonal
        >>> diagonal(torch.diag(torch.tensor([1.0, 2.0, 3.0]))).values
        tensor([1., 2., 3.], dtype=torch.float64)
    """
    start = time.perf_counter()
    operator = square_operator(op)
    size = operator.shape[0]
    if method not in get_args(Method):
        raise ValueError(f"method: {method!r} is unknown; expected one of {', '.join(get_args(Method))}")
    check_positive(rtol, "rtol")
    check_count(max_matvecs, "max_matvecs", least=2)
    check_count(max_memory, "max_memory")
    if samples is not None:
        check_count(samples, "samples", least=2)
        if rtol is not None:
            raise ValueError("rtol: give either rtol or samples; with samples there is no pilot")
    require_seed(checkpoint, generator)
    most = min(size, largest_sketch(size, operator.dtype.itemsize, max_memory), max_matvecs // 2)
    if method == "exact" and size > max_matvecs:
        raise ValueError(f"max_matvecs: the exact diagonal takes {size} products, more than {max_matvecs}")
    if method == "xdiag" and (needed := samples or min(PILOT, size)) > most:
        raise ValueError(
            f"samples: xdiag with {needed} vectors does not fit P = {size}, max_memory and max_matvecs; at most "
            f"{most} do"
        )
    make_generator(seed, generator, operator.device)
    settings = {"seed": seed, "rtol": rtol, "samples": samples, "max_matvecs": max_matvecs, "method": method,
                "max_memory": max_memory}  # fmt: skip
    with (
        Interruptible() as stop,
        Checkpoint(
            checkpoint, what="diagonal", op=operator, settings=settings, seconds=checkpoint_seconds
        ) as file,
        progress_bar(samples or max_matvecs, enabled=progress, what="diagonal") as bar,
    ):
        run = Run(operator, bar, file, stop, max_matvecs)
        source = make_generator(run.seed(seed) if checkpoint else seed, generator, operator.device)
        found = _estimate(run, Probes(operator, source), method, rtol or DEFAULT_RTOL, samples, most)
        run.save()
        if found is None:
            raise KeyboardInterrupt("interrupted before there were two values")
    require_finite(found.values.sum().cpu(), "diagonal")
    result = Diagonal(
        values=found.values,
        stderr=found.squares.sqrt(),
        method=found.method,
        samples=found.samples,
        matvecs=run.matvecs,
        seconds=time.perf_counter() - start,
        converged=True,
    )
    met = samples is not None or result.relative_error <= (rtol or DEFAULT_RTOL)
    if run.interrupted:
        notes: tuple[str, ...] = ("interrupted: the values made until then",)
    elif found.wanted > max_matvecs:
        planned = "more" if found.wanted >= UNREACHABLE else str(found.wanted)
        notes = (f"max_matvecs: {planned} products were planned, {max_matvecs} allowed",)
    else:
        notes = () if met else ("the values spread more than the pilot had predicted; ask for more samples",)
    return replace(result, converged=not notes, notes=notes)


@dataclass(frozen=True)
class _Found:
    method: str
    values: Tensor
    squares: Tensor
    samples: int
    wanted: int


def _estimate(
    run: Run, probes: Probes, method: Method, rtol: float, samples: int | None, most: int
) -> _Found | None:
    size, eps = run.op.shape[0], torch.finfo(run.op.dtype).eps
    if method == "exact" or (method == "auto" and size <= min(samples or 2 * PILOT, run.left)):
        return _exact(run)
    if samples is not None and method != "xdiag":
        return _hutchinson(run, probes, min(samples, run.left), samples)
    if method != "xdiag" and min(most, run.left) < PILOT < size:  # no room for a pilot
        return _hutchinson(run, probes, run.left, UNREACHABLE)
    sketch = Sketch(run, probes.signs)
    target = samples or min(PILOT, most)
    kind, count, wanted = "xdiag", target, 2 * target
    while True:
        sketch.grow(target)
        if run.interrupted:
            return _from_sketch(sketch)
        decay = observe(sketch, size, eps, what="diagonal")
        if method == "xdiag" and not decay.symmetric:
            raise NotSymmetricError("op: it is not symmetric, which xdiag needs; use method='hutchinson'")
        if samples is not None:
            break
        kind, count, wanted = _plan(decay, method, rtol, size, most, run.left)
        step = min(next_size(len(sketch)), most)
        if kind != "xdiag" or count <= step or step <= len(sketch):
            break
        target = step
    wanted += run.matvecs if samples is None else 0
    if kind == "exact":
        return _exact(run)
    if kind == "hutchinson":
        return _hutchinson(run, probes, min(count, run.left), wanted)
    sketch.grow(count)
    found = None if run.interrupted else xdiag(run, sketch)
    if found is None:
        return _from_sketch(sketch)
    return _Found("xdiag", *found, samples=count, wanted=wanted)


def _plan(decay: Decay, method: Method, rtol: float, size: int, most: int, left: int) -> tuple[str, int, int]:
    """Method, vectors and products beyond those made: Σ_k Var of entry k is half the variance of the trace."""
    tolerance = rtol * math.sqrt(decay.squared_diagonal)
    m = decay.seen
    count = samples_for(decay.sign_variance / 2, tolerance, decay.relative_error)
    options = {"hutchinson": (count, count), "exact": (size, size)}
    if decay.symmetric:
        vectors = vectors_for(decay.one_sided_at, tolerance, 0.0, m, most, shared=0.0)
        options["xdiag"] = (vectors, 2 * vectors - m)
    allowed = options if method == "auto" else {method: options[method]}
    kind, (count, cost) = min(allowed.items(), key=lambda item: item[1][1])
    if cost <= left:
        return kind, count, cost
    if kind == "xdiag":
        return kind, min(most, (left + m) // 2), cost
    return ("hutchinson" if kind == "exact" else kind), left, cost


def _exact(run: Run) -> _Found | None:
    size = run.op.shape[0]
    values = run.array("exact", (size,), torch.float64)
    for block in run.blocks("exact", size):
        if not block.known:
            values[block.span] = unit_images(run, block.start, block.stop)
    return None if run.interrupted else _Found("exact", values, torch.zeros_like(values), 0, size)


def _hutchinson(run: Run, probes: Probes, count: int, wanted: int) -> _Found | None:
    """Running mean and sum of squared deviations, two vectors of P numbers whatever the count."""
    size, done = run.op.shape[0], 0
    mean = run.array("mean", (size,), torch.float64)
    deviations = run.array("deviations", (size,), torch.float64)
    for block in run.blocks("forms", count):
        rows = probes.signs(len(block))
        done = block.stop
        if block.known:
            continue
        entries = rows.double() * (run.op @ rows.mT).mT.double()
        # two sets of values together: Chan, Golub, LeVeque (1983)
        shift = entries.mean(0) - mean
        deviations += (entries - entries.mean(0)).square().sum(0)
        deviations += shift.square() * (block.start * len(block) / block.stop)
        mean += shift * (len(block) / block.stop)
    return _Found("hutchinson", mean, deviations / (done * (done - 1)), done, wanted) if done > 1 else None


def _from_sketch(sketch: Sketch) -> _Found | None:
    """What is there when a run is interrupted early."""
    if len(sketch) < 2:
        return None
    entries = torch.cat(
        [v.double() * y.double() for v, y in zip(sketch.vectors(), sketch.images(), strict=True)]
    )
    return _Found("hutchinson", entries.mean(0), entries.var(0) / len(entries), len(entries), 0)
