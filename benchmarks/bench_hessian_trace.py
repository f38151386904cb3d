"""The Hessian's trace to 1 %: fk.hessian_trace against Hutchinson with a kept double-backward graph.

``python -m benchmarks.bench_hessian_trace`` trains each network on 512 MNIST digits, measures both sides in one run and
writes benchmarks/results/hessian_trace.json. The other side is what PyHessian's ``data=`` path does: one graph of the
gradient, kept; a product with a random sign vector a probe. Its probes to a true 1 % are predicted from the measured
standard deviation of one, (sd / (0.01 Tr))²; running them would take minutes to hours.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import flatkern as fk
from benchmarks.timing import save
from flatkern.experiments.data import load

RTOL = 0.01
SEEDS = 3
LOSS = nn.CrossEntropyLoss()


def mlp(act: type[nn.Module]) -> nn.Module:
    """784-512-512-10."""
    return nn.Sequential(nn.Linear(784, 512), act(), nn.Linear(512, 512), act(), nn.Linear(512, 10))


def vgg(act: type[nn.Module]) -> nn.Module:
    """Four 3×3 convolutions in two pooled stages, then 1568-64-10."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 28, 28))]
    channels = 1
    for width in (16, 32):
        layers += [
            nn.Conv2d(channels, width, 3, padding=1),
            act(),
            nn.Conv2d(width, width, 3, padding=1),
            act(),
        ]
        layers.append(nn.MaxPool2d(2))
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 49, 64), act(), nn.Linear(64, 10))


class ViT(nn.Module):
    """Patches of 7 × 7, four pre-LN blocks of width 64 with four heads, GELU, mean over tokens."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 7, stride=7)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
                )
                for _ in range(4)
            )
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images as rows [n, 784] → logits."""
        h = self.embed(x.view(-1, 1, 28, 28)).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(h)).mean(1))
        return logits


MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP ReLU": lambda: mlp(nn.ReLU),
    "MLP tanh": lambda: mlp(nn.Tanh),
    "MLP GELU": lambda: mlp(nn.GELU),
    "VGG ReLU": lambda: vgg(nn.ReLU),
    "VGG GELU": lambda: vgg(nn.GELU),
    "ViT GELU": ViT,
}


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """Adam, batches of 64."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    source = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(x), (64,), generator=source)
        optimizer.zero_grad()
        LOSS(model(x[chosen]), y[chosen]).backward()
        optimizer.step()


def cpu_seconds(function: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    begun = time.process_time()
    function()
    return time.process_time() - begun


def hutchinson(model: nn.Module, x: Tensor, y: Tensor, probes: int) -> tuple[Tensor, float, float]:
    """Values of ``probes`` probes, CPU seconds of the graph, and of one probe."""
    parameters = list(model.parameters())
    source = torch.Generator().manual_seed(1)
    begun = time.process_time()
    with sdpa_kernel(SDPBackend.MATH):
        gradients = torch.autograd.grad(LOSS(model(x), y), parameters, create_graph=True)
    graph = time.process_time() - begun
    values, seconds = [], []
    for _ in range(probes):
        begun = time.process_time()
        signs = [torch.randint(0, 2, p.shape, generator=source).to(p) * 2 - 1 for p in parameters]
        images = torch.autograd.grad(gradients, parameters, signs, retain_graph=True)
        values.append(sum((v.double() * h.double()).sum() for v, h in zip(signs, images, strict=True)))
        seconds.append(time.process_time() - begun)
    return torch.stack([torch.as_tensor(v) for v in values]), graph, statistics.median(seconds)


def measure(
    name: str, model: nn.Module, steps: int, x: Tensor, y: Tensor, probes: int, long: int
) -> dict[str, object]:
    """One row of the table."""
    parameters = list(model.parameters())
    gradient = statistics.median(
        cpu_seconds(lambda: torch.autograd.grad(LOSS(model(x), y), parameters)) for _ in range(7)
    )
    runs, ours = [], []
    for seed in range(SEEDS):
        ours.append(
            cpu_seconds(
                lambda seed=seed: runs.append(fk.hessian_trace(model, LOSS, (x, y), rtol=RTOL, seed=seed))
            )
        )  # type: ignore[misc]
    exact = runs[0].stderr == 0
    reference = runs[0] if exact else fk.hessian_trace(model, LOSS, (x, y), samples=long, seed=99)
    ggn = cpu_seconds(lambda: fk.ggn_trace(model, LOSS, (x, y)))
    values, graph, probe = hutchinson(model, x, y, probes)
    spread = float(values.std())
    planned = (spread / (RTOL * reference.value)) ** 2
    theirs = graph + planned * probe
    own = statistics.median(ours)
    return {
        "model": name,
        "steps": steps,
        "trace": reference.value,
        "reference_stderr": reference.stderr,
        "gradient_ms": 1e3 * gradient,
        "flatkern_gradients": own / gradient,
        "of_which_ggn": ggn / gradient,
        "probes": 0 if exact or runs[0].samples is None else len(runs[0].samples),
        "stated_error": runs[0].stderr / abs(reference.value),
        "largest_error": max(abs(r.value - reference.value) for r in runs) / abs(reference.value),
        "hutchinson_sd": spread / abs(reference.value),
        "hutchinson_z": float(values.mean() - reference.value) / (spread / probes**0.5),
        "hutchinson_probe_gradients": probe / gradient,
        "hutchinson_probes": planned,
        "hutchinson_gradients": theirs / gradient,
        "ratio": theirs / own,
    }


def main() -> None:
    """Run all, or the networks named, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(MODELS))
    parser.add_argument("--steps", nargs="*", type=int, default=[0, 300])
    parser.add_argument("--samples", type=int, default=512)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load("digits-mnist", num_train=arguments.samples, num_test=10).train
    x, y = data.x, data.labels
    rows = []
    for name in arguments.only:
        for steps in arguments.steps:
            torch.manual_seed(0)
            model = MODELS[name]()
            train(model, x, y, steps)
            small = name.startswith("MLP")
            rows.append(measure(name, model.eval(), steps, x, y, 40 if small else 16, 300 if small else 40))
            print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    settings = {
        "data": f"{len(x)} MNIST digits",
        "loss": "mean cross-entropy",
        "training": "Adam 1e-3, batches of 64",
        "rtol": RTOL,
        "dtype": "float32",
    }
    save("hessian_trace", settings, rows)


if __name__ == "__main__":
    main()
