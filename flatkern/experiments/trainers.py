"""What trains the networks of one setting: by hand where that is known, else by autograd, behind one interface."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from flatkern.experiments.data import CLASSES, Dataset
from flatkern.experiments.networks import build_network, takes_vectors
from flatkern.experiments.settings import DemoConfig
from flatkern.experiments.sgd import Ensemble

__all__ = ["AutogradTrainer", "Trainer", "trainer_for"]


class Trainer(Protocol):
    """K networks that differ only in their seed, trained on ``nn.MSELoss`` by plain SGD."""

    def step(self, x: Tensor, targets: Tensor, learning_rate: float) -> None:
        """One step on x [K, B, ...] and targets [K, B, outputs]."""

    def member(self, k: int) -> nn.Module:
        """Network k as a module of its own."""

    def state(self, k: int) -> dict[str, Tensor]:
        """A copy of the weights of network k."""

    def load(self, k: int, state: Mapping[str, Tensor]) -> None:
        """Put weights into network k."""


class AutogradTrainer:
    """Any module, one network after the other; weights move in place, and no optimizer state exists.

    Args:
        build: makes a network; called once a seed, with torch's global generator at that seed (restored afterwards).
        seeds: of the initial weights.
    """

    def __init__(self, build: Callable[[], nn.Module], seeds: Sequence[int]) -> None:
        self._models: list[nn.Module] = []
        with torch.random.fork_rng(devices=[]):
            for seed in seeds:
                torch.manual_seed(seed)
                self._models.append(build())
        self._parameters: list[list[Tensor]] = [[*model.parameters()] for model in self._models]
        self._loss = nn.MSELoss()

    def step(self, x: Tensor, targets: Tensor, learning_rate: float) -> None:
        """One step of each network."""
        for model, parameters, inputs, wanted in zip(self._models, self._parameters, x, targets, strict=True):
            gradients = torch.autograd.grad(self._loss(model(inputs), wanted), parameters)
            with torch.no_grad():
                torch._foreach_add_(parameters, gradients, alpha=-learning_rate)

    def member(self, k: int) -> nn.Module:
        """A copy of network k."""
        return copy.deepcopy(self._models[k])

    def state(self, k: int) -> dict[str, Tensor]:
        """A copy of the weights of network k."""
        return {name: value.detach().clone() for name, value in self._models[k].state_dict().items()}

    def load(self, k: int, state: Mapping[str, Tensor]) -> None:
        """Put weights into network k."""
        self._models[k].load_state_dict(dict(state))


def trainer_for(config: DemoConfig, data: Dataset, seeds: Sequence[int]) -> Trainer:
    """The networks that ``config`` names for these images, with the initial weights of ``seeds``."""
    if takes_vectors(config.network):
        activation = nn.Tanh if config.network == "mlp-tanh" else nn.ReLU
        return Ensemble((data.pixels, *config.hidden, CLASSES), seeds, activation)
    return AutogradTrainer(lambda: build_network(config.network, data.shape, config.hidden), seeds)
