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

__all__ = [
    "Evaluation",
    "evaluate",
    "measure",
    "measure_elsewhere",
    "misclassified",
    "relative_flatness",
    "unmeasured",
]


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
        part = samples[i : i + 2000]
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
    row: Row = {
        "train_mse": fit.mse,
        "train_loss": fit.loss,
        "train_accuracy": fit.accuracy,
        "test_loss": held_out.loss,
        "test_accuracy": held_out.accuracy,
        "generalization_gap": held_out.loss - fit.loss,
    }
    return row | _geometry(model, probe)


def measure_elsewhere(model: nn.Module, samples: Samples) -> Row:
    """The same of samples that need not be training samples; of none at all, their number alone."""
    row: Row = {"count": len(samples)}
    if not len(samples):
        return row
    return row | {"loss": evaluate(model, samples).loss} | _geometry(model, samples.x)


@torch.no_grad()
def misclassified(model: nn.Module, samples: Samples, most: int) -> Samples:
    """The first ``most`` samples whose largest output is not their class."""
    found, count = [], 0
    for i in range(0, len(samples), 2000):
        part = samples[i : i + 2000]
        found.append(i + (model(part.x).argmax(1) != part.labels).nonzero()[:, 0])
        count += len(found[-1])
        if count >= most:
            break
    return samples[torch.cat(found)[:most]]


@torch.no_grad()
def relative_flatness(model: nn.Module, x: Tensor) -> float:
    """Σᵢⱼ ⟨wᵢ, wⱼ⟩ Tr(∂²L/∂wᵢ∂wⱼ) of the last linear layer's rows, for L = ``nn.MSELoss``: (2/N) ‖W‖² mean ‖z‖².

    z are the inputs of that layer, which must give the N outputs; NaN where there is no such layer. Petzka et al.,
    "Relative Flatness and Generalization", NeurIPS 2021.
    """
    last = next((m for m in reversed(list(model.modules())) if isinstance(m, nn.Linear)), None)
    if last is None:
        return math.nan
    seen: list[Tensor] = []
    handle = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        out: Tensor = model(x)
    finally:
        handle.remove()
    z = seen[-1]
    if z.shape[:-1] != out.shape[:1] or last.out_features != out.shape[1]:
        return math.nan
    size = z.square().sum(1).double().mean() * last.weight.square().sum().double()
    return float(size) * 2 / out.shape[1]


def _geometry(model: nn.Module, x: Tensor) -> Row:
    g = fk.geometry(model, x)
    row = geometry_row(g) | bounds_row(fk.bounds(model, x, geometry=g))
    root = float(row["sqrt_sharpness"])
    row["log10_sqrt_sharpness"] = math.log10(root) if root > 0 else -math.inf
    return row | {"relative_flatness": relative_flatness(model, x)}


def unmeasured() -> Row:
    """The row of a network whose weights are no longer finite."""
    return {"train_mse": math.nan, "train_loss": math.nan}
