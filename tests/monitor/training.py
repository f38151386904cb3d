"""Small training runs to watch."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

X = torch.randn(60, 6, generator=torch.Generator().manual_seed(1))
Y = torch.randint(4, (60,), generator=torch.Generator().manual_seed(2))
LOSS = nn.CrossEntropyLoss()


class Mixed(nn.Module):
    """Batch norm, dropout, a buffer that counts, a frozen part in eval mode: much that a measurement could disturb."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Linear(6, 12), nn.BatchNorm1d(12)
        self.drop, self.b = nn.Dropout(0.4), nn.Linear(12, 12)
        self.frozen, self.c = nn.BatchNorm1d(12), nn.Linear(12, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))

    def train(self, mode: bool = True) -> Mixed:
        super().train(mode)
        self.frozen.training = False
        return self

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        x = self.drop(self.norm(self.a(x)).relu())
        return self.c(self.frozen(self.b(x).tanh()))


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))


def conv() -> nn.Sequential:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout1d(0.3), nn.Flatten(),
        nn.Linear(16, 4),
    )  # fmt: skip


def reparametrized() -> nn.Sequential:
    """Weights computed in each forward pass, one of them with a state that training moves."""
    return nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(6, 9)), nn.Tanh(),
        nn.utils.parametrizations.weight_norm(nn.Linear(9, 9)), nn.Tanh(), nn.Linear(9, 4),
    )  # fmt: skip


def train(
    model: nn.Module,
    steps: int,
    after: Callable[[Tensor], Any] = lambda _: None,
    lr: float = 0.1,
    first: int = 0,
) -> None:
    """Momentum SGD on batches drawn from the global generator, with noise from NumPy and Python as well."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    model.train()
    for _ in range(first, steps):
        batch = torch.randint(len(X), (16,))
        x = X[batch] + 0.01 * float(np.random.rand()) + 0.01 * random.random()  # noqa: NPY002
        optimizer.zero_grad()
        loss = LOSS(model(x), Y[batch])
        loss.backward()
        optimizer.step()
        after(loss)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    return make()
