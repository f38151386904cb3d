"""The Gauss-Newton part of a Hessian's trace on linearized chunks of samples: exactly, or by groups of columns."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flatkern.freedom import SummedVariance
from flatkern.linearize import Linearization
from flatkern.losses import Loss
from flatkern.signs import draw_signs
from flatkern.squared_norms import parameter_squared_norms
from flatkern.trace_groups import columns_of, group_columns, over_bound
from flatkern.trace_plan import Way

__all__ = ["GroupSketch"]


@dataclass
class GroupSketch:
    """Σ_k ‖J_iᵀ s_ik‖² of chunk after chunk, and what is to be said of all of them."""

    model: nn.Module
    loss: Loss
    parameters: dict[str, nn.Parameter]
    generator: torch.Generator
    variance: SummedVariance = field(default_factory=SummedVariance)
    """Of the sum over all chunks so far, or a bound on it."""
    drawn: bool = False
    notes: dict[str, None] = field(default_factory=dict)

    def __call__(self, lin: Linearization, output: Tensor, target: Tensor, way: Way) -> tuple[Tensor, Tensor]:
        """The values and their variances, as far as these are known sample by sample, float64 [n] each."""
        if not way.draws:
            assert self.loss.root is not None
            values = self._squares(lin, self.loss.root(output, target))
            return values, torch.zeros_like(values)
        drawn, bound = self.draws(lin, output, target, way)
        self.drawn = True
        if way.draws == 1:
            self.variance.add(bound, 1)
            return drawn[0], torch.zeros_like(bound)
        noise = drawn.var(0) / way.draws
        self.variance.add(noise, way.draws - 1)
        return drawn.mean(0), noise

    def draws(self, lin: Linearization, output: Tensor, target: Tensor, way: Way) -> tuple[Tensor, Tensor]:
        """Values of the sketch [draws, n]; where there is one, the bound Σ_g c_g v_g² on its variance, [n]."""
        columns = columns_of(self.loss, output, target)
        groups = group_columns(columns.double().square().flatten(2).sum(2).T, way.alone, way.groups)
        factors = over_bound(groups.sizes).T[way.alone :]
        values: list[Tensor] = []
        alone = bound = torch.zeros(len(output), dtype=torch.float64, device=output.device)
        for draw in range(way.draws):
            signs = draw_signs(columns.shape[:2], self.generator, output.device)
            roots = groups.combined(columns, signs.T)
            if draw == 0 and way.alone:
                alone = self._squares(lin, roots[: way.alone])
            drawn = roots[way.alone :]
            if way.draws > 1:
                values.append(alone + self._squares(lin, drawn))
                continue
            parts = torch.stack([self._squares(lin, root.unsqueeze(0)) for root in drawn])
            bound = (factors * parts.square()).sum(0)
            values.append(alone + parts.sum(0))
        return torch.stack(values), bound

    def _squares(self, lin: Linearization, roots: Tensor) -> Tensor:
        norms = parameter_squared_norms(self.model, lin, roots, self.parameters)
        self.notes.update(dict.fromkeys(norms.notes))
        return norms.total
