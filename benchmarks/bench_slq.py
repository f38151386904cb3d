"""Spectral density of a Hessian: 8 probes of 40 Lanczos steps against hessian-eigenthings, time and accuracy.

Run: ``make peers; python -m benchmarks.bench_slq``.

Accuracy: the 1-Wasserstein distance of the probes' mean distribution from a reference, that of 2 other probes with
100 steps in float64 and the whole basis kept; and the L1 distance of the densities broadened with σ = 2 % of the
spectrum's width.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import alternate, save
from flatkern.estimators import spectral_density
from flatkern.estimators.slq import BASIS_BYTES
from flatkern.operators import hessian

PROBES, STEPS, REFERENCE_STEPS = 8, 40, 100


def mlp(n: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return model, torch.randn(n, 784), torch.randint(0, 10, (n,))


def cnn(n: int) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(16 * 49, 10),
    )
    return model, torch.randn(n, 1, 28, 28), torch.randint(0, 10, (n,))


CASES: dict[str, tuple[Callable[[int], tuple[nn.Module, Tensor, Tensor]], int]] = {
    "MLP 784-512-512-10": (mlp, 64),
    "MLP 784-512-512-10 ": (mlp, 512),
    "CNN 8-16": (cnn, 64),
}


def mixture(nodes: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Quadratures of several probes as one measure with ascending nodes."""
    kept = torch.isfinite(nodes)
    order = nodes[kept].double().argsort()
    return nodes[kept].double()[order], (weights[kept].double() / len(nodes))[order]


def wasserstein(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> float:
    """∫ |difference of the cumulative distributions|."""
    nodes, order = torch.cat([left[0], right[0]]).sort()
    height = torch.cat([left[1], -right[1]])[order].cumsum(0)
    return float((height[:-1].abs() * nodes.diff()).sum())


def broadened(measure: tuple[Tensor, Tensor], grid: Tensor, sigma: float) -> Tensor:
    nodes, weights = measure
    table = torch.exp(-0.5 * ((grid[:, None] - nodes) / sigma) ** 2)
    return table @ weights / (sigma * math.sqrt(2 * math.pi))


def compare(name: str, rounds: int) -> list[dict[str, Any]]:
    import hessian_eigenthings as he

    build, n = CASES[name]
    model, x, y = build(n)
    loss = nn.CrossEntropyLoss()
    reference = spectral_density(
        hessian(model.double(), loss, (x.double(), y)),
        probes=2,
        steps=REFERENCE_STEPS,
        reorthogonalize=True,
        seed=1,
    )
    truth = mixture(reference.nodes, reference.weights)
    model.float()

    def ours(**options: Any) -> tuple[Tensor, Tensor]:
        # the operator is made anew each time: its pass over the data belongs to the cost
        d = spectral_density(hessian(model, loss, (x, y)), probes=PROBES, steps=STEPS, seed=2, **options)
        return mixture(d.nodes, d.weights)

    def theirs() -> tuple[Tensor, Tensor]:
        operator = he.HessianOperator(model, [(x, y)], he.supervised_loss(loss))
        d = he.spectral_density(operator, num_runs=PROBES, lanczos_steps=STEPS, num_grid_points=512, seed=2)
        return mixture(d.raw_eigenvalues, d.raw_weights)

    ways: dict[str, Callable[[], tuple[Tensor, Tensor]]] = {
        "flatkern": ours,
        "flatkern, whole basis": lambda: ours(reorthogonalize=True),
        "hessian-eigenthings": theirs,
    }
    results: dict[str, tuple[Tensor, Tensor]] = {}

    def recorded(way: str) -> Callable[[], None]:
        def call() -> None:
            results[way] = ways[way]()

        return call

    timed = alternate({way: recorded(way) for way in ways}, dict.fromkeys(ways, rounds))
    low, high = float(truth[0][0]), float(truth[0][-1])
    sigma = 0.02 * (high - low)
    grid = torch.linspace(low - 4 * sigma, high + 4 * sigma, 4000, dtype=torch.float64)
    exact = broadened(truth, grid, sigma)
    peer = timed["hessian-eigenthings"]
    rows = []
    for way, times in timed.items():
        gap = (broadened(results[way], grid, sigma) - exact).abs()
        rows.append(
            {
                "model": name.strip(),
                "n": n,
                "way": way,
                "cpu_s": times["cpu_s"],
                "wall_s": times["wall_s"],
                "products": PROBES * STEPS,
                "wasserstein": wasserstein(results[way], truth),
                "l1": float(torch.trapezoid(gap, grid)),
                "ratio": peer["cpu_s"] / times["cpu_s"],
                "wall_ratio": peer["wall_s"] / times["wall_s"],
            }
        )
        print(
            {k: v if isinstance(v, (str, int)) else float(f"{v:.3g}") for k, v in rows[-1].items()},
            flush=True,
        )
    return rows


def main() -> None:
    """Time all ways on all cases and write the results."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    rows = [row for name in CASES for row in compare(name, rounds)]
    settings = {
        "probes": PROBES,
        "steps": STEPS,
        "peer": "hessian-eigenthings 1.0.0a5 (whole basis, probes one after the other)",
        "reference": f"2 other probes, {REFERENCE_STEPS} steps, float64, whole basis",
        "rounds": rounds,
        "flatkern_default": f"keeps the basis where it fits into {BASIS_BYTES >> 20} MiB (the CNN's does)",
    }
    print(save("slq", settings, rows))


if __name__ == "__main__":
    main()
