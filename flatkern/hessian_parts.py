"""A loss's Hessian as what is exact on its diagonal and what has to be sampled: G + R, or H where that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flatkern._loss_roots import with_roots
from flatkern.curvature_rows import CurvatureRows, Survey
from flatkern.ggn_draws import ggn_draws
from flatkern.ggn_entries import GGNEntries, ggn_diagonal
from flatkern.linearize import Forward
from flatkern.loss_data import LossData
from flatkern.losses import Reduction
from flatkern.operators import LinearOperator, hessian
from flatkern.operators.evaluation import resolve
from flatkern.problem import Layout, ParameterSelection, check_model, model_device, select_parameters
from flatkern.residual_operator import residual_operator
from flatkern.samples import take
from flatkern.verdicts import loss_uses_parameters, not_affine

__all__ = ["EXACT_UP_TO", "HessianParts", "Obstacle", "hessian_parts", "why_no_split"]

EXACT_UP_TO = 64
"""Cotangents a sample up to which the exact way is taken where it can be drawn instead."""
Draw = Callable[[Tensor | None, dict[str, slice], int, torch.Generator], Tensor]


class Obstacle(NamedTuple):
    """Why the Gauss-Newton diagonal cannot be had exactly."""

    reason: str
    can_draw: bool = False
    """Whether it is a matter of size alone, and sign sketches do."""


@dataclass(frozen=True)
class HessianParts:
    """diag H = ``ggn`` on the exact parameters, ``ggn`` + diag of ``operator()`` on the others."""

    parameters: dict[str, nn.Parameter]
    layout: Layout
    ggn: Tensor
    """diag GGN [P], float64; zeros where ``split`` is false."""
    unproven: dict[str, str]
    """Parameters that are not exact, with the reason."""
    split: bool
    """Whether ``operator`` is the residual R; else it is H itself, of all parameters."""
    make: Callable[[], LinearOperator] = field(repr=False)
    draw: Draw | None = field(repr=False)
    """(w, groups, count, generator) → draws of Σ w_k G_kk, where ``ggn`` is not known (and zeros) for its size."""
    loss: float | None
    num_data: int
    notes: tuple[str, ...]
    reason: str = ""
    """Why ``ggn`` is not known."""

    @property
    def exact(self) -> tuple[str, ...]:
        """Parameters whose diagonal entries are exact."""
        return tuple(name for name in self.parameters if name not in self.sampled)

    @property
    def sampled(self) -> dict[str, str]:
        """The others, with the reason."""
        rest = {} if self.draw is None else dict.fromkeys(self.parameters, self.reason)
        return {**rest, **self.unproven}

    @property
    def columns(self) -> Tensor:
        """Where the entries of the unproven parameters lie among all, in the operator's order."""
        places = [torch.arange(s.start, s.stop) for s in (self.layout.slices[n] for n in self.unproven)]
        return torch.cat(places).to(self.ggn.device) if places else torch.empty(0, dtype=torch.long)

    def operator(self) -> LinearOperator:
        """R or H of the unproven parameters, in the layout's order."""
        return self.make()


