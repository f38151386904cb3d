"""Normalized MLS against adaptive sharpness, a dot a vision transformer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

import flatkern as fk
from flatkern.experiments.correlation import Coefficient, correlate
from flatkern.experiments.data import Dataset
from flatkern.experiments.networks import network_from
from flatkern.experiments.pretrained import pretrained_models
from flatkern.experiments.settings import DemoConfig
from flatkern.experiments.training import Run
from flatkern.results import Estimate
from flatkern.rows import Row

__all__ = ["VITS", "Transformers", "adaptive_sharpness", "measure_pretrained", "measure_trained"]

VITS = ("vit-16-1", "vit-16-2", "vit-32-2", "vit-32-3")
"""Those that are trained where no weights are given."""


@dataclass(frozen=True)
class Transformers:
    """What was found; the coefficients are of the decimal logarithms, a value a model."""

    rows: list[Row]
    pearson: Coefficient
    spearman: Coefficient
    pretrained: bool
    """Whether the models were read from files."""
    samples: int
    diverged: int = 0
    """Trained models that are left out, as their loss grew without bound."""


class _Adaptive:
    """diag(θ) H diag(θ) for :func:`flatkern.trace`."""

    def __init__(self, hessian: fk.LinearOperator, theta: Tensor) -> None:
        self.shape, self.dtype, self.device = hessian.shape, hessian.dtype, hessian.device
        self._hessian, self._theta = hessian, theta[:, None]

    def __matmul__(self, vectors: Tensor) -> Tensor:
        return self._theta * (self._hessian @ (self._theta * vectors))


def adaptive_sharpness(
    model: nn.Module, loss_fn: object, data: tuple[Tensor, Tensor], *, samples: int = 64, seed: int = 0
) -> Estimate:
    """Σ_k θ_k² H_kk = Tr(diag(θ) H diag(θ)), by ``samples`` Hessian products, with a standard error."""
    hessian = fk.hessian(model, loss_fn, data)
    theta = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    return fk.trace(_Adaptive(hessian, theta), samples=samples, method="hutchinson", seed=seed)


def measure_trained(
    runs: dict[str, list[Run]], config: DemoConfig, data: Dataset, *, seed: int = 0
) -> Transformers:
    """Trained networks by name, at the end of training, on the first training images; of ``nn.MSELoss``."""
    part = data.train.first(config.num_probe)
    rows, diverged = [], 0
    for network, trained in runs.items():
        for run in trained:
            if run.diverged:
                diverged += 1
                continue
            model = network_from(network, data.shape, config.hidden, run.weights)
            row: Row = {
                "model": network,
                "learning_rate": run.setting.learning_rate,
                "batch_size": run.setting.batch_size,
                "seed": run.seed,
                "train_loss": run.final("train_loss"),
                "test_accuracy": run.final("test_accuracy"),
            }
            rows.append(row | _dot(model, nn.MSELoss(), (part.x, part.targets), seed))
    return replace(_assemble(rows, pretrained=False, samples=len(part)), diverged=diverged)


def measure_pretrained(
    folder: Path, config: DemoConfig, data: Dataset, say: Callable[[str], None], *, seed: int = 0
) -> Transformers:
    """Models from files, on the first training images; of the cross-entropy to each model's own choice of class.

    Classes of the images are not those of the models, and the choice makes the loss one of confidence.
    """
    part = data.train.first(config.num_probe)
    rows: list[Row] = []
    for found in pretrained_models(folder):
        say(f"measuring {found.name} ...")
        x = found.images(part.x)
        with torch.no_grad():
            chosen = found.model(x).argmax(1)
        row: Row = {"model": found.name}
        rows.append(row | _dot(found.model, nn.CrossEntropyLoss(), (x, chosen), seed))
    return _assemble(rows, pretrained=True, samples=len(part))


def _dot(model: nn.Module, loss_fn: object, data: tuple[Tensor, Tensor], seed: int) -> Row:
    sensitivity = fk.geometry(model, data[0]).normalized_mls
    sharpness = adaptive_sharpness(model, loss_fn, data, seed=seed)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "normalized_mls": sensitivity.value,
        "normalized_mls_stderr": math.nan if sensitivity.sample_stderr is None else sensitivity.sample_stderr,
        "adaptive_sharpness": sharpness.value,
        "adaptive_sharpness_stderr": sharpness.stderr,
    }


def _assemble(rows: list[Row], *, pretrained: bool, samples: int) -> Transformers:
    x, y = (_logs(rows, key) for key in ("adaptive_sharpness", "normalized_mls"))
    r, rho, _ = correlate(x, y)
    return Transformers(rows, r, rho, pretrained, samples)


def _logs(rows: Sequence[Row], key: str) -> list[float]:
    """Logarithms; NaN of what has none (a trace of an indefinite Hessian may be negative)."""
    values = [float(row[key]) for row in rows]
    return [math.log10(v) if v > 0 else math.nan for v in values]
