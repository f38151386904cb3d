"""Watch flatness and volume while a small network trains on scikit-learn's digits.

Run: .venv/bin/python examples/watch_training.py
"""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits

import flatkern as fk


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    x = torch.as_tensor(digits.data, dtype=torch.float32) / 16
    y = torch.nn.functional.one_hot(torch.as_tensor(digits.target), 10).float()
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Tanh(), torch.nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    probe = x[:50]
    print(f"{'step':>6} {'loss':>10} {'√S_GN':>8} {'log-volume':>11} {'MLS':>8} {'D ≥ MLS':>8}")
    for step in range(2001):
        if step in (0, 10, 100, 500, 1000, 2000):
            g = fk.geometry(model, probe)
            upper = fk.bounds(model, probe, geometry=g)["MLS"].sides["D"]
            loss = (model(x) - y).square().sum(1).mean().item() / 2
            print(
                f"{step:>6} {loss:>10.5f} {g.sharpness.value**0.5:>8.2f} {g.log_volume.mean:>11.2f} "
                f"{g.mls.value:>8.3f} {torch.tensor(upper).exp().item():>8.2f}"
            )
        batch = torch.randint(len(x), (20,))
        loss = (model(x[batch]) - y[batch]).square().sum(1).mean() / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


if __name__ == "__main__":
    main()