def hessian_parts(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    *,
    params: ParameterSelection,
    reduction: Reduction | None,
    forward: Forward | None,
    max_memory: int,
    diagonal: GGNEntries | None = None,
    unproven: dict[str, str] | None = None,
    max_columns: int | None = None,
) -> HessianParts:
    """Split the Hessian of a loss where its diagonal is concerned.

    Args:
        model, loss_fn, data, params, reduction, forward: as for :func:`flatkern.ggn_diagonal`; ``loss_fn=None`` as for
            :func:`flatkern.hessian`.
        max_memory: bytes.
        diagonal, unproven: the exact part and the verdicts, where they are known already.
        max_columns: cotangents a sample beyond which the Gauss-Newton part is drawn.
    """
    check_model(model)
    loss = resolve(loss_fn, reduction, forward)
    parameters = select_parameters(model, params)
    same: dict[str, Any] = {
        "params": list(parameters), "reduction": reduction, "forward": forward, "max_memory": max_memory
    }  # fmt: skip
    obstacle: Obstacle | None = None
    if diagonal is None:
        obstacle = why_no_split(model, loss_fn, data, reduction, forward, max_memory, max_columns)
    if obstacle is not None and (max_columns is None or not obstacle.can_draw):
        return _whole(model, loss_fn, data, parameters, same, obstacle.reason)
    batches = LossData(model, data, forward)
    if unproven is None:
        unproven = not_affine(model, batches, parameters, batches.forward, max_memory)
    draw: Draw | None = None
    if obstacle is not None:
        rows = CurvatureRows(model, loss_fn, data, params=None, reduction=reduction, forward=forward)
        diagonal = _nothing(parameters, model, rows.survey())
        draw = _drawing(model, loss_fn, data, same, diagonal.denominator)
    elif diagonal is None:
        diagonal = ggn_diagonal(model, loss_fn, data, **same)
    denominator = diagonal.denominator
    return HessianParts(
        parameters=parameters,
        layout=diagonal.layout,
        ggn=diagonal.values,
        unproven=unproven,
        split=True,
        make=lambda: residual_operator(
            model, loss, data, list(unproven), denominator, batches.forward, max_memory
        ),
        draw=draw,
        loss=diagonal.loss,
        num_data=diagonal.num_data,
        notes=diagonal.notes,
        reason="" if obstacle is None else obstacle.reason,
    )


def _nothing(parameters: dict[str, nn.Parameter], model: nn.Module, survey: Survey) -> GGNEntries:
    layout = Layout(parameters)
    zeros = torch.zeros(layout.size, dtype=torch.float64, device=model_device(model))
    return GGNEntries(zeros, survey.loss, layout, survey.num_data, 0.0, (), survey.denominator)


def _drawing(model: nn.Module, loss_fn: object, data: Any, same: dict[str, Any], denominator: float) -> Draw:
    def draw(
        weights: Tensor | None, groups: dict[str, slice], count: int, generator: torch.Generator
    ) -> Tensor:
        return ggn_draws(
            model, loss_fn, data,
            denominator=denominator, weights=weights, groups=groups, count=count, generator=generator, **same,
        )  # fmt: skip

    return draw


def why_no_split(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    reduction: Reduction | None,
    forward: Forward | None,
    max_memory: int,
    max_columns: int | None = None,
) -> Obstacle | None:
    """Why the Gauss-Newton diagonal is not to be had; ``None`` where it is."""
    loss = resolve(loss_fn, reduction, forward)
    if loss_fn is None:
        return Obstacle("the model computes its own loss, so output and loss are not apart")
    if loss.name == "NLLLoss":
        return Obstacle("NLLLoss is linear in the output, so its Gauss-Newton matrix is 0")
    rows = CurvatureRows(model, loss_fn, data, params=None, forward=forward, reduction=reduction)
    ((inputs, target),) = islice(iter(rows), 1)
    few = slice(0, 2)
    output, y = rows.evaluate(inputs, target, few)
    if loss_uses_parameters(loss, output, y, model):
        return Obstacle(f"the loss {loss.name} itself uses parameters")
    known = loss.sketch is not None
    if max_columns is not None and loss.columns(output) > max_columns:
        return Obstacle(f"{loss.columns(output)} cotangents a sample", known)
    needed = 3 * loss.columns(output) * output[0].numel() * output.element_size()
    if needed > max_memory:
        return Obstacle(f"{loss.columns(output)} cotangents a sample exceed max_memory", known)
    try:
        with torch.enable_grad():
            root = with_roots(loss).root
            assert root is not None
            root(output.detach(), take(y, few) if forward is None else y)
    except ValueError as error:  # not convex, or too many outputs to form its Hessian
        return Obstacle(str(error).removeprefix("loss_fn: "))
    return None


def _whole(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    parameters: dict[str, nn.Parameter],
    same: dict[str, Any],
    reason: str,
) -> HessianParts:
    op = hessian(model, loss_fn, data, **same)
    layout = Layout(parameters)
    return HessianParts(
        parameters=parameters,
        layout=layout,
        ggn=torch.zeros(layout.size, dtype=torch.float64, device=op.device),
        unproven=dict.fromkeys(parameters, reason),
        split=False,
        make=lambda: op,
        draw=None,
        loss=None,
        num_data=op.num_data,
        notes=(),
    )
