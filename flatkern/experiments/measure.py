"""One measurement point: everything that is recorded about a network, as a flat row of numbers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import flatkern as fk
from flatkern.experiments.data import Samples

__all__ = ["LN10", "Evaluation", "evaluate", "measure", "side_column", "unmeasured"]

LN10 = math.log(10.0)


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


def side_column(inequality: str, side: str) -> str:
    """The column of one side of one inequality, e.g. ``log10_mls_d``: its decimal logarithm."""
    return "log10_" + re.sub(r"[^a-z0-9]+", "_", f"{inequality} {side}".lower()).strip("_")


def measure(model: nn.Module, probe: Tensor, train: Samples, test: Samples) -> dict[str, float | str]:
    """Losses, geometry on the probe samples, and both sides of every inequality.

    ``*_stderr`` is the standard error of the mean over the probe samples; every value is exact for those samples.
    """
    fit, held_out = evaluate(model, train), evaluate(model, test)
    g = fk.geometry(model, probe)
    top = g.top_log_volume(3)
    dimension = g.local_dimensionality
    row: dict[str, float | str] = {
        "train_mse": fit.mse,
        "train_loss": fit.loss,
        "train_accuracy": fit.accuracy,
        "test_loss": held_out.loss,
        "test_accuracy": held_out.accuracy,
        "generalization_gap": held_out.loss - fit.loss,
        "sharpness": g.sharpness.value,
        "sharpness_stderr": _number(g.sharpness.sample_stderr),
        "sqrt_sharpness": math.sqrt(g.sharpness.value),
        "log_volume_top3": top.mean,
        "log_volume_top3_stderr": _number(top.sample_stderr),
        "log_volume": g.log_volume.mean,
        "log_volume_stderr": _number(g.log_volume.sample_stderr),
        "rank_deficient": float(g.log_volume.rank_deficient),
        "mls": g.mls.value,
        "mls_stderr": _number(g.mls.sample_stderr),
        "nmls": g.nmls.value,
        "nmls_stderr": _number(g.nmls.sample_stderr),
        "normalized_mls": g.normalized_mls.value,
        "local_dimensionality": dimension.mean,
        "local_dimensionality_stderr": _number(dimension.sample_stderr),
        "log_local_dimensionality": math.log(dimension.mean) if dimension.mean > 0 else math.nan,
    }
    for name, inequality in fk.bounds(model, probe, geometry=g).inequalities.items():
        for side, value in inequality.sides.items():
            row[side_column(name, side)] = value / LN10
        row[f"status_{side_column(name, '').removeprefix('log10_')}"] = inequality.status
        row[f"looseness_{side_column(name, '').removeprefix('log10_')}"] = inequality.looseness / LN10
    return row


def unmeasured() -> dict[str, float | str]:
    """The row of a network whose weights are no longer finite."""
    return {"train_mse": math.nan, "train_loss": math.nan}


def _number(value: float | None) -> float:
    return math.nan if value is None else value
