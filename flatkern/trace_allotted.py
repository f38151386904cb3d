"""Tr H to a tolerance in one pass: what samples need of the Gauss-Newton part and of the residual, planned together.

A plain forward pass tells the sizes of all samples' output Hessians and residuals; a pilot on some of them, chosen in
proportion, what a draw of either part spreads. Samples are then taken in order of size, and each chunk gets the number
of groups, draws and probes that meets the tolerance at the least cost (:mod:`flatkern.trace_plan`). Both parts go
through the same recorded run.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flatkern.linearize import Forward, Linearization
from flatkern.loss_data import LossData, check_target
from flatkern.losses import Loss
from flatkern.problem import preserve_state
from flatkern.recorded_pull import RecordedPull
from flatkern.residual import Chunk, Sites, Twice
from flatkern.samples import count_samples, take
from flatkern.squared_norms import parameter_squared_norms
from flatkern.tape import UnsupportedError
from flatkern.trace_goal import Goal
from flatkern.trace_groups import columns_of, group_columns, over_bound
from flatkern.trace_plan import Outlook, Share, Way, allot

__all__ = ["Allotment", "Found", "Runs"]

MOST_COLUMNS = 64
"""Columns of S_i up to which this is tried."""
LEAST_SAMPLES = 128
LEAST_WORK = 150_000_000
"""Parameters plus ten times the values, times samples (a gradient of about 10 ms): below, a plan costs what it saves."""
PILOT = 64
PILOT_POWER = 1.5
"""Means go with a sample's size, variances with its square; probabilities are in between."""
PILOT_DRAWS = 2
PILOT_PROBES = 4
PILOT_FREEDOM = 192
LOOK = 4
"""Samples on which it is looked whether anything has to be drawn."""
MOST_PROBES = 16
"""Where more are planned on average, the exact Gauss-Newton trace is small beside them."""
_COUNTS = (1, 2, 3, 4, 5, 6, 8, 12, 16, 24, 32, 48)
_COST = {Sites: 1.25, Twice: 4.0}
"""Of a probe, in cotangents that are pulled back."""


class Runs(Protocol):
    """What :class:`flatkern.trace_split.Split` gives."""

    model: nn.Module
    loss: Loss
    data: Any
    parameters: dict[str, nn.Parameter]
    goal: Goal
    generator: torch.Generator
    max_memory: int
    forward: Forward | None

    def step(self, x: Any) -> int:
        """Samples of a batch that a chunk takes."""

    def work(self, x: Any) -> int:
        """Entries of parameters and ten times those of the values, times samples."""

    def chunks(
        self, x: Any, y: Tensor | None, parts: Iterable[slice | Sequence[int]]
    ) -> Iterator[tuple[Any, Chunk, Tensor]]:
        """Inputs, recorded run and target of each part."""

    def evaluator(self, chunk: Chunk, y: Tensor, method: str) -> tuple[Sites | Twice | None, float]:
        """The residual on a chunk, and its part of the denominator."""


@dataclass
class _Batch:
    """What the plain forward pass tells of a batch."""

    step: int
    residuals: Tensor
    """‖∂ℓ_i/∂f_i‖, [n]."""
    squares: Tensor
    """‖s_ik‖², [n, K]."""
    weight: float
    order: Tensor = field(init=False)
    """The samples by falling size."""
    sizes: Tensor = field(init=False)

    def __len__(self) -> int:
        return len(self.residuals)

    def parts(self) -> list[list[int]]:
        """The samples of each chunk."""
        return [part.tolist() for part in self.order.split(self.step)]


@dataclass
class _Spread:
    """What a draw of either part spreads, from the pilot."""

    ggn: float
    """Σ_i over all samples,"""
    residual: float
    gain: float
    """mean of (‖J_iᵀS_i‖²/‖S_i‖²)², weighted with ‖S_i‖⁴,"""
    coherence: float
    """mean of the squared cosine of two columns' gradients,"""
    probe: float
    """variance of one probe over ‖r_i‖²,"""
    single: float
    """its second moment likewise."""
    cost: float


@dataclass
class Found:
    """The trace's numerator, sample by sample, before any division."""

    values: Tensor
    """Both parts, float64 [n]."""
    noise: Tensor
    """The estimator's own variance of each where it is known, [n]."""
    variance: float
    """That of the sum, or a bound on it."""
    weight: float
    cotangents: float
    """A sample, on average."""
    sketched: bool
    probes: tuple[int, int]
    """Fewest and most."""
    mean_probes: float
    passes: str
    notes: tuple[str, ...]


