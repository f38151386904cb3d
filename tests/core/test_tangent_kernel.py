"""fk.ntk against explicit Jacobians, in one piece and in many."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import flatkern as fk
from flatkern.gradient_rows import GradientRows
from flatkern.losses import identity_cotangents
from tests.core.networks import NAMES, RULE_NAMES, TinyGPT, networks, parameter_jacobian, rule_networks


def stacked_jacobian(model, x):
    return torch.cat([j.flatten(0, 1) for j in parameter_jacobian(model, x).values()], 1)


@pytest.mark.parametrize("name", NAMES + RULE_NAMES)
def test_kernel_of_all_architectures(name):
    model, x = {**networks(), **rule_networks()}[name]
    j = stacked_jacobian(model, x)
    outputs = len(j) // len(x)
    torch.testing.assert_close(fk.ntk(model, x), j @ j.mT, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(fk.ntk(model, x, x[1:]), j @ j[outputs:].mT, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "name", ["mlp tanh", "vgg", "bilinear", "attention", "gpt tied", "weight norm", "lstm"]
)
def test_chunks_of_both_sides(name):
    model, x = {**networks(), **rule_networks()}[name]
    whole = fk.ntk(model, x)
    limit = max(8 * whole.numel(), 6000)
    torch.testing.assert_close(fk.ntk(model, x, max_memory=limit), whole, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        fk.ntk(model, x, x[:2], max_memory=limit), whole[:, : 2 * (len(whole) // len(x))]
    )


def test_sequences_of_different_length():
    model = TinyGPT().double()
    x, longer = torch.randint(11, (2, 3)), torch.randint(11, (3, 5))
    left, right = stacked_jacobian(model, x), stacked_jacobian(model, longer)
    torch.testing.assert_close(fk.ntk(model, x, longer), left @ right.mT)


def test_selected_parameters_and_float32():
    model, x = networks()["mlp tanh"]
    j = parameter_jacobian(model, x)
    want = sum(j[name].flatten(0, 1) @ j[name].flatten(0, 1).mT for name in ("0.bias", "2.weight"))
    torch.testing.assert_close(fk.ntk(model, x, params=["0.bias", "2.weight"]), want)
    single = fk.ntk(model.float(), x.float(), params=["0.bias", "2.weight"])
    assert single.dtype == torch.float64
    torch.testing.assert_close(single, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(single, single.mT, rtol=1e-13, atol=1e-13)


def test_the_bias_is_one_inside():
    layer, x = nn.Linear(3, 2).double(), torch.randn(4, 3).double()
    want = torch.kron(x @ x.mT + 1, torch.eye(2).double())
    torch.testing.assert_close(fk.ntk(layer, x), want)


def test_a_kernel_beyond_memory_is_refused():
    with pytest.raises(ValueError, match="max_memory"):
        fk.ntk(nn.Linear(3, 2), torch.randn(50, 3), max_memory=1000)
    with pytest.raises(ValueError, match="x2"):
        fk.ntk(nn.Linear(3, 2), torch.randn(5, 3), torch.full((2, 3), float("nan")))


def test_chunks_hold_what_they_may():
    model, x = networks()["vgg"]
    x = x.repeat(8, 1, 1, 1)
    rows = GradientRows(
        model, [(x, None)], dict(model.named_parameters()), lambda f, _t, _i: identity_cotangents(f)
    )
    (whole,) = rows.chunks(1 << 30)
    for limit in (whole.bytes, whole.bytes // 3, whole.bytes // 5):
        found = list(rows.chunks(limit))
        assert max(chunk.bytes for chunk in found) <= limit
        assert [c.start for c in found[1:]] == [c.rows.stop for c in found[:-1]]
    assert len(found) < 32
