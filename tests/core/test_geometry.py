"""Volume, sensitivity and dimensionality against explicit float64 Jacobians, and against the direct loop."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import flatkern as fk
from benchmarks import direct_loop
from tests.core.networks import NAMES, Skip, input_jacobian, networks, parameter_jacobian

REAL = tuple(name for name in NAMES if name != "tokens")


def layer_input_sigma(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """σ_max(∂f/∂x^l) a sample, for every call of a linear or convolutional layer."""
    kinds = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
    rows = []
    for i in range(len(x)):
        inputs: list[torch.Tensor] = []
        hooks = [
            m.register_forward_pre_hook(lambda _m, args, seen=inputs: seen.append(args[0]))
            for m in model.modules()
            if isinstance(m, kinds)
        ]
        point = x[i : i + 1].clone().requires_grad_()
        output = model(point.clone()).flatten()
        for hook in hooks:
            hook.remove()
        sample = []
        for a in inputs:
            j = [torch.autograd.grad(e, a, retain_graph=True, allow_unused=True)[0] for e in output]
            sample.append(
                0.0 if j[0] is None else float(torch.linalg.svdvals(torch.stack([r.flatten() for r in j]))[0])
            )
        rows.append(sample)
    return list(torch.tensor(rows, dtype=torch.float64).T)


@pytest.mark.parametrize("max_memory", [None, 30_000])
@pytest.mark.parametrize("name", REAL)
def test_every_quantity_of_the_input_jacobian(name, max_memory):
    model, x = networks()[name]
    j = input_jacobian(model, x)
    sigma = torch.linalg.svdvals(j)
    g = fk.geometry(model, x, max_memory=max_memory)
    n, outputs, inputs = j.shape
    assert (g.outputs, g.inputs) == (outputs, inputs)
    assert g.singular_values.shape == (n, min(outputs, inputs))
    scale = sigma[:, :1]
    torch.testing.assert_close(g.singular_values / scale, sigma / scale, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(g.max_sensitivity.values, sigma[:, 0])
    assert g.mls.value == pytest.approx(float(sigma[:, 0].mean()))
    energy = sigma.square()
    torch.testing.assert_close(g.local_dimensionality.values, energy.sum(1).square() / energy.square().sum(1))
    norm_sq = x.flatten(1).square().sum(1)
    assert g.normalized_mls.value == pytest.approx(float((norm_sq * sigma[:, 0].square()).mean()))
    volume = sigma.log().sum(1)
    regular = (sigma[:, -1] > 1e-12 * sigma[:, 0]) & torch.tensor(outputs <= inputs)
    torch.testing.assert_close(g.log_volume.values[regular], volume[regular], rtol=1e-6, atol=1e-6)
    assert (g.log_volume.values[~regular] == -math.inf).all()
    assert g.log_volume.rank_deficient == int((~regular).sum())
    torch.testing.assert_close(g.top_log_volume(1).values, sigma[:, 0].log())
    torch.testing.assert_close(
        g.sharpness.per_sample, sum(p.square().sum((1, 2)) for p in parameter_jacobian(model, x).values())
    )


@pytest.mark.parametrize(
    "name", ["mlp tanh", "vgg", "conv1d groups dilation", "skip", "token-wise", "one module twice"]
)
def test_sensitivity_to_every_layers_input(name):
    model, x = networks()[name]
    exact = layer_input_sigma(model, x)
    for max_memory in (None, 30_000):
        g = fk.geometry(model, x, max_memory=max_memory)
        assert len(g.layers) == len(exact)
        for layer, sigma in zip(g.layers.values(), exact, strict=True):
            torch.testing.assert_close(layer.max_sensitivity.values, sigma)
        assert g.nmls.value == pytest.approx(float(sum(s.mean() for s in exact)))


def test_layers_can_be_chosen_and_are_counted_by_call():
    model, x = networks()["one module twice"]
    assert list(fk.geometry(model, x).layers) == ["0", "0#2", "3"]
    g = fk.geometry(model, x, layers="3")
    assert list(g.layers) == ["3"]
    assert g.nmls.value == pytest.approx(g.layers["3"].mls)
    assert g.sharpness.value == pytest.approx(fk.sharpness(model, x).value)
    with pytest.raises(ValueError, match="layers: 'nope' matches no"):
        fk.geometry(model, x, layers=["nope"])


def test_single_quantities_agree_with_the_one_pass():
    for name in ("mlp tanh", "vgg", "softmax output", "image output"):
        model, x = networks()[name]
        g = fk.geometry(model, x)
        torch.testing.assert_close(fk.max_sensitivity(model, x).values, g.max_sensitivity.values)
        torch.testing.assert_close(fk.local_dimensionality(model, x).values, g.local_dimensionality.values)
        if g.outputs <= g.inputs:
            torch.testing.assert_close(fk.log_volume(model, x).values, g.log_volume.values)
            torch.testing.assert_close(fk.log_volume(model, x, max_memory=20_000).values, g.log_volume.values)
        torch.testing.assert_close(fk.log_volume(model, x, rank=2).values, g.top_log_volume(2).values)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_softmax_outputs_are_rank_deficient_not_nan(dtype):
    model, x = networks()["softmax output"]
    model, x = model.to(dtype), x.to(dtype)
    v = fk.log_volume(model, x)
    assert v.rank_deficient == len(x)
    assert (v.values == -math.inf).all()
    assert v.mean == -math.inf
    assert fk.geometry(model, x).log_volume.rank_deficient == len(x)
    assert torch.isfinite(fk.log_volume(model, x, rank=3).values).all()


def test_dead_units_and_constant_outputs():
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    with torch.no_grad():
        model[0].weight.zero_()
    g = fk.geometry(model, torch.randn(5, 3).double())
    assert g.log_volume.rank_deficient == 5
    assert g.local_dimensionality.rank_deficient == 5
    assert g.mls.value == 0
    assert not any(math.isnan(v) for v in (g.local_dimensionality.mean, g.nmls.value, g.sharpness.value))


def test_more_outputs_than_inputs():
    model, x = nn.Linear(2, 5).double(), torch.randn(3, 2).double()
    with pytest.raises(ValueError, match="N = 5 outputs exceed M = 2 inputs"):
        fk.log_volume(model, x)
    g = fk.geometry(model, x)
    assert g.log_volume.rank_deficient == 3
    assert any("exceed" in note for note in g.notes)
    sigma = torch.linalg.svdvals(model.weight.detach())
    torch.testing.assert_close(g.singular_values[0], sigma)
    torch.testing.assert_close(fk.log_volume(model, x, rank=2).values, sigma.log().sum().expand(3))


def test_digits_of_a_nearly_singular_jacobian_survive():
    """κ = 1e9: the Gram matrix alone would have lost the smallest singular value."""
    u, v = (torch.linalg.qr(torch.randn(k, 3, dtype=torch.float64)).Q for k in (3, 8))
    sigma = torch.tensor([1.0, 1e-4, 1e-9], dtype=torch.float64)
    model = nn.Linear(8, 3, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(u * sigma @ v.T)
    got = fk.log_volume(model, torch.randn(4, 8).double())
    torch.testing.assert_close(got.values, sigma.log().sum().expand(4), rtol=1e-6, atol=0)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 5), st.integers(0, 2**31))
def test_a_linear_map_has_its_own_singular_values(d_in, d_out, n, seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(d_in, d_out).double()
    with torch.no_grad():
        model.weight.copy_(torch.randn(d_out, d_in, generator=generator, dtype=torch.float64))
    x = torch.randn(n, d_in, generator=generator, dtype=torch.float64)
    g = fk.geometry(model, x)
    sigma = torch.linalg.svdvals(model.weight.detach())
    torch.testing.assert_close(g.singular_values, sigma.expand(n, -1), rtol=1e-6, atol=1e-9)
    assert 1 - 1e-9 <= g.local_dimensionality.mean <= min(d_in, d_out) + 1e-9


@pytest.mark.parametrize("n", [3, 12])
def test_equal_to_the_direct_loop_to_five_digits(n):
    model = nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 5))
    x = torch.rand(n, 30)
    loop, g = direct_loop.measure(model, x), fk.geometry(model, x)
    ours = {
        "sharpness": g.sharpness.value,
        "log_volume": g.log_volume.mean,
        "top_log_volume": g.top_log_volume(3).mean,
        "mls": g.mls.value,
        "nmls": g.nmls.value,
        "local_dimensionality": g.local_dimensionality.mean,
    }
    assert ours == pytest.approx({name: float(v) for name, v in loop.items()}, rel=1e-5)


def test_a_frozen_model_still_has_a_geometry():
    model, x = networks()["mlp tanh"]
    want = fk.geometry(model, x)
    model.requires_grad_(False)
    g = fk.geometry(model, x)
    assert g.mls.value == pytest.approx(want.mls.value)
    assert g.sharpness.value == 0
    assert any("frozen" in note for note in g.notes)


def test_structure_seen_by_the_bounds():
    g = fk.geometry(*networks()["flattened image"])
    assert [layer.takes_model_input for layer in g.layers.values()] == [True, False]
    assert all(layer.sole_consumer and layer.positions == 1 for layer in g.layers.values())
    model, x = Skip().double(), torch.randn(4, 4).double()
    layers = fk.geometry(model, x).layers
    assert not layers["a"].sole_consumer
    assert not layers["b"].sole_consumer
    assert layers["head"].sole_consumer
    assert fk.geometry(*networks()["token-wise"]).layers["0.0"].positions == 6