class Allotment:
    """One call's plan and pass."""

    def __init__(self, runs: Runs, method: str) -> None:
        self._runs, self._method = runs, method
        self._pull: RecordedPull | None = None
        self.closed = False
        """Whether nothing has to be drawn."""

    def run(self) -> Found | None:
        """The pass; ``None`` where the exact Gauss-Newton trace and even probes are to be preferred."""
        batches = self._survey()
        if batches is None:
            return None
        spread = self._pilot(batches[0])
        if spread is None:
            return None
        shares = self._plan(batches, spread)
        return None if shares is None else self._pass(batches, shares)

    def _data(self) -> LossData:
        return LossData(self._runs.model, self._runs.data, self._runs.forward)

    def _survey(self) -> list[_Batch] | None:
        runs = self._runs
        batches: list[_Batch] = []
        for x, y in self._data():
            n = count_samples(x)
            if not batches:
                small = n < LEAST_SAMPLES or runs.work(x) < LEAST_WORK
                if small or not self._drawn(x, y):
                    return None
            step = runs.step(x)
            if step < min(n, LOOK):
                return None
            found = [self._sizes(x, y, slice(i, i + step)) for i in range(0, n, step)]
            batches.append(
                _Batch(
                    step,
                    torch.cat([r for r, _, _ in found]),
                    torch.cat([s for _, s, _ in found]),
                    sum(w for _, _, w in found),
                )
            )
        totals = [
            sum(float(b.residuals.sum()) for b in batches),
            sum(float(b.squares.sum()) for b in batches),
        ]
        if not all(math.isfinite(t) and t > 0 for t in totals):
            return None
        for batch in batches:
            batch.sizes = batch.residuals / totals[0] + batch.squares.sum(1) / totals[1]
            batch.order = batch.sizes.argsort(descending=True, stable=True)
        return batches

    def _drawn(self, x: Any, y: Tensor | None) -> bool:
        """Whether there is something to draw, and few enough columns, seen on a few samples."""
        for _, chunk, target in self._runs.chunks(x, y, [slice(0, LOOK)]):
            evaluator, _ = self._runs.evaluator(chunk, target, self._method)
            if chunk.refused:
                return False
            self.closed = evaluator is None or evaluator.exact
            columns = self._runs.loss.columns(chunk.output)
            return not self.closed and 1 < columns <= MOST_COLUMNS
        return False

    def _sizes(self, x: Any, y: Tensor | None, part: slice) -> tuple[Tensor, Tensor, float]:
        """‖∂ℓ_i/∂f_i‖, ‖s_ik‖² and the part of the denominator."""
        runs = self._runs
        inputs = take(x, part)
        with preserve_state(runs.model), torch.no_grad():
            if runs.forward is None:
                output, target = runs.model(inputs.clone()), y
                assert y is not None
                target = y[part]
            else:
                output, target = self._data().forward(runs.model, inputs)  # type: ignore[misc]
        leaf = output.detach().clone().requires_grad_()
        with torch.enable_grad():
            (residual,) = torch.autograd.grad(runs.loss.numerator(leaf, target), leaf)
        squares = columns_of(runs.loss, output, target).double().square().flatten(2).sum(2).T
        weight = float(runs.loss.weight(output, target))
        return residual.double().flatten(1).norm(dim=1), squares, weight

    def _pilot(self, batch: _Batch) -> _Spread | None:
        """On samples of the first batch, large ones with more probability; sums over all are by inverse probability."""
        runs = self._runs
        x, y = next(iter(self._data()))
        if count_samples(x) != len(batch):
            return None
        sizes = batch.sizes**PILOT_POWER
        ends = sizes[batch.order].cumsum(0)
        marks = (torch.arange(PILOT, dtype=ends.dtype, device=ends.device) + 0.5) * (ends[-1] / PILOT)
        places, counts = torch.searchsorted(ends, marks).clamp(max=len(batch) - 1).unique(return_counts=True)
        chosen = batch.order[places]
        counts = counts.to(ends) * ends[-1] / PILOT / sizes[chosen]
        parts = [part.tolist() for part in chosen.split(batch.step)]
        probes = max(PILOT_PROBES, 1 + math.ceil(PILOT_FREEDOM / len(chosen)))
        sketches, residuals, cost = [], [], _COST[Sites]
        for inputs, chunk, target in runs.chunks(x, y, parts):
            if chunk.refused:
                return None
            if self._pull is None:
                self._pull = RecordedPull(
                    runs.model, runs.parameters, runs.forward, runs.max_memory, chunk, inputs
                )
            lin, output = self._pull(chunk, inputs), chunk.output.detach()
            sketches.append(self._draws(lin, output, target, Way(0, 1, PILOT_DRAWS))[0])
            evaluator, _ = runs.evaluator(chunk, target, self._method)
            if evaluator is None or evaluator.exact:
                self.closed = True
                return None
            cost = _COST[type(evaluator)]
            residuals.append(torch.stack([evaluator.draw(runs.generator) for _ in range(probes)]))
        return _spread(batch, chosen, counts, torch.cat(sketches, 1), torch.cat(residuals, 1), cost)

    def _plan(self, batches: list[_Batch], spread: _Spread) -> list[list[Share]] | None:
        runs = self._runs
        factor = sum(float(b.residuals.square().sum()) for b in batches) / float(
            batches[0].residuals.square().sum()
        )
        denominator = runs.loss.denominator(sum(b.weight for b in batches))
        tolerance = runs.goal.tolerance(factor * (spread.ggn + spread.residual) / denominator) * denominator
        outlooks = [outlook for batch in batches for outlook in _outlooks(batch, spread)]
        shares = allot(outlooks, tolerance**2, spread.cost, runs.goal.max_samples)
        if shares is None:
            return None
        samples = sum(o.samples for o in outlooks)
        if sum(o.samples * s.probes for o, s in zip(outlooks, shares, strict=True)) > MOST_PROBES * samples:
            return None
        pending = iter(shares)
        return [[next(pending) for _ in batch.parts()] for batch in batches]

    def _pass(self, batches: list[_Batch], shares: list[list[Share]]) -> Found:
        runs, total, pull = self._runs, _Total(), self._pull
        assert pull is not None
        for number, (x, y) in enumerate(self._data()):
            n = count_samples(x)
            if number >= len(batches) or n != len(batches[number]):
                raise ValueError("data: it gave other batches when it was gone through again")
            values = torch.zeros(2, n, dtype=torch.float64, device=batches[number].order.device)
            parts = batches[number].parts()
            chunks = runs.chunks(x, y, parts)
            for part, share, (inputs, chunk, target) in zip(parts, shares[number], chunks, strict=True):
                if chunk.refused:
                    raise UnsupportedError(
                        f"batches use {', '.join(sorted(chunk.refused))} in different ways"
                    )
                lin, output = pull(chunk, inputs), chunk.output.detach()
                check_target(runs.loss, output, target, [False])
                sketch = self._sketch(lin, output, target, share.way, total)
                del lin
                residual = self._residual(chunk, target, share, total)
                values[:, part] = torch.stack([sketch[0] + residual[0], sketch[1] + residual[1]])
                total.count(len(part), share)
            total.values.append(values)
        return total.found()

    def _draws(
        self, lin: Linearization, output: Tensor, target: Tensor, way: Way
    ) -> tuple[Tensor, Tensor, tuple[str, ...]]:
        """Values of the sketch [draws, n]; for a single draw the bound Σ_g c_g v_g² on its variance, [n]."""
        runs = self._runs
        columns = columns_of(runs.loss, output, target)
        groups = group_columns(columns.double().square().flatten(2).sum(2).T, way.alone, way.groups)
        notes: tuple[str, ...] = ()

        def squares(roots: Tensor) -> Tensor:
            nonlocal notes
            norms = parameter_squared_norms(runs.model, lin, roots, runs.parameters)
            notes = norms.notes
            return norms.total

        values: list[Tensor] = []
        bound = torch.zeros(len(output), dtype=torch.float64, device=output.device)
        alone = torch.zeros_like(bound)
        for draw in range(way.draws):
            signs = torch.randint(0, 2, columns.shape[:2], generator=runs.generator, dtype=torch.int8)
            roots = groups.combined(columns, signs.T.to(output.device) * 2 - 1)
            if draw == 0 and way.alone:
                alone = squares(roots[: way.alone])
            if way.draws > 1:
                values.append(alone + squares(roots[way.alone :]))
                continue
            value = alone
            for factors, root in zip(
                over_bound(groups.sizes).T[way.alone :], roots[way.alone :], strict=True
            ):
                part = squares(root.unsqueeze(0))
                value, bound = value + part, bound + factors * part.square()
            values.append(value)
        return torch.stack(values), bound, notes

    def _sketch(
        self, lin: Linearization, output: Tensor, target: Tensor, way: Way, total: _Total
    ) -> tuple[Tensor, Tensor]:
        """The Gauss-Newton part a sample and its variance where it is known, [n] each."""
        if not way.draws:
            root = self._runs.loss.root
            assert root is not None
            roots = root(output, target)
            norms = parameter_squared_norms(self._runs.model, lin, roots, self._runs.parameters)
            total.notes.update(dict.fromkeys(norms.notes))
            return norms.total, torch.zeros_like(norms.total)
        values, bound, notes = self._draws(lin, output, target, way)
        total.notes.update(dict.fromkeys(notes))
        total.sketched = True
        if way.draws == 1:
            total.variance += float(bound.sum())
            return values[0], torch.zeros_like(bound)
        noise = values.var(0) / way.draws
        total.variance += float(noise.sum())
        return values.mean(0), noise

    def _residual(self, chunk: Chunk, target: Tensor, share: Share, total: _Total) -> tuple[Tensor, Tensor]:
        evaluator, weight = self._runs.evaluator(chunk, target, self._method)
        total.weight += weight
        if evaluator is None:
            zero = torch.zeros(len(chunk.output), dtype=torch.float64, device=chunk.output.device)
            return zero, zero
        if evaluator.exact:
            value = evaluator.draw(self._runs.generator)
            return value, torch.zeros_like(value)
        total.passes = "tangent passes" if isinstance(evaluator, Sites) else "double backward"
        values = torch.stack([evaluator.draw(self._runs.generator) for _ in range(share.probes)])
        if share.probes > 1:
            noise = values.var(0) / share.probes
            total.variance += float(noise.sum())
            return values.mean(0), noise
        # one value a sample: their spread over samples holds the probes' own and that of the true values
        total.variance += len(values[0]) * float(values[0].var())
        return values[0], torch.zeros_like(values[0])


