"""Hessian, GGN and empirical Fisher as other packages have them, where these are right: a second opinion."""

import pytest
import torch

import flatkern as fk
from tests.operators.explicit import assert_close, make
from tests.peers import products as peers

pytestmark = pytest.mark.peers
MODELS = ["mlp tanh", "conv", "layer norm", "batch norm eval"]


@pytest.fixture(params=MODELS)
def model_and_inputs(request):
    return make(request.param, 12)


@pytest.fixture(params=list(peers.CLASSIFIER_LOSSES))
def loss(request):
    return peers.CLASSIFIER_LOSSES[request.param]


@pytest.fixture
def problem(model_and_inputs, loss):
    """Model, loss, inputs, targets, and the same in three equal batches (one peer weighs batches alike)."""
    model, x = model_and_inputs
    y = peers.targets(loss, 12)
    return model, loss, x, y, list(zip(x.split(4), y.split(4), strict=True))


def test_hessian_of_pyhessian_on_one_batch(problem):
    model, loss, x, y, _ = problem
    assert_close(fk.hessian(model, loss, (x, y)).to_dense(), peers.pyhessian_kept(model, loss, x, y))


def test_hessian_of_pyhessian_on_a_loader(problem):
    # sample-weighted, so that a ragged loader is right for plain means
    model, loss, x, y, _ = problem
    ragged = list(zip(x.split(5), y.split(5), strict=True))
    assert_close(fk.hessian(model, loss, ragged).to_dense(), peers.pyhessian_loader(model, loss, ragged))


def test_hessian_of_hessian_eigenthings(problem):
    model, loss, _, _, batches = problem
    assert_close(fk.hessian(model, loss, batches).to_dense(), peers.eigenthings(model, loss, batches))


@pytest.mark.parametrize("name", ["mlp tanh", "batch norm eval", "relu conv"])
def test_hessian_of_curvlinops(name, loss):
    """Other layers: see test_peer_errors.py."""
    model, x = make("conv" if name == "relu conv" else name, 12)
    if name == "relu conv":
        model[2] = torch.nn.ReLU()
    y = peers.targets(loss, 12)
    ragged = list(zip(x.split(5), y.split(5), strict=True))
    assert_close(fk.hessian(model, loss, ragged).to_dense(), peers.curvlinops(model, loss, ragged))


def test_ggn_of_hessian_eigenthings(problem):
    model, loss, _, _, batches = problem
    assert_close(fk.ggn(model, loss, batches).to_dense(), peers.eigenthings(model, loss, batches, "ggn"))


def test_ggn_of_curvlinops(problem):
    model, loss, _, _, batches = problem
    assert_close(fk.ggn(model, loss, batches).to_dense(), peers.curvlinops(model, loss, batches, "ggn"))


@pytest.mark.parametrize("name", ["ce", "mse"])
def test_empirical_fisher_of_curvlinops(model_and_inputs, name):
    model, x = model_and_inputs
    loss = peers.CLASSIFIER_LOSSES[name]
    batches = list(zip(x.split(5), peers.targets(loss, 12).split(5), strict=True))
    ours = fk.fisher(model, loss, batches, kind="empirical").to_dense()
    assert_close(ours, peers.curvlinops(model, loss, batches, "empirical"))


def test_empirical_fisher_of_hessian_eigenthings(model_and_inputs):
    model, x = model_and_inputs
    loss = peers.CLASSIFIER_LOSSES["ce"]
    batches = list(zip(x.split(4), peers.targets(loss, 12).split(4), strict=True))
    ours = fk.fisher(model, loss, batches, kind="empirical").to_dense()
    assert_close(ours, peers.eigenthings(model, loss, batches, "empirical"))


@pytest.mark.parametrize("name", ["mlp tanh", "mlp relu in place"])
@pytest.mark.parametrize("loss_name", ["ce", "mse"])
def test_ggn_diagonal_and_sample_gradients_of_backpack(name, loss_name):
    model, x = make(name, 12)
    for module in model.modules():
        if hasattr(module, "inplace"):
            module.inplace = False  # backpack reads a layer's input afterwards
    loss = peers.CLASSIFIER_LOSSES[loss_name]
    y = peers.targets(loss, 12)
    diagonal, shares = peers.backpack_parts(model, loss, x, y)
    assert_close(fk.ggn(model, loss, (x, y)).to_dense().diagonal(), diagonal)
    # a share is the gradient of a sample's numerator over the denominator
    op = fk.fisher(model, loss, (x, y), kind="empirical")
    assert_close(op.to_dense(), op.denominator * shares.T @ shares)


@pytest.mark.parametrize("name", ["attention", "transformer"])
def test_attention_in_its_decomposed_form(name):
    """Under ``sdpa_kernel(MATH)`` the peers manage attention too."""
    model, x = make(name, 12)
    loss = peers.CLASSIFIER_LOSSES["ce"]
    y = torch.arange(12) % 3
    ours = fk.hessian(model, loss, (x, y)).to_dense()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert_close(ours, peers.eigenthings(model, loss, [(x, y)]))
        assert_close(ours, peers.pyhessian_kept(model.eval(), loss, x, y))
