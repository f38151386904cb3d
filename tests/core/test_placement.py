"""Where the samples lie: flattened with positions, on other axes, in windows; found out, never guessed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import flatkern as fk
from tests.core.networks import parameter_jacobian


class _Calls(nn.Module):
    def __init__(self, function, length):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 5), nn.Linear(5, 2), nn.Linear(4, 4)
        self.p, self.function = nn.Parameter(torch.randn(length)), function

    def forward(self, x):
        return self.function(self, x)


def windows(m, x):
    n, length, d = x.shape
    w = torch.tanh(m.a(x.view(n, length // 2, 2, d).reshape(-1, 2, d)))
    w = w.view(n, length // 2, 2, -1).transpose(1, 2).reshape(-1, w.shape[-1])
    return m.b(w).view(n, -1)[:, :3]


def in_place(m, x):
    h = m.b(m.a(x).relu_())
    h += 1
    return h.tanh_()[:, 0]


def one_token_of_flattened_rows(m, x):
    h = torch.relu(m.a(x))
    return m.b(h.reshape(-1, h.shape[-1])).reshape(len(x), -1, 2)[:, 0]


def positions_first(m, x):
    h = torch.relu(m.a(x.transpose(0, 1).reshape(-1, x.shape[-1])))
    return m.b(h).view(x.shape[1], len(x), -1)[0]


def weights_on_the_left(m, x):
    h = torch.tanh(m.a.weight @ x.flatten(0, 1).t() + m.a.bias[:, None])
    return (m.b.weight @ h).view(2, len(x), -1).permute(1, 0, 2).flatten(1)


def einsum(m, x):
    h = torch.tanh(torch.einsum("ntd,ed->nte", x, m.a.weight) + m.a.bias)
    return torch.einsum("ntd,ed->nte", h, m.b.weight).sum(1)


def checkpointed(m, x):
    return m.b(checkpoint(lambda v: torch.tanh(m.a(v)), x, use_reentrant=False)).sum(1)


def in_a_loop(m, x):
    for _ in range(3):
        x = torch.tanh(F.linear(x, m.c.weight, m.c.bias))
    return m.b(torch.tanh(m.a(x))).sum(1)


def overlapping_slices(m, x):
    w = m.c.weight
    return torch.cat([x @ w[:2].T, torch.tanh(x) @ w[1:].T, x @ w], -1).flatten(1)


def indexed(m, x):
    return m.b(torch.tanh(m.a(x))) * m.p[torch.arange(x.shape[1])].unsqueeze(-1)


@pytest.mark.parametrize("n", [1, 2, 3, 7])
@pytest.mark.parametrize("length", [2, 4])
@pytest.mark.parametrize(
    "function",
    [
        windows, in_place, one_token_of_flattened_rows, positions_first, weights_on_the_left, einsum, checkpointed,
        in_a_loop, overlapping_slices, indexed,
    ],
)  # fmt: skip
def test_samples_wherever_they_lie(function, length, n):
    model, x = _Calls(function, length).double(), torch.randn(n, length, 4).double()
    exact = sum(j.square().sum((1, 2)) for j in parameter_jacobian(model, x).values())
    for max_memory in (None, 25_000):
        s = fk.sharpness(model, x, method="exact", max_memory=max_memory)
        torch.testing.assert_close(s.per_sample, exact, rtol=1e-9, atol=1e-12)


def test_other_operations_for_another_batch_size_take_the_fallback():
    def function(m, x):  # the same function of a sample, by other operations
        return (m.a(x) if len(x) <= 3 else F.linear(x, m.a.weight) + m.a.bias).sum(1)

    model, x = _Calls(function, 2).double(), torch.randn(7, 2, 4).double()
    exact = sum(j.square().sum((1, 2)) for j in parameter_jacobian(model, x).values())
    s = fk.sharpness(model, x)
    torch.testing.assert_close(s.per_sample, exact)
    assert "per-sample gradients formed" in s.notes[0]
