"""Tr H as exact GGN trace plus sampled residual: planning, chunks, error bars, and what falls back."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.chunk_plan import frugal_limit, note
from flatkern.estimators import trace
from flatkern.flatness import ggn_trace
from flatkern.linearize import Forward
from flatkern.loss_data import LossData, output_gradient
from flatkern.losses import Loss, Reduction
from flatkern.operators import hessian
from flatkern.residual import Chunk, Sites, Twice, linearize
from flatkern.results import Estimate, HessianTrace
from flatkern.sample_axis import FEW, footprint, sample_axes
from flatkern.samples import count_samples, take
from flatkern.tape import Tape, UnsupportedError
from flatkern.trace_allotted import Allotment, Found
from flatkern.trace_goal import Goal, Sampled, Spread

__all__ = ["Split"]

PILOT_SAMPLES = 64
"""The pilot runs on this many samples of the first batch, spread over it."""
PILOT_PROBES = 4
PILOT_FREEDOM = 192
"""Degrees of freedom of the pilot's spread, at least: few samples take more probes."""
SECOND_PILOT = 16
"""Where more probes than this are planned, a pilot on all samples plans again."""
PROBES_A_PRODUCT = 6
"""What a Hessian-vector product costs in probes, about."""
COPIES = 4
"""Memory of a chunk over that of its intermediate values: graph, cotangents, tangents and temporaries."""

_AFFINE = "outputs piecewise affine in every parameter entry"
_SmallRuns = dict[bool, tuple[Tape, dict[int, tuple[int, bool]]]]
"""Tapes of a few samples, and of one (``True``), with the samples' axes."""


