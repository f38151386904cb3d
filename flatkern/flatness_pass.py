"""One pass over the data for everything that is exact and first order: what :func:`flatkern.flatness` shares."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flatkern._loss_roots import with_roots
from flatkern.ggn_entries import GGNEntries, add_squares
from flatkern.gradient_gram import Gradients
from flatkern.linearize import Forward, Linearization, linearizations
from flatkern.loss_data import LossData, check_target, output_gradient
from flatkern.losses import Loss
from flatkern.problem import Layout, model_device
from flatkern.relative_parts import weighted_norms
from flatkern.results import Estimate, PerSample, standard_error
from flatkern.root_sets import gradients_for
from flatkern.squared_norms import layer_of

__all__ = ["Sums", "one_pass"]

GGN, OWN, UNIT = "ggn", "own", "unit"


@dataclass
class _Norms:
    """Σ_k ‖γ_ik‖² of one set of cotangents."""

    per_sample: list[Tensor] = field(default_factory=list)
    per_layer: dict[str, list[Tensor]] = field(default_factory=dict)

    def add(
        self, gradients: Gradients, names: Mapping[str, nn.Parameter], device: torch.device, limit: int
    ) -> None:
        by_layer: dict[str, Tensor] = {}
        for name in names:
            own = torch.zeros(gradients.n, dtype=torch.float64, device=device)
            for term in gradients.terms.get(name, ()):
                own = own + term.squared_norms(limit)
            layer = layer_of(name)
            by_layer[layer] = by_layer[layer] + own if layer in by_layer else own
        for layer, own in by_layer.items():
            self.per_layer.setdefault(layer, []).append(own)
        self.per_sample.append(torch.stack(list(by_layer.values())).sum(0))

    def estimate(self, factor: float, passes: int, notes: Iterable[str], seconds: float) -> Estimate:
        """factor · Σ_i over the samples."""
        values = torch.cat(self.per_sample)
        per_sample = values * (factor * len(values))
        return Estimate(
            value=float(per_sample.mean()),
            sample_stderr=standard_error(per_sample),
            method="exact (ghost norms)",
            num_data=len(values),
            passes=passes,
            seconds=seconds,
            notes=tuple(notes),
            per_sample=per_sample,
            per_layer={
                layer: factor * float(torch.cat(parts).sum()) for layer, parts in self.per_layer.items()
            },
        )

    def values(self, notes: Iterable[str], seconds: float) -> PerSample:
        return PerSample(
            torch.cat(self.per_sample),
            method="exact (ghost norms)",
            seconds=seconds,
            notes=tuple(notes),
            per_layer={layer: torch.cat(parts) for layer, parts in self.per_layer.items()},
        )


@dataclass(frozen=True)
class Sums:
    """What one pass gave; ``None`` where it was not asked for."""

    loss: float
    denominator: float
    num_data: int
    layout: Layout
    gradient: Tensor
    """∇L [P], float64."""
    ggn: Estimate | None
    diagonal: GGNEntries | None
    sharpness: Estimate | None
    gradient_norms: PerSample
    relative: Tensor | None
    """Each sample's part of the numerator of κ, float64 [n]."""
    seconds: float
    cotangents: int
    """Pulled back a sample, at most."""


def one_pass(
    model: nn.Module,
    loss: Loss,
    data: Any,
    parameters: Mapping[str, nn.Parameter],
    forward: Forward | None,
    max_memory: int,
    *,
    wanted: Set[str],
    layer: str | None,
) -> Sums:
    """Loss, gradient, per-sample gradient norms, and as ``wanted`` "ggn", "diagonal", "sharpness" and ``layer``'s κ.

    Each chunk of samples is run once; the unit cotangents of its N outputs are pulled back to where the parameters
    enter, and roots of the output Hessian and the loss's own gradients are combinations of them.
    """
    started = time.perf_counter()
    curved = bool(wanted & {"ggn", "diagonal"}) or layer is not None
    rooted = with_roots(loss) if curved else loss
    layout, batches = Layout(parameters), LossData(model, data, forward)
    gradient = torch.zeros(layout.size, dtype=torch.float64, device=model_device(model))
    diagonal = torch.zeros_like(gradient)
    unchecked = [loss.callable]
    norms = {key: _Norms() for key in (OWN, GGN, UNIT)}
    relative: list[Tensor] = []
    total, weight, n, cotangents = 0.0, 0.0, 0, 0
    notes: dict[str, None] = {}
    for inputs, y in batches:
        for lin in linearizations(
            model, inputs, parameters,
            with_input=False, max_memory=max_memory // 3, own_roots=True, keep_cotangents=True,
            forward=batches.forward,
        ):  # fmt: skip
            output, target = lin.output.detach(), lin.target if y is None else y[lin.samples]
            check_target(loss, output, target, unchecked)
            total += float(loss.numerator(output, target))
            weight += float(loss.weight(output, target))
            n += lin.n
            sets: dict[str, Tensor | None] = {OWN: output_gradient(loss, output, target).unsqueeze(0)}
            if curved:
                assert rooted.root is not None
                sets[GGN] = rooted.root(output, target)
            if "sharpness" in wanted:
                sets[UNIT] = None
            cotangents = max(cotangents, _pulled(lin, sets))
            gradient += _gradient(lin, sets[OWN], parameters, layout)
            for key, found in zip(
                sets, gradients_for(model, lin, list(sets.values()), parameters), strict=True
            ):
                notes.update(dict.fromkeys(found.notes))
                if key != GGN or "ggn" in wanted:
                    norms[key].add(found, parameters, output.device, max_memory // 4)
                if key == GGN and "diagonal" in wanted:
                    add_squares(diagonal, lin, found, parameters, layout, max_memory // 4)
                if key == GGN and layer is not None:
                    terms = found.terms.get(layer, [])
                    relative.append(weighted_norms(lin, terms, layer, parameters[layer], max_memory // 4))
                del found
            del lin, sets
    denominator = loss.denominator(weight)
    seconds = time.perf_counter() - started
    entries = None
    if "diagonal" in wanted:
        entries = GGNEntries(diagonal / denominator, total / denominator, layout, n, seconds, (), denominator)
    return Sums(
        loss=total / denominator,
        denominator=denominator,
        num_data=n,
        layout=layout,
        gradient=gradient / denominator,
        ggn=norms[GGN].estimate(1 / denominator, cotangents, notes, seconds) if "ggn" in wanted else None,
        diagonal=entries,
        sharpness=norms[UNIT].estimate(1 / n, cotangents, notes, seconds) if "sharpness" in wanted else None,
        gradient_norms=norms[OWN].values(notes, seconds),
        relative=torch.cat(relative) if relative else None,
        seconds=seconds,
        cotangents=cotangents,
    )


def _pulled(lin: Linearization, sets: Mapping[str, Tensor | None]) -> int:
    outputs = lin.output[0].numel()
    asked = sum(outputs if roots is None else len(roots) for roots in sets.values())
    return asked if lin.uses.uncovered else min(asked, outputs)


def _gradient(
    lin: Linearization, roots: Tensor | None, parameters: Mapping[str, nn.Parameter], layout: Layout
) -> Tensor:
    if lin.output.grad_fn is None or roots is None:
        return torch.zeros(layout.size, dtype=torch.float64, device=lin.output.device)
    found = torch.autograd.grad(
        lin.output, list(parameters.values()), roots[0], retain_graph=True, allow_unused=True
    )
    filled = [
        torch.zeros_like(p) if g is None else g for p, g in zip(parameters.values(), found, strict=True)
    ]
    return layout.flatten(filled).double()
