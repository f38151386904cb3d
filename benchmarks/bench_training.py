"""The experiments' training loop against an SGD step written by hand, and ten networks together against one by one.

``python -m benchmarks.bench_training`` trains the paper's MLP and VGG-10 (batch 20) and writes
benchmarks/results/training.json; ``--device cuda`` does the same on a GPU, where the second comparison is of interest.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.bench_measurement import digits, paper_mlp, paper_vgg
from benchmarks.timing import alternate, save
from flatkern.experiments.data import Dataset, Samples
from flatkern.experiments.devices import resolve
from flatkern.experiments.reproduce import ReproduceConfig, reproduction
from flatkern.experiments.settings import Group, Setting
from flatkern.experiments.training import TICK, _Training

BATCH, IMAGES, RATE, TOGETHER = 20, 1000, 0.1, 10
NETWORKS: dict[str, tuple[str, Callable[[], nn.Sequential], tuple[int, ...]]] = {
    "MLP 784-500-500-500-10": ("mlp-tanh", paper_mlp, (784,)),
    "VGG-10": ("vgg10", paper_vgg, (3, 32, 32)),
}


class MlpByHand:
    """One tanh MLP, no graph: activations forward, cotangents back, every weight moved in place."""

    def __init__(self, model: nn.Sequential, device: torch.device) -> None:
        layers = [m.to(device) for m in model if isinstance(m, nn.Linear)]
        self.weights = [(m.weight.detach(), m.bias.detach()) for m in layers]

    def step(self, x: Tensor, y: Tensor) -> None:
        """One step on ``nn.MSELoss``."""
        inputs, a = [], x
        for i, (w, b) in enumerate(self.weights):
            inputs.append(a)
            a = torch.addmm(b, a, w.T)
            if i < len(self.weights) - 1:
                a.tanh_()
        g = (a - y).mul_(2 * RATE / y.numel())
        for i in range(len(self.weights) - 1, -1, -1):
            w, b = self.weights[i]
            below = torch.mm(g, w).mul_(1 - inputs[i].square()) if i else g
            w.addmm_(g.T, inputs[i], alpha=-1)
            b.sub_(g.sum(0))
            g = below


class ByAutograd:
    """Any module: a graph and its gradients, every weight moved in place."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.model = model.to(device)
        self.parameters, self.loss = list(model.parameters()), nn.MSELoss()

    def step(self, x: Tensor, y: Tensor) -> None:
        """One step on ``nn.MSELoss``."""
        gradients = torch.autograd.grad(self.loss(self.model(x), y), self.parameters)
        with torch.no_grad():
            for p, gradient in zip(self.parameters, gradients, strict=True):
                p.sub_(gradient, alpha=RATE)


def by_hand(network: MlpByHand | ByAutograd, x: Tensor, y: Tensor) -> Callable[[], None]:
    """``TICK`` steps on batches of a permutation."""

    def run() -> None:
        order = torch.empty(0, dtype=torch.long, device=x.device)
        for _ in range(TICK):
            if len(order) < BATCH:
                order = torch.randperm(len(x)).to(x.device)
            batch, order = order[:BATCH], order[BATCH:]
            network.step(x[batch], y[batch])
        _finish(x.device)

    return run


def loop(config: ReproduceConfig, data: Dataset, seeds: tuple[int, ...]) -> Callable[[], None]:
    """``TICK`` network steps of the experiments' own loop, without measurements."""
    training = _Training(config, Group(Setting(RATE, BATCH), seeds), data)
    training.schedule = set()

    def run() -> None:
        training.advance()
        _finish(resolve(config.device))

    return run


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def compare(name: str, device: str, rounds: int) -> dict[str, object]:
    """Milliseconds a step of one network, in the four ways."""
    kind, make, shape = NETWORKS[name]
    where = resolve(device)
    torch.manual_seed(0)
    x, labels = digits(IMAGES, shape), torch.randint(10, (IMAGES,))
    samples = Samples(x, labels)
    data = Dataset("benchmark", "", samples, samples, (1, 28, 28) if shape == (784,) else (3, 32, 32))
    base = reproduction("fig1", network=kind, steps=1_000_000_000, points=2, device=device)
    alone, together = replace(base, ensemble=False), replace(base, ensemble=True)
    network = MlpByHand(make(), where) if shape == (784,) else ByAutograd(make(), where)
    singles = [loop(alone, data, (seed,)) for seed in range(TOGETHER)]
    ways = {
        "loop": singles[0],
        "by hand": by_hand(network, samples.to(where).x, samples.to(where).targets),
        "one by one": lambda: [run() for run in singles],
        "ensemble": loop(together, data, tuple(range(TOGETHER))),
    }
    often = {"loop": 4 * rounds, "by hand": 4 * rounds, "one by one": rounds, "ensemble": 4 * rounds}
    clock = "cpu_s" if where.type == "cpu" else "wall_s"
    found = {way: times[clock] for way, times in alternate(ways, often).items()}
    steps = {"one by one": TICK * TOGETHER}
    ms = {way: 1e3 * seconds / steps.get(way, TICK) for way, seconds in found.items()}
    return {
        "model": name,
        "loop_ms": ms["loop"],
        "by_hand_ms": ms["by hand"],
        "ratio": ms["loop"] / ms["by hand"],
        "one_by_one_ms": ms["one by one"],
        "ensemble_ms": ms["ensemble"],
        "gain": ms["one by one"] / ms["ensemble"],
    }


def main() -> None:
    """Time both networks and write the table's numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for name in NETWORKS:
        rows.append(compare(name, arguments.device, arguments.rounds))
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()})
    settings = {
        "threads": arguments.threads,
        "device": arguments.device,
        "training": f"plain SGD on nn.MSELoss, batch {BATCH}, float32; a step of one network",
        "ensemble": f"{TOGETHER} networks",
        "timing": f"calls of {TICK} steps interleaved, medians; CPU milliseconds (wall on a GPU)",
    }
    name = "training" if arguments.device == "cpu" else "training_gpu"
    print("written:", save(name, settings, rows))


if __name__ == "__main__":
    main()
