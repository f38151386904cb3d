"""The Hessian's trace of trained networks to a true 1 %: fk.hessian_trace against curvlinops' XTrace and Hutch++.

``make peers && python -m benchmarks.bench_trace_peers`` writes benchmarks/results/trace_peers.json. The peers get the
fewest products of a ladder with which the root mean square error over some seeds is at most 1 %, which nobody knows in
advance; finding it is not charged. Their operator is made once, outside the timing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import flatkern as fk
from benchmarks.bench_hessian_trace import LOSS, MODELS, RTOL, train
from benchmarks.timing import save
from flatkern.experiments.data import load

LADDER = (24, 48, 96, 192)
SEEDS = 3


def timed(function: Callable[[int], float]) -> tuple[list[float], float]:
    """Values by seed, and the median of their CPU seconds."""
    values, seconds = [], []
    for seed in range(SEEDS):
        begun = time.process_time()
        values.append(function(seed))
        seconds.append(time.process_time() - begun)
    return values, statistics.median(seconds)


def error_of(values: list[float], true: float) -> float:
    """Root mean square, relative."""
    return statistics.fmean((v / true - 1) ** 2 for v in values) ** 0.5


def peer(method: str, operator: Any, true: float) -> dict[str, float]:
    """The first rung that reaches the tolerance, or the last one."""
    import curvlinops

    estimate = {"XTrace": curvlinops.xtrace, "Hutch++": curvlinops.hutchpp_trace}[method]

    def value(seed: int, products: int) -> float:
        torch.manual_seed(seed)
        return float(estimate(operator, products))

    for products in LADDER:
        values, seconds = timed(partial(value, products=products))
        if error_of(values, true) <= RTOL:
            break
    return {"cpu_s": seconds, "products": products, "error": error_of(values, true)}


def measure(model: nn.Module, x: Tensor, y: Tensor) -> list[dict[str, Any]]:
    """A row a way."""
    from curvlinops import HessianLinearOperator

    def ours(seed: int) -> float:
        return fk.hessian_trace(model, LOSS, (x, y), rtol=RTOL, seed=seed).value

    values, seconds = timed(ours)
    reference = fk.hessian_trace(model, LOSS, (x, y), samples=40, seed=99)
    true = reference.value
    rows: list[dict[str, Any]] = [
        {"way": "flatkern", "cpu_s": seconds, "products": 0, "error": error_of(values, true), "ratio": 1.0}
    ]
    operator = HessianLinearOperator(
        model, LOSS, list(model.parameters()), [(x, y)], check_deterministic=False
    )
    for method in ("XTrace", "Hutch++"):
        found = peer(method, operator, true)
        rows.append({"way": f"curvlinops {method}", **found, "ratio": found["cpu_s"] / seconds})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    """Run the networks named and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=["MLP tanh", "MLP GELU"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--samples", type=int, default=512)
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = load("digits-mnist", num_train=options.samples, num_test=10).train
    x, y = data.x, data.labels
    rows = []
    for name in options.only:
        torch.manual_seed(0)
        model = MODELS[name]()
        train(model, x, y, options.steps)
        rows += [{"model": name, **row} for row in measure(model.eval(), x, y)]
    settings = {
        "data": f"{len(x)} MNIST digits, mean cross-entropy, float32",
        "training": f"{options.steps} steps of Adam, 1e-3, batches of 64",
        "ladder": ", ".join(map(str, LADDER)),
        "error": f"root mean square over {SEEDS} seeds",
    }
    print("written:", save("trace_peers", settings, rows))


if __name__ == "__main__":
    main()
