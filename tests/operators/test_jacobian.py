"""Jacobians in parameters and input against torch.func and autograd."""

import pytest
import torch
from explicit import ZOO, assert_close, flat, function_of, make, names_of, twice_differentiable_in_torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatkern.operators import StaleOperatorError, jacobian


def parameter_jacobian(model, x, names=None):
    names = names or names_of(model)
    theta = flat([dict(model.named_parameters())[n] for n in names])
    call = function_of(model, names, x)
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.jacobian(lambda t: call(t).reshape(-1), theta)


@pytest.mark.parametrize("name", ZOO)
def test_parameters(name):
    model, x = make(name, 5)
    J = jacobian(model, x)
    expected = parameter_jacobian(twice_differentiable_in_torch(name, model), x)
    assert_close(J.to_dense(), expected)
    assert_close(J.T.to_dense(), expected.T)
    assert_close(J.per_sample(), expected.view(5, 3, -1))


@pytest.mark.parametrize("name", [n for n, (_, inputs) in ZOO.items() if inputs.__name__ == "vectors"])
def test_input(name):
    model, x = make(name, 5)
    J = jacobian(model, x, wrt="input")
    expected = torch.autograd.functional.jacobian(lambda t: model(t).reshape(-1), x).view(15, 20)
    assert J.shape == (15, 20)
    assert J.layout is None
    assert_close(J.to_dense(), expected)
    assert_close(J.T.to_dense(), expected.T)
    blocks = expected.view(5, 3, 5, 4)
    assert_close(J.per_sample(), torch.stack([blocks[i, :, i] for i in range(5)]))


def test_subsets_spatial_outputs_and_products():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(inplace=True), nn.Conv2d(2, 2, 1)).double()
    x = torch.randn(3, 1, 4, 4, dtype=torch.float64)
    J = jacobian(model, x, params="2.*")
    assert J.layout.names == ("2.weight", "2.bias")
    assert J.output_shape == (2, 2, 2)
    expected = parameter_jacobian(model, x, ["2.weight", "2.bias"])
    assert_close(J.to_dense(), expected)
    assert_close((J.T @ J).to_dense(), expected.T @ expected)
    assert_close(J.per_sample(), expected.view(3, 8, -1))
    assert jacobian(model, x, wrt="input").per_sample().shape == (3, 8, 16)


def test_a_model_that_writes_to_its_input_in_place():
    model, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 2)).double(), torch.randn(3, 4).double()
    kept = x.clone()
    J = jacobian(model, x.clone(), wrt="input")
    expected = model[1].weight.detach() * (kept[:, None] > 0)
    assert_close(J.per_sample(), expected)
    jacobian(model, x)
    assert torch.equal(x, kept)


def test_staleness_state_and_errors():
    model, x = make("batch norm eval", 4)
    rng = torch.get_rng_state()
    J = jacobian(model, x)
    v = torch.ones(J.shape[1], dtype=torch.float64)
    with torch.no_grad():
        before = J @ v
    assert not before.requires_grad
    assert torch.equal(rng, torch.get_rng_state())
    assert all(p.grad is None for p in model.parameters())
    assert not x.requires_grad
    model[0].weight.data.mul_(2)
    with pytest.raises(StaleOperatorError):
        J @ v
    assert_close(J.refresh() @ v, parameter_jacobian(model, x) @ v)
    for call, error, text in (
        (lambda: jacobian(model, x, wrt="weights"), ValueError, "wrt"),
        (lambda: jacobian(model, x, wrt="input", params="0.*"), ValueError, "params"),
        (lambda: jacobian(model, x[:0]), ValueError, "x"),
        (lambda: jacobian(model, torch.ones(3, dtype=torch.long), wrt="input"), TypeError, "x"),
        (lambda: jacobian("net", x), TypeError, "model"),
        (lambda: jacobian(model.train(), x), ValueError, "eval"),
        (lambda: J.refresh().per_sample(), ValueError, "eval"),
        (lambda: jacobian(model.eval(), x).per_sample(max_memory=10), ValueError, "max_memory"),
    ):
        with pytest.raises(error, match=text):
            call()


@pytest.mark.parametrize("wrt", ["params", "input"])
def test_low_precision(wrt):
    model, x = make("mlp tanh", 6)
    expected = jacobian(model, x, wrt=wrt).to_dense()
    J = jacobian(model.bfloat16(), x.bfloat16(), wrt=wrt)
    assert J.dtype == torch.float32
    assert (J.to_dense().double() - expected).norm() < 3e-2 * expected.norm()
