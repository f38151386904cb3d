"""Ghost norms of shared weights against formed gradients and T × T Gram matrices, and what they do inside the library.

    make bench                         with pytest-benchmark
    python -m benchmarks.bench_ghost   the table of ratios, and benchmarks/results/ghost.json

One thread, minima of CPU times over rounds in which all sides take turns, each call after an untimed one: what the side
before left in the caches does not matter. The explicit forms get the shortest code in PyTorch: one batched product, or
two; patches by a strided copy where the input is an image.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

import flatkern as fk
from benchmarks.bench_ggn_trace import ViT, vgg
from benchmarks.timing import save
from flatkern import kernels
from flatkern.kernels._select import using
from flatkern.layers.conv import patches
from flatkern.layers.outer import OuterTerm

SEQUENCES = (
    # K, n, T, d_in, d_out
    (1, 64, 16, 512, 512),
    (1, 64, 17, 64, 128),
    (1, 64, 64, 256, 256),
    (1, 32, 128, 512, 512),
    (1, 16, 128, 768, 3072),
    (1, 16, 197, 384, 384),
    (1, 16, 256, 768, 768),
    (9, 4, 256, 256, 256),
    (1, 8, 512, 768, 768),
    (1, 2, 1024, 1024, 1024),
    (1, 8, 1024, 64, 64),
    (1, 4, 2048, 512, 512),
    (9, 4, 1024, 64, 64),
)
IMAGES = (
    # K, n, C_in, C_out, side; kernels 3 × 3, padding 1
    (1, 32, 3, 64, 32),
    (1, 32, 16, 16, 32),
    (1, 32, 32, 32, 32),
    (1, 32, 64, 64, 32),
    (1, 32, 64, 64, 16),
    (1, 32, 64, 64, 8),
    (1, 32, 128, 128, 16),
    (1, 32, 256, 256, 8),
    (9, 8, 16, 16, 32),
    (9, 8, 64, 64, 16),
)


SECONDS = 0.5
"""Of CPU time a row at least: short calls get more rounds."""


def by_gradients(a: Tensor, g: Tensor) -> Tensor:
    """The gradients formed, a [n, T, d_in], g [K, n, T, d_out]."""
    stacked = g.permute(1, 0, 3, 2).flatten(1, 2)  # [n, K d_out, T]
    formed = (stacked @ a).unflatten(1, (len(g), -1)).flatten(2)
    return torch.linalg.vector_norm(formed, dim=-1).double().square().mT


def by_grams(a: Tensor, g: Tensor) -> Tensor:
    """Two T × T matrices a sample, that of a once for all cotangents."""
    inputs = a @ a.mT
    return torch.stack([(inputs * (c @ c.mT)).sum((1, 2), dtype=torch.float64) for c in g])


def minima(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The least CPU seconds of each function, taken in turns, each after an untimed call of its own."""
    best = dict.fromkeys(functions, float("inf"))
    begun, done = time.process_time(), 0
    while done < rounds or time.process_time() - begun < SECONDS:
        for name, function in functions.items():
            function()  # the side before may have swept the caches
            start = time.process_time()
            function()
            best[name] = min(best[name], time.process_time() - start)
        done += 1
    return best


def row(what: str, dtype: torch.dtype, own: Callable[[], Tensor], reference: Callable[[], Tensor],
        explicit: dict[str, Callable[[], Tensor]], rounds: int) -> dict[str, Any]:  # fmt: skip
    """The kernel and its reference against the better explicit form."""
    seconds = minima({"own": own, "reference": reference, **explicit}, rounds)
    better = min(explicit, key=lambda name: seconds[name])
    difference = ((own() - explicit[better]()) / own()).abs().max().item()
    return {
        "what": what,
        "dtype": str(dtype).removeprefix("torch."),
        "own_ms": 1e3 * seconds["own"],
        "tiled_torch_ms": 1e3 * seconds["reference"],
        "explicit_ms": 1e3 * seconds[better],
        "explicit_form": better,
        "ratio": seconds[better] / seconds["own"],
        "over_tiled_torch": seconds["reference"] / seconds["own"],
        "difference": difference,
    }


