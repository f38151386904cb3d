"""The automatic trace against the best method by hindsight, in products, to a true 1 %.

``python -m benchmarks.bench_trace`` writes benchmarks/results/trace.json. Curvature matrices come from ``fk.hessian``
and ``fk.ggn`` of small networks on scikit-learn's 8 × 8 digits and are formed once, so that true errors over many
seeds cost little; products are what is counted.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from torch import Tensor, nn

import flatkern as fk
from benchmarks.timing import save
from flatkern.operators import as_operator

RTOL = 0.01
LEAST = 16
"""Fewest samples by hindsight: what an error bar needs, and what every pilot takes."""


def networks() -> dict[str, Any]:
    """Name → a function that makes the network."""

    def mlp(act: type[nn.Module]) -> nn.Sequential:
        return nn.Sequential(nn.Linear(64, 20), act(), nn.Linear(20, 20), act(), nn.Linear(20, 10))

    def cnn() -> nn.Sequential:
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)), nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(6, 12, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(48, 10),
        )  # fmt: skip

    return {"MLP tanh": lambda: mlp(nn.Tanh), "MLP ReLU": lambda: mlp(nn.ReLU), "CNN": cnn}


def curvatures() -> dict[str, Tensor]:
    """Hessians and GGNs, untrained, after 60 and after 600 steps of Adam."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.as_tensor(digits.data[:400] / 16), torch.as_tensor(digits.target[:400])
    loss, found = nn.CrossEntropyLoss(), {}
    for name, make in networks().items():
        torch.manual_seed(0)
        model = make().double()
        optimizer = torch.optim.Adam(model.parameters(), 3e-3)
        for step in range(601):
            if step in (0, 60, 600):
                for kind, op in (("Hessian", fk.hessian), ("GGN", fk.ggn)):
                    found[f"{name}, {step} steps, {kind}"] = op(model, loss, (x, y)).to_dense()
            optimizer.zero_grad()
            loss(model(x), y).backward()
            optimizer.step()
    return found


def synthetic(size: int = 1000) -> dict[str, Tensor]:
    """Known spectra in random directions."""
    g = torch.Generator().manual_seed(1)
    i = torch.arange(1, size + 1, dtype=torch.float64)
    spectra = {
        "flat indefinite": torch.linspace(-1, 3, size, dtype=torch.float64),
        "power 0.5, PSD": i**-0.5,
        "power 1, PSD": 1 / i,
        "power 2, PSD": i**-2,
        "exponential 10, PSD": torch.exp(-i / 10),
        "exponential 50, PSD": torch.exp(-i / 50),
        "rank 20 + noise": torch.cat(
            [
                torch.linspace(50, 100, 20, dtype=torch.float64),
                0.3 * torch.randn(size - 20, generator=g, dtype=torch.float64),
            ]
        ),
        "three outliers, PSD": torch.cat(
            [torch.tensor([400.0, 250.0, 150.0]), torch.linspace(0, 1, size - 3)]
        ).double(),
    }
    found = {}
    for name, values in spectra.items():
        q = torch.linalg.qr(torch.randn(size, size, generator=g, dtype=torch.float64)).Q
        found[name] = (q * values) @ q.T
    return found


def rms(op: Any, truth: float, method: str, k: int, seeds: int) -> float:
    """Relative root mean square error of ``k`` samples."""
    runs = [fk.trace(op, samples=k, method=method, seed=s, max_matvecs=1 << 20).value for s in range(seeds)]
    return math.sqrt(sum((v / truth - 1) ** 2 for v in runs) / seeds)


def fewest(op: Any, truth: float, method: str, most: int) -> int | None:
    """Fewest test vectors for a true 1 %, by bisection on a geometric grid."""
    grid = sorted({round(2 * 1.07**j) for j in range(120) if 2 * 1.07**j <= most})
    low, high = -1, len(grid)
    while high - low > 1:
        middle = (low + high) // 2
        k = grid[middle]
        reached = rms(op, truth, method, k, 96 if k < 64 else 24) <= RTOL
        low, high = (low, middle) if reached else (middle, high)
    return grid[high] if high < len(grid) else None


