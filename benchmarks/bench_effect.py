"""What the kernels do for whole calls: each call with the compiled kernels and with their PyTorch references.

``python -m benchmarks.bench_effect`` writes ``results/effect.json``. One thread, CPU time, in turns in one process.
Everything else is the same on both sides (the tiled attention, which is PyTorch, too).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import flatkern as fk
from benchmarks import trace_networks as networks
from benchmarks.bench_measurement import MODELS, digits
from benchmarks.operator_problems import Block, ViT, mlp
from benchmarks.timing import alternate, save
from flatkern.kernels._select import using


class Language(nn.Module):
    """Two blocks of width 128 with eight heads over 256 tokens, 100 classes."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(100, 128)
        self.position = nn.Parameter(0.02 * torch.randn(256, 128))
        self.blocks = nn.Sequential(Block(128, 8), Block(128, 8))
        self.norm, self.head = nn.LayerNorm(128), nn.Linear(128, 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens [n, 256] → logits [n, 100, 256]."""
        logits: torch.Tensor = self.head(self.norm(self.blocks(self.words(x) + self.position)))
        return logits.mT


SIDES = ("compiled", "reference")
LOSS = nn.CrossEntropyLoss()
Calls = dict[str, tuple[int, Callable[[], Callable[[], object]]]]
"""By name: timed calls a side, and what makes the call (under the kernels that it is to run with)."""


def measurement_points() -> Calls:
    """The geometry of 20 and 200 samples."""
    found: Calls = {}
    for name, (make, shape) in MODELS.items():
        for n in (20, 200):
            torch.manual_seed(0)
            model, x = make(), digits(n, shape)
            found[f"geometry, {n} samples, {name}"] = (
                15 if n == 20 else 5,
                lambda model=model, x=x: lambda: fk.geometry(model, x),
            )
    return found


def products() -> Calls:
    """Hessian and Gauss-Newton products, one vector and eight."""
    torch.manual_seed(0)
    vit, images = ViT(), (torch.randn(8, 3, 32, 32), torch.randint(10, (8,)))
    words = nn.Linear(64, 50_257)
    tokens = (torch.randn(32, 64), torch.randint(50_257, (32,)))

    def product(
        make: Callable[..., fk.LinearOperator], model: nn.Module, data: object, columns: int
    ) -> object:
        def prepare() -> Callable[[], object]:
            operator = make(model, LOSS, data)
            v = torch.randn(operator.shape[1], columns, generator=torch.Generator().manual_seed(1))
            operator @ v  # chooses how products are done
            return lambda: operator @ v

        return prepare

    return {
        "Hessian product, ViT, n = 8": (15, product(fk.hessian, vit, images, 1)),
        "Hessian products, eight vectors, ViT, n = 8": (5, product(fk.hessian, vit, images, 8)),
        "Gauss-Newton product, 50,257 classes": (15, product(fk.ggn, words, tokens, 1)),
    }


def estimators() -> Calls:
    """What is estimated by products: a density, eigenvalues, a trace, log-determinant."""
    torch.manual_seed(0)
    model = mlp()
    data = (torch.randn(64, 784), torch.randint(10, (64,)))

    def operator() -> fk.LinearOperator:
        return fk.hessian(model, LOSS, data)

    return {
        "spectral_density, 4 × 40, MLP, n = 64": (
            3,
            lambda: lambda: fk.spectral_density(operator(), probes=4, steps=40, seed=0),
        ),
        "eigsh, k = 5, MLP, n = 64": (3, lambda: lambda: fk.eigsh(operator(), k=5, seed=0)),
        "trace, 32 samples, MLP, n = 64": (
            3,
            lambda: lambda: fk.trace(operator(), method="hutchinson", samples=32, seed=0),
        ),
    }


def flatness() -> Calls:
    """Traces and spectra by layer rules."""
    torch.manual_seed(0)
    x, y = torch.randn(128, 784), torch.randint(10, (128,))
    gelu, vit = networks.mlp(nn.GELU), ViT()
    images = (torch.randn(16, 3, 32, 32), torch.randint(10, (16,)))
    language, tokens = Language(), (torch.randint(100, (2, 256)), torch.randint(100, (2, 256)))
    return {
        "hessian_trace, GELU MLP, n = 128": (7, lambda: lambda: fk.hessian_trace(gelu, LOSS, (x, y), seed=0)),
        "hessian_trace, 8 samples, ViT, n = 16": (
            3,
            lambda: lambda: fk.hessian_trace(vit, LOSS, images, samples=8, seed=0),
        ),
        "hessian_trace, 32 samples, transformer, 2 × 256 tokens": (
            5,
            lambda: lambda: fk.hessian_trace(language, LOSS, tokens, samples=32, seed=0),
        ),
        "ggn_trace, GELU MLP, n = 128": (9, lambda: lambda: fk.ggn_trace(gelu, LOSS, (x, y), method="exact")),
        "ggn_trace, exact, ViT, n = 16": (5, lambda: lambda: fk.ggn_trace(vit, LOSS, images, method="exact")),
        "ntk, ViT, n = 16": (5, lambda: lambda: fk.ntk(vit, images[0])),
    }


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for group in (measurement_points, products, estimators, flatness):
        for name, (rounds, prepare) in group().items():
            sides: dict[str, Callable[[], object]] = {}
            for which in SIDES:
                with using(which):
                    call = prepare()
                sides[which] = _under(which, call)
            times = alternate(sides, dict.fromkeys(SIDES, rounds))
            row = {"call": name} | {f"{s}_ms": 1e3 * times[s]["cpu_s"] for s in SIDES}
            row["ratio"] = row["reference_ms"] / row["compiled_ms"]
            rows.append(row)
            print(
                f"{name:50s} {row['compiled_ms']:9.3g} ms {row['reference_ms']:9.3g} ms {row['ratio']:6.2f}"
            )
    path = save("effect", {"timing": "medians of 3 to 15 calls a side, in turns; CPU milliseconds"}, rows)
    print(f"wrote {path}")


def _under(which: str, call: Callable[[], object]) -> Callable[[], object]:
    def run() -> object:
        with using(which):  # type: ignore[arg-type]
            return call()

    return run


if __name__ == "__main__":
    main()
