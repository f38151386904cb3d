"""Where other packages are wrong or raise, flatkern is right: each against the explicit matrix.

What a peer did is recorded (``record_property``) and told in the docstring, for PyHessian 0.1, hessian-eigenthings
1.0.0a5 and curvlinops 3.0.1 on torch 2.13. Nothing fails where a peer has been mended.
"""

import copy

import pytest
import torch
from torch import nn

import flatkern as fk
from tests.operators.explicit import assert_close, explicit_ggn, explicit_hessian, make
from tests.peers import products as peers

pytestmark = pytest.mark.peers
CE = nn.CrossEntropyLoss()


def labels(n):
    return torch.arange(n) % 3


def test_ragged_last_batch_hessian_eigenthings_averages_batches_alike(record_property):
    """Batches of 16, 16, 16 and 2: the last two samples weigh as much as sixteen others."""
    model, x = make("mlp tanh", 50)
    y = labels(50)
    batches = list(zip(x.split(16), y.split(16), strict=True))
    truth = explicit_hessian(model, CE, x, y)
    record_property("peer", peers.relative_error(lambda: peers.eigenthings(model, CE, batches), truth))
    assert_close(fk.hessian(model, CE, batches).to_dense(), truth)
    ggn = explicit_ggn(model, CE, x, y)
    record_property(
        "peer ggn", peers.relative_error(lambda: peers.eigenthings(model, CE, batches, "ggn"), ggn)
    )
    assert_close(fk.ggn(model, CE, batches).to_dense(), ggn)


@pytest.mark.parametrize("peer", [peers.pyhessian_loader, peers.eigenthings, peers.curvlinops])
def test_class_weights_over_a_loader_all_peers_divide_by_samples(peer, record_property):
    """A weighted mean is over the sum of the weights of the whole data set, not of each batch."""
    model, x = make("mlp tanh", 12)
    y = labels(12).sort().values  # batches of different weight
    loss = nn.CrossEntropyLoss(weight=torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64))
    batches = list(zip(x.split(4), y.split(4), strict=True))
    truth = explicit_hessian(model, loss, x, y)
    record_property("peer", peers.relative_error(lambda: peer(model, loss, batches), truth))
    assert_close(fk.hessian(model, loss, batches).to_dense(), truth)


@pytest.mark.parametrize("name", ["layer norm", "group norm", "conv"])
def test_layers_that_curvlinops_gets_wrong_or_refuses(name, record_property):
    """Layer norm: 12 % off and silent, as ``jvp`` of ``torch.func.jacrev`` is (of ``torch.func.grad`` it is right);
    group norm and SiLU ("conv") raise."""
    model, x = make(name, 12)
    y = labels(12)
    truth = explicit_hessian(model, CE, x, y)
    record_property("peer", peers.relative_error(lambda: peers.curvlinops(model, CE, [(x, y)]), truth))
    for mode in ("kept", "forward") if name in ("layer norm", "conv") else ("kept",):
        assert_close(fk.hessian(model, CE, (x, y), mode=mode).to_dense(), truth)


def pyhessian_on_one_batch(model, loss, batches):
    return peers.pyhessian_kept(model, loss, *batches[0])


@pytest.mark.parametrize("peer", [pyhessian_on_one_batch, peers.eigenthings, peers.curvlinops])
@pytest.mark.parametrize("name", ["attention", "transformer"])
def test_attention_all_peers_raise(peer, name, record_property):
    """The fused forms of scaled_dot_product_attention have no second derivatives in either mode."""
    model, x = make(name, 12)
    y = labels(12)
    truth = explicit_hessian(model, CE, x, y)
    record_property("peer", peers.relative_error(lambda: peer(model, CE, [(x, y)]), truth))
    assert_close(fk.hessian(model, CE, (x, y)).to_dense(), truth)


