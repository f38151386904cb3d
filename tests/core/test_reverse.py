"""The package's own reverse pass through convolutional networks, against autograd and explicit Jacobians."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import flatkern as fk
from flatkern import squared_norms
from flatkern.kernels._select import compiled_available, using
from flatkern.reverse import has_reverse_pass, reverse_pass, reverse_pays


class Residual(nn.Module):
    """Batch norm, a skip, grouped convolution, average pooling and a mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.second = nn.Conv2d(4, 4, 3, padding=1, groups=2, bias=False)
        self.last, self.head = nn.Conv2d(4, 6, 1), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.first(x)).relu()
        x = nn.functional.avg_pool2d(x + self.second(x), 2)
        return self.head(torch.tanh(self.last(x)).mean((2, 3)))


def residual() -> nn.Module:
    model = Residual()
    model.norm.running_mean.uniform_(-1, 1)
    model.norm.running_var.uniform_(0.5, 2)
    return model.eval()


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


NETWORKS = {
    "pools": lambda: chain(
        nn.Conv2d(3, 4, 3, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 6, 3, padding=2), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(54, 8), nn.ReLU(), nn.Linear(8, 10),
    ),
    "pools, smooth": lambda: chain(
        nn.Conv2d(3, 4, 5, stride=1), nn.GELU(), nn.MaxPool2d((2, 3)), nn.Conv2d(4, 3, (2, 1)), nn.SiLU(),
        nn.Flatten(), nn.Linear(3, 10, bias=False),
    ),
    "pool before activation": lambda: chain(
        nn.Conv2d(3, 4, 3), nn.MaxPool2d(3, stride=3, ceil_mode=True), nn.LeakyReLU(), nn.Flatten(),
        nn.Linear(16, 10),
    ),
    "pool behind batch norm": lambda: chain(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(16, 10)
    ).eval(),
    "pooled twice": lambda: chain(
        nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 10)
    ),
    "overlapping pool": lambda: chain(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(3, stride=1), nn.Flatten(), nn.Linear(64, 3)
    ),
    "grouped, pooled": lambda: chain(
        nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.MaxPool2d(3), nn.Flatten(), nn.Linear(24, 9)
    ),
    "transposed": lambda: chain(
        nn.Conv2d(3, 4, 2, stride=2), nn.ELU(), nn.ConvTranspose2d(4, 2, 3, stride=2, output_padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(8, 5),
    ),
    "one axis": lambda: chain(
        nn.Flatten(1, 2), nn.Conv1d(24, 4, 3, dilation=2), nn.Softplus(), nn.Flatten(), nn.Linear(16, 4)
    ),
    "residual": residual,
}  # fmt: skip


