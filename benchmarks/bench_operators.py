"""One product with the Hessian against raw torch's kept graph, and spectral estimators on top of it.

Run: ``python -m pytest benchmarks/bench_operators.py --benchmark-enable --benchmark-columns=median,iqr,rounds``.
Timings are CPU time of this process, so that other work on the machine matters less.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flatkern.estimators import eigsh, spectral_density
from flatkern.operators import ggn, hessian

pytestmark = pytest.mark.benchmark(timer=time.process_time, warmup=True, warmup_iterations=2, min_rounds=7)
CASES = {"n=512": 512, "n=64": 64}


def problem(n: int) -> tuple[nn.Module, Tensor, Tensor]:
    """The MLP 784-512-512-10 with ``n`` random inputs and labels."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return model, torch.randn(n, 784), torch.randint(0, 10, (n,))


def gradient(n: int) -> Callable[[], Any]:
    model, x, y = problem(n)
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(nn.functional.cross_entropy(model(x), y), parameters)


def raw_kept_graph(n: int) -> Callable[[], Any]:
    model, x, y = problem(n)
    parameters = list(model.parameters())
    loss = nn.functional.cross_entropy(model(x), y)
    gradients = torch.autograd.grad(loss, parameters, create_graph=True)
    sizes = [p.numel() for p in parameters]
    v = torch.randn(sum(sizes))

    def product() -> Tensor:
        pieces = [t.view(p.shape) for t, p in zip(v.split(sizes), parameters, strict=True)]
        images = torch.autograd.grad(gradients, parameters, grad_outputs=pieces, retain_graph=True)
        return torch.cat([t.reshape(-1) for t in images])

    return product


def one_product(build: Callable[..., Any], n: int, **options: Any) -> Callable[[], Any]:
    model, x, y = problem(n)
    op = build(model, nn.CrossEntropyLoss(), (x, y), **options)
    v = torch.randn(op.shape[0])
    return lambda: op @ v


WAYS: dict[str, Callable[[int], Callable[[], Any]]] = {
    "gradient": gradient,
    "raw kept graph": raw_kept_graph,
    "hessian": lambda n: one_product(hessian, n),
    "hessian rebuilt": lambda n: one_product(hessian, n, max_memory=0),
    "ggn": lambda n: one_product(ggn, n),
}


@pytest.mark.parametrize("size", CASES)
@pytest.mark.parametrize("way", WAYS)
def test_one_product(benchmark: Any, way: str, size: str) -> None:
    benchmark.group = f"one product, {size}"
    benchmark(WAYS[way](CASES[size]))


@pytest.mark.parametrize("reorthogonalize", [False, True])
def test_spectral_density(benchmark: Any, reorthogonalize: bool) -> None:
    benchmark.group = "8 probes x 20 steps, n=64"
    model, x, y = problem(64)
    op = hessian(model, nn.CrossEntropyLoss(), (x, y))
    benchmark.pedantic(
        lambda: spectral_density(op, probes=8, steps=20, seed=0, reorthogonalize=reorthogonalize), rounds=2
    )


def test_eigsh(benchmark: Any) -> None:
    benchmark.group = "eigsh k=5, n=64"
    model, x, y = problem(64)
    op = hessian(model, nn.CrossEntropyLoss(), (x, y))
    pairs = benchmark.pedantic(lambda: eigsh(op, k=5, seed=0), rounds=2)
    benchmark.extra_info["matvecs"] = pairs.matvecs
