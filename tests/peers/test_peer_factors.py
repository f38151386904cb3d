"""Diagonals and eigenvalues of Gauss-Newton matrices as other packages have them."""

import pytest
import torch

import flatkern as fk
from tests.operators.explicit import assert_close, make
from tests.peers import products as peers

pytestmark = pytest.mark.peers


@pytest.mark.parametrize("loss", ["ce", "mse"])
@pytest.mark.parametrize("name", ["mlp tanh", "conv"])
def test_diagonal_of_backpack(name, loss):
    model, x = make(name, 12)
    if name == "conv":
        model[2] = torch.nn.ReLU()  # it has no rule for SiLU
    loss_fn = peers.CLASSIFIER_LOSSES[loss]
    y = peers.targets(loss_fn, 12)
    diagonal, _ = peers.backpack_parts(model, loss_fn, x, y)
    assert_close(fk.ggn_diagonal(model, loss_fn, (x, y)).values, diagonal)


@pytest.mark.parametrize("loss", ["ce", "mse", "bce"])
@pytest.mark.parametrize("name", ["mlp tanh", "conv", "layer norm"])
def test_eigenvalues_of_curvlinops(name, loss):
    model, x = make(name, 12)
    loss_fn = peers.CLASSIFIER_LOSSES[loss]
    y = peers.targets(loss_fn, 12)
    ragged = list(zip(x.split(5), y.split(5), strict=True))
    theirs = torch.linalg.eigvalsh(peers.curvlinops(model, loss_fn, ragged, "ggn")).flip(0)
    ours = fk.ggn_spectrum(model, loss_fn, ragged).values
    assert_close(ours, theirs[: len(ours)])