def explicit(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values of ∂f_i/∂x_i [n, N], and mean ‖∂f_i/∂θ‖², both in float64."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def output(theta: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, theta, sample[None])[0]

    at_input = torch.stack([torch.func.jacrev(output, 1)(parameters, s).flatten(1) for s in x])
    squares = [sum(g.square().sum() for g in torch.func.jacrev(output, 0)(parameters, s).values()) for s in x]
    return torch.linalg.svdvals(at_input), torch.stack(squares).mean()


@pytest.mark.parametrize(
    "which",
    [
        "reference",
        pytest.param("compiled", marks=pytest.mark.skipif(not compiled_available(), reason="no kernels")),
    ],
)
@pytest.mark.parametrize("name", list(NETWORKS))
def test_geometry_against_explicit_jacobians(name, which, monkeypatch):
    monkeypatch.setattr(squared_norms, "reverse_pays", lambda *_: True)
    torch.manual_seed(0)
    model = NETWORKS[name]().double()
    x = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    values, sharpness = explicit(model, x)
    with using(which):
        g = fk.geometry(model, x)
    assert has_reverse_pass(model(x.clone().requires_grad_()))
    kept = values[:, : g.singular_values.shape[1]]
    assert torch.allclose(g.singular_values, kept, rtol=1e-9, atol=1e-9 * float(values.max()))
    assert g.sharpness.value == pytest.approx(float(sharpness), rel=1e-11)


@pytest.mark.parametrize("block", [1, 3, 10])
@pytest.mark.parametrize("name", list(NETWORKS))
def test_all_that_is_measured_is_what_autograd_gives(name, block, monkeypatch):
    """Rows at every layer, norms by parameter and position, image norms, however many cotangents go together."""
    torch.manual_seed(1)
    model = NETWORKS[name]().double()
    x = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    used = []

    def in_blocks(output, edges):
        found = reverse_pass(output, edges)
        used.append(found is not None)
        return lambda roots, _: found(roots, block)

    monkeypatch.setattr(squared_norms, "reverse_pass", in_blocks)
    monkeypatch.setattr(squared_norms, "reverse_pays", lambda *_: True)
    own = fk.geometry(model, x)
    monkeypatch.setattr(squared_norms, "reverse_pass", lambda *_: None)
    plain = fk.geometry(model, x)
    assert used == [True]
    assert own.sharpness.value == pytest.approx(plain.sharpness.value, rel=1e-12)
    assert own.iimls.value == pytest.approx(plain.iimls.value, rel=1e-12)
    assert own.nmls.value == pytest.approx(plain.nmls.value, rel=1e-10)
    assert own.layers.keys() == plain.layers.keys()
    for key, layer in own.layers.items():
        other = plain.layers[key]
        assert torch.allclose(layer.max_sensitivity.values, other.max_sensitivity.values, rtol=1e-10)
        for name_of in ("frobenius_sq", "weight_gradient_sq", "bias_gradient_sq", "output_gradient_sq",
                        "position_gradient_sq"):  # fmt: skip
            one, two = getattr(layer, name_of), getattr(other, name_of)
            assert (one is None) == (two is None)
            assert one is None or torch.allclose(one, two, rtol=1e-11)


@pytest.mark.skipif(not compiled_available(), reason="no compiled kernels")
def test_it_pays_where_cotangents_stay_scattered():
    x = torch.randn(2, 3, 8, 8)
    pays = {name: reverse_pays(make()(x.clone().requires_grad_()), 10) for name, make in NETWORKS.items()}
    assert {name for name, good in pays.items() if good} == {
        "pools", "pools, smooth", "pool before activation", "pool behind batch norm", "pooled twice",
    }  # fmt: skip
    out = NETWORKS["pools"]()(x.clone().requires_grad_())
    assert not reverse_pays(out, 1)  # fifteen of sixteen lanes would be empty
    with using("reference"):
        assert not reverse_pays(out, 10)


def test_only_some_parameters_and_single_precision():
    torch.manual_seed(2)
    model = NETWORKS["pools"]()
    x = torch.randn(5, 3, 8, 8)
    bias = fk.sharpness(model, x, params="0.bias")
    wide = fk.sharpness(model.double(), x.double(), params="0.bias")
    assert bias.value == pytest.approx(wide.value, rel=1e-5)


def test_other_operations_are_left_to_autograd():
    convolution = nn.Conv2d(3, 4, 3)
    for tail in (nn.Softmax(1), nn.GroupNorm(2, 4), nn.Upsample(scale_factor=2), nn.PReLU()):
        model = nn.Sequential(convolution, tail, nn.Flatten())
        out = model(torch.randn(2, 3, 8, 8).requires_grad_())
        assert not has_reverse_pass(out)
    mixing = nn.Sequential(convolution, nn.Flatten(0, 1))  # samples and channels on one axis
    assert not has_reverse_pass(mixing(torch.randn(2, 3, 8, 8).requires_grad_()))
    assert not has_reverse_pass(nn.Linear(3, 2)(torch.randn(4, 3)))  # nothing is convolved


def test_what_comes_in_scaled_or_broadcast_is_left_to_autograd():
    x = torch.randn(2, 3, 4, 4).requires_grad_()
    y = nn.Conv2d(3, 3, 1)(x)
    assert not has_reverse_pass(torch.add(y, x, alpha=2.0))
    assert not has_reverse_pass(y + x.mean((2, 3), keepdim=True))
    assert has_reverse_pass(y + x)
