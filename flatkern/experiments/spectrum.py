"""The Hessian's spectrum of one trained network, of the loss it was trained on."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

import flatkern as fk
from flatkern.experiments.data import Dataset
from flatkern.experiments.settings import DemoConfig
from flatkern.experiments.sgd import mlp_from
from flatkern.experiments.training import Run

__all__ = ["Spectrum", "final_spectrum"]

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Spectrum:
    """Spectral density of the Hessian of ``nn.MSELoss`` at a final network."""

    run: str
    learning_rate: float
    samples: int
    parameters: int
    grid: Array
    density: Array
    stderr: Array
    sigma: float
    largest: Array
    """The largest eigenvalues, descending, each to its residual."""
    smallest: float
    residuals: Array
    converged: bool
    trace: float
    """Tr H from the density's first moment."""
    trace_stderr: float
    sharpness_trace: float
    """(2/10)·S on the same samples: what Tr H is at a perfect fit."""
    seconds: float


def final_spectrum(config: DemoConfig, run: Run, data: Dataset, *, seed: int = 0) -> Spectrum:
    """Density, extreme eigenvalues and trace of the Hessian of the training loss on training samples."""
    started = time.perf_counter()
    model = mlp_from(config.sizes(data.pixels), run.weights)
    part = data.train.first(config.spectrum_samples)
    hessian = fk.hessian(model, torch.nn.MSELoss(), (part.x, part.targets))
    density = fk.spectral_density(
        hessian, probes=config.spectrum_probes, steps=config.spectrum_steps, seed=seed
    )
    top = fk.eigsh(hessian, k=5, which="LA", seed=seed, verify=False)
    bottom = fk.eigsh(hessian, k=1, which="SA", tol=1e-3, max_matvecs=300, seed=seed, verify=False)
    high, low = float(top.values[0]), min(float(bottom.values[0]), 0.0)
    sigma = (high - low) / 150
    grid = torch.linspace(low - 5 * sigma, high + 5 * sigma, 600, dtype=torch.float64)
    curve = density.density(grid, sigma)
    mean = density.moment(1)
    size = hessian.shape[0]
    outputs = config.sizes(data.pixels)[-1]
    error = torch.zeros_like(curve.values) if curve.stderr is None else curve.stderr
    return Spectrum(
        run=run.name,
        learning_rate=run.setting.learning_rate,
        samples=len(part),
        parameters=size,
        grid=curve.grid.numpy(),
        density=curve.values.numpy(),
        stderr=error.numpy(),
        sigma=sigma,
        largest=top.values.numpy(),
        smallest=float(bottom.values[0]),
        residuals=torch.cat([top.residuals, bottom.residuals]).numpy(),
        converged=bool(top.converged.all() and bottom.converged.all()),
        trace=mean.value * size,
        trace_stderr=mean.stderr * size,
        sharpness_trace=fk.sharpness(model, part.x).value * 2 / outputs,
        seconds=time.perf_counter() - started,
    )
