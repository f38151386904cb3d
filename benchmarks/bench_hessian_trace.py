"""The Hessian's trace to a true 1 %: fk.hessian_trace against the estimators of other packages.

``make peers && python -m benchmarks.bench_hessian_trace`` trains each network on 512 MNIST digits, measures all sides
in one run and writes benchmarks/results/hessian_trace.json; with ``--only`` it prints one network's rows and writes
nothing.

The others' number of products to a root mean square error of 1 % comes from the spread of their samples on this very
Hessian, measured with a growing basis taken out (benchmarks/trace_products.py). Each then runs its own function on its
own operator: with that many products where they fit a few seconds and the memory, else with as many as fit, and
its time is scaled up by the number of products. That favours them: the orthogonalization grows faster.
"""

from __future__ import annotations

import argparse
import re
import statistics
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import flatkern as fk
from benchmarks.timing import save
from benchmarks.trace_networks import LOSS, MODELS, train
from benchmarks.trace_peers import PEERS, Peer
from benchmarks.trace_products import METHODS, Needed, Sketch, sketch
from flatkern.experiments.data import load

RTOL = 0.01
SEEDS = 3
STEPS = (0, 300)
BASIS = {"MLP": 64, "VGG": 64, "ViT": 64}
"""Vectors taken out, at most; for untrained networks, whose spectra are no few large eigenvalues, an eighth."""
PROBES = {"MLP": 40, "VGG": 32, "ViT": 32}
SKETCH_SECONDS = 75.0
COLUMNS = {"MLP": 32, "VGG": 4, "ViT": 8}
"""Vectors that curvlinops gets at a time: it takes all of a step at once, 0.5 GB each on the VGG."""
PEER_SECONDS = 3.0
SLOW_SECONDS = 30.0
"""Where two calls of flatkern take more CPU seconds, there is no third."""
LONG = 40
"""Probes of the reference; none is made where every run takes more, and each is held against the others."""


