"""A loss's Hessian as what is exact on its diagonal and what has to be sampled: G + R, or H where that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from flatkern._loss_roots import with_roots
from flatkern.curvature_rows import CurvatureRows
from flatkern.ggn_entries import GGNEntries, ggn_diagonal
from flatkern.linearize import Forward
from flatkern.loss_data import LossData
from flatkern.losses import Reduction
from flatkern.operators import LinearOperator, hessian
from flatkern.operators.evaluation import resolve
from flatkern.problem import Layout, ParameterSelection, check_model, select_parameters
from flatkern.residual_operator import residual_operator
from flatkern.samples import take
from flatkern.verdicts import loss_uses_parameters, not_affine

__all__ = ["HessianParts", "hessian_parts", "why_no_split"]


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
    loss: float | None
    num_data: int
    notes: tuple[str, ...]

    @property
    def exact(self) -> tuple[str, ...]:
        """Parameters whose diagonal entries are exact."""
        return tuple(name for name in self.parameters if name not in self.unproven)

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
        max_columns: cotangents a sample beyond which H is taken whole.
    """
    check_model(model)
    loss = resolve(loss_fn, reduction, forward)
    parameters = select_parameters(model, params)
    reason = ""
    if diagonal is None:
        reason = why_no_split(model, loss_fn, data, reduction, forward, max_memory, max_columns)
    if reason:
        return _whole(model, loss_fn, data, parameters, reduction, forward, max_memory, reason)
    names = list(parameters)
    if diagonal is None:
        diagonal = ggn_diagonal(
            model, loss_fn, data, params=names, reduction=reduction, forward=forward, max_memory=max_memory
        )
    batches = LossData(model, data, forward)
    if unproven is None:
        unproven = not_affine(model, batches, parameters, batches.forward, max_memory)
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
        loss=diagonal.loss,
        num_data=diagonal.num_data,
        notes=diagonal.notes,
    )


def why_no_split(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    reduction: Reduction | None,
    forward: Forward | None,
    max_memory: int,
    max_columns: int | None = None,
) -> str:
    """Why the Gauss-Newton diagonal is not to be had; empty where it is."""
    loss = resolve(loss_fn, reduction, forward)
    if loss_fn is None:
        return "the model computes its own loss, so output and loss are not apart"
    if loss.name == "NLLLoss":
        return "NLLLoss is linear in the output, so its Gauss-Newton matrix is 0"
    rows = CurvatureRows(model, loss_fn, data, params=None, forward=forward, reduction=reduction)
    ((inputs, target),) = islice(iter(rows), 1)
    few = slice(0, 2)
    output, y = rows.evaluate(inputs, target, few)
    if loss_uses_parameters(loss, output, y, model):
        return f"the loss {loss.name} itself uses parameters"
    if max_columns is not None and loss.columns(output) > max_columns:
        return f"{loss.columns(output)} cotangents a sample"
    needed = 3 * loss.columns(output) * output[0].numel() * output.element_size()
    if needed > max_memory:
        return f"{loss.columns(output)} cotangents a sample exceed max_memory"
    try:
        with torch.enable_grad():
            root = with_roots(loss).root
            assert root is not None
            root(output.detach(), take(y, few) if forward is None else y)
    except ValueError as error:  # not convex, or too many outputs to form its Hessian
        return str(error).removeprefix("loss_fn: ")
    return ""


def _whole(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    parameters: dict[str, nn.Parameter],
    reduction: Reduction | None,
    forward: Forward | None,
    max_memory: int,
    reason: str,
) -> HessianParts:
    op = hessian(
        model, loss_fn, data,
        params=list(parameters), reduction=reduction, forward=forward, max_memory=max_memory,
    )  # fmt: skip
    layout = Layout(parameters)
    return HessianParts(
        parameters=parameters,
        layout=layout,
        ggn=torch.zeros(layout.size, dtype=torch.float64, device=op.device),
        unproven=dict.fromkeys(parameters, reason),
        split=False,
        make=lambda: op,
        loss=None,
        num_data=op.num_data,
        notes=(),
    )
