"""The inequalities beyond the first layer's: biases, powers, volumes of the network, and position by position."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import flatkern as fk
from tests.core.networks import input_jacobian, networks, parameter_jacobian
from tests.core.test_geometry_ways import jacobian_between
from tests.core.test_operator_norm import matrix_of


def logs(value) -> float:
    return pytest.approx(math.log(float(value)), rel=1e-8, abs=1e-8)


def test_sides_with_biases_powers_and_volumes():
    model, x = networks()["mlp tanh"]
    b, n, outputs = fk.bounds(model, x, powers=(1, 2, 3.5)), len(x), 3
    j = input_jacobian(model, x)
    sigma = torch.linalg.svdvals(j)
    gradients = {p: v.square().sum((1, 2)) for p, v in parameter_jacobian(model, x).items()}
    s, g1 = sum(gradients.values()), gradients["0.weight"]
    whole, more = g1 + gradients["0.bias"], x.square().sum(1) + 1
    w = {k: float(torch.linalg.matrix_norm(model[k].weight.detach(), 2)) for k in (0, 2, 4)}
    sides = b["MLS with bias"].sides
    assert sides["B"] == logs(w[0] * (whole / more).sqrt().mean())
    assert sides["B"] == pytest.approx(b["MLS"].sides["B"])
    assert sides["C"] == logs(w[0] * (1 / more).mean().sqrt() * whole.mean().sqrt())
    assert sides["D"] == logs(w[0] * (1 / more).mean().sqrt() * s.mean().sqrt())
    assert sides["D"] < b["MLS"].sides["D"]
    for k, name in ((2, "Ma-Ying k=2"), (3.5, "Ma-Ying k=3.5")):
        assert b[name].sides["MLS"] == logs((sigma[:, 0] ** k).mean())
        assert b[name].sides["bound"] == logs((w[0] / x.norm(dim=1).min()) ** k * (g1 ** (k / 2)).mean())
    pointwise = b["pointwise dV"]
    torch.testing.assert_close(pointwise.per_sample["dV"], sigma.log().sum(1))
    bound = (sigma.square().sum(1) / outputs).log() * outputs / 2
    torch.testing.assert_close(pointwise.per_sample["Frobenius"], bound)
    assert pointwise.sides["dV"] == pytest.approx(float(sigma.log().sum(1).mean()))
    layers = [jacobian_between(model, x, model[k], None) for k in (0, 2, 4)]
    h = [x, model[:2](x).detach(), model[:4](x).detach()]
    nvr = b["NVR"].sides
    scale = outputs ** (-outputs / 2)
    assert nvr["NVR"] == logs(sum(torch.linalg.svdvals(a).prod(1).mean() for a in layers))
    assert nvr["Frobenius"] == logs(scale * sum(a.square().sum((1, 2)).pow(1.5).mean() for a in layers))
    powers = sum((w[k] / a.norm(dim=1)) ** (2 * outputs) for k, a in zip((0, 2, 4), h, strict=True))
    assert nvr["per sample"] == logs(scale * (powers.sqrt() * s**1.5).mean())
    assert nvr["bound"] == logs(scale * powers.mean().sqrt() * n * s.mean() ** 1.5)
    ratio = sum(w[k] ** 2 / (a.square().sum(1) + 1) for k, a in zip((0, 2, 4), h, strict=True))
    assert b["NMLS with bias"].sides["bound"] == logs(ratio.mean().sqrt() * s.mean().sqrt())
    for k, a, i in zip((0, 2, 4), h, layers, strict=True):
        side = b.per_layer[str(k)].sides
        invariant = a.square().sum(1) * torch.linalg.svdvals(i)[:, 0] ** 2
        assert side["normalized sensitivity"] == logs(invariant.mean())
        assert side["bound"] == logs(w[k] ** 2 * gradients[f"{k}.weight"].mean())
    assert all(i.status == "holds" for i in [*b.inequalities.values(), *b.per_layer.values()])


def position_vectors(module: nn.Module, inputs: Tensor) -> Tensor:
    """‖x_t‖² for every output position of an ungrouped layer, from its matrix: [n, T]."""
    if isinstance(module, nn.Linear):
        return inputs.square().sum(-1).flatten(1)
    ones = nn.Conv2d(
        module.in_channels, 1, module.kernel_size, module.stride, module.padding, bias=False
    ).double()
    nn.init.ones_(ones.weight)
    return ones(inputs.square()).flatten(1).detach()


@pytest.mark.parametrize("name", ["vgg", "token-wise"])
def test_sides_per_position(name):
    model, x = networks()[name]
    b = fk.bounds(model, x)
    if name == "vgg":
        model[1].inplace = False  # for the oracle: its hooks would see what became of z
    first = model[0] if name == "vgg" else model[0][0]
    outputs = model(x[:1].clone())[0].numel()
    w = float(torch.linalg.svdvals(matrix_of(first, x.shape[1:]))[0])
    g = jacobian_between(model, x, model[1] if name == "vgg" else model[0][1], None)  # at z, [n, N, ...]
    z = first(x).detach()
    shape = (len(x), outputs, *z.shape[1:])
    channel = 2 if name == "vgg" else -1
    energy = g.reshape(shape).square().sum(1 if channel == -1 else (1, 2))
    energy = energy.sum(-1).flatten(1) if channel == -1 else energy.flatten(1)  # [n, T]
    norms = position_vectors(first, x)
    total, weighted, least = energy.sum(1), (energy * norms).sum(1), norms.min(1).values
    sides = b["MLS per position"].sides
    assert sides["A"] == b["MLS"].sides["A"]
    assert sides["output gradients"] == pytest.approx(math.log(float(w * total.sqrt().mean())), abs=1e-6)
    want = w * ((weighted + total) / (least + 1)).sqrt().mean()
    assert sides["positions with bias"] == pytest.approx(math.log(float(want)), abs=1e-6)
    assert sides["positions"] == pytest.approx(
        math.log(float(w * (weighted / least).sqrt().mean())), abs=1e-6
    )
    want = w * (1 / least).mean().sqrt() * weighted.mean().sqrt()
    assert sides["bound"] == pytest.approx(math.log(float(want)), abs=1e-6)
    assert b["MLS"].replacement == "MLS per position"
    assert b.valid("MLS").name == "MLS per position"
    for kind in ("MLS", "normalized MLS", "LVR", "NMLS", "NVR"):
        assert b[f"{kind} per position"].status == "holds", b[f"{kind} per position"]
        assert b[f"{kind} per position"].looseness > 0


@pytest.mark.parametrize("seed", range(12))
def test_per_position_inequalities_hold_for_random_convolutional_nets(seed):
    torch.manual_seed(seed)
    act = (nn.Tanh, nn.ReLU, nn.SiLU)[seed % 3]
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=seed % 3, stride=1 + seed % 2, groups=1 + seed % 2), act(),
        nn.Conv2d(4, 3, 2, bias=bool(seed % 2)), act(), nn.Flatten(), nn.LazyLinear(3),
    )  # fmt: skip
    x = torch.randn(4, 2, 6, 6)
    model(x)
    model, x = model.double(), x.double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(float(torch.rand(())) * 3 + 0.3)
    b = fk.bounds(model, x)
    assert not any(i.status == "violated" for i in [*b.inequalities.values(), *b.per_layer.values()])
    for kind in ("MLS", "normalized MLS", "LVR", "NMLS", "NVR"):
        assert b[f"{kind} per position"].status == "holds"
        assert not b[kind].applicable


class PreNorm(nn.Module):
    """Attention with its own queries, keys and values, behind a norm and inside a skip."""

    def __init__(self, width: int = 6):
        super().__init__()
        self.patch = nn.Conv1d(2, width, 2, stride=2)
        self.norm = nn.LayerNorm(width)
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))
        self.out, self.head = nn.Linear(width, width), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).mT
        a = self.norm(h)
        weights = (self.q(a) @ self.k(a).mT).softmax(-1)
        return self.head((h + self.out(weights @ self.v(a))).mean(1))


@pytest.mark.parametrize("seed", range(6))
def test_queries_keys_and_values_count_as_one_layer(seed):
    torch.manual_seed(seed)
    model, x = PreNorm().double(), torch.randn(4, 2, 10, dtype=torch.float64)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1 + 2 * torch.rand(()))
    g = fk.geometry(model, x)
    assert set(g.layers["q"].partners) == {"k", "v"}
    assert not g.layers["out"].partners
    b = fk.bounds(model, x, geometry=g)
    assert not b["NMLS"].applicable
    assert b["NMLS"].replacement == "NMLS per position"
    assert b.valid("NMLS").status == "holds"
    assert b.valid("MLS").status == "holds"
    stacked = math.sqrt(
        sum(float(torch.linalg.matrix_norm(m.weight.detach(), 2)) ** 2 for m in (model.q, model.k, model.v))
    )
    energy = sum(g.layers[name].output_gradient_sq for name in "qkv")
    for name in "qkv":
        assert (g.layers[name].max_sensitivity.values <= stacked * energy.sqrt() * (1 + 1e-9)).all()


def test_a_skip_around_layers_on_one_input_is_seen():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) * self.b(x) + x

    g = fk.geometry(Around().double(), torch.randn(3, 4).double())
    assert not g.layers["a"].partners
    assert not g.layers["a"].sole_consumer


def test_cancelling_copies_have_a_valid_replacement():
    """f = k x₁ − k x₂ at x₁ = x₂: the shared gradient is 0, those per position are not."""
    conv = nn.Conv1d(1, 1, 1, bias=False)
    difference = nn.Linear(2, 1, bias=False)
    difference.weight.data = torch.tensor([[1.0, -1.0]])
    difference.requires_grad_(False)
    b = fk.bounds(nn.Sequential(conv, nn.Flatten(), difference).double(), torch.ones(3, 1, 2).double())
    assert b.sharpness.value == 0
    assert b.valid("MLS").name == "MLS per position"
    assert b.valid("MLS").sides["bound"] > b["MLS"].sides["A"] - 1e-9


def test_positions_where_the_input_is_zero():
    conv = nn.Conv2d(1, 2, 3, padding=2)
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(2 * 36, 2)).double()
    x = torch.zeros(2, 1, 4, 4).double()
    x[:, :, 1:3, 1:3] = torch.randn(2, 1, 2, 2).double()  # a blank border
    b = fk.bounds(model, x)["MLS per position"]
    assert b.status == "holds"
    assert "positions" not in b.sides
    assert "a position where x is zero" in b.reason
    assert all(math.isfinite(v) for v in b.sides.values())


def test_zero_samples_keep_the_form_with_bias():
    model, x = networks()["mlp tanh"]
    x[2] = 0
    b = fk.bounds(model, x)
    assert not b["MLS"].applicable
    assert b["MLS"].replacement == "MLS with bias"
    assert b.valid("MLS").status == "holds"


def test_what_has_no_replacement_says_so():
    model, x = networks()["skip"]
    b = fk.bounds(model, x)
    assert not any("per position" in name for name in b.inequalities)
    with pytest.raises(ValueError, match="nothing replaces it"):
        b.valid("NMLS")


def test_a_geometry_by_iteration_has_no_gradients_at_the_layers():
    model, x = networks()["vgg"]
    g = fk.geometry(model, x, layers="*", method="matrix-free")
    b = fk.bounds(model, x, geometry=g)
    assert "method='cotangents'" in b["NMLS per position"].reason
    assert not b["MLS"].applicable


def test_bounds_of_a_part_of_the_network():
    model, x = networks()["mlp tanh"]
    g = fk.geometry(model, x, source="2")
    b = fk.bounds(model, x, geometry=g)
    assert b["MLS"].status == "holds"
    assert math.exp(b["MLS"].sides["A"]) == pytest.approx(g.mls.value)


def test_deficient_ranks_make_trivial_volumes():
    model, x = networks()["softmax output"]
    b = fk.bounds(model, x)
    assert b["LVR"].sides["LVR"] == -math.inf
    assert b["LVR"].status == b["pointwise dV"].status == b["NVR"].status == "holds"


def test_a_violation_per_position_and_pointwise_would_be_reported():
    model, x = networks()["vgg"]
    g = fk.geometry(model, x)
    layer = g.layers["0"]
    small = replace(layer, output_gradient_sq=layer.output_gradient_sq * 1e-9)
    b = fk.bounds(model, x, geometry=replace(g, layers={**g.layers, "0": small}))
    assert b["MLS per position"].status == "violated"
    b = fk.bounds(
        model, x, geometry=replace(g, frobenius=replace(g.frobenius, values=g.frobenius.values / 9))
    )
    assert b["pointwise dV"].status == "violated"


def test_bad_powers_are_refused():
    model, x = networks()["mlp tanh"]
    with pytest.raises(ValueError, match="powers"):
        fk.bounds(model, x, powers=(0,))
