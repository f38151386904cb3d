"""One call of fk.flatness against the same quantities one by one, in gradients.

``python -m benchmarks.bench_flatness`` trains each network on 512 MNIST digits and takes both sides in turns within one
process, CPU time on one thread. A gradient is forward and backward over the same 512 samples.
"""

from __future__ import annotations

import argparse

import torch
from torch import nn

import flatkern as fk
from benchmarks.timing import alternate
from benchmarks.trace_networks import LOSS, MODELS, train
from flatkern.experiments.data import load

FIRST_ORDER = [
    "loss", "gradient_norm", "gradient_norms", "fisher_trace", "sharpness", "ggn_trace", "relative_flatness",
]  # fmt: skip
SAMPLES = 512


def compare(model: nn.Module, data: tuple[torch.Tensor, torch.Tensor], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each way."""
    x, _ = data
    parameters = list(model.parameters())

    def gradient() -> None:
        torch.autograd.grad(LOSS(model(x), data[1]), parameters)

    def one_by_one() -> None:
        gradient()
        fk.gradient_norms(model, LOSS, data, per_layer=True)
        fk.sharpness(model, x, per_layer=True)
        fk.ggn_trace(model, LOSS, data, per_layer=True)
        fk.relative_flatness(model, LOSS, data)

    ways = {
        "gradient": gradient,
        "first order, one by one": one_by_one,
        "first order, flatness": lambda: fk.flatness(model, LOSS, data, quantities=FIRST_ORDER),
        "+ adaptive, one by one": lambda: (one_by_one(), fk.adaptive_sharpness(model, LOSS, data, seed=0)),
        "+ adaptive, flatness": lambda: fk.flatness(
            model, LOSS, data, quantities=[*FIRST_ORDER, "adaptive_sharpness"], seed=0
        ),
        "all, flatness": lambda: fk.flatness(model, LOSS, data, seed=0),
        "of it λ_max": lambda: fk.max_eigenvalue(model, LOSS, data, seed=0, check_determinism=False),
    }
    counts = dict.fromkeys(ways, rounds) | {"gradient": 5 * rounds}
    return {name: times["cpu_s"] for name, times in alternate(ways, counts).items()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--models", nargs="*", default=["MLP ReLU", "MLP GELU", "VGG ReLU", "ViT GELU"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=3)
    settings = parser.parse_args()
    torch.set_num_threads(1)
    data = load("digits-mnist", num_train=SAMPLES, num_test=10).train
    for name in settings.models:
        torch.manual_seed(0)
        model = MODELS[name]().eval()
        train(model, data.x, data.labels, settings.steps)
        times = compare(model, (data.x, data.labels), settings.rounds)
        print(f"{name}: gradient {1e3 * times['gradient']:.0f} ms CPU")
        for way, seconds in times.items():
            print(f"    {way}: {seconds / times['gradient']:.1f} gradients")
        if name == settings.models[0]:
            print(fk.flatness(model, LOSS, (data.x, data.labels), seed=0))


if __name__ == "__main__":
    main()
