"""fk.relative_flatness against the definition with explicit float64 Hessians, and its closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatkern as fk
from flatkern.losses import TokenCrossEntropyLoss
from flatkern.operators.forms import twice_differentiable
from tests.core.curved_networks import Lambda, not_affine, piecewise_affine, smooth
from tests.core.networks import TinyGPT, networks, rule_networks
from tests.core.test_ggn_spectrum import LOSSES, target
from tests.core.test_left_as_found import same, snapshot

ALL = {
    **{f"n: {k}": v for k, v in networks().items()},
    **{f"r: {k}": v for k, v in rule_networks().items()},
    **{f"s: {k}": v for k, v in smooth().items()},
    **{f"a: {k}": v for k, v in piecewise_affine().items()},
    **{f"c: {k}": v[:2] for k, v in not_affine().items()},
}
WITHOUT_DENSE = {"n: image output", "r: frames"}


def kappa(
    model: nn.Module, loss: object, x: Tensor, y: Tensor, name: str, *, transposed: bool = False
) -> float:
    """Σ_{c,c'} ⟨w_c, w_c'⟩ Tr H_{cc'} with H from double backward passes, a row at a time."""
    w = dict(model.named_parameters())[name]
    with twice_differentiable(model):
        (gradient,) = torch.autograd.grad(loss(model(x.clone()), y), w, create_graph=True)
    rows = []
    for entry in gradient.flatten():
        row = (
            torch.autograd.grad(entry, w, retain_graph=True, allow_unused=True)[0]
            if entry.requires_grad
            else None
        )
        rows.append(torch.zeros_like(w) if row is None else row)
    hessian = torch.stack(rows).reshape(*w.shape, *w.shape).detach()
    w = w.detach()
    if transposed:  # kept as [in, out]
        return float(torch.einsum("ja,jc,dadc->", w, w, hessian))
    return float(torch.einsum("aj,cj,adcd->", w, w, hessian))


def _slow_but_some(name: str) -> object:
    often = name.startswith("n: ") or name in (
        "r: gpt tied",
        "r: siamese",
        "r: lora merged",
        "s: log softmax",
    )
    return name if often else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [_slow_but_some(n) for n in ALL if n not in WITHOUT_DENSE])
def test_all_architectures(name):
    model, x = ALL[name]
    model, x = model.double(), x.double() if x.is_floating_point() else x
    output = model(x.clone()).detach()
    for loss in (nn.MSELoss(), nn.CrossEntropyLoss()):
        torch.manual_seed(7)
        y = torch.rand_like(output)
        if isinstance(loss, nn.CrossEntropyLoss):
            y = torch.randint(output.shape[1], (len(x), *output.shape[2:]))
        got = fk.relative_flatness(model, loss, (x, y), samples=64, seed=0)
        want = kappa(model, loss, x, y, got.layer)
        assert abs(got.value - want) <= 1e-8 * abs(want) + 4.5 * got.stderr + 1e-12, got
        if got.per_sample is not None:
            assert float(got.per_sample.mean()) == pytest.approx(got.value)
            assert got.residual == ""


def test_the_closed_forms():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x, y = torch.randn(9, 4).double(), torch.randint(3, (9,))
    with torch.no_grad():
        h, w, p = model[:2](x), model[2].weight.detach(), model(x).softmax(1)
    got = fk.relative_flatness(model, nn.MSELoss(), (x, F.one_hot(y, 3).double()))
    assert got.method == "closed form"
    assert got.layer == "2.weight"
    assert got.value == pytest.approx(2 / 3 * float(w.square().sum() * h.square().sum(1).mean()))
    got = fk.relative_flatness(model, nn.CrossEntropyLoss(), (x, y))
    forms = h.square().sum(1) * (p @ w.square().sum(1) - (p @ w).square().sum(1))
    assert got.value == pytest.approx(float(forms.mean()))
    torch.testing.assert_close(got.per_sample, forms)
    assert got.sample_stderr == pytest.approx(float(forms.std()) / 3)


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("name", ["mlp tanh", "vgg"])
def test_losses_on_ragged_loaders(name, loss):
    model, x = networks()[name]
    loss_fn = LOSSES[loss]
    y = target(loss_fn, model, x)
    reduction = None if isinstance(loss_fn, nn.Module) else "sum"
    loader = [(x[:3], y[:3]), (x[3:], y[3:])]
    got = fk.relative_flatness(model, loss_fn, loader, reduction=reduction)
    assert got.stderr == 0
    assert got.value == pytest.approx(kappa(model, loss_fn, x, y, got.layer), rel=1e-9)
    tight = fk.relative_flatness(model, loss_fn, loader, reduction=reduction, max_memory=20_000)
    assert tight.value == pytest.approx(got.value)


def test_huber_and_saturated_probabilities():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(9, 4).double()
    y = torch.randn(9, 3).double()
    for loss in (nn.HuberLoss(delta=0.7), nn.SmoothL1Loss(beta=0.5)):
        got = fk.relative_flatness(model, loss, (x, y))
        assert got.value == pytest.approx(kappa(model, loss, x, y, "weight"))
    with torch.no_grad():
        model.weight.mul_(60)
    loss, labels = (
        nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.3]).double(), label_smoothing=0.2),
        torch.arange(9) % 3,
    )
    got = fk.relative_flatness(model, loss, (x, labels))
    assert got.method == "closed form"
    assert got.value == pytest.approx(kappa(model, loss, x, labels, "weight"), rel=1e-6)
    saturated = fk.relative_flatness(model.float(), nn.CrossEntropyLoss(), (1e3 * x.float(), labels))
    assert bool(torch.isfinite(saturated.per_sample).all())


