"""The Hessian of a convolutional network: trace, extreme eigenvalues and spectral density, with error bars.

Run: .venv/bin/python examples/hessian_spectrum.py [FOLDER]
with a folder it also draws the density there (density.png; needs matplotlib).
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import flatkern as fk


def main(folder: Path | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8 * 3 * 3, 10)
    )
    loader = [(torch.randn(k, 1, 8, 8), torch.randint(10, (k,))) for k in (64, 64, 17)]  # ragged on purpose
    loss_fn = nn.CrossEntropyLoss()
    exact = fk.ggn_trace(model, loss_fn, loader, per_layer=True)
    print(
        f"Tr GGN  = {exact.value:.4f} (exact; ± {exact.sample_stderr:.4f} over samples), by layer {exact.per_layer}"
    )
    hessian = fk.hessian(model, loss_fn, loader)
    estimate = fk.trace(hessian, samples=100, seed=0)
    print(f"Tr H    = {estimate.value:.4f} ± {estimate.stderr:.4f} ({estimate.matvecs} products)")
    ends = fk.eigsh(hessian, k=4, which="BE", seed=0)
    print(
        "extreme eigenvalues",
        [round(float(v), 5) for v in ends.values],
        "residuals ≤",
        float(ends.residuals.max()),
    )
    density = fk.spectral_density(hessian, probes=4, steps=30, seed=0)
    curve = density.density()
    print(f"density on {len(curve.grid)} points, peak {float(curve.values.max()):.3g}")
    if folder is not None:
        density.plot().figure.savefig(folder / "density.png", dpi=120)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else None)
