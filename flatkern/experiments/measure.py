"""One measurement point: everything that is recorded about a network, as a flat row of numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import flatkern as fk
from flatkern.experiments.data import Samples
from flatkern.measurement import bounds_row, geometry_row
from flatkern.rows import Row

__all__ = ["Evaluation", "evaluate", "measure", "unmeasured"]


@dataclass(frozen=True)
class Evaluation:
    """Loss and accuracy of a network on some samples."""

    mse: float
    """Mean over samples and outputs of (f − y)², which ``nn.MSELoss`` trains."""
    loss: float
    """Mean over samples of ½‖f − y‖², whose Hessian trace the sharpness is."""
    accuracy: float


@torch.no_grad()
def evaluate(model: nn.Module, samples: Samples) -> Evaluation:
    """Loss and accuracy, summed in float64 over chunks so that a large test set needs little memory."""
    squares, right = 0.0, 0
    for i in range(0, len(samples), 2000):
        part = Samples(samples.x[i : i + 2000], samples.labels[i : i + 2000])
        out: Tensor = model(part.x)
        squares += float((out - part.targets).square().sum(dtype=torch.float64))
        right += int((out.argmax(1) == part.labels).sum())
    n, outputs = len(samples), out.shape[1]
    return Evaluation(squares / (n * outputs), squares / (2 * n), right / n)


def measure(model: nn.Module, probe: Tensor, train: Samples, test: Samples) -> Row:
    """Losses, geometry on the probe samples, and both sides of every inequality.

    ``*_stderr`` is the standard error of the mean over the probe samples; every value is exact for those samples.
    """
    fit, held_out = evaluate(model, train), evaluate(model, test)
    g = fk.geometry(model, probe)
    row: Row = {
        "train_mse": fit.mse,
        "train_loss": fit.loss,
        "train_accuracy": fit.accuracy,
        "test_loss": held_out.loss,
        "test_accuracy": held_out.accuracy,
        "generalization_gap": held_out.loss - fit.loss,
    }
    return row | geometry_row(g) | bounds_row(fk.bounds(model, probe, geometry=g))


def unmeasured() -> Row:
    """The row of a network whose weights are no longer finite."""
    return {"train_mse": math.nan, "train_loss": math.nan}