def hutchpp(matrix: Tensor, tolerance: float, least: int) -> int:
    """Fewest products of Hutch++ over sketch sizes, from the exact variance of its forms."""
    best, g = 1 << 40, torch.Generator().manual_seed(0)
    for rank in sorted({round(2 * 1.2**j) for j in range(34) if 2 * 1.2**j <= len(matrix) // 2}):
        if 2 * rank >= best:
            break
        variance = 0.0
        for _ in range(3):
            sketch = matrix @ torch.randn(len(matrix), rank, generator=g, dtype=torch.float64).sign()
            q = torch.linalg.qr(sketch).Q
            part = matrix - q @ (q.T @ matrix)
            part = part - (part @ q) @ q.T
            variance += 2 * float(part.square().sum() - part.diagonal().square().sum()) / 3
        best = min(best, 2 * rank + max(least, math.ceil(variance / tolerance**2)))
    return best


def hindsight(matrix: Tensor, op: Any, least: int, vectors: dict[str, int | None]) -> dict[str, int]:
    """Products each method needs for a true 1 %."""
    truth = float(matrix.trace())
    tolerance = RTOL * abs(truth)
    variance = 2 * float(matrix.square().sum() - matrix.diagonal().square().sum())
    costs = {"exact": len(matrix), "hutchinson": max(least, math.ceil(variance / tolerance**2))}
    costs["hutch++"] = hutchpp(matrix, tolerance, least)
    for method, products in (("xtrace", 2), ("xnystrace", 1)):
        if (k := vectors.get(method)) is not None:
            costs[method] = products * max(k, least)
    return costs


def measure(name: str, matrix: Tensor, seeds: int) -> dict[str, Any]:
    """One row."""
    matrix = ((matrix + matrix.T) / 2).contiguous()
    op = as_operator(matrix)
    op.semidefinite = name.endswith(("GGN", "PSD"))
    truth = float(matrix.trace())
    methods = ["xtrace", "xnystrace"] if op.semidefinite else ["xtrace"]
    vectors = {m: fewest(op, truth, m, len(matrix) // 2) for m in methods}
    fair, bare = hindsight(matrix, op, LEAST, vectors), hindsight(matrix, op, 2, vectors)
    runs = [fk.trace(op, rtol=RTOL, seed=s, max_matvecs=1 << 20) for s in range(seeds)]
    costs = sorted(r.matvecs for r in runs)
    best = min(fair, key=lambda m: fair[m])
    rounding = 1e-12 * abs(truth)
    inside = [lo - rounding <= truth <= hi + rounding for lo, hi in (r.interval(0.90) for r in runs)]
    used = [r.method for r in runs]
    return {
        "operator": name,
        "size": len(matrix),
        "seeds": seeds,
        "best_method": best,
        "best_products": fair[best],
        "best_products_any_samples": min(bare.values()),
        "by_hindsight": fair,
        "auto_products": sum(costs) / seeds,
        "auto_products_p90": costs[int(0.9 * seeds)],
        "ratio": sum(costs) / seeds / fair[best],
        "rms_error_percent": 100 * math.sqrt(sum((r.value / truth - 1) ** 2 for r in runs) / seeds),
        "coverage_90": sum(inside) / seeds,
        "converged": sum(r.converged for r in runs) / seeds,
        "methods": {m: used.count(m) for m in sorted(set(used))},
    }


def main() -> None:
    """Measure everything and write the table's numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=100)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    rows = []
    for name, matrix in {**synthetic(), **curvatures()}.items():
        rows.append(measure(name, matrix, seeds))
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    settings = {
        "tolerance": "1 % (standard error of the automatic choice; true root mean square error by hindsight)",
        "least samples": LEAST,
        "dtype": "float64",
        "data": "400 of scikit-learn's 8 x 8 digits, cross-entropy; Adam at 3e-3",
    }
    print("written:", save("trace", settings, rows))


if __name__ == "__main__":
    main()