def _spread(
    batch: _Batch, chosen: Tensor, counts: Tensor, sketches: Tensor, residuals: Tensor, cost: float
) -> _Spread:
    squares = batch.squares[chosen]
    sizes = squares.sum(1)
    gains = torch.where(sizes > 0, sketches.mean(0) / sizes, 0.0)
    pairs = group_columns(squares, 0, 1).pairs
    mean, variance = residuals.mean(0), residuals.var(0)
    energy = float(batch.residuals.square().sum())

    def over_all(values: Tensor) -> float:
        return float((counts * values).sum())

    coherent, largest = over_all(sketches.var(0)), 4 * over_all(gains.square() * pairs)
    return _Spread(
        ggn=over_all(sketches.mean(0)),
        residual=over_all(mean),
        gain=over_all(sketches.mean(0).square()) / over_all(sizes.square()),
        coherence=min(1.0, coherent / largest) if largest > 0 else 1.0,
        probe=over_all(variance) / energy,
        single=over_all(variance + mean.square()) / energy,
        cost=cost,
    )


def _outlooks(batch: _Batch, spread: _Spread) -> list[Outlook]:
    """Of the batch's chunks."""
    squares, energies = batch.squares[batch.order], batch.residuals[batch.order].square()
    columns = squares.shape[1]
    ways = {Way(columns, 0, 0): torch.zeros_like(energies)}
    for count in _COUNTS:
        if count >= columns:
            break
        # drawn once: alone or not, what is known of the variance is its bound
        groups = group_columns(squares, 0, count)
        ways[Way(0, count, 1)] = spread.gain * (over_bound(groups.sizes) * groups.sums.square()).sum(1)
        pairs = {(0, count): groups.pairs, (count - 1, 1): group_columns(squares, count - 1, 1).pairs}
        for (alone, others), sizes in pairs.items():
            ways[Way(alone, others, 2)] = spread.gain * spread.coherence * 2 * sizes
    variances = torch.stack(
        [v.new_tensor([part.sum() for part in v.split(batch.step)]) for v in ways.values()]
    )
    return [
        Outlook(
            len(part),
            dict(zip(ways, variances[:, i].tolist(), strict=True)),
            spread.probe * float(part.sum()),
            spread.single * float(part.sum()),
        )
        for i, part in enumerate(energies.split(batch.step))
    ]


class _Total:
    """Sums over chunks."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []
        self.variance = self.weight = 0.0
        self.sketched = False
        self.passes = ""
        self.notes: dict[str, None] = {}
        self._samples = self._cotangents = self._probed = 0
        self._counts: set[int] = set()

    def count(self, samples: int, share: Share) -> None:
        self._samples += samples
        self._cotangents += samples * share.way.cotangents
        self._probed += samples * share.probes
        self._counts.add(share.probes)

    def found(self) -> Found:
        values = torch.cat(self.values, 1)
        return Found(
            values=values[0],
            noise=values[1],
            variance=self.variance,
            weight=self.weight,
            cotangents=self._cotangents / self._samples,
            sketched=self.sketched,
            probes=(min(self._counts), max(self._counts)),
            mean_probes=self._probed / self._samples,
            passes=self.passes,
            notes=tuple(self.notes),
        )
