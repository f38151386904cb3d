"""What trains the networks of one setting: by hand where that is known, else by autograd, behind one interface."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from flatkern.experiments.data import CLASSES, Dataset
from flatkern.experiments.devices import CPU, resolve
from flatkern.experiments.networks import build_network, takes_vectors
from flatkern.experiments.settings import DemoConfig
from flatkern.experiments.sgd import Ensemble

__all__ = ["AutogradTrainer", "BatchedTrainer", "Trainer", "trainer_for"]


class Trainer(Protocol):
    """K networks that differ only in their seed, trained on ``nn.MSELoss`` by plain SGD."""

    def step(self, x: Tensor, targets: Tensor, learning_rate: float) -> None:
        """One step on x [K, B, ...] and targets [K, B, outputs]."""

    def member(self, k: int) -> nn.Module:
        """Network k as a module of its own."""

    def state(self, k: int) -> dict[str, Tensor]:
        """A copy of the weights of network k, on the CPU."""

    def load(self, k: int, state: Mapping[str, Tensor]) -> None:
        """Put weights into network k."""


def _initial(build: Callable[[], nn.Module], seeds: Sequence[int]) -> list[nn.Module]:
    models = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed)
            models.append(build())
    return models


class AutogradTrainer:
    """Any module, one network after the other; weights move in place, and no optimizer state exists.

    Args:
        build: makes a network; called once a seed, with torch's global generator at that seed (restored afterwards).
        seeds: of the initial weights.
        device: of the weights; they are drawn on the CPU.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        seeds: Sequence[int],
        device: torch.device = CPU,
    ) -> None:
        self._models = [model.to(device) for model in _initial(build, seeds)]
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
        """A copy of the weights of network k, on the CPU."""
        return {name: _copied(value) for name, value in self._models[k].state_dict().items()}

    def load(self, k: int, state: Mapping[str, Tensor]) -> None:
        """Put weights into network k."""
        self._models[k].load_state_dict(dict(state))


class BatchedTrainer:
    """Any module without buffers, all networks in one: weights [K, ...], one vectorized forward and backward pass.

    Args:
        build, seeds, device: as for :class:`AutogradTrainer`.

    Raises:
        ValueError: a network with buffers (running statistics), which a batched pass cannot write.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        seeds: Sequence[int],
        device: torch.device = CPU,
    ) -> None:
        models = [model.to(device) for model in _initial(build, seeds)]
        self._weights, buffers = stack_module_state(models)
        if buffers:
            raise ValueError(
                f"build: an ensemble takes networks without buffers; there is {next(iter(buffers))}"
            )
        self._member = models[0]
        skeleton = copy.deepcopy(models[0]).to("meta")

        def call(weights: dict[str, Tensor], x: Tensor) -> Tensor:
            found: Tensor = functional_call(skeleton, weights, (x,))
            return found

        self._call = vmap(call)

    def step(self, x: Tensor, targets: Tensor, learning_rate: float) -> None:
        """One step of all networks."""
        weights = list(self._weights.values())
        error = self._call(self._weights, x) - targets
        # nn.MSELoss of each network; they share no weight, so the sum's gradients are theirs
        loss = error.square().sum() / targets[0].numel()
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            torch._foreach_add_(weights, gradients, alpha=-learning_rate)

    def member(self, k: int) -> nn.Module:
        """Network k as a module of its own."""
        model = copy.deepcopy(self._member)
        model.load_state_dict({name: value[k].detach() for name, value in self._weights.items()})
        return model

    def state(self, k: int) -> dict[str, Tensor]:
        """A copy of the weights of network k, on the CPU."""
        return {name: _copied(value[k]) for name, value in self._weights.items()}

    def load(self, k: int, state: Mapping[str, Tensor]) -> None:
        """Put weights into network k."""
        with torch.no_grad():
            for name, value in self._weights.items():
                value[k].copy_(state[name])


def _copied(value: Tensor) -> Tensor:
    return value.detach().to("cpu", copy=True)


def trainer_for(config: DemoConfig, data: Dataset, seeds: Sequence[int]) -> Trainer:
    """The networks that ``config`` names for these images, with the initial weights of ``seeds``."""
    device = resolve(config.device)
    if takes_vectors(config.network):
        activation = nn.Tanh if config.network == "mlp-tanh" else nn.ReLU
        return Ensemble((data.pixels, *config.hidden, CLASSES), seeds, activation, device=device)
    kind = BatchedTrainer if config.batched and len(seeds) > 1 else AutogradTrainer
    return kind(lambda: build_network(config.network, data.shape, config.hidden), seeds, device)