def test_any_layer_of_a_relu_network_is_exact():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x, y, loss = torch.randn(9, 4).double(), torch.randint(3, (9,)), nn.CrossEntropyLoss()
    for layer, name in (("0", "0.weight"), ("2.weight", "2.weight"), ("4", "4.weight")):
        got = fk.relative_flatness(model, loss, (x, y), layer=layer)
        assert got.layer == name
        assert got.residual == ""
        assert got.value == pytest.approx(kappa(model, loss, x, y, name))


def test_it_does_not_change_with_the_scale():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6, bias=False), nn.ReLU(), nn.Linear(6, 3)).double()
    data = torch.randn(9, 4).double(), torch.randint(3, (9,))
    before = [fk.relative_flatness(model, nn.CrossEntropyLoss(), data, layer=k).value for k in "02"]
    with torch.no_grad():
        model[0].weight.mul_(5)
        model[2].weight.div_(5)
    after = [fk.relative_flatness(model, nn.CrossEntropyLoss(), data, layer=k).value for k in "02"]
    assert after == pytest.approx(before)
    twice = fk.relative_flatness(model, nn.CrossEntropyLoss(), [data, data]).value
    assert twice == pytest.approx(after[1])
    summed = fk.relative_flatness(model, nn.CrossEntropyLoss(reduction="sum"), data).value
    assert summed == pytest.approx(9 * after[1])


@pytest.mark.parametrize("tanh", [False, True])
def test_weights_kept_as_in_out(tanh):
    torch.manual_seed(0)

    def run(m: nn.Module, x: Tensor) -> Tensor:
        z = torch.addmm(m.b, m.a(x).relu(), m.w)
        return z.tanh() if tanh else z

    for outputs in (3, 4, 6):
        model = Lambda(run, a=nn.Linear(4, 4), w=torch.randn(4, outputs), b=torch.randn(outputs)).double()
        x, y = torch.randn(7, 4).double(), torch.randint(outputs, (7,))
        got = fk.relative_flatness(model, nn.CrossEntropyLoss(), (x, y), samples=100)
        assert got.layer == "w"
        assert (got.method == "closed form") is not tanh
        assert got.value == pytest.approx(kappa(model, nn.CrossEntropyLoss(), x, y, "w", transposed=True))


