"""Weighted traces of the Gauss-Newton diagonal by sign sketches, for samples with too many outputs for all roots."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.curvature_rows import CurvatureRows
from flatkern.ggn_entries import add_squares
from flatkern.gradient_rows import GradientRows
from flatkern.linearize import Forward
from flatkern.losses import Reduction
from flatkern.problem import Layout
from flatkern.signs import draw_signs

__all__ = ["ggn_draws"]


def ggn_draws(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    *,
    params: list[str],
    reduction: Reduction | None,
    forward: Forward | None,
    max_memory: int,
    denominator: float,
    weights: Tensor | None,
    groups: Mapping[str, slice],
    count: int,
    generator: torch.Generator,
) -> Tensor:
    """Unbiased draws of Σ_{k in group} w_k G_kk, float64 [count, groups].

    A draw is Σ_i (∂(S_i ε_i·f_i)/∂θ_k)², with independent signs ε_i a sample and S_i a root of its output Hessian: one
    cotangent a sample. Its variance falls as 1/n.

    Args:
        model, loss_fn, data, reduction, forward, max_memory: as for :func:`flatkern.ggn_diagonal`.
        params: names.
        denominator: the loss's, over the whole data set.
        weights: w [P], float64; ``None``: ones.
        groups: entries by name.
        count: draws.
        generator: of the signs.
    """
    rows = CurvatureRows(model, loss_fn, data, params=params, reduction=reduction, forward=forward)
    sketch = rows.loss.sketch
    assert sketch is not None
    layout = Layout(rows.parameters)

    def roots(output: Tensor, target: Any, _start: int) -> Tensor:
        return sketch(output, target, draw_signs(output.shape, generator, output.device, output.dtype))[None]

    sketched = GradientRows(model, rows, rows.parameters, roots, forward=rows.forward, cotangents=1)
    found = []
    for _ in range(count):
        total: Tensor | None = None
        for chunk in sketched.chunks(max_memory // 2):
            if total is None:
                total = torch.zeros(layout.size, dtype=torch.float64, device=chunk.lin.output.device)
            add_squares(total, chunk.lin, chunk.gradients, rows.parameters, layout, max_memory // 4)
            del chunk
        assert total is not None
        total = total if weights is None else total * weights
        found.append(torch.stack([total[place].sum() for place in groups.values()]) / denominator)
    return torch.stack(found)