@dataclass
class Split:
    """One call of :func:`flatkern.hessian_trace`: the exact part, the pilot, the probes, the fall-backs."""

    model: nn.Module
    loss_fn: object
    loss: Loss
    data: Any
    parameters: dict[str, nn.Parameter]
    reduction: Reduction | None
    goal: Goal
    generator: torch.Generator
    max_memory: int
    per_layer: bool
    forward: Forward | None = None
    verdicts: dict[str, str] = field(default_factory=dict)
    """Parameters not proven, with the reason."""
    refused: dict[str, str] = field(default_factory=dict)
    _axes: dict[Any, _SmallRuns] = field(default_factory=dict)
    _batch: tuple[Any, _SmallRuns] | None = None
    """The last batch that is not one tensor, with its small runs."""

    def unsuitable(self) -> str:
        """Why this loss or model takes the plain estimator; empty where it does not."""
        if self.loss.root is None:
            return f"no closed-form output Hessian is known for {self.loss.name}"
        if any(p.dtype not in (torch.float32, torch.float64) for p in self.parameters.values()):
            return "parameters in half precision"
        return ""

    def plain(
        self, reason: str, started: float, names: list[str] | None = None, *, outright: bool = False
    ) -> HessianTrace:
        """``fk.trace(fk.hessian(...))``; ``outright``: by a product a parameter."""
        op = hessian(
            self.model,
            self.loss_fn,
            self.data,
            params=list(self.parameters) if names is None else names,
            reduction=self.reduction,
            forward=self.forward,
            max_memory=self.max_memory,
        )
        found = trace(
            op,
            rtol=self.goal.rtol,
            atol=self.goal.atol,
            samples=self.goal.samples,
            max_matvecs=op.shape[0] if outright else self.goal.max_samples,
            method="exact" if outright else "auto",
            generator=self.generator,
        )
        exact = found.method == "exact"
        why = reason or "asked for"
        return HessianTrace(
            value=found.value,
            stderr=found.stderr,
            method=f"{found.method} on the Hessian ({why})",
            num_data=found.num_data,
            matvecs=found.matvecs,
            seconds=time.perf_counter() - started,
            converged=found.converged,
            samples=found.samples,
            notes=found.notes,
            exact=tuple(self.parameters) if exact else (),
            sampled={} if exact else dict.fromkeys(self.parameters, why),
        )

    def run(self, method: str, started: float) -> HessianTrace:
        """The exact GGN trace plus the sampled residual."""
        probes = self.goal.samples or 0
        closed = False
        if self.goal.samples is None and not self.per_layer:
            allotment = Allotment(self, method)
            found = allotment.run()
            if found is not None:
                return self._allotted(found, started)
            closed = allotment.closed
        pilot = Spread(0.0, 0.0, 0.0) if closed else self._pilot(method)
        ours = {n: p for n, p in self.parameters.items() if n not in self.refused}
        if not ours or (self.refused and (self.per_layer or method != "auto")):
            raise UnsupportedError("; ".join(f"{n}: {why}" for n, why in self.refused.items()))
        ggn = ggn_trace(
            self.model,
            self.loss_fn,
            self.data,
            params=list(ours),
            forward=self.forward,
            rtol=0.02 if self.goal.rtol is None else min(0.5, self.goal.rtol / 2**0.5),
            seed=int(self.generator.get_state().long().sum()),  # without drawing from it
            per_layer=self.per_layer,
            max_memory=self.max_memory,
        )
        assert ggn.num_data is not None
        assert ggn.per_sample is not None
        planned = self._plan(pilot.scaled(ggn.num_data), ggn)
        drawing = pilot.variance > 0
        if not probes and planned > SECOND_PILOT and ggn.num_data > PILOT_SAMPLES:
            planned = self._plan(self._sample(method, PILOT_PROBES)[0].spread(), ggn)
        size = sum(p.numel() for p in self.parameters.values())
        if method == "auto" and not probes and not self.per_layer and PROBES_A_PRODUCT * size <= planned:
            return self.plain(f"{size} parameters, fewer than probes", started, outright=True)
        planned = probes or planned
        used = min(planned, self.goal.max_samples)
        sampled, how, layers = self._sample(method, used)
        denominator = self.loss.denominator(sampled.weight)
        n = ggn.num_data
        mean = torch.cat(sampled.means, -1) / denominator  # [rows, n]
        spread = torch.cat(sampled.variances, -1) / (denominator**2 * used)
        residual = mean.sum(0)
        stderr = math.hypot(float(spread.sum()) ** 0.5, ggn.stderr)
        value = ggn.value + float(residual.sum())
        per_sample = ggn.per_sample + n * residual.to(ggn.per_sample)
        rest: HessianTrace | None = None
        if self.refused:
            rest = self.plain("; ".join(self.refused.values()), started, list(self.refused))
            value, stderr = value + rest.value, math.hypot(stderr, rest.stderr)
        if not math.isfinite(value):
            raise ValueError("model: second derivatives overflow or are NaN at this θ; measure in float64")
        met = not self.goal.given or stderr <= self.goal.tolerance(value)
        notes = list(ggn.notes) + ([] if rest is None else list(rest.notes))
        if planned > used:
            notes.append(f"max_samples allowed {used} probes; {planned} were planned")
        elif not met:
            notes.append("the probes spread more than the pilot's did; run again with more samples")
        drawn = stderr > 0 or drawing
        by_layer = self._by_layer(ggn, mean, spread, layers) if self.per_layer else None
        return HessianTrace(
            value=value,
            stderr=stderr,
            sample_stderr=None if rest is not None else _over_samples(per_sample, spread.sum(0) * n**2),
            method=self._describe(how if drawn or self.verdicts else "", used, ggn),
            num_data=n,
            matvecs=0 if rest is None else rest.matvecs,
            passes=ggn.passes + 1 + (used if drawn else 0),
            seconds=time.perf_counter() - started,
            converged=met and planned <= used,
            samples=None
            if sampled.totals is None or not drawn or rest is not None
            else ggn.value + sampled.totals.cpu() / denominator,
            per_sample=None if rest is not None else per_sample,
            per_layer=None if by_layer is None else by_layer[0],
            # how a sketch's error splits by layer is not known
            per_layer_stderr=None if by_layer is None or ggn.stderr else by_layer[1],
            notes=tuple(dict.fromkeys(notes)),
            exact=() if ggn.stderr else tuple(n for n in self.parameters if n not in self.verdicts),
            sampled={
                n: self.verdicts.get(n, "many outputs: the Gauss-Newton part is sketched")
                for n in self.parameters
                if n in self.verdicts or ggn.stderr
            },
        )

    def _allotted(self, found: Found, started: float) -> HessianTrace:
        """The result of the pass in which the samples got what they need."""
        denominator, n = self.loss.denominator(found.weight), len(found.values)
        value, stderr = float(found.values.sum()) / denominator, found.variance**0.5 / denominator
        if not math.isfinite(value):
            raise ValueError("model: second derivatives overflow or are NaN at this θ; measure in float64")
        per_sample = found.values * (n / denominator)
        met = stderr <= self.goal.tolerance(value)
        notes = list(found.notes)
        if not met:
            notes.append("the draws spread more than the pilot's did; run again with more samples")
        sampled = (
            dict.fromkeys(self.parameters, "the Gauss-Newton part is sketched") if found.sketched else {}
        )
        sampled.update(self.verdicts)
        return HessianTrace(
            value=value,
            stderr=stderr,
            sample_stderr=_over_samples(per_sample, found.noise * (n / denominator) ** 2),
            method=self._described(found),
            num_data=n,
            passes=round(found.cotangents + found.probes) + 1,
            seconds=time.perf_counter() - started,
            converged=met,
            per_sample=per_sample,
            notes=tuple(notes),
            exact=tuple(name for name in self.parameters if name not in sampled),
            sampled=sampled,
        )

    def _describe(self, how: str, probes: int, ggn: Estimate) -> str:
        sketched = f"{ggn.passes} sign sketches of the GGN trace" if ggn.stderr else ""
        if not self.verdicts:
            return f"{sketched}; {_AFFINE}" if sketched else f"exact (ghost norms; {_AFFINE})"
        text = (sketched or "exact GGN trace") + self._residual_text()
        text += "closed form" if how == "exact" else f"{probes} probes ({how})"
        return text + (f", Hutchinson for {', '.join(self.refused)}" if self.refused else "")

    def _described(self, found: Found) -> str:
        if not self.verdicts:
            return f"exact (ghost norms; {_AFFINE})"
        text = f"sign sketch of the GGN trace ({found.cotangents:.1f} cotangents a sample)"
        text = (text if found.sketched else "exact GGN trace") + self._residual_text()
        if not found.how:
            return text + "closed form"
        probes = f"{found.least}" if found.least == found.most else f"{found.least} to {found.most}"
        return f"{text}{probes} probes ({found.how})"

    def _residual_text(self) -> str:
        return f" + residual of {len(self.verdicts)} of {len(self.parameters)} parameters: "

    @staticmethod
    def _by_layer(
        ggn: Estimate, mean: Tensor, spread: Tensor, layers: tuple[str, ...]
    ) -> tuple[dict[str, float], dict[str, float]]:
        values = dict(ggn.per_layer or {})
        errors = dict.fromkeys(values, 0.0)
        for layer, m, s in zip(layers, mean, spread, strict=True):
            values[layer] = values.get(layer, 0.0) + float(m.sum())
            errors[layer] = float(s.sum()) ** 0.5
        return values, errors

    def _pilot(self, method: str) -> Spread:
        """On a few samples, a sample."""
        for x, y in LossData(self.model, self.data, self.forward):
            n = count_samples(x)
            few = list(range(0, n, max(1, n // PILOT_SAMPLES)))[:PILOT_SAMPLES]
            total, spread, weight = 0.0, 0.0, 0.0
            # with a number of probes given, only the verdict is wanted
            n, step = len(few), self.step(x)
            least = max(PILOT_PROBES, 1 + math.ceil(PILOT_FREEDOM / n))
            wanted = least if self.goal.samples is None else 0
            parts = [few[i : i + step] for i in range(0, n, step)]
            for _, chunk, target in self.chunks(x, y, parts):
                evaluator, part_weight = self.evaluator(chunk, target, method)
                self.refused.update(chunk.refused)
                weight += part_weight
                if evaluator is not None and wanted:
                    values = torch.stack(
                        [evaluator.draw(self.generator) for _ in range(2 if evaluator.exact else wanted)]
                    )
                    total, spread = total + float(values.mean(0).sum()), spread + float(values.var(0).sum())
                del chunk, evaluator
            return Spread(total, spread, weight).scaled(1 / n)
        raise ValueError("data: no batch in it")

    def _plan(self, spread: Spread, ggn: Estimate) -> int:
        denominator = spread.weight if self.loss.reduction == "mean" else 1.0
        share = 0.5 if self.refused else 1.0
        return self.goal.probes(spread, ggn.value, denominator, share=share, taken=ggn.stderr)

    def _sample(self, method: str, probes: int) -> tuple[Sampled, str, tuple[str, ...]]:
        sampled, how = Sampled(), "exact"
        layers: tuple[str, ...] | None = None
        for x, y in LossData(self.model, self.data, self.forward):
            for _, chunk, target in self.chunks(x, y):
                evaluator, weight = self.evaluator(chunk, target, method)
                sampled.weight += weight
                unknown = set(chunk.refused) - set(self.refused)
                if unknown:
                    raise UnsupportedError(f"batches use {', '.join(sorted(unknown))} in different ways")
                n = len(chunk.output)
                if evaluator is None:
                    rows = 1 if layers is None else len(layers)
                    values = torch.zeros(2, rows, n, dtype=torch.float64, device=chunk.output.device)
                elif self.per_layer:
                    assert isinstance(evaluator, Twice)
                    layers = evaluator.layers if layers is None else layers
                    if layers != evaluator.layers:
                        raise UnsupportedError("batches reach different layers")
                    values = torch.stack([evaluator.draw_layers(self.generator) for _ in range(probes)])
                    how = "double backward"
                else:
                    count = 1 if evaluator.exact else probes
                    drawn = torch.stack([evaluator.draw(self.generator) for _ in range(count)])
                    if evaluator.exact:
                        drawn = drawn[:1].expand(probes, -1)
                    else:
                        how = "tangent passes" if isinstance(evaluator, Sites) else "double backward"
                    values = drawn.unsqueeze(1)
                sampled.add(values if len(values) == probes else values[:1].expand(probes, -1, -1))
                del chunk, evaluator
        return sampled, how, layers or ()

    def step(self, x: Any) -> int:
        """Samples of a batch that a chunk takes."""
        n, chunks = count_samples(x), self._recorded(x)
        note(chunks)
        return chunks.samples(n)

    def work(self, x: Any) -> int:
        """Entries of parameters and ten times those of the values, times samples: how dear a gradient is, roughly."""
        chunks = self._recorded(x)
        entry = next(iter(self.parameters.values())).element_size()
        return count_samples(x) * (chunks.gradient_bytes + 10 * chunks.sample_bytes) // entry

    def _recorded(self, x: Any) -> _Recorded:
        """From the small runs, which are made with the batch's first samples where there are none."""
        n = count_samples(x)
        own = sum(p.numel() * p.element_size() for p in self.parameters.values())

        def plan(tape: Tape) -> _Recorded:
            return _Recorded(self.max_memory, footprint(tape) // max(1, len(tape.final.tensor)), own)

        runs = self._runs_of(x)
        if False not in runs:
            # where one sample is a chunk, its cotangents for several at once would be the peak
            forward = LossData(self.model, self.data, self.forward).forward
            runs[False] = sample_axes(
                self.model, x, self.parameters, forward, wanted=lambda tape: plan(tape).samples(n) > 1
            )
        return plan(runs[False][0])

    def _runs_of(self, x: Any) -> _SmallRuns:
        # batches of one kind share the small runs (of each chunk it is checked that the operations are the same)
        if not isinstance(x, Tensor):
            if self._batch is None or self._batch[0] is not x:
                self._batch = x, {}
            return self._batch[1]
        return self._axes.setdefault((x.shape[1:], x.dtype, min(len(x), FEW)), {})

    def chunks(
        self, x: Any, y: Tensor | None, parts: Iterable[slice | Sequence[int]] | None = None
    ) -> Iterator[tuple[Any, Chunk, Tensor]]:
        """Inputs, recorded run and target of each part; by default of equal parts in order."""
        forward = LossData(self.model, self.data, self.forward).forward
        n, step = count_samples(x), self.step(x)
        runs = self._runs_of(x)
        if step == 1:
            del runs[False]
        if parts is None:
            parts = (slice(start, min(start + step, n)) for start in range(0, n, step))
        for part in parts:
            inputs = take(x, part)
            # a batch of one may take other operations (expand does nothing)
            alone = count_samples(inputs) == 1
            if alone not in runs:
                runs[alone] = sample_axes(self.model, x, self.parameters, forward, few=1 if alone else FEW)
            chunk = linearize(self.model, inputs, self.parameters, *runs[alone], forward)
            for name, degree in chunk.verdicts.items():
                if not degree.proven:
                    self.verdicts.setdefault(name, degree.reason)
            yield inputs, chunk, chunk.tape.target if y is None else y[part]
            del inputs, chunk  # before the next is run

    def evaluator(self, chunk: Chunk, y: Tensor, method: str) -> tuple[Sites | Twice | None, float]:
        """The residual on a chunk, ``None`` where all is proven, and its part of the denominator."""
        output = chunk.output.detach()
        weight = float(self.loss.weight(output, y))
        if not chunk.entries:
            return None, weight
        residual = output_gradient(self.loss, output, y)
        del output  # Sites lets go of it
        if method != "double-backward" and not self.per_layer:
            try:
                return Sites(chunk, residual), weight
            except UnsupportedError:
                if method == "sites":
                    raise
        return Twice(chunk, residual), weight


def _over_samples(values: Tensor, noise: Tensor) -> float | None:
    """Standard error of the mean over samples, the estimator's own variance of each value taken out."""
    if len(values) < 2:
        return None
    own = float(values.var()) - float(noise.mean())
    return (max(own, 0.0) / len(values)) ** 0.5


@dataclass(frozen=True)
class _Recorded:
    """Chunks of recorded runs: a model of :mod:`flatkern.chunk_plan`."""

    max_memory: int
    sample_bytes: int
    gradient_bytes: int
    """What one gradient takes: parameters, and half of a sample's values is saved for it."""

    def bytes(self, n: int) -> int:
        """Values, graph, cotangents, tangents and temporaries."""
        return COPIES * self.sample_bytes * self.samples(n)

    def samples(self, n: int) -> int:
        """The most that fit into less than two gradients' memory, and at least one."""
        gradient = self.gradient_bytes // 2 + n * self.sample_bytes // 2
        limit = frugal_limit(gradient, self.max_memory)
        most = max(1, min(n, limit // max(1, COPIES * self.sample_bytes)))
        return -(-n // -(-n // most))
