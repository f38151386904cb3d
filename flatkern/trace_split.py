"""Tr H as exact GGN trace plus sampled residual: planning, chunks, error bars, and what falls back."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.estimators import trace
from flatkern.flatness import ggn_trace
from flatkern.freedom import SummedVariance
from flatkern.linearize import Forward
from flatkern.loss_data import residual_norms
from flatkern.losses import Loss, Reduction
from flatkern.operators import hessian
from flatkern.recorded_runs import RecordedRuns
from flatkern.residual import Chunk, Sites, Twice
from flatkern.results import Estimate, HessianTrace, standard_error
from flatkern.sample_axis import FEW
from flatkern.samples import count_samples
from flatkern.tape import UnsupportedError
from flatkern.trace_allotted import Allotment, Found
from flatkern.trace_goal import Goal, Sampled, Spread, together
from flatkern.trace_survey import largest_and_some

__all__ = ["Split"]

PILOT_SAMPLES = 64
"""The pilot runs on this many samples of the first batch."""
PILOT_PROBES = 4
PILOT_FREEDOM = 192
"""Degrees of freedom of the pilot's spread, at least: few samples take more probes."""
SECOND_PILOT = 16
"""Where more probes than this are planned, a pilot on all samples plans again."""
PROBES_A_PRODUCT = 6
"""What a Hessian-vector product costs in probes, about."""

