"""The inequalities: each side against its formula, true wherever they are said to hold, refused where they do not."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import flatkern as fk
from tests.core.networks import input_jacobian, networks, parameter_jacobian

ACTIVATIONS = (nn.Tanh, nn.ReLU, nn.SiLU, nn.LeakyReLU)


def test_each_side_is_its_formula():
    model, x = networks()["mlp tanh"]
    b, n, outputs = fk.bounds(model, x), len(x), 3
    j, sigma = input_jacobian(model, x), torch.linalg.svdvals(input_jacobian(model, x))
    gradients = {p: v.square().sum((1, 2)) for p, v in parameter_jacobian(model, x).items()}
    s, g1, norm = sum(gradients.values()), gradients["0.weight"], x.norm(dim=1)
    w = {k: float(torch.linalg.matrix_norm(model[k].weight.detach(), 2)) for k in (0, 2, 4)}
    inverse = (1 / norm**2).mean().sqrt()
    want = {
        "A": sigma[:, 0].mean(),
        "B": w[0] * (g1.sqrt() / norm).mean(),
        "C": w[0] * inverse * g1.mean().sqrt(),
        "D": w[0] * inverse * s.mean().sqrt(),
    }
    assert {k: math.exp(v) for k, v in b["MLS"].sides.items()} == pytest.approx(
        {k: float(v) for k, v in want.items()}
    )
    assert math.exp(b["Ma-Ying"].sides["bound"]) == pytest.approx(float(w[0] / norm.min() * g1.sqrt().mean()))
    assert math.exp(b["normalized MLS"].sides["bound"]) == pytest.approx(float(w[0] ** 2 * g1.mean()))
    frobenius = j.square().sum((1, 2)).sqrt()
    lvr = b["LVR"].sides
    assert math.exp(lvr["LVR"]) == pytest.approx(float(sigma.prod(1).mean()))
    assert math.exp(lvr["Frobenius"]) == pytest.approx(
        float(outputs ** (-outputs / 2) * (frobenius**outputs).mean())
    )
    last = (
        outputs ** (-outputs / 2)
        * ((w[0] / norm) ** (2 * outputs)).mean().sqrt()
        * n ** ((outputs - 1) / 2)
        * s.mean() ** (outputs / 2)
    )
    assert math.exp(lvr["bound"]) == pytest.approx(float(last))
    h = [x, model[:2](x).detach(), model[:4](x).detach()]
    ratio = sum(w[k] ** 2 / a.square().sum(1) for k, a in zip((0, 2, 4), h, strict=True))
    nmls = b["NMLS"].sides
    assert math.exp(nmls["per sample"]) == pytest.approx(float((ratio.sqrt() * s.sqrt()).mean()))
    assert math.exp(nmls["bound"]) == pytest.approx(float(ratio.mean().sqrt() * s.mean().sqrt()))
    assert all(i.status == "holds" for i in b.inequalities.values())


@given(
    st.integers(0, 2**31),
    st.sampled_from(ACTIVATIONS),
    st.booleans(),
    st.integers(1, 4),
    st.integers(0, 2),
    st.integers(1, 6),
    st.floats(0.1, 5),
)
def test_they_hold_at_any_parameters(seed, act, bias, outputs, hidden, n, scale):
    torch.manual_seed(seed)
    widths = [5, *[7] * hidden, outputs]
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(widths):
        layers += [nn.Linear(d_in, d_out, bias=bias), act()]
    model = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    b = fk.bounds(model, torch.randn(n, 5).double())
    for inequality in [*b.inequalities.values(), *b.per_layer.values()]:
        assert inequality.status == "holds" or (
            inequality.status == "not applicable"
            and ("zero input" in inequality.reason or (not bias and "has no bias" in inequality.reason))
        ), inequality
        if inequality.applicable:
            assert inequality.looseness >= -1e-8


def _status(name):
    model, x = networks()[name]
    return {k: (i.status, i.reason) for k, i in fk.bounds(model, x).inequalities.items()}


@pytest.mark.parametrize(
    ("name", "inequality", "reason"),
    [
        ("vgg", "MLS", "weight sharing: '0' is a convolution"),
        ("vgg", "NMLS", "weight sharing: '0' is a convolution"),
        ("token-wise", "MLS", "applied at 6 positions"),
        ("skip", "MLS", "other ways"),
        ("skip", "NMLS", "other ways"),
        ("one module twice", "MLS", "used elsewhere"),
        ("frozen weight", "NMLS", "frozen"),
        ("writes into input", "MLS", "does not enter, unchanged"),
        ("functional", "MLS", "does not enter, unchanged"),
    ],
)
def test_not_applicable_is_said_with_its_reason(name, inequality, reason):
    status, why = _status(name)[inequality]
    assert status == "not applicable"
    assert reason in why


def test_a_later_convolution_does_no_harm_to_the_first_layer():
    model = nn.Sequential(
        nn.Linear(8, 8), nn.Unflatten(1, (2, 4)), nn.Conv1d(2, 3, 2), nn.Flatten(), nn.Tanh()
    )
    b = fk.bounds(model.double(), torch.randn(5, 8).double())
    assert b["MLS"].status == "holds"
    assert b["NMLS"].status == "not applicable"


def test_cancelling_copies_are_never_called_a_bound():
    """f = k x₁ − k x₂ at x₁ = x₂ has ∂f/∂k = 0 and ∂f/∂x ≠ 0: a formal bound would be violated."""
    conv = nn.Conv1d(1, 1, 1, bias=False)
    difference = nn.Linear(2, 1, bias=False)
    difference.weight.data = torch.tensor([[1.0, -1.0]])
    difference.requires_grad_(False)
    model = nn.Sequential(conv, nn.Flatten(), difference).double()
    b = fk.bounds(model, torch.ones(3, 1, 2).double())
    assert b.sharpness.value == 0
    assert not b["MLS"].applicable
    assert b["MLS"].sides["A"] > -math.inf


def test_samples_of_norm_zero():
    model, x = networks()["mlp tanh"]
    x[2] = 0
    b = fk.bounds(model, x)
    assert b["MLS"].status == "not applicable"
    assert "1 samples have a zero input" in b["MLS"].reason
    assert math.isnan(b["MLS"].looseness)


def test_a_geometry_is_reused_and_checked():
    model, x = networks()["mlp tanh"]
    g = fk.geometry(model, x)
    assert fk.bounds(model, x, geometry=g).inequalities == fk.bounds(model, x).inequalities
    with pytest.raises(ValueError, match="geometry: it was taken on 7 samples"):
        fk.bounds(model, x[:3], geometry=g)


@pytest.mark.parametrize("change", ["loaded", "data", "replaced", "parametrized", "cast"])
def test_a_geometry_of_other_weights_is_refused(change):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    if change == "parametrized":
        torch.nn.utils.parametrizations.weight_norm(model[0])
    x = torch.randn(5, 6)
    g = fk.geometry(model, x)
    fk.bounds(model, x, geometry=g)
    if change == "loaded":
        model.load_state_dict({k: v / 100 for k, v in model.state_dict().items()}, assign=True)
    elif change == "data":
        model[0].weight.data.mul_(3)
    elif change == "replaced":
        model[0].weight = torch.nn.Parameter(2 * model[0].weight.detach())
    elif change == "parametrized":
        model[0].parametrizations.weight.original0.data.div_(1000)
    else:
        model.double()
    with pytest.raises(ValueError, match="geometry: it was taken at other weights"):
        fk.bounds(model, x, geometry=g)


def test_a_violation_would_be_reported():
    """The status is computed, not assumed: a geometry with a sharpness made too small must be called violated."""
    from dataclasses import replace

    model, x = networks()["mlp tanh"]
    g = fk.geometry(model, x)
    b = fk.bounds(model, x, geometry=replace(g, sharpness=replace(g.sharpness, value=1e-6)))
    assert b["MLS"].status == "violated"
    assert "log C exceeds log D" in b["MLS"].reason
