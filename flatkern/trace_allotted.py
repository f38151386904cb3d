"""Tr H in one pass over recorded runs, each of which serves the Gauss-Newton part and the residual.

Where nothing has to be drawn both parts are exact. Else a plain forward pass tells the sizes of all samples' output
Hessians and residuals; a pilot on some of them, large ones with more probability, what a draw of either part spreads.
Samples are then taken in order of size, and each chunk gets the groups, draws and probes that meet the tolerance at
the least cost (:mod:`flatkern.trace_plan`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flatkern.freedom import SummedVariance
from flatkern.loss_data import check_target, residual_norms
from flatkern.problem import model_device
from flatkern.recorded_pull import RecordedPull
from flatkern.recorded_runs import RecordedRuns
from flatkern.residual import Chunk, Sites, Twice
from flatkern.reverse import has_reverse_pass
from flatkern.samples import count_samples
from flatkern.tape import UnsupportedError
from flatkern.trace_goal import Goal
from flatkern.trace_groups import columns_of
from flatkern.trace_plan import Share, Way, allot
from flatkern.trace_sketch import GroupSketch
from flatkern.trace_survey import Batch, Expected, expected, outlooks

__all__ = ["Allotment", "Found"]

MOST_COLUMNS = 64
"""Columns of S_i up to which this is tried."""
LEAST_SAMPLES = 128
LEAST_WORK = 150_000_000
"""Parameters plus ten times the values, times samples (a gradient of some 10 ms): below, a plan costs what it saves."""
LOOK = 4
"""Samples on which it is looked whether anything has to be drawn."""
MORE_CHUNKS = 1
"""Than memory asks for: what samples get can differ by chunk alone."""
PILOT = 64
PILOT_DRAWS = 2
PILOT_PROBES = 3
PILOT_FREEDOM = 128
"""Degrees of freedom of the pilot's spread, at least."""
SAME = 0.01
"""Relative difference up to which residuals are those of the survey."""
MOST_PROBES = 16
"""Where more are planned on average, the exact Gauss-Newton trace is small beside them."""
_COST = {Sites: 1.25, Twice: 4.0}
"""Of a probe, in cotangents that are pulled back."""

Part = slice | list[int]


@dataclass
class Found:
    """The trace's numerator, sample by sample, before any division."""

    values: Tensor
    """Both parts, float64 [n]."""
    noise: Tensor
    """The estimator's own variance of each where it is known, [n]."""
    variance: SummedVariance
    """That of the sum, or a bound on it."""
    weight: float
    """The denominator's sum."""
    cotangents: float
    """A sample, on average;"""
    probes: float
    """likewise, 0 where none was drawn."""
    least: int
    """Probes that a sample got;"""
    most: int
    sketched: bool
    how: str
    """By what the probes were taken."""
    notes: tuple[str, ...]