_AFFINE = "outputs piecewise affine in every parameter entry"


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
    refused: dict[str, str] = field(default_factory=dict)
    """Parameters left to the plain estimator, with the reason."""

    def __post_init__(self) -> None:
        self._runs = RecordedRuns(
            self.model, self.loss, self.data, self.parameters, self.forward, self.max_memory
        )

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
            dof=found.dof,
            skewness=found.skewness,
            exact=tuple(self.parameters) if exact else (),
            sampled={} if exact else dict.fromkeys(self.parameters, why),
        )

    def run(self, method: str, started: float) -> HessianTrace:
        """The exact GGN trace plus the sampled residual."""
        probes = self.goal.samples or 0
        closed = False
        if self.goal.samples is None and not self.per_layer:
            allotment = Allotment(self._runs, self.goal, self.generator, method)
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
        planned = self._plan(pilot, ggn)
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
        mean = together(sampled.means) / denominator  # [rows, n]
        spread = together(sampled.variances) / (denominator**2 * used)
        residual = mean.sum(0)
        error = sampled.summed().scaled(1 / (denominator * used**0.5))
        error.add(ggn.stderr**2, ggn.dof)
        value = ggn.value + float(residual.sum())
        per_sample = ggn.per_sample + n * residual.to(ggn.per_sample)
        rest: HessianTrace | None = None
        if self.refused:
            rest = self.plain("; ".join(self.refused.values()), started, list(self.refused))
            value += rest.value
            error.add(rest.stderr**2, rest.dof)
        drawn = how != "exact"
        blind = drawn and probes > 0 and sampled.uninformative  # else a pilot has seen many more
        stderr = math.nan if blind else error.stderr
        if not math.isfinite(value):
            raise ValueError("model: second derivatives overflow or are NaN at this θ; measure in float64")
        met = not self.goal.given or stderr <= self.goal.tolerance(value)
        notes = list(ggn.notes) + ([] if rest is None else list(rest.notes))
        if planned > used:
            notes.append(f"max_samples allowed {used} probes; {planned} were planned")
        elif blind:
            notes.append("the few draws coincide, which says nothing of their error: take more samples")
        elif not met:
            notes.append("the probes spread more than the pilot's did; run again with more samples")
        by_layer = self._by_layer(ggn, mean, spread, layers) if self.per_layer else None
        return HessianTrace(
            value=value,
            stderr=stderr,
            sample_stderr=None if rest is not None else standard_error(per_sample, stderr),
            method=self._describe(how, used, ggn),
            num_data=n,
            matvecs=0 if rest is None else rest.matvecs,
            passes=ggn.passes + 1 + (used if drawn else 0),
            seconds=time.perf_counter() - started,
            converged=met and planned <= used,
            samples=None
            if sampled.totals is None or not drawn or rest is not None
            else ggn.value + sampled.totals.cpu() / denominator,
            per_sample=None if rest is not None else per_sample,
            dof=error.dof,
            per_layer=None if by_layer is None else by_layer[0],
            # how a sketch's error splits by layer is not known
            per_layer_stderr=None if by_layer is None or ggn.stderr else by_layer[1],
            notes=tuple(dict.fromkeys(notes)),
            exact=() if ggn.stderr else tuple(n for n in self.parameters if n not in self._runs.verdicts),
            sampled={
                n: self._runs.verdicts.get(n, "many outputs: the Gauss-Newton part is sketched")
                for n in self.parameters
                if n in self._runs.verdicts or ggn.stderr
            },
        )

    def _allotted(self, found: Found, started: float) -> HessianTrace:
        """The result of the pass in which the samples got what they need."""
        denominator, n = self.loss.denominator(found.weight), len(found.values)
        value, stderr = float(found.values.sum()) / denominator, found.variance.stderr / denominator
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
        sampled.update(self._runs.verdicts)
        return HessianTrace(
            value=value,
            stderr=stderr,
            # of values drawn once nothing is known by themselves
            sample_stderr=standard_error(per_sample, float(found.noise.sum()) ** 0.5 / denominator),
            method=self._described(found),
            num_data=n,
            passes=round(found.cotangents + found.probes) + 1,
            seconds=time.perf_counter() - started,
            converged=met,
            per_sample=per_sample,
            notes=tuple(notes),
            dof=found.variance.dof,
            exact=tuple(name for name in self.parameters if name not in sampled),
            sampled=sampled,
        )

    def _describe(self, how: str, probes: int, ggn: Estimate) -> str:
        sketched = f"{ggn.passes} sign sketches of the GGN trace" if ggn.stderr else ""
        if not self._runs.verdicts:
            return f"{sketched}; {_AFFINE}" if sketched else f"exact (ghost norms; {_AFFINE})"
        text = (sketched or "exact GGN trace") + self._residual_text()
        text += "closed form" if how == "exact" else f"{probes} probes ({how})"
        return text + (f", Hutchinson for {', '.join(self.refused)}" if self.refused else "")

    def _described(self, found: Found) -> str:
        if not self._runs.verdicts:
            return f"exact (ghost norms; {_AFFINE})"
        text = f"sign sketch of the GGN trace ({found.cotangents:.1f} cotangents a sample)"
        text = (text if found.sketched else "exact GGN trace") + self._residual_text()
        if not found.how:
            return text + "closed form"
        probes = f"{found.least}" if found.least == found.most else f"{found.least} to {found.most}"
        return f"{text}{probes} probes ({found.how})"

    def _residual_text(self) -> str:
        return f" + residual of {len(self._runs.verdicts)} of {len(self.parameters)} parameters: "

    @staticmethod
    def _by_layer(
        ggn: Estimate, mean: Tensor, spread: Tensor, layers: tuple[str, ...]
    ) -> tuple[dict[str, float], dict[str, float]]:
        values = dict(ggn.per_layer or {})
        errors = dict.fromkeys(values, 0.0)
        for layer, m, s in zip(layers, mean, spread, strict=False):  # no layers where nothing had to be drawn
            values[layer] = values.get(layer, 0.0) + float(m.sum())
            errors[layer] = float(s.sum()) ** 0.5
        return values, errors

    def _pilot(self, method: str) -> Spread:
        """Over all data, from a few samples of the first batch that has a residual, and sizes of all of them."""
        found, ours, energy, size, weight = None, (0.0, 0.0), 0.0, 0.0, 0.0
        for x, y in self._runs.batches():
            if self.goal.samples is not None:  # only the verdict is wanted
                self._look(x, y, method, torch.arange(min(count_samples(x), FEW)), None)
                return Spread(0.0, 0.0, 0.0)
            norms, part = self._norms(x, y)
            batch = float(norms.square().sum()), float(norms.sum())
            energy, size, weight = energy + batch[0], size + batch[1], weight + part
            if found is None or (ours[0] == 0 and batch[0] > 0):
                chosen, counts = torch.arange(len(norms)), None
                if len(norms) > PILOT_SAMPLES:
                    chosen, counts = largest_and_some(norms, PILOT_SAMPLES)
                found, ours = self._look(x, y, method, chosen, counts), batch
        if found is None:
            raise ValueError("data: no batch in it")
        if ours[0] > 0:
            found = replace(
                found, mean=found.mean * size / ours[1], variance=found.variance * energy / ours[0]
            )
        return replace(found, weight=weight)

    def _look(self, x: Any, y: Tensor | None, method: str, chosen: Tensor, counts: Tensor | None) -> Spread:
        """Probes on some samples of a batch, each of which stands for so many; without ``counts`` for itself."""
        step = self._runs.step(x)
        total, spread = 0.0, SummedVariance()
        probes = max(PILOT_PROBES, 1 + math.ceil(PILOT_FREEDOM / len(chosen)))
        parts = list(torch.arange(len(chosen)).split(step))
        chunks = self._runs.chunks(x, y, [chosen[part].tolist() for part in parts])
        for part, (_, chunk, target) in zip(parts, chunks, strict=True):
            evaluator, _ = self._evaluator(chunk, target, method)
            self.refused.update(chunk.refused)
            if evaluator is not None and self.goal.samples is None:
                count = 2 if evaluator.exact else probes
                values = torch.stack([evaluator.draw(self.generator) for _ in range(count)])
                times = torch.ones_like(values[0]) if counts is None else counts[part].to(values)
                total += float((values.mean(0) * times).sum())
                spread.add(values.var(0), probes - 1, times)
            del chunk, evaluator
        return Spread(total, spread.value, 0.0, spread.freedom / (probes - 1))

    def _norms(self, x: Any, y: Tensor | None) -> tuple[Tensor, float]:
        """‖∂ℓ_i/∂f_i‖ of a batch on the CPU, [n], and its part of the denominator."""
        n, step = count_samples(x), self._runs.step(x)
        norms, weight = [], 0.0
        for start in range(0, n, step):
            output, target = self._runs.outputs(x, y, slice(start, min(start + step, n)))
            norms.append(residual_norms(self.loss, output, target))
            weight += float(self.loss.weight(output, target))
        return torch.cat(norms).cpu(), weight

    def _plan(self, spread: Spread, ggn: Estimate) -> int:
        denominator = spread.weight if self.loss.reduction == "mean" else 1.0
        share = 0.5 if self.refused else 1.0
        return self.goal.probes(spread, ggn.value, denominator, share=share, taken=ggn.stderr)

    def _evaluator(self, chunk: Chunk, target: Tensor, method: str) -> tuple[Sites | Twice | None, float]:
        return self._runs.evaluator(chunk, target, method, per_layer=self.per_layer)

    def _sample(self, method: str, probes: int) -> tuple[Sampled, str, tuple[str, ...]]:
        sampled, how = Sampled(), "exact"
        layers: tuple[str, ...] | None = None
        for x, y in self._runs.batches():
            for _, chunk, target in self._runs.chunks(x, y):
                evaluator, weight = self._evaluator(chunk, target, method)
                sampled.weight += weight
                unknown = set(chunk.refused) - set(self.refused)
                if unknown:
                    raise UnsupportedError(f"batches use {', '.join(sorted(unknown))} in different ways")
                n = len(chunk.output)
                if evaluator is None:
                    values = torch.zeros(2, 1, n, dtype=torch.float64, device=chunk.output.device)
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
