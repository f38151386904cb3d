"""A monitor in a plain training loop, stopped half-way and continued from a checkpoint.

Run: .venv/bin/python examples/monitor_training.py [FOLDER]
writes run.csv (a line a measurement) and six-panels.png; the same file can be fed to any plotting tool.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn

import flatkern as fk


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Dropout(0.1), nn.Linear(64, 10))
    return model, torch.optim.SGD(model.parameters(), lr=0.1)


def main(folder: Path, steps: int = 2000) -> None:
    digits = load_digits()
    x, y = torch.as_tensor(digits.data, dtype=torch.float32) / 16, torch.as_tensor(digits.target)
    loss_fn = nn.CrossEntropyLoss()

    def train(
        model: nn.Module, optimizer: torch.optim.Optimizer, monitor: fk.Monitor, first: int, last: int
    ) -> None:
        for _ in range(first, last):
            batch = torch.randint(len(x), (32,))
            optimizer.zero_grad()
            loss = loss_fn(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
            monitor.step(loss)

    # "log": at equal ratios of the step; every=200 is each 200th, share=0.05 caps the time spent measuring
    options = {"every": "log", "per_decade": 8, "samples": 50, "path": folder / "run.csv"}
    model, optimizer = make()
    monitor = fk.Monitor(model, x, y, loss_fn, **options).start()
    train(model, optimizer, monitor, 0, steps // 2)
    torch.save({"model": model.state_dict(), "monitor": monitor.state_dict()}, folder / "checkpoint.pt")
    monitor.stop()

    # another process, later
    model, optimizer = make()
    checkpoint = torch.load(folder / "checkpoint.pt", weights_only=True)
    model.load_state_dict(checkpoint["model"])
    monitor = fk.Monitor(model, x, y, loss_fn, resume=True, **options)
    monitor.load_state_dict(checkpoint["monitor"])
    with monitor:
        train(model, optimizer, monitor, steps // 2, steps)

    print(f"{'step':>6} {'train loss':>10} {'√S_GN':>8} {'log-volume':>11} {'MLS':>8}")
    for row in monitor.history[::4]:
        print(
            f"{row['step']:>6} {row.get('train_loss', float('nan')):>10.4f} {row['sqrt_sharpness']:>8.2f} "
            f"{row['log_volume']:>11.2f} {row['mls']:>8.3f}"
        )
    monitor.save(folder / "six-panels.png")
    print(f"{len(monitor.history)} measurements took {monitor.overhead:.0%} of the training time")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