class Allotment:
    """One call's plan and pass."""

    def __init__(self, runs: RecordedRuns, goal: Goal, generator: torch.Generator, method: str) -> None:
        self._runs, self._goal, self._generator, self._method = runs, goal, generator, method
        self._pull: RecordedPull | None = None
        self.closed = False
        """Whether nothing has to be drawn, once :meth:`run` has looked."""

    def run(self) -> Found | None:
        """The pass; ``None`` where the two parts had better be taken apart."""
        try:
            return self._run()
        except UnsupportedError:
            return None

    def _run(self) -> Found | None:
        runs = self._runs
        x, y = next(iter(self._runs.batches()))
        if count_samples(x) < LEAST_SAMPLES or runs.step(x) < LOOK:
            return None
        columns, convolves = self._look(x, y)
        if not 1 < columns <= MOST_COLUMNS:
            return None
        if self.closed:
            # the exact trace of a convolutional network wants other chunks
            exact = Share(Way(columns, 0, 0), 2)
            return None if convolves else self._pass(lambda _, x: self._evenly(x, exact))
        if runs.work(x) < LEAST_WORK:
            return None
        batches = self._survey()
        if not batches:
            return None
        spread = self._pilot(batches[0])
        shares = None if spread is None else self._plan(batches, *spread)
        if shares is None:
            return None

        def planned(number: int, x: Any) -> list[tuple[Part, Share]]:
            if number >= len(batches) or count_samples(x) != len(batches[number]):
                raise UnsupportedError("batches of other sizes when the data is gone through again")
            parts = [part.tolist() for part in batches[number].order.split(batches[number].step)]
            return list(zip(parts, shares[number], strict=True))

        return self._pass(planned)

    def _look(self, x: Any, y: Tensor | None) -> tuple[int, bool]:
        """Columns a sample, 0 where a parameter's use is not understood; whether there are convolutions."""
        for _, chunk, target in self._runs.chunks(x, y, [slice(0, LOOK)]):
            if chunk.refused:
                break
            convolves = has_reverse_pass(chunk.output)
            evaluator, _ = self._runs.evaluator(chunk, target, self._method)
            self.closed = evaluator is None or evaluator.exact
            return self._runs.loss.columns(chunk.output), convolves
        return 0, False

    def _evenly(self, x: Any, share: Share) -> list[tuple[Part, Share]]:
        n, step = count_samples(x), self._runs.step(x)
        return [(slice(start, min(start + step, n)), share) for start in range(0, n, step)]

    def _survey(self) -> list[Batch]:
        """Empty where there is nothing to go by."""
        batches = []
        for x, y in self._runs.batches():
            n, step = count_samples(x), self._runs.step(x)
            found = [self._sizes(x, y, slice(i, min(i + step, n))) for i in range(0, n, step)]
            residuals, squares, weights = zip(*found, strict=True)
            finer = -(-n // (-(-n // step) + MORE_CHUNKS))
            batches.append(Batch(finer, torch.cat(residuals), torch.cat(squares), sum(weights)))
        residual = sum(float(b.residuals.sum()) for b in batches)
        square = sum(float(b.squares.sum()) for b in batches)
        if not all(math.isfinite(total) and total > 0 for total in (residual, square)):
            return []
        for batch in batches:
            batch.measure(residual, square)
        return batches if batches[0].tells() else []  # the pilot is on the first

    def _sizes(self, x: Any, y: Tensor | None, part: slice) -> tuple[Tensor, Tensor, float]:
        """‖∂ℓ_i/∂f_i‖, ‖s_ik‖² and the part of the denominator."""
        loss = self._runs.loss
        output, target = self._runs.outputs(x, y, part)
        squares = columns_of(loss, output, target).double().square().flatten(2).sum(2).T
        return residual_norms(loss, output, target), squares, float(loss.weight(output, target))

    def _pilot(self, batch: Batch) -> tuple[Expected, float] | None:
        """What to expect, from some samples of the first batch, and the cost of a probe."""
        runs, sketch = self._runs, self._sketch()
        x, y = next(iter(self._runs.batches()))
        if count_samples(x) != len(batch):
            return None
        chosen, counts = batch.some(PILOT)
        probes = max(PILOT_PROBES, 1 + math.ceil(PILOT_FREEDOM / len(chosen)))
        norms, sketches, residuals, cost = [], [], [], 0.0
        for inputs, chunk, target in runs.chunks(x, y, [part.tolist() for part in chosen.split(batch.step)]):
            lin, output = self._linearized(chunk, inputs), chunk.output.detach()
            sketches.append(sketch.draws(lin, output, target, Way(0, 1, PILOT_DRAWS))[0])
            del lin
            norms.append(residual_norms(runs.loss, output, target))
            evaluator, _ = runs.evaluator(chunk, target, self._method)
            if evaluator is None:
                return None
            cost = _COST[type(evaluator)]
            residuals.append(torch.stack([evaluator.draw(self._generator) for _ in range(probes)]))
            del inputs, chunk, output, evaluator
        seen = batch.residuals[chosen]
        if (torch.cat(norms) - seen).norm() > SAME * seen.norm():
            return None  # a loader that shuffles: these are other samples
        return expected(batch, chosen, counts, torch.cat(sketches, 1), torch.cat(residuals, 1)), cost

    def _plan(self, batches: list[Batch], spread: Expected, cost: float) -> list[list[Share]] | None:
        runs = self._runs
        denominator = runs.loss.denominator(sum(b.weight for b in batches))
        squares = [float(b.squares.sum()) for b in batches]
        residuals = [float(b.residuals.sum()) for b in batches]
        value = spread.ggn * sum(squares) / squares[0] + spread.residual * sum(residuals) / residuals[0]
        value /= denominator
        allowed = (self._goal.tolerance(value) * denominator) ** 2
        by_batch = [outlooks(batch, spread) for batch in batches]
        together = [outlook for some in by_batch for outlook in some]
        shares = allot(together, allowed, cost, self._goal.max_samples)
        if shares is None:
            return None
        probes = sum(o.samples * s.probes for o, s in zip(together, shares, strict=True))
        if probes > MOST_PROBES * sum(o.samples for o in together):
            return None
        pending = iter(shares)
        return [[next(pending) for _ in some] for some in by_batch]

    def _sketch(self) -> GroupSketch:
        runs = self._runs
        return GroupSketch(runs.model, runs.loss, runs.parameters, self._generator)

    def _linearized(self, chunk: Chunk, inputs: Any) -> Any:
        if chunk.refused:
            raise UnsupportedError(f"batches use {', '.join(sorted(chunk.refused))} in different ways")
        if self._pull is None:
            runs = self._runs
            self._pull = RecordedPull(
                runs.model, runs.parameters, self._runs.batches().forward, runs.max_memory, chunk, inputs
            )
        return self._pull(chunk, inputs)

    def _pass(self, plan: Callable[[int, Any], list[tuple[Part, Share]]]) -> Found:
        runs, sketch, residual = (
            self._runs,
            self._sketch(),
            _Residual(self._runs, self._generator, self._method),
        )
        batches: list[Tensor] = []
        done: list[tuple[int, Share]] = []
        device = model_device(runs.model)
        for number, (x, y) in enumerate(self._runs.batches()):
            shares = plan(number, x)
            values = torch.zeros(2, count_samples(x), dtype=torch.float64, device=device)
            chunks = runs.chunks(x, y, [part for part, _ in shares])
            pending = iter(shares)
            for inputs, chunk, target in chunks:  # one at a time: none is kept while the next is run
                part, share = next(pending)
                lin, output = self._linearized(chunk, inputs), chunk.output.detach()
                check_target(runs.loss, output, target, [False])  # a callable has no root, and is not planned
                ours = sketch(lin, output, target, share.way)
                del lin
                rest = residual(chunk, target, share.probes)
                values[:, part] = torch.stack([ours[0] + rest[0], ours[1] + rest[1]])
                done.append((len(output), share))
                del inputs, chunk, output
            batches.append(values)
        together, n = torch.cat(batches, 1), sum(n for n, _ in done)
        counts = residual.counts or {0}
        return Found(
            values=together[0],
            noise=together[1],
            variance=sketch.variance + residual.variance,
            weight=residual.weight,
            cotangents=sum(n * share.way.cotangents for n, share in done) / n,
            probes=sum(n * share.probes for n, share in done) / n if residual.how else 0.0,
            least=min(counts),
            most=max(counts),
            sketched=sketch.drawn,
            how=residual.how,
            notes=tuple(sketch.notes),
        )


@dataclass
class _Residual:
    """The residual of chunk after chunk."""

    runs: RecordedRuns
    generator: torch.Generator
    method: str
    variance: SummedVariance = field(default_factory=SummedVariance)
    weight: float = 0.0
    how: str = ""
    counts: set[int] = field(default_factory=set)

    def __call__(self, chunk: Chunk, target: Tensor, probes: int) -> tuple[Tensor, Tensor]:
        """Values and their variances, as far as these are known sample by sample, [n] each."""
        evaluator, weight = self.runs.evaluator(chunk, target, self.method)
        self.weight += weight
        if evaluator is None:
            zero = torch.zeros(len(chunk.output), dtype=torch.float64, device=chunk.output.device)
            return zero, zero
        if evaluator.exact:
            value = evaluator.draw(self.generator)
            return value, torch.zeros_like(value)
        self.how = "tangent passes" if isinstance(evaluator, Sites) else "double backward"
        self.counts.add(probes)
        values = torch.stack([evaluator.draw(self.generator) for _ in range(probes)])
        if probes > 1:
            noise = values.var(0) / probes
            self.variance.add(noise, probes - 1)
            return values.mean(0), noise
        # one value a sample: their spread over samples holds the probes' own and that of the true values
        n = len(values[0])
        self.variance.add((values[0] - values[0].mean()).square() * (n / (n - 1)), 1)
        return values[0], torch.zeros_like(values[0])
