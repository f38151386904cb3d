"""The Gauss-Newton diagonal and matrix, and Fisher ones, against explicit matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import flatkern as fk
from flatkern.losses import TokenCrossEntropyLoss
from tests.core.networks import NAMES, RULE_NAMES, TinyGPT, networks, rule_networks
from tests.core.test_ggn_spectrum import LOSSES, explicit_ggn, target


@pytest.mark.parametrize("name", NAMES + RULE_NAMES)
def test_diagonal_of_all_architectures(name):
    model, x = {**networks(), **rule_networks()}[name]
    y = torch.rand_like(model(x.clone()).detach())
    matrix = explicit_ggn(model, nn.MSELoss(), x, y)
    for memory in (None, 20_000):
        got = fk.ggn_diagonal(model, nn.MSELoss(), (x, y), max_memory=memory)
        torch.testing.assert_close(got.values, matrix.diagonal(), rtol=1e-9, atol=1e-12)
    assert got.loss == pytest.approx(float(nn.MSELoss()(model(x.clone()), y).detach()))


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("name", ["mlp tanh", "vgg", "attention"])
def test_diagonal_and_matrix_of_all_losses_on_ragged_loaders(name, loss):
    model, x = networks()[name]
    loss_fn = LOSSES[loss]
    y = target(loss_fn, model, x)
    reduction = None if isinstance(loss_fn, nn.Module) else "sum"
    matrix = explicit_ggn(model, loss_fn, x, y)
    loader = [(x[:3], y[:3]), (x[3:], y[3:])]
    diagonal = fk.ggn_diagonal(model, loss_fn, loader, reduction=reduction)
    torch.testing.assert_close(diagonal.values, matrix.diagonal(), rtol=1e-9, atol=1e-12)
    whole = fk.ggn_matrix(model, loss_fn, loader, reduction=reduction)
    torch.testing.assert_close(whole.values, matrix, rtol=1e-9, atol=1e-12)
    assert whole.loss == diagonal.loss == pytest.approx(float(loss_fn(model(x.clone()), y).detach()))


def test_token_loss_of_a_tied_table():
    torch.manual_seed(0)
    model, loss_fn = TinyGPT().double(), TokenCrossEntropyLoss()
    x, y = torch.randint(11, (3, 4)), torch.randint(11, (3, 4))
    matrix = explicit_ggn(model, loss_fn, x, y)
    torch.testing.assert_close(fk.ggn_diagonal(model, loss_fn, (x, y)).values, matrix.diagonal())
    torch.testing.assert_close(fk.ggn_matrix(model, loss_fn, (x, y)).values, matrix)


@pytest.mark.parametrize("kind", ["mc", "empirical"])
def test_fisher_matrices(kind):
    model, x = networks()["mlp tanh"]
    y = torch.randint(3, (len(x),))
    loss_fn = nn.CrossEntropyLoss()
    if kind == "empirical":
        want = fk.fisher(model, loss_fn, (x, y), kind=kind).to_dense()
        got = fk.ggn_matrix(model, loss_fn, (x, y), fisher=kind).values
        torch.testing.assert_close(got, want)
        torch.testing.assert_close(
            fk.ggn_diagonal(model, loss_fn, (x, y), fisher=kind).values, want.diagonal()
        )
        return
    want = fk.ggn(model, loss_fn, (x, y)).to_dense()
    draws = [fk.ggn_matrix(model, loss_fn, (x, y), fisher=kind, samples=20, seed=s).values for s in range(40)]
    found = torch.stack(draws)
    error = found.std(0) / len(draws) ** 0.5
    assert float((((found.mean(0) - want) / error.clamp(min=1e-12)).square().mean()).sqrt()) < 1.5
    again = fk.ggn_diagonal(model, loss_fn, (x, y), fisher=kind, samples=20, seed=3).values
    torch.testing.assert_close(again, draws[3].diagonal())


def test_bad_arguments():
    model, data = nn.Linear(3, 2), (torch.randn(4, 3), torch.arange(4) % 2)
    for settings, match in (
        ({"fisher": "exact"}, "fisher"),
        ({"samples": 3}, "samples"),
        ({"fisher": "mc", "samples": 0}, "samples"),
        ({"seed": -1}, "seed"),
    ):
        with pytest.raises(ValueError, match=match):
            fk.ggn_diagonal(model, nn.CrossEntropyLoss(), data, **settings)
    with pytest.raises(ValueError, match="max_size"):
        fk.ggn_matrix(model, nn.CrossEntropyLoss(), data, max_size=3)
    with pytest.raises(ValueError, match="predictive"):
        fk.ggn_diagonal(model, nn.HuberLoss(), (data[0], torch.randn(4, 2)), fisher="mc")
