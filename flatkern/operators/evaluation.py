"""From a batch to output and target: a model on pairs, ``forward`` on anything, losses of the model's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flatkern.losses import Loss, Reduction, resolve_loss
from flatkern.operators.batches import Forward, tensors_in
from flatkern.problem import check_output

__all__ = ["OWN_LOSS", "evaluate", "resolve"]

OWN_LOSS = "the model's own loss"


def resolve(loss_fn: object, reduction: Reduction | None, forward: Forward | None) -> Loss:
    """The loss, or one that stands for what ``forward`` returns where ``loss_fn`` is ``None``."""
    if loss_fn is not None:
        return resolve_loss(loss_fn, reduction)
    if forward is None:
        raise ValueError(
            "loss_fn: None needs forward=(model, batch) -> loss, for a model with a loss of its own"
        )
    if reduction not in ("mean", "sum"):
        raise ValueError("reduction: say 'mean' or 'sum' for the loss that forward returns (loss_fn=None)")

    def numerator(output: Tensor, target: Tensor) -> Tensor:
        return output[0] * target if reduction == "mean" else output[0]

    return Loss(OWN_LOSS, reduction, numerator, lambda _, target: target)


def evaluate(
    model: nn.Module, batch: Any, forward: Forward | None, *, own_loss: bool, samples: int
) -> tuple[Tensor, Any]:
    """Output and target of a batch; for a loss of the model's own the loss [1] and the batch's weight."""
    if forward is None:
        x, y = batch
        # a copy, as a layer may write to its input in place
        return check_output(model, model(x.clone()), len(x)), y
    versions = [(t, t._version) for t in tensors_in(batch)]
    result = forward(model, batch)
    if any(t._version != version for t, version in versions):
        raise ValueError("forward: the batch was written to in place; copy what the model changes")
    if own_loss:
        return _own_loss(model, result, samples)
    if not isinstance(result, (tuple, list)) or len(result) != 2:
        raise ValueError(
            f"forward: expected (output, target), got {type(result).__name__}; for a model that computes its own "
            "loss pass loss_fn=None"
        )
    output, target = result
    rows = len(output) if isinstance(output, Tensor) and output.ndim else samples
    return check_output(model, output, rows), target


def _own_loss(model: nn.Module, result: Any, samples: int) -> tuple[Tensor, Tensor]:
    weight: Any = float(samples)
    if isinstance(result, (tuple, list)) and len(result) == 2:
        result, weight = result
    if not isinstance(result, Tensor) or result.numel() != 1:
        raise ValueError(
            "forward: with loss_fn=None it must return one scalar tensor, or (loss, weight) with the batch's weight "
            f"in the mean; got {type(result).__name__}"
        )
    if not bool(torch.isfinite(result)):
        check_output(model, result.reshape(1), 1)
    return result.reshape(1), torch.as_tensor(weight, dtype=torch.float64, device=result.device).detach()