def cpu_seconds(function: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    begun = time.process_time()
    function()
    return time.process_time() - begun


def math_attention(name: str) -> AbstractContextManager[None]:
    """The form of attention that has second derivatives; flatkern finds it by itself."""
    return sdpa_kernel(SDPBackend.MATH) if name.startswith("ViT") else nullcontext()


def planned(method: str) -> str:
    """The probes a sample that ``method`` tells of, where samples got different numbers."""
    found = re.search(r"\d+( to \d+)?(?= probes)", method)
    return found[0] if found else "sketch"


def own(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Any]:
    """flatkern's side: its seeds, and the reference, of which no run is measured against itself."""
    runs, seconds = [], []
    for seed in range(SEEDS):
        begun = time.process_time()
        runs.append(fk.hessian_trace(model, LOSS, (x, y), rtol=RTOL, seed=seed))
        seconds.append(time.process_time() - begun)
        if seed == 1 and sum(seconds) > SLOW_SECONDS:
            break
    exact = runs[0].stderr == 0
    probes = 0 if exact or runs[0].samples is None else len(runs[0].samples)
    taken = list(runs)
    if not exact and probes < LONG:
        taken.append(fk.hessian_trace(model, LOSS, (x, y), samples=LONG, seed=99))
    weights = [1.0 if exact else 1 / r.stderr**2 for r in taken]

    def mean(left_out: int | None = None) -> float:
        kept = [(w, r.value) for i, (w, r) in enumerate(zip(weights, taken, strict=True)) if i != left_out]
        return sum(w * v for w, v in kept) / sum(w for w, _ in kept)

    trace = mean()
    return {
        "trace": trace,
        "reference_stderr": 0.0 if exact else sum(weights) ** -0.5,
        "flatkern_s": statistics.median(seconds),
        "ggn_s": cpu_seconds(lambda: fk.ggn_trace(model, LOSS, (x, y))),
        "seeds": len(runs),
        "probes": probes or ("" if exact else planned(runs[0].method)),
        "stated_error": runs[0].stderr / abs(trace),
        "largest_error": max(abs(r.value - mean(i)) for i, r in enumerate(runs)) / abs(trace),
    }


def products(
    name: str, model: nn.Module, x: Tensor, y: Tensor, steps: int, tolerance: float
) -> tuple[Sketch, dict[str, Needed]]:
    """The sketch of this Hessian, and each method's products."""
    kind = name.split()[0]
    op = fk.hessian(model, LOSS, (x, y))
    found = sketch(
        op.__matmul__,
        op.shape[0],
        most=BASIS[kind] if steps else BASIS[kind] // 8,
        probes=PROBES[kind] if steps else PROBES[kind] // 2,
        tolerance=tolerance,
        seconds=SKETCH_SECONDS,
    )
    return found, {method: found.needed(method, tolerance) for method in METHODS}


def peer_row(name: str, model: nn.Module, x: Tensor, y: Tensor, peer: Peer, needed: Needed) -> dict[str, Any]:
    """One estimator of another package: runs, and its cost to the goal."""
    share = peer.share
    goal = share * max(2, round(needed.products / share))
    with math_attention(name), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*create_graph=True.*")  # PyHessian's way
        begun = time.process_time()
        run = peer.make(model, x, y)
        setup = time.process_time() - begun
        least = 2 * share
        one = cpu_seconds(lambda: run(least, 100)) / least
        fitting = share * max(2, int(PEER_SECONDS / one) // share)
        if peer.batched:
            fitting = min(fitting, share * COLUMNS[name.split()[0]])
        count = min(goal, fitting)
        values, seconds = [], []
        while not seconds or (len(seconds) < 3 and sum(seconds) < PEER_SECONDS / 2):
            begun = time.process_time()
            values.append(run(count, len(seconds)))
            seconds.append(time.process_time() - begun)
    model.zero_grad(set_to_none=True)
    product = statistics.median(seconds) / count
    return {
        "peer": peer.name,
        "products": needed.products,
        "products_stderr": needed.stderr,
        "extrapolated": needed.extrapolated,
        "products_run": count,
        "calls": len(seconds),
        "values": values,
        "product_s": product,
        "cpu_s": setup + product * goal,
    }


def measure(name: str, model: nn.Module, steps: int, x: Tensor, y: Tensor) -> dict[str, Any]:
    """One network's row."""
    parameters = list(model.parameters())
    gradients: list[float] = []

    def time_gradient() -> None:
        gradients.extend(
            cpu_seconds(lambda: torch.autograd.grad(LOSS(model(x), y), parameters)) for _ in range(3)
        )

    time_gradient()
    row: dict[str, Any] = {"model": name, "steps": steps, **own(model, x, y)}
    show(row)
    tolerance = RTOL * abs(row["trace"])
    found, needed = products(name, model, x, y, steps, tolerance)
    row["hutchinson_sd"] = found.error("hutchinson", 1) / abs(row["trace"])
    row["basis"], row["spread_probes"] = found.size, found.forms.shape[1]
    row["peers"] = []
    for peer in PEERS:
        time_gradient()
        part = peer_row(name, model, x, y, peer, needed[peer.method])
        expected = found.error(peer.method, part["products_run"])
        part["z"] = [(v - row["trace"]) / expected for v in part.pop("values")]
        part["ratio"] = part["cpu_s"] / row["flatkern_s"]
        row["peers"].append(part)
        show(part)
    row["gradient_s"] = statistics.median(gradients)
    return row


def show(row: dict[str, Any]) -> None:
    """Print numbers with four digits."""
    print({k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}, flush=True)


def main() -> None:
    """Run all and write the result, or show the networks named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=list(MODELS), help="these alone; nothing is written")
    parser.add_argument(
        "--steps", nargs="*", type=int, help="training steps, default 0 and 300; nothing is written"
    )
    parser.add_argument("--samples", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load("digits-mnist", num_train=arguments.samples, num_test=10).train
    x, y = data.x, data.labels
    rows, begun = [], time.perf_counter()
    for name in arguments.only or MODELS:
        for steps in arguments.steps or STEPS:
            torch.manual_seed(0)
            model = MODELS[name]()
            train(model, x, y, steps)
            rows.append(measure(name, model.eval(), steps, x, y))
            print(f"{name}, {steps} steps: {time.perf_counter() - begun:.0f} s so far", flush=True)
    scores = torch.tensor([z for row in rows for peer in row["peers"] for z in peer["z"]])
    agreement = float(scores.square().mean().sqrt())
    print(
        f"other packages' errors over the predicted ones: root mean square {agreement:.2f} of {len(scores)}"
    )
    if arguments.only or arguments.steps:
        return
    packages = ("PyHessian", "curvlinops-for-pytorch", "hessian-eigenthings")
    settings = {
        "data": f"{len(x)} MNIST digits",
        "loss": "mean cross-entropy",
        "training": "Adam 1e-3, batches of 64",
        "rtol": RTOL,
        "dtype": "float32",
        "peers": ", ".join(f"{p} {version(p)}" for p in packages),
        "attention": "the peers under sdpa_kernel(MATH)",
        "runs_of_peers": f"root mean square of {len(scores)} errors over the predicted ones {agreement:.2f}",
        "timing": f"CPU seconds; medians of {SEEDS} calls for flatkern (of 2 where they take more than "
        f"{SLOW_SECONDS:.0f} s), of 1 to 3 for the peers, of 18 spread over the row for the gradient",
    }
    print("written:", save("hessian_trace", settings, rows))


if __name__ == "__main__":
    main()
