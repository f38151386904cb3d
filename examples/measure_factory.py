"""A factory for ``flatkern measure``: your model, its loss and data.

Run: .venv/bin/flatkern measure examples/measure_factory.py:make
Write checkpoints of a short training first, and measure the series:
     .venv/bin/python examples/measure_factory.py checkpoints
     .venv/bin/flatkern measure examples/measure_factory.py:make --checkpoint checkpoints/*.pt
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def make() -> tuple[nn.Module, nn.Module, DataLoader]:
    """What ``flatkern measure`` calls: (model, loss_fn, data)."""
    torch.manual_seed(0)
    digits = load_digits()
    x, y = torch.as_tensor(digits.data, dtype=torch.float32) / 16, torch.as_tensor(digits.target)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 8, 8)),
        nn.Conv2d(1, 8, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(72, 10),
    )
    return model, nn.CrossEntropyLoss(), DataLoader(TensorDataset(x[:500], y[:500]), 250)


def main(folder: Path, epochs: int = 4) -> None:
    model, loss_fn, loader = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    folder.mkdir(exist_ok=True)
    for epoch in range(epochs):
        torch.save(model.state_dict(), folder / f"epoch-{epoch}.pt")
        for x, y in loader:
            optimizer.zero_grad()
            loss_fn(model(x), y).backward()
            optimizer.step()
    print(f"written: {epochs} checkpoints in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "checkpoints"))
