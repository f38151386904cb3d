"""fk.adaptive_sharpness against explicit float64 Hessians, brute-force sampling and exact trust-region maxima."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

import flatkern as fk
from flatkern.losses import TokenCrossEntropyLoss
from flatkern.perturbed_loss import PerturbedLoss
from tests.core.curved_networks import piecewise_affine, smooth
from tests.core.explicit_diagonals import hessian_diagonal
from tests.core.networks import TinyGPT, networks
from tests.core.test_left_as_found import same, snapshot

CE = nn.CrossEntropyLoss()


def theta(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def by_layer(model: nn.Module, loss: object, x: Tensor, y: Tensor) -> dict[str, float]:
    """½ Σ θ² H_kk of every layer."""
    found: dict[str, float] = {}
    named = dict(model.named_parameters())
    for name, d in hessian_diagonal(model, loss, x, y).items():
        layer = name.rpartition(".")[0]
        found[layer] = found.get(layer, 0.0) + 0.5 * float(d @ named[name].detach().flatten().square())
    return found


def scaled_hessian(model: nn.Module, loss: object, data: object) -> Tensor:
    d = theta(model).abs()
    return d[:, None] * fk.hessian(model, loss, data).to_dense() * d


def small(act: type[nn.Module] = nn.Tanh) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(3, 5), act(), nn.Linear(5, 3)).double()
    return model, torch.randn(8, 3).double(), torch.randint(3, (8,))


def trained(act: type[nn.Module]) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(4, 12), act(), nn.Linear(12, 3)).double()
    x, y = torch.randn(24, 4).double(), torch.randint(3, (24,))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(150):
        optimizer.zero_grad()
        CE(model(x), y).backward()
        optimizer.step()
    model.zero_grad()
    return model, x, y


OFTEN = ("relu mlp", "prelu", "siamese", "lora", "embedding", "linear attention", "scalar gate")
SOME = [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in sorted(piecewise_affine())]


@pytest.mark.parametrize("name", SOME)
def test_the_limit_is_exact_in_piecewise_affine_networks(name):
    model, x = piecewise_affine()[name]
    model, x = model.double(), x.double() if x.is_floating_point() else x
    y = torch.arange(len(x)) % 3
    got = fk.adaptive_sharpness(model, CE, (x, y), per_layer=True)
    want = by_layer(model, CE, x, y)
    assert got.stderr == 0
    assert not got.sampled
    assert got.value == pytest.approx(sum(want.values()), rel=1e-6, abs=1e-12)
    assert got.per_layer == pytest.approx(want, rel=1e-6, abs=1e-12)
    assert got.loss == pytest.approx(float(CE(model(x.clone()), y).detach()))


@pytest.mark.parametrize(
    "name", ["tanh mlp", "conv, batch norm, average", "transformer", "rnn", "tied in sequence"]
)
def test_the_limit_within_its_error(name):
    model, x = smooth()[name]
    model, x = model.double(), x.double()
    y = torch.arange(len(x)) % 3
    want = by_layer(model, CE, x, y)
    got = fk.adaptive_sharpness(
        model, CE, [(x[:2], y[:2]), (x[2:], y[2:])], samples=30, seed=1, per_layer=True
    )
    assert abs(got.value - sum(want.values())) < 4 * got.stderr + 1e-10
    for layer, value in want.items():
        assert abs(got.per_layer[layer] - value) < 4.5 * got.per_layer_stderr[layer] + 1e-10, layer
    assert sum(got.per_layer.values()) == pytest.approx(got.value)
    assert {*got.exact, *got.sampled} == {n for n, _ in model.named_parameters()}


def test_the_limits_error_bar_over_seeds():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(4, 10), nn.Tanh(), nn.Linear(10, 8), nn.GELU(), nn.Linear(8, 3)).double()
    x, y = torch.randn(10, 4).double(), torch.randint(3, (10,))
    want = sum(by_layer(model, CE, x, y).values())
    runs = [fk.adaptive_sharpness(model, CE, (x, y), samples=16, seed=seed) for seed in range(30)]
    z = torch.tensor([(r.value - want) / r.stderr for r in runs])
    assert abs(float(z.mean())) < 0.6
    assert 0.75 < float(z.std()) < 1.45


@pytest.mark.parametrize("act", [pytest.param(nn.Identity, marks=pytest.mark.slow), nn.Tanh])
def test_many_outputs_are_drawn(act):
    torch.manual_seed(6)
    model = nn.Sequential(nn.Linear(4, 6), act(), nn.Linear(6, 70)).double()
    x, y = torch.randn(20, 4).double(), torch.randint(70, (20,))
    want = by_layer(model, CE, x, y)
    runs = [fk.adaptive_sharpness(model, CE, (x, y), samples=8, seed=s, per_layer=True) for s in range(16)]
    assert "sign draws" in runs[0].method
    assert not runs[0].exact
    for layer, value in want.items():
        found = torch.tensor([r.per_layer[layer] for r in runs])
        assert abs(float(found.mean()) - value) < 4 * float(found.std()) / 16**0.5
        error = torch.tensor([r.per_layer_stderr[layer] for r in runs]).square().mean().sqrt()
        assert float(error) == pytest.approx(float(found.std()), rel=0.6)
    planned = fk.adaptive_sharpness(model, CE, (x, y), rtol=0.03, seed=0)
    assert planned.converged
    assert abs(planned.value - sum(want.values())) < 4 * planned.stderr


def test_a_quadratic_loss_has_no_noise_with_the_control_variate_at_any_rho():
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 2).double(), torch.randn(9, 4).double(), torch.randn(9, 2).double()
    want = sum(by_layer(model, nn.MSELoss(), x, y).values())
    for rho in (0.01, 3.0):
        got = fk.adaptive_sharpness(model, nn.MSELoss(), (x, y), rho=rho, samples=5, seed=1)
        assert "control variate" in got.method
        assert got.value == pytest.approx(want, rel=1e-8)
        assert got.stderr < 1e-8 * want
        plain = fk.adaptive_sharpness(
            model, nn.MSELoss(), (x, y), rho=rho, samples=200, control_variate=False, seed=1
        )
        assert plain.stderr > 1e-3 * want
        assert abs(plain.value - want) < 4 * plain.stderr


def brute_force(model: nn.Module, x: Tensor, y: Tensor, rho: float, count: int) -> tuple[float, float]:
    """(E L(θ + δ) − L(θ))/ρ² from independent draws, all at once."""
    named = {n: p.detach() for n, p in model.named_parameters()}
    base = CE(functional_call(model, named, (x,)), y)
    noise = {n: 1 + rho * torch.randn(count, *p.shape, dtype=p.dtype) for n, p in named.items()}
    losses = vmap(
        lambda factors: CE(functional_call(model, {n: named[n] * f for n, f in factors.items()}, (x,)), y)
    )
    values = (losses(noise) - base) / rho**2
    return float(values.mean()), float(values.std()) / count**0.5


@pytest.mark.parametrize(
    ("act", "rho", "control"),
    [(nn.Tanh, 0.3, True), (nn.ReLU, 0.5, True), (nn.SiLU, 1.0, False)],
)
def test_a_finite_average_is_that_of_brute_force(act, rho, control):
    model, x, y = trained(act)
    want, error = brute_force(model, x, y, rho, 20_000)
    got = fk.adaptive_sharpness(model, CE, (x, y), rho=rho, samples=150, control_variate=control, seed=4)
    assert abs(got.value - want) < 4.5 * (error**2 + got.stderr**2) ** 0.5
    assert got.loss == pytest.approx(float(CE(model(x), y).detach()))
    assert got.rho == rho
    assert got.dof == 149


@pytest.mark.slow
def test_a_finite_average_is_unbiased_with_an_error_bar_that_covers():
    model, x, y = trained(nn.Tanh)
    rho = 0.2
    want, error = brute_force(model, x, y, rho, 50_000)
    runs = [
        fk.adaptive_sharpness(model, CE, (x, y), rho=rho, samples=32, control_variate=s % 2 == 0, seed=s)
        for s in range(30)
    ]

    z = torch.tensor([(r.value - want) / (r.stderr**2 + error**2) ** 0.5 for r in runs])
    assert abs(float(z.mean())) < 0.75
    assert 0.7 < float(z.std()) < 1.6


def test_small_steps_of_a_smooth_network_give_the_limit_and_the_control_variate_pays():
    model, x, y = trained(nn.Tanh)
    limit = fk.adaptive_sharpness(model, CE, (x, y), samples=1000)  # a product an entry
    assert limit.stderr == 0
    small_step = fk.adaptive_sharpness(model, CE, (x, y), rho=1e-3, samples=100, seed=0)
    assert abs(small_step.value - limit.value) < 4 * small_step.stderr + 1e-3 * limit.value
    plain = fk.adaptive_sharpness(model, CE, (x, y), rho=1e-3, samples=100, control_variate=False, seed=0)
    assert small_step.stderr < 0.6 * plain.stderr


def test_finite_steps_see_kinks_that_the_limit_does_not():
    model = nn.Sequential(nn.Linear(1, 1), nn.ReLU()).double()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[0].bias.fill_(-1.0)
    data = (torch.ones(1, 1).double(), -torch.ones(1, 1).double())  # z = 0: right at the kink
    loss = lambda f, t: (f - t).sum()  # noqa: E731
    limit = fk.adaptive_sharpness(model, loss, data, reduction="sum")
    assert limit.value == 0
    for rho in (0.1, 0.01):  # E relu(ρ√2 v) = ρ√2/√(2π), over ρ²
        got = fk.adaptive_sharpness(model, loss, data, reduction="sum", rho=rho, samples=300, seed=0)
        assert abs(got.value - 1 / (rho * torch.pi**0.5)) < 4.5 * got.stderr


def test_it_is_drawn_to_a_tolerance_with_common_random_numbers():
    model, x, y = trained(nn.Tanh)
    got = fk.adaptive_sharpness(model, CE, (x, y), rho=0.1, rtol=0.05, seed=0)
    assert got.converged
    assert got.stderr <= 0.05 * got.value
    again = fk.adaptive_sharpness(model, CE, [(x[:5], y[:5]), (x[5:], y[5:])], rho=0.1, rtol=0.05, seed=0)
    assert again.value == pytest.approx(got.value, rel=1e-6)
    torch.testing.assert_close(again.samples, got.samples, rtol=1e-5, atol=1e-9)
    few = fk.adaptive_sharpness(model, CE, (x, y), rho=0.1, samples=2, control_variate=False, seed=0)
    many = fk.adaptive_sharpness(model, CE, (x, y), rho=0.1, samples=5, control_variate=False, seed=0)
    torch.testing.assert_close(few.samples, many.samples[:2])
    cut = fk.adaptive_sharpness(model, CE, (x, y), rho=0.1, rtol=1e-9, max_samples=10, seed=0)
    assert not cut.converged
    assert "max_samples" in cut.notes[0]


def test_the_expansion_of_the_worst_case():
    model, x, y = small()
    data = (x, y)
    matrix = scaled_hessian(model, CE, data)
    loss = CE(model(x), y)
    g = theta(model).abs() * torch.cat([t.flatten() for t in torch.autograd.grad(loss, model.parameters())])
    got = fk.adaptive_sharpness(model, CE, data, kind="worst", seed=0)
    top = float(torch.linalg.eigvalsh(matrix)[-1])
    assert got.value == pytest.approx(top / 2, rel=1e-4)
    assert abs(got.value - top / 2) <= got.error_bound + 1e-12
    assert got.slope == pytest.approx(float(g.norm()))
    assert got.slope_curvature == pytest.approx(float(g @ matrix @ g / g.square().sum()))
    for rho in (0.01, 0.3, 2.0):
        low, high = got.at(rho)
        best = trust_region(matrix, g, rho)
        assert low * (1 - 1e-3) <= best <= high * (1 + 1e-3)
    with pytest.raises(ValueError, match="expansion"):
        fk.adaptive_sharpness(model, CE, data, seed=0).at(0.1)


def trust_region(matrix: Tensor, g: Tensor, rho: float) -> float:
    """max ⟨g, τ⟩ + ½ τᵀAτ over ‖τ‖ ≤ ρ, from the secular equation."""
    values, vectors = torch.linalg.eigh(matrix)
    c = vectors.mT @ g
    low, high = max(float(values[-1]), 0.0), float(values[-1].abs() + g.norm() / rho + 1)
    for _ in range(200):
        middle = (low + high) / 2
        size = float((c / (middle - values)).norm())
        low, high = (middle, high) if size > rho else (low, middle)
    tau = c / (high - values)
    return float(c @ tau + 0.5 * (values * tau.square()).sum())


@pytest.mark.parametrize("rho", [0.05, 0.5, 3.0])
def test_ascent_finds_the_maximum_of_a_quadratic_loss(rho):
    torch.manual_seed(0)
    model, x, y = nn.Linear(4, 2).double(), torch.randn(9, 4).double(), torch.randn(9, 2).double()
    loss = nn.MSELoss()
    grads = torch.autograd.grad(loss(model(x), y), list(model.parameters()))
    g = theta(model).abs() * torch.cat([t.flatten() for t in grads])
    best = trust_region(scaled_hessian(model, loss, (x, y)), g, rho)
    got = fk.adaptive_sharpness(model, loss, (x, y), kind="worst", rho=rho, steps=40, seed=0)
    assert got.value <= best * (1 + 1e-9)
    assert got.value >= 0.995 * best
    assert got.slope == pytest.approx(float(g.norm()))
    assert "lower bound" in got.method


def test_ascent_stays_in_the_ball_never_loses_and_leaves_a_stationary_point():
    model, x, y = small()
    for rho in (0.01, 1.0):
        one = fk.adaptive_sharpness(model, CE, (x, y), kind="worst", rho=rho, steps=1, restarts=0, seed=0)
        more = fk.adaptive_sharpness(model, CE, (x, y), kind="worst", rho=rho, steps=15, restarts=2, seed=0)
        assert 0 <= one.value <= more.value + 1e-12
    slope = fk.adaptive_sharpness(model, CE, (x, y), kind="worst", rho=1e-4, seed=0)
    assert slope.value == pytest.approx(1e-4 * slope.slope, rel=1e-3)
    flat = nn.Linear(2, 1, bias=False).double()
    nn.init.ones_(flat.weight)
    data = (torch.eye(2).double(), torch.ones(2, 1).double())  # fitted: the gradient is 0
    got = fk.adaptive_sharpness(flat, nn.MSELoss(reduction="sum"), data, kind="worst", rho=0.5, seed=0)
    assert got.slope == 0
    assert got.value == pytest.approx(0.25)  # δ = 0.5 (cos, sin)


def test_scaling_laws():
    model, x, y = trained(nn.ReLU)
    with torch.no_grad():  # without a bias before the ReLU the two scalings leave the function as it is
        model[0].bias.zero_()
    base = fk.adaptive_sharpness(model, CE, (x, y)).value
    twice = fk.adaptive_sharpness(model, CE, (torch.cat([x, x]), torch.cat([y, y]))).value
    assert twice == pytest.approx(base)
    summed = fk.adaptive_sharpness(model, nn.CrossEntropyLoss(reduction="sum"), (x, y)).value
    assert summed == pytest.approx(len(x) * base)
    worst = fk.adaptive_sharpness(model, CE, (x, y), kind="worst", rho=0.2, seed=0).value
    finite = fk.adaptive_sharpness(model, CE, (x, y), rho=0.2, samples=10, seed=0).value
    with torch.no_grad():
        model[0].weight.mul_(3)
        model[2].weight.div_(3)
    assert fk.adaptive_sharpness(model, CE, (x, y)).value == pytest.approx(base)
    again = fk.adaptive_sharpness(model, CE, (x, y), kind="worst", rho=0.2, seed=0).value
    assert again == pytest.approx(worst, rel=1e-4)
    assert fk.adaptive_sharpness(model, CE, (x, y), rho=0.2, samples=10, seed=0).value == pytest.approx(
        finite
    )


def test_batches_of_any_kind_and_selected_parameters():
    torch.manual_seed(0)
    model, loss = TinyGPT().double(), TokenCrossEntropyLoss()
    x, y = torch.randint(11, (3, 4)), torch.randint(11, (3, 4))
    batches = [{"tokens": x[:2], "labels": y[:2]}, {"tokens": x[2:], "labels": y[2:]}]
    forward = lambda m, b: (m(b["tokens"]), b["labels"])  # noqa: E731
    for settings in ({}, {"rho": 0.05}, {"kind": "worst", "rho": 0.05, "steps": 3}, {"kind": "worst"}):
        if settings.get("kind") != "worst":
            settings = {**settings, "samples": 4}
        chosen = {"params": ["down.weight", "tokens.weight"], "seed": 0, **settings}
        whole = fk.adaptive_sharpness(model, loss, (x, y), **chosen)
        parts = fk.adaptive_sharpness(model, loss, batches, forward=forward, **chosen)
        assert parts.value == pytest.approx(whole.value, rel=1e-4)
        tight = fk.adaptive_sharpness(model, loss, batches, forward=forward, max_memory=60_000, **chosen)
        assert tight.value == pytest.approx(whole.value, rel=1e-4)


class _FailsLater(nn.Module):
    def __init__(self, calls: int):
        super().__init__()
        self.a, self.left = nn.Linear(3, 2), calls

    def forward(self, x: Tensor) -> Tensor:
        if self.left == 0:
            raise RuntimeError("user's own error")
        object.__setattr__(self, "left", self.left - 1)
        return self.a(x)


@pytest.mark.parametrize("settings", [{"rho": 0.1}, {"kind": "worst", "rho": 0.1}, {}, {"kind": "worst"}])
def test_nothing_is_changed(settings):
    for name in ("mlp tanh", "one module twice", "tied across modules", "writes into input"):
        model, x = networks()[name]
        y = torch.zeros_like(model(x.clone())).detach()
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        before = snapshot(model, x)
        extra = {"steps": 2} if settings.get("kind") else {"samples": 3}
        fk.adaptive_sharpness(model, nn.MSELoss(), (x, y), seed=0, **settings, **extra)
        after = snapshot(model, x)
        for key in before:
            assert same(before[key], after[key]), (name, key)


@pytest.mark.parametrize("calls", [3, 4, 6, 9])
def test_nothing_is_changed_on_errors(calls):
    model, x = _FailsLater(calls), torch.randn(4, 3)
    before = snapshot(model, x)
    with pytest.raises(RuntimeError, match="user's own error"):
        fk.adaptive_sharpness(
            model, nn.MSELoss(), (x, torch.zeros(4, 2)), rho=0.1, control_variate=False, samples=50
        )
    after = snapshot(model, x)
    for key in before:
        if key != "attributes":
            assert same(before[key], after[key]), key


def test_perturbed_losses_and_gradients():
    model, x, y = small()
    loss = PerturbedLoss(
        model, CE, [(x[:3], y[:3]), (x[3:], y[3:])],
        params=None, reduction=None, forward=None, max_memory=2000,
    )  # fmt: skip
    delta = 0.1 * torch.randn_like(loss.theta)
    named = loss.layout.unflatten((loss.theta + delta).requires_grad_())
    want = CE(functional_call(model, named, (x,)), y)
    value, gradient = loss.gradient_at(delta)
    assert value == pytest.approx(float(want.detach()))
    assert loss.at(delta) == pytest.approx(value)
    grads = torch.autograd.grad(want, list(named.values()))
    torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in grads]))


class _Augmented(list):
    source = torch.Generator().manual_seed(0)  # torch's own is put back after every pass

    def __iter__(self):
        return iter([(x + torch.rand(1, generator=self.source).double(), y) for x, y in super().__iter__()])


def test_bad_arguments():
    model, x, y = small()
    data = (x, y)
    for settings, match in (
        ({"kind": "mean"}, "kind"),
        ({"rho": 0.0}, "rho"),
        ({"rho": float("nan")}, "rho"),
        ({"samples": 1}, "samples"),
        ({"rtol": 0.0}, "rtol"),
        ({"steps": 0, "kind": "worst", "rho": 1.0}, "steps"),
        ({"restarts": -1, "kind": "worst", "rho": 1.0}, "restarts"),
        ({"per_layer": True, "rho": 0.1}, "per_layer"),
        ({"params": "none"}, "params"),
    ):
        with pytest.raises(ValueError, match=match):
            fk.adaptive_sharpness(model, CE, data, **settings)
    with pytest.raises(ValueError, match="itself uses parameters"):
        fk.adaptive_sharpness(
            model,
            lambda f, t: f.square().sum() + len(f) * model[0].weight.sum(),
            data,
            reduction="sum",
            rho=0.1,
        )
    with pytest.raises(ValueError, match="control_variate: not possible"):
        fk.adaptive_sharpness(
            model, lambda f, t: f.cos().sum(), data, reduction="sum", rho=0.1, control_variate=True
        )
    with pytest.raises(ValueError, match="same in every pass"):
        fk.adaptive_sharpness(model, CE, _Augmented([data]), rho=0.1, control_variate=False)