@pytest.mark.parametrize("peer", [pyhessian_on_one_batch, peers.eigenthings])
def test_unused_parameters_have_zero_rows_two_peers_raise(peer, record_property):
    model, x = make("unused", 12)
    y = labels(12)
    ours = fk.hessian(model, CE, (x, y)).to_dense()
    used = ["used.weight", "used.bias"]
    truth = torch.zeros_like(ours)
    truth[6:, 6:] = explicit_hessian(model, CE, x, y, used)
    record_property("peer", peers.relative_error(lambda: peer(model, CE, [(x, y)]), truth))
    assert_close(ours, truth)


def test_negative_trace_pyhessian_stops_at_once(record_property):
    """Its rule divides by the signed mean: a negative trace always meets it. Ours asks for an error bar."""
    model, x = make("mlp tanh", 12)
    y = torch.randn(12, 3, dtype=torch.float64)

    def loss(output, target):
        return -(output - target).square().mean()

    truth = float(explicit_hessian(model, loss, x, y).trace())
    peer = peers.pyhessian_operator(model, loss, data=(x, y))
    record_property("peer", f"{len(peer.trace())} probes")
    H = fk.hessian(model, loss, (x, y), reduction="mean")
    estimate = fk.trace(H, rtol=0.05, seed=0)
    assert estimate.converged
    assert truth < 0
    assert abs(estimate.value - truth) <= 5 * estimate.stderr + 1e-10 * abs(truth)


def test_density_pyhessian_raises_or_gives_complex_weights(record_property):
    """``torch.eig`` is gone; where it was, weights of a symmetric matrix came from an unsymmetric solver."""
    model, x = make("mlp tanh", 12)
    y = labels(12)
    matrix = explicit_hessian(model, CE, x, y)
    peer = peers.pyhessian_operator(model, CE, data=(x, y))
    error = peers.relative_error(lambda: torch.tensor(peer.density(iter=10)), matrix)
    record_property("peer", error)
    density = fk.spectral_density(fk.hessian(model, CE, (x, y)), probes=64, steps=20, seed=0)
    assert (density.weights >= 0).all()
    mean = float((density.nodes * density.weights).sum() / density.weights.sum())
    exact = float(torch.linalg.eigvalsh(matrix).mean())
    spread = float(torch.linalg.eigvalsh(matrix).std())
    assert mean == pytest.approx(exact, abs=spread)


def test_eigenvalues_without_ghosts_curvlinops_repeats_them(record_property):
    """Lanczos without re-orthogonalization finds an eigenvalue again and again."""
    model, x = make("mlp tanh", 12)
    y = labels(12)
    values = torch.linalg.eigvalsh(explicit_hessian(model, CE, x, y))
    spectrum = pytest.importorskip("curvlinops.papyan2020traces.spectrum")
    operator = peers.curvlinops_operator(model, CE, [(x, y)])
    found = torch.as_tensor(spectrum.fast_lanczos(operator, 2 * len(values))[0])
    near = (found - values[-1]).abs() < 1e-6 * values[-1]
    record_property("peer", f"the largest eigenvalue {int(near.sum())} times")
    ours = fk.eigsh(fk.hessian(model, CE, (x, y)), k=8, which="LA", tol=1e-9, seed=0).values
    assert_close(ours.sort().values, values[-8:], rtol=1e-7)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_left_as_found_pyhessian_changes_mode_and_gradients(training, record_property):
    """It calls ``eval()`` on the user's model and leaves gradients with their graphs in ``.grad``."""
    model, x = make("mlp tanh", 12)
    model.train(training)
    y = labels(12)
    pyhessian = pytest.importorskip("pyhessian")
    theirs = copy.deepcopy(model)
    pyhessian.hessian(theirs, CE, data=(x, y), cuda=False)
    record_property("peer", f"training {theirs.training}, grad {theirs[0].weight.grad is not None}")
    fk.hessian(model, CE, (x, y)) @ torch.ones(peers.size_of(model), dtype=torch.float64)
    assert model.training is training
    assert all(p.grad is None for p in model.parameters())
