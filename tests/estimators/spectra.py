"""Symmetric matrices with known spectra."""

import torch


def symmetric(values, seed=0):
    values = torch.as_tensor(values, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64)).Q
    return (q * values) @ q.T


I80 = torch.arange(1, 81, dtype=torch.float64)
FLAT = symmetric(torch.linspace(-1, 3, 80))
SKEWED = symmetric(torch.cat([torch.tensor([40.0, 25.0, 15.0]), torch.linspace(0, 1, 77)]))
POWER = symmetric(1 / I80)
EXPONENTIAL = symmetric(torch.exp(-I80 / 5))
CASES = {"flat": FLAT, "skewed": SKEWED, "power": POWER, "exponential": EXPONENTIAL}
