"""Tr H as exact GGN trace plus sampled residual: planning, chunks, error bars, and what falls back."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.estimators import trace
from flatkern.flatness import ggn_trace
from flatkern.losses import Loss, Reduction
from flatkern.operators import hessian
from flatkern.problem import (
    Batches,
    check_input,
    model_device,
)
from flatkern.residual import Chunk, Sites, Twice, linearize
from flatkern.results import Estimate, HessianTrace
from flatkern.sample_axis import FEW, footprint, sample_axes
from flatkern.tape import Tape, UnsupportedError
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
COPIES = 6
"""Memory of a chunk over that of its intermediate values: graph, cotangents, tangents and temporaries."""


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
    verdicts: dict[str, str] = field(default_factory=dict)
    """Parameters not proven, with the reason."""
    refused: dict[str, str] = field(default_factory=dict)
    _axes: dict[Any, tuple[Tape, dict[int, tuple[int, bool]]]] = field(default_factory=dict)

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
        pilot = self._pilot(method)
        ours = {n: p for n, p in self.parameters.items() if n not in self.refused}
        if not ours or (self.refused and (self.per_layer or method != "auto")):
            raise UnsupportedError("; ".join(f"{n}: {why}" for n, why in self.refused.items()))
        ggn = ggn_trace(
            self.model,
            self.loss_fn,
            self.data,
            params=list(ours),
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
        stderr = float(spread.sum()) ** 0.5
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
            method=self._describe(how if drawn or self.verdicts else "", used),
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
            per_layer_stderr=None if by_layer is None else by_layer[1],
            notes=tuple(dict.fromkeys(notes)),
            exact=tuple(n for n in self.parameters if n not in self.verdicts),
            sampled={n: self.verdicts[n] for n in self.parameters if n in self.verdicts},
        )

    def _describe(self, how: str, probes: int) -> str:
        if not self.verdicts:
            return "exact (ghost norms; outputs piecewise affine in every parameter entry)"
        text = f"exact GGN trace + residual of {len(self.verdicts)} of {len(self.parameters)} parameters: "
        text += "closed form" if how == "exact" else f"{probes} probes ({how})"
        return text + (f", Hutchinson for {', '.join(self.refused)}" if self.refused else "")

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
        for x, y in Batches(self.data, model_device(self.model)):
            step = max(1, len(x) // PILOT_SAMPLES)
            few = torch.arange(0, len(x), step, device=x.device)[:PILOT_SAMPLES]
            x, y = x[few], y[few]
            check_input(x, differentiable=False)
            check_input(y, differentiable=False, name="y")
            total, spread, weight = 0.0, 0.0, 0.0
            # with a number of probes given, only the verdict is wanted
            least = max(PILOT_PROBES, 1 + math.ceil(PILOT_FREEDOM / len(x)))
            wanted = least if self.goal.samples is None else 0
            for chunk, part, target in self._chunks(x, y):
                evaluator, part_weight = self._evaluator(chunk, part, target, method)
                self.refused.update(chunk.refused)
                weight += part_weight
                if evaluator is not None and wanted:
                    values = torch.stack(
                        [evaluator.draw(self.generator) for _ in range(2 if evaluator.exact else wanted)]
                    )
                    total, spread = total + float(values.mean(0).sum()), spread + float(values.var(0).sum())
            return Spread(total, spread, weight).scaled(1 / len(x))
        raise ValueError("data: no batch in it")

    def _plan(self, spread: Spread, ggn: Estimate) -> int:
        denominator = spread.weight if self.loss.reduction == "mean" else 1.0
        return self.goal.probes(spread, ggn.value, denominator, share=0.5 if self.refused else 1.0)

    def _sample(self, method: str, probes: int) -> tuple[Sampled, str, tuple[str, ...]]:
        sampled, how = Sampled(), "exact"
        layers: tuple[str, ...] | None = None
        for x, y in Batches(self.data, model_device(self.model)):
            check_input(x, differentiable=False)
            for chunk, part, target in self._chunks(x, y):
                evaluator, weight = self._evaluator(chunk, part, target, method)
                sampled.weight += weight
                unknown = set(chunk.refused) - set(self.refused)
                if unknown:
                    raise UnsupportedError(f"batches use {', '.join(sorted(unknown))} in different ways")
                n = len(chunk.output)
                if evaluator is None:
                    rows = 1 if layers is None else len(layers)
                    values = torch.zeros(2, rows, n, dtype=torch.float64, device=part.device)
                elif self.per_layer:
                    assert isinstance(evaluator, Twice)
                    layers = evaluator.layers if layers is None else layers
                    if layers != evaluator.layers:
                        raise UnsupportedError("batches reach different layers")
                    values = torch.stack([evaluator.draw_layers(self.generator) for _ in range(probes)])
                    how = "double backward"
                else:
                    count = 2 if evaluator.exact else probes
                    drawn = torch.stack([evaluator.draw(self.generator) for _ in range(count)])
                    if evaluator.exact:
                        drawn = drawn[:1].expand(probes, -1)
                    else:
                        how = "tangent passes" if isinstance(evaluator, Sites) else "double backward"
                    values = drawn.unsqueeze(1)
                sampled.add(values if len(values) == probes else values[:1].expand(probes, -1, -1))
        return sampled, how, layers or ()

    def _chunks(self, x: Tensor, y: Tensor) -> Iterator[tuple[Chunk, Tensor, Tensor]]:
        small, places = self._axes_of(x)
        size = COPIES * footprint(small) // max(1, len(small.final.tensor))
        step = max(1, self.max_memory // max(size, 1))
        for start in range(0, len(x), step):
            part, target = x[start : start + step], y[start : start + step]
            chunk = linearize(self.model, part, self.parameters, small, places)
            for name, degree in chunk.verdicts.items():
                if not degree.proven:
                    self.verdicts.setdefault(name, degree.reason)
            yield chunk, part, target

    def _axes_of(self, x: Tensor) -> tuple[Tape, dict[int, tuple[int, bool]]]:
        # batches of one kind share the small run (of each chunk it is checked that the operations are the same)
        kind = x.shape[1:], x.dtype, min(len(x), FEW)
        if kind not in self._axes:
            self._axes[kind] = sample_axes(self.model, x, self.parameters)
        return self._axes[kind]

    def _evaluator(
        self, chunk: Chunk, x: Tensor, y: Tensor, method: str
    ) -> tuple[Sites | Twice | None, float]:
        output = chunk.output.detach().requires_grad_()
        value = self.loss.numerator(output, y)
        weight = float(self.loss.weight(output.detach(), y))
        if not chunk.entries:
            return None, weight
        (residual,) = torch.autograd.grad(value, output)
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