def in_reference(f: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same call on the PyTorch reference."""

    def call() -> Tensor:
        with using("reference"):
            return f()

    return call


def sequence_row(dtype: torch.dtype, sizes: tuple[int, ...], rounds: int) -> dict[str, Any]:
    k, n, t, d_in, d_out = sizes
    a, g = torch.randn(n, t, d_in, dtype=dtype), torch.randn(k, n, t, d_out, dtype=dtype)
    forms = {"gradients": lambda: by_gradients(a, g)}
    if t <= 1024:
        forms["Gram matrices"] = lambda: by_grams(a, g)

    def own() -> Tensor:
        return kernels.ghost_norm(a, g)

    what = f"sequences: K={k} n={n} T={t} {d_in} → {d_out}"
    return row(what, dtype, own, in_reference(own), forms, rounds)


def image_row(dtype: torch.dtype, sizes: tuple[int, ...], rounds: int) -> dict[str, Any]:
    k, n, c_in, c_out, side = sizes
    x = torch.randn(n, c_in, side, side, dtype=dtype)
    g = torch.randn(k, n, c_out, side, side, dtype=dtype)

    def unfolded() -> Tensor:
        return patches(x, (3, 3), (1, 1), (1, 1), (1, 1), 1)[:, 0]

    rows = g.flatten(3).mT
    forms = {"gradients": lambda: by_gradients(unfolded(), rows)}
    if side <= 16:
        forms["Gram matrices"] = lambda: by_grams(unfolded(), rows)

    def own() -> Tensor:
        return kernels.conv_ghost_norm(x, g, (3, 3), padding=1)

    what = f"conv 3×3: K={k} n={n} {side}×{side} {c_in} → {c_out}"
    return row(what, dtype, own, in_reference(own), forms, rounds)


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """A convolutional network, a vision transformer, and a stack of token-wise layers with long sequences."""

    def wide(c: int) -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(c, 2 * c, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(2 * c, 2 * c, 3, padding=1), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * c, 10),
        )  # fmt: skip

    class Tokens(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(16, width),
                nn.GELU(),
                nn.Linear(width, 4 * width),
                nn.GELU(),
                nn.Linear(4 * width, width),
            )
            self.head = nn.Linear(width, 10)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layers(x).tanh().mean(1))

    return {
        "VGG 16-64, 128 digits": (vgg(), torch.randn(128, 1, 28, 28)),
        "CNN 16-32 channels, 32 of 32×32": (wide(16), torch.randn(32, 3, 32, 32)),
        "CNN 64-128 channels, 16 of 32×32": (wide(64), torch.randn(16, 3, 32, 32)),
        "ViT of width 64, 128 digits": (ViT(), torch.randn(128, 1, 28, 28)),
        "token MLP of width 256, 8 × 256 tokens": (Tokens(256), torch.randn(8, 256, 16)),
        "token MLP of width 128, 32 × 64 tokens": (Tokens(128), torch.randn(32, 64, 16)),
    }


def library_rows(rounds: int) -> list[dict[str, Any]]:
    """Whole calls with and without the kernel in the rules of dense layers and convolutions."""
    loss, out = nn.CrossEntropyLoss(), []

    def without(f: Callable[[], Any]) -> Callable[[], Any]:
        def call() -> Any:
            with patch.object(OuterTerm, "_by_kernel", lambda term: False):
                return f()

        return call

    for name, (model, x) in networks().items():
        y = torch.randint(10, (len(x),))
        calls: dict[str, Callable[[], Any]] = {
            "gradient_norms": lambda model=model, x=x, y=y: fk.gradient_norms(model, loss, (x, y)),
            "ggn_trace": lambda model=model, x=x, y=y: fk.ggn_trace(model, loss, [(x, y)], method="exact"),
        }
        for call, function in calls.items():
            seconds = minima({"before": without(function), "after": function}, rounds)
            out.append(
                {
                    "call": f"{call}, {name}",
                    "before_ms": 1e3 * seconds["before"],
                    "after_ms": 1e3 * seconds["after"],
                    "ratio": seconds["before"] / seconds["after"],
                }
            )
    return out


def main() -> None:
    """Compare everything in one run and write benchmarks/results/ghost.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = []
    for dtype in (torch.float32, torch.float64):
        wanted = slice(None) if dtype == torch.float32 else slice(None, None, 3)
        rows += [sequence_row(dtype, sizes, options.rounds) for sizes in SEQUENCES[wanted]]
        rows += [image_row(dtype, sizes, options.rounds) for sizes in IMAGES[wanted]]
    for r in rows:
        print(f"{r['what']:45} {r['dtype']:8} {r['ratio']:5.2f}  tiled torch {r['over_tiled_torch']:5.2f}")
    library = library_rows(options.rounds)
    for r in library:
        print(f"{r['call']:60} {r['before_ms']:8.1f} {r['after_ms']:8.1f} {r['ratio']:5.2f}")
    settings = {
        "threads": 1,
        "data": "normal random inputs and cotangents; untrained networks",
        "timing": f"least CPU time of {options.rounds} rounds or half a second, each call after an untimed one",
    }
    print("written:", save("ghost", settings, rows + library))


@pytest.mark.parametrize("form", ["auto", "gradients", "Gram matrices"])
@pytest.mark.parametrize("positions", [64, 256])
def test_sequences(benchmark, form, positions):
    a, g = torch.randn(8, positions, 256), torch.randn(1, 8, positions, 256)
    benchmark.group = f"ghost norm T={positions}"
    f = {"auto": kernels.ghost_norm, "gradients": by_gradients, "Gram matrices": by_grams}[form]
    benchmark(f, a, g)


if __name__ == "__main__":
    main()
