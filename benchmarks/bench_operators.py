"""flatkern's products and the spectral estimators on top of them, one by one, for work on their speed.

Run: ``python -m pytest benchmarks/bench_operators.py --benchmark-enable --benchmark-columns=median,iqr,rounds``.
Timings are CPU time of this process, so that other work on the machine matters less. Beside raw torch and other
packages, in one run with all models: ``python -m benchmarks.bench_peers``.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from benchmarks.hvp_ways import ONE
from benchmarks.operator_problems import PROBLEMS, Problem
from flatkern.estimators import eigsh, spectral_density
from flatkern.operators import HessianOperator, hessian

pytestmark = pytest.mark.benchmark(timer=time.process_time, warmup=True, warmup_iterations=2, min_rounds=7)
WAYS = ("gradient", "raw torch, kept graph", "flatkern", "flatkern, nothing kept", "flatkern GGN")
MLPS = {f"n={p.n}": p for p in PROBLEMS[:2]}


@pytest.mark.parametrize("size", MLPS)
@pytest.mark.parametrize("way", WAYS)
def test_one_product(benchmark: Any, way: str, size: str) -> None:
    benchmark.group = f"one product, {size}"
    model = MLPS[size].model()
    v = torch.randn(1, sum(p.numel() for p in model.parameters()))
    benchmark(ONE[way](model, [MLPS[size].batch(MLPS[size].n)], v))


def operator(problem: Problem) -> HessianOperator:
    return hessian(problem.model(), torch.nn.CrossEntropyLoss(), problem.batch(problem.n))


@pytest.mark.parametrize("reorthogonalize", [False, True])
def test_spectral_density(benchmark: Any, reorthogonalize: bool) -> None:
    benchmark.group = "8 probes x 20 steps, n=64"
    op = operator(MLPS["n=64"])
    benchmark.pedantic(
        lambda: spectral_density(op, probes=8, steps=20, seed=0, reorthogonalize=reorthogonalize), rounds=2
    )


def test_eigsh(benchmark: Any) -> None:
    benchmark.group = "eigsh k=5, n=64"
    op = operator(MLPS["n=64"])
    pairs = benchmark.pedantic(lambda: eigsh(op, k=5, seed=0), rounds=2)
    benchmark.extra_info["matvecs"] = pairs.matvecs