def test_tokens_and_a_large_vocabulary():
    torch.manual_seed(0)
    loss = TokenCrossEntropyLoss(ignore_index=3, label_smoothing=0.1)
    model = TinyGPT(tied=False).double()
    x, y = torch.randint(11, (5, 4)), torch.randint(11, (5, 4))
    batches = [{"tokens": x[:2], "labels": y[:2]}, {"tokens": x[2:], "labels": y[2:]}]
    got = fk.relative_flatness(model, loss, batches, forward=lambda m, b: (m(b["tokens"]), b["labels"]))
    assert got.layer == "head.weight"
    assert got.method == "closed form"
    assert got.value == pytest.approx(kappa(model, loss, x, y, "head.weight"))
    wide = TinyGPT(vocabulary=40, tied=False).double()
    x, y = torch.randint(40, (6, 4)), torch.randint(40, (6, 4))

    data = (x, torch.zeros(6, 4, 40).double())
    runs = [
        fk.relative_flatness(wide, nn.MSELoss(), data, layer="down", samples=6, seed=s) for s in range(12)
    ]
    want = kappa(wide, nn.MSELoss(), *data, "down.weight")
    assert "sign draws" in runs[0].method
    z = torch.tensor([(r.value - want) / r.stderr for r in runs])
    assert abs(float(z.mean())) < 1.0
    assert 0.6 < float(z.std()) < 1.6
    planned = fk.relative_flatness(wide, nn.MSELoss(), data, layer="down", rtol=0.05, seed=0)
    assert planned.converged
    assert planned.stderr <= 0.05 * planned.value


def test_losses_without_a_gauss_newton_part():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.LogSoftmax(1)).double()
    x, y = torch.randn(6, 4).double(), torch.randint(3, (6,))
    got = fk.relative_flatness(model, nn.NLLLoss(), (x, y), samples=100)
    assert got.value == pytest.approx(kappa(model, nn.NLLLoss(), x, y, "2.weight"))
    assert "NLLLoss" in got.residual
    bent = lambda f, t: (f - t).sin().sum()  # noqa: E731
    t = torch.randn(6, 3).double()
    got = fk.relative_flatness(model, bent, (x, t), reduction="sum", samples=100)
    assert got.value == pytest.approx(kappa(model, bent, x, t, "2.weight"))


def test_residual_products_have_an_error_bar_that_holds():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(10, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh()).double()
    x, y = torch.randn(8, 10).double(), torch.randn(8, 12).double()
    want = kappa(model, nn.MSELoss(), x, y, "2.weight")
    runs = [fk.relative_flatness(model, nn.MSELoss(), (x, y), samples=12, seed=s) for s in range(30)]
    z = torch.tensor([(r.value - want) / r.stderr for r in runs])
    assert abs(float(z.mean())) < 0.8
    assert 0.7 < float(z.std()) < 1.5
    assert "residual" in runs[0].method


def test_the_layer_has_to_be_clear():
    x, y = torch.randn(6, 4), torch.randn(6, 3)
    two = Lambda(lambda m, x: m.a(x) + m.b(x.relu()), a=nn.Linear(4, 3), b=nn.Linear(4, 3))
    with pytest.raises(ValueError, match="several last dense layers"):
        fk.relative_flatness(two, nn.MSELoss(), (x, y))
    assert fk.relative_flatness(two, nn.MSELoss(), (x, y), layer="b").layer == "b.weight"
    frozen = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    frozen[2].requires_grad_(False)
    with pytest.raises(ValueError, match="frozen"):
        fk.relative_flatness(frozen, nn.MSELoss(), (x, y))
    assert fk.relative_flatness(frozen, nn.MSELoss(), (x, y), layer="0").value > 0
    with pytest.raises(ValueError, match="frozen"):
        fk.relative_flatness(frozen, nn.MSELoss(), (x, y), layer="2")
    image, images = networks()["image output"]
    with pytest.raises(ValueError, match="no dense layer was found"):
        fk.relative_flatness(image, nn.MSELoss(), (images, torch.zeros_like(image(images))))
    with pytest.raises(ValueError, match="is that of a matrix"):
        fk.relative_flatness(image, nn.MSELoss(), (images, torch.zeros_like(image(images))), layer="0")
    for settings, match in (
        ({"layer": "none"}, "layer"),
        ({"samples": 1}, "samples"),
        ({"rtol": 0.0}, "rtol"),
    ):
        with pytest.raises(ValueError, match=match):
            fk.relative_flatness(two, nn.MSELoss(), (x, y), **settings)


@pytest.mark.parametrize("name", ["mlp tanh", "one module twice", "softmax output", "writes into input"])
def test_nothing_is_changed(name):
    model, x = networks()[name]
    y = torch.zeros_like(model(x.clone())).detach()
    before = snapshot(model, x)
    fk.relative_flatness(model, nn.MSELoss(), (x, y), samples=4, seed=0)
    after = snapshot(model, x)
    for key in before:
        assert same(before[key], after[key]), key
