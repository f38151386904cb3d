"""Hessian-vector products of flatkern beside raw torch and other packages, and the matrix-multiplication floor.

``python -m benchmarks.bench_peers`` times everything with one thread and then with two (each in a process of its
own), checks the ways against each other, and writes benchmarks/results/operators.json. It needs the packages of
``make peers``. ``--threads 1`` leaves the second out; ``--only ViT`` prints the models whose title contains that and
saves nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import hvp_ways
from benchmarks.matmul_floor import floor
from benchmarks.operator_problems import PROBLEMS, Problem
from benchmarks.timing import alternate, save

CASES = {"one vector": hvp_ways.ONE, "loader": hvp_ways.LOADER, "eight vectors": hvp_ways.EIGHT}
PEERS = ("PyHessian", "hessian-eigenthings", "curvlinops-for-pytorch")
SECONDS_EACH, MOST, LEAST = 1.5, 60, 3
OTHER_MATRIX = ("gradient", "flatkern GGN")


def in_math_form(function: Callable[[], Any]) -> Callable[[], Any]:
    """Run with attention decomposed: its fused forms have no second derivatives."""

    def run() -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return function()

    return run


def functions(problem: Problem, case: str) -> tuple[dict[str, Callable[[], Any]], dict[str, float]]:
    """What is to be timed, and how far each way's product is from the raw one (relative, largest entry)."""
    batches = problem.loader() if case == "loader" else [problem.batch(problem.n)]
    size = sum(p.numel() for p in problem.model().parameters())
    count = 8 if case == "eight vectors" else 1
    rows = torch.randn(count, size, generator=torch.Generator().manual_seed(1))
    runs: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    reference = None
    for name, way in CASES[case].items():
        # flatkern finds a form with second derivatives by itself; all others are given one
        others = problem.title.startswith("ViT") and not name.startswith("flatkern")
        with sdpa_kernel(SDPBackend.MATH) if others else nullcontext():
            run = way(problem.model(), batches, rows)
            runs[name] = in_math_form(run) if others else run
            product = runs[name]()
            if name not in OTHER_MATRIX:
                product = hvp_ways.flat(product)
                reference = product if reference is None else reference
                errors[name] = float((product - reference).abs().max() / reference.abs().max())
    x = batches[0][0]
    one = floor(problem.model(), x, count)
    runs["floor"] = (lambda: [one() for _ in batches]) if len(batches) > 1 else one
    runs["floor"]()
    return runs, errors


def rounds(runs: dict[str, Callable[[], Any]]) -> dict[str, int]:
    """Calls of each: as many as fit into SECONDS_EACH, within bounds."""
    counts = {}
    for name, run in runs.items():  # each has run before
        start = time.perf_counter()
        run()
        counts[name] = max(LEAST, min(MOST, int(SECONDS_EACH / (time.perf_counter() - start))))
    return counts


def measure(problem: Problem, case: str) -> list[dict[str, Any]]:
    """One model and case: a row a way."""
    runs, errors = functions(problem, case)
    # a peer's error is reported, not repaired
    worst = max(error for name, error in errors.items() if name.startswith(("raw", "flatkern")))
    if not worst < 1e-4:
        raise SystemExit(f"{problem.title}, {case}: the ways differ: {errors}")
    times = alternate(runs, rounds(runs))
    vectors = 8 if case == "eight vectors" else 1
    for name, t in times.items():
        share = 1 if name == "gradient" else vectors
        t["cpu_s"], t["wall_s"] = t["cpu_s"] / share, t["wall_s"] / share
    ours, unit, least = times["flatkern"], times["gradient"], times["floor"]
    rows = []
    for name, t in times.items():
        row = {
            "case": case,
            "model": problem.title,
            "n": problem.loader_n if case == "loader" else problem.n,
            "way": name,
            "threads": torch.get_num_threads(),
            "cpu_ms": 1e3 * t["cpu_s"],
            "wall_ms": 1e3 * t["wall_s"],
            "gradients": t["cpu_s"] / unit["cpu_s"],
            "over_flatkern": t["cpu_s"] / ours["cpu_s"],
            "wall_over_flatkern": t["wall_s"] / ours["wall_s"],
            "over_floor": t["cpu_s"] / least["cpu_s"],
            "relative_error": errors.get(name),
            "calls": t["calls"],
        }
        rows.append(row)
        shown = {k: float(f"{v:.3g}") if isinstance(v, float) else v for k, v in row.items()}
        print(*shown.values(), sep=" | ", flush=True)
    return rows


def run_here(threads: int, only: str) -> list[dict[str, Any]]:
    """All models and cases in this process."""
    torch.set_num_threads(threads)
    chosen = [p for p in PROBLEMS if only in f"{p.title}, n = {p.n}"]
    return [row for case in CASES for problem in chosen for row in measure(problem, case)]


def settings(threads: list[int]) -> dict[str, Any]:
    """What the page says about the run."""
    return {
        "threads": " and ".join(map(str, threads))
        + (", each in a process of its own" if threads[1:] else ""),
        "peers": ", ".join(f"{name} {version(name)}" for name in PEERS),
        "dtype": "float32",
        "data": "normal inputs, uniform labels, cross-entropy",
        "parameters": "PyTorch's default initialization, seed 0",
        "attention": "raw torch, the gradient and the peers under sdpa_kernel(MATH)",
        "timing": f"calls in random order, medians of {LEAST} to {MOST} calls each, CPU milliseconds",
    }


def main() -> None:
    """Time all, and write the table's numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="numbers of threads")
    parser.add_argument("--only", default="", help="models whose title contains this; nothing is saved")
    parser.add_argument("--rows", type=Path, help="time in this process and write the rows here alone")
    options = parser.parse_args()
    if options.rows:
        options.rows.write_text(json.dumps(run_here(options.threads[0], options.only)), encoding="utf-8")
        return
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for threads in options.threads:
            path = Path(folder) / f"{threads}.json"
            command = [sys.executable, "-m", "benchmarks.bench_peers", "--threads", str(threads)]
            subprocess.run([*command, "--only", options.only, "--rows", str(path)], check=True)
            rows += json.loads(path.read_text(encoding="utf-8"))
    if not options.only:
        print("written:", save("operators", settings(options.threads), rows))


if __name__ == "__main__":
    main()
