"""Sharpness and Gauss-Newton trace against explicit float64 Jacobians and output Hessians."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import flatkern as fk
from flatkern.layers.shared_weight import cheaper_form, weight_squared_norms
from tests.core.networks import NAMES, RULE_NAMES, networks, parameter_jacobian, rule_networks


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_memory", [None, 20_000])
def test_sharpness_is_the_mean_squared_jacobian_norm(name, max_memory):
    model, x = networks()[name]
    exact = {p: j.square().sum((1, 2)) for p, j in parameter_jacobian(model, x).items()}
    s = fk.sharpness(model, x, per_layer=True, max_memory=max_memory)
    torch.testing.assert_close(s.per_sample, sum(exact.values()), rtol=1e-9, atol=1e-12)
    assert s.value == pytest.approx(float(sum(exact.values()).mean()), rel=1e-10)
    layers: dict[str, float] = {}
    for parameter, values in exact.items():
        layer = parameter.rpartition(".")[0]
        layers[layer] = layers.get(layer, 0.0) + float(values.mean())
    assert s.per_layer == pytest.approx(layers, rel=1e-9, abs=1e-12)
    assert s.stderr == 0
    assert s.sample_stderr == pytest.approx(float(s.per_sample.std() / len(x) ** 0.5))


def test_sharpness_of_a_subset_of_parameters():
    model, x = networks()["mlp tanh"]
    exact = parameter_jacobian(model, x)
    got = fk.sharpness(model, x, params=["0.*", "4.bias"])
    want = sum(exact[p].square().sum((1, 2)) for p in ("0.weight", "0.bias", "4.bias"))
    torch.testing.assert_close(got.per_sample, want)


@pytest.mark.parametrize("name", RULE_NAMES)
@pytest.mark.parametrize("max_memory", [None, 30_000])
def test_every_rule_against_the_explicit_jacobian(name, max_memory):
    model, x = rule_networks()[name]
    exact = {p: j.square().sum((1, 2)) for p, j in parameter_jacobian(model, x).items()}
    s = fk.sharpness(model, x, method="exact", per_parameter=True, max_memory=max_memory)
    torch.testing.assert_close(s.per_sample, sum(exact.values()), rtol=1e-9, atol=1e-12)
    means = {p: float(values.mean()) for p, values in exact.items()}
    assert s.per_parameter == pytest.approx(means, rel=1e-9, abs=1e-12)  # every parameter is there
    one = fk.sharpness(model, x[:1], method="exact")  # a single sample needs no axis of samples
    torch.testing.assert_close(one.per_sample, s.per_sample[:1], rtol=1e-9, atol=1e-12)


FORMED = {"weight norm", "lora merged", "direct", "bilinear"}
"""Networks that need gradients formed: weights computed from others, and the one operation without a rule."""


def test_only_these_networks_form_gradients():
    zoo = {**networks(), **rule_networks()}
    assert {name for name, (model, x) in zoo.items() if fk.sharpness(model, x).notes} == FORMED


def test_what_no_rule_covers_is_counted_and_said():
    model, x = rule_networks()["bilinear"]
    assert fk.sharpness(model, x).notes == ("per-sample gradients formed (vmap) for 1.layer.weight",)
    model, x = networks()["weight norm"]
    assert "of weights computed from others" in fk.sharpness(model, x).notes[0]


def _losses():
    weight = torch.tensor([0.5, 1.0, 2.5], dtype=torch.float64)
    return {
        "ce": (nn.CrossEntropyLoss(), "index"),
        "ce weights smoothing ignore": (
            nn.CrossEntropyLoss(weight=weight, label_smoothing=0.2, ignore_index=1),
            "index",
        ),
        "ce sum": (nn.CrossEntropyLoss(reduction="sum"), "index"),
        "ce probabilities": (nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1), "probabilities"),
        "mse": (nn.MSELoss(), "real"),
        "mse sum": (nn.MSELoss(reduction="sum"), "real"),
        "bce": (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0]).double()), "unit"),
    }


def _target(kind: str, n: int, outputs: int) -> torch.Tensor:
    if kind == "index":
        return torch.arange(n) % outputs
    values = torch.rand(n, outputs, dtype=torch.float64)
    return values / values.sum(1, keepdim=True) if kind == "probabilities" else values


@pytest.mark.parametrize("loss", list(_losses()))
@pytest.mark.parametrize("name", ["mlp tanh", "vgg", "attention", "tokens", "frozen weight"])
def test_ggn_trace_against_the_explicit_matrix(name, loss):
    model, x = networks()[name]
    loss_fn, kind = _losses()[loss]
    output = model(x).detach()
    y = _target(kind, len(x), output.shape[1])
    hessian = torch.autograd.functional.hessian(
        lambda f: loss_fn(f, y), output
    )  # [n, N, n, N], of the real loss
    exact = 0.0
    for j in parameter_jacobian(model, x).values():
        exact += float(torch.einsum("iap,iaib,ibp->", j, hessian, j))
    got = fk.ggn_trace(model, loss_fn, (x, y))
    assert got.value == pytest.approx(exact, rel=1e-9)
    assert float(got.per_sample.mean()) == pytest.approx(exact, rel=1e-9)
    ragged = [(x[:3], y[:3]), (x[3:], y[3:])]
    assert fk.ggn_trace(model, loss_fn, ragged, max_memory=30_000).value == pytest.approx(exact, rel=1e-9)


def test_ggn_trace_of_dense_prediction_cross_entropy():
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1)).double()
    x, y = torch.randn(3, 1, 2, 2).double(), torch.randint(3, (3, 2, 2))
    y[0, 0, 0] = -100
    output = model(x).detach()
    hessian = torch.autograd.functional.hessian(lambda f: nn.functional.cross_entropy(f, y), output)
    hessian = hessian.reshape(3, 12, 3, 12)
    exact = sum(
        float(torch.einsum("iap,iaib,ibp->", j, hessian, j)) for j in parameter_jacobian(model, x).values()
    )
    assert fk.ggn_trace(model, nn.CrossEntropyLoss(), (x, y)).value == pytest.approx(exact, rel=1e-9)


def test_mse_trace_at_interpolation_is_two_over_n_times_sharpness():
    model, x = networks()["mlp tanh"]
    y = model(x).detach()
    assert fk.ggn_trace(model, nn.MSELoss(), (x, y)).value == pytest.approx(
        2 / 3 * fk.sharpness(model, x).value
    )


@pytest.mark.parametrize(("t", "d_in", "d_out"), [(1, 5, 3), (2, 5, 3), (40, 2, 3), (9, 1, 1)])
def test_both_forms_of_shared_weights_agree_in_any_chunking(t, d_in, d_out):
    a, g = torch.randn(4, t, d_in).double(), torch.randn(3, 4, t, d_out).double()
    exact = torch.einsum("knto,nti->knoi", g, a).square().sum((0, 2, 3))
    for form in ("explicit", "gram"):
        for memory in (1, 1000, 1 << 20):
            torch.testing.assert_close(weight_squared_norms(a, g, memory, form), exact)


def test_the_form_with_fewer_multiplications_is_taken():
    assert cheaper_form(4, 512, 512, 10) == "gram"
    assert cheaper_form(1024, 27, 16, 10) == "explicit"


def test_scaling_laws():
    model, x = networks()["mlp tanh"]
    s = fk.sharpness(model, x).value
    assert fk.sharpness(model, torch.cat([x, x])).value == pytest.approx(s)
    assert fk.sharpness(model, x.flip(0)).value == pytest.approx(s)
    scaled = nn.Sequential(model, _Scale(3.0))
    assert fk.sharpness(scaled, x).value == pytest.approx(9 * s)


class _Scale(nn.Module):
    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.factor * x


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision(dtype):
    model, x = networks()["vgg"]
    exact = fk.sharpness(model, x).value
    tolerance = 1e-5 if dtype == torch.float32 else 0.1
    assert fk.sharpness(model.to(dtype), x.to(dtype)).value == pytest.approx(exact, rel=tolerance)


def test_works_under_no_grad_and_inference_mode():
    model, x = networks()["mlp tanh"]
    s = fk.sharpness(model, x).value
    with torch.no_grad():
        assert fk.sharpness(model, x).value == s
    with torch.inference_mode():
        assert fk.sharpness(model, x * 1.0).value == pytest.approx(s)
        assert fk.log_volume(model, x * 1.0).values.shape == (7,)


class _Reorders(nn.Module):
    """A layer that works on samples in another order, or with the samples on axis 1."""

    def __init__(self, there, back):
        super().__init__()
        self.a, self.b, self.there, self.back = nn.Linear(4, 4), nn.Linear(4, 2), there, back

    def forward(self, x):
        return self.b(self.back(torch.tanh(self.a(self.there(x)))).flatten(1)[:, :4])


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize(
    ("shape", "there", "back"),
    [
        ((4,), lambda x: x.flip(0), lambda z: z.flip(0)),
        ((3, 4), lambda x: x.transpose(0, 1), lambda z: z.transpose(0, 1)),
        ((2, 4), lambda x: x.transpose(0, 1), lambda z: z.transpose(0, 1)),
        ((3, 4), lambda x: x.reshape(-1, 4), lambda z: z.reshape(-1, 3, 4)),
        ((4,), lambda x: x.unsqueeze(0), lambda z: z.squeeze(0)),
    ],
)
def test_layers_with_their_samples_elsewhere_take_the_fallback(n, shape, there, back):
    """Also where a shape cannot tell: a sequence as long as the batch, samples in another order."""
    model, x = _Reorders(there, back).double(), torch.randn(n, *shape).double()
    exact = sum(j.square().sum((1, 2)) for j in parameter_jacobian(model, x).values())
    torch.testing.assert_close(fk.sharpness(model, x).per_sample, exact)


def test_inputs_that_are_single_numbers():
    class Curve(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(1, 3)

        def forward(self, x):
            return self.a(x.unsqueeze(1)).sin()

    model, x = Curve().double(), torch.randn(4).double()
    g = fk.geometry(model, x)
    slope = model.a.weight.detach()[:, 0] * torch.cos(model.a(x.unsqueeze(1)).detach())
    torch.testing.assert_close(g.max_sensitivity.values, slope.norm(dim=1))
