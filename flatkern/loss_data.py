"""Batches and their loss for quantities that need the model's output and the loss apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.linearize import Forward
from flatkern.losses import Loss, Reduction, resolve_loss
from flatkern.operators.batches import OperatorData, tensors_in
from flatkern.operators.evaluation import evaluate
from flatkern.operators.ggn_op import output_gradient as mean_gradient
from flatkern.problem import all_finite, check_input, model_device
from flatkern.samples import count_samples

__all__ = ["LossData", "check_target", "output_gradient", "residual_norms", "separate_loss"]


def separate_loss(loss_fn: object, reduction: Reduction | None) -> Loss:
    """The loss apart from the model; it cannot be the model's own."""
    if loss_fn is None:
        raise ValueError(
            "loss_fn: None is not possible here, as output and loss are needed apart; give the loss and "
            "forward=(model, batch) -> (output, target)"
        )
    return resolve_loss(loss_fn, reduction)


def check_target(loss: Loss, output: Tensor, target: Tensor, unchecked: list[bool]) -> None:
    """A wrong target gets the loss's own message, a callable's reduction is compared with two halves once."""
    value = loss.numerator(output, target)
    if not bool(torch.isfinite(value)):
        raise ValueError(
            "loss_fn: the loss is NaN or Inf on finite outputs; check the targets and the loss's weights"
        )
    if unchecked[0] and len(output) > 1:
        loss.check_reduction(output, target)
        unchecked[0] = False


def output_gradient(loss: Loss, output: Tensor, target: Tensor) -> Tensor:
    """∂(numerator)/∂f, [*output]; zeros where the loss does not depend on the output."""
    found = mean_gradient(output.detach(), target, loss, create_graph=False)
    return torch.zeros_like(output) if found is None else found[1] * len(output)


def residual_norms(loss: Loss, output: Tensor, target: Tensor) -> Tensor:
    """‖∂ℓ_i/∂f_i‖, float64 [n]."""
    return output_gradient(loss, output, target).double().flatten(1).norm(dim=1)


class LossData:
    """Batches as (inputs, target), or whole ones with the target left to ``forward``."""

    def __init__(self, model: nn.Module, data: Any, forward: Forward | None) -> None:
        self._data = OperatorData(data, model_device(model), forward)
        self._given = forward

    @property
    def forward(self) -> Forward | None:
        """Checked: one output row a sample."""
        given = self._given
        if given is None:
            return None

        def checked(model: nn.Module, batch: Any) -> tuple[Tensor, Any]:
            n = count_samples(batch)
            output, target = evaluate(model, batch, given, own_loss=False, samples=n)
            if len(output) != n:
                raise ValueError(
                    f"forward: the output has {len(output)} rows for {n} samples; keep the samples on axis 0, tokens "
                    "on the next (outputs [B, T, V] with fk.losses.TokenCrossEntropyLoss)"
                )
            return output, target

        return checked

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        for batch in self._data:
            for tensor in tensors_in(batch):
                if tensor.is_floating_point() and not all_finite(tensor):
                    raise ValueError("data: a tensor of a batch holds NaN or Inf")
            if self._given is not None:
                yield batch, None
            else:
                x, y = batch
                check_input(x, differentiable=False)
                yield x, y
