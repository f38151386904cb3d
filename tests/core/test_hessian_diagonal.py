"""fk.hessian_diagonal against explicit float64 Hessians: exact where it says so, error bars that hold elsewhere."""

from __future__ import annotations

import fnmatch

import pytest
import torch
from torch import Tensor, nn

import flatkern as fk
from flatkern.losses import TokenCrossEntropyLoss
from tests.core.curved_networks import Lambda, Tower, not_affine, piecewise_affine, smooth
from tests.core.explicit_diagonals import hessian_diagonal
from tests.core.networks import TinyGPT, networks
from tests.core.test_ggn_spectrum import LOSSES, target
from tests.core.test_left_as_found import same, snapshot

NETWORKS = {
    **{f"affine: {k}": (m, x, ()) for k, (m, x) in piecewise_affine().items()},
    **{f"not: {k}": v for k, v in not_affine().items()},
    **{f"smooth: {k}": (m, x, ()) for k, (m, x) in smooth().items()},
}


def double(model: nn.Module, x: Tensor) -> tuple[nn.Module, Tensor, Tensor]:
    return model.double(), x.double() if x.is_floating_point() else x, torch.arange(len(x)) % 3


def flat(model: nn.Module, loss: object, x: Tensor, y: Tensor) -> Tensor:
    return torch.cat(list(hessian_diagonal(model, loss, x, y).values()))


def mlp(*acts: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), acts[0], nn.Linear(7, 6), acts[-1], nn.Linear(6, 3)).double()


def _slow_but_some(name: str) -> object:
    often = not name.startswith("smooth") or name in ("smooth: conv 1d", "smooth: rnn", "smooth: rms norm")
    dear = name in ("affine: transposed conv", "affine: batch norm, eval", "affine: conv")
    return name if often and not dear else pytest.param(name, marks=pytest.mark.slow)


@pytest.mark.parametrize("name", [_slow_but_some(n) for n in NETWORKS])
def test_exact_where_it_says_so_and_within_its_error_elsewhere(name: str) -> None:
    model, x, forbidden = NETWORKS[name]
    model, x, y = double(model, x)
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), label_smoothing=0.1)
    want = hessian_diagonal(model, loss, x, y)
    got = fk.hessian_diagonal(model, loss, (x, y), samples=30, seed=5)
    assert set(got.exact).isdisjoint(got.estimated)
    assert {*got.exact, *got.estimated} == set(want)
    assert all(got.estimated.values())
    values, errors = got.as_dict(), got.stderr_dict()
    for key, true in want.items():
        error = errors[key].flatten()
        off = values[key].flatten() - true
        if key in got.exact:
            assert not any(fnmatch.fnmatch(key, pattern) for pattern in forbidden)
            assert float(error.abs().max()) == 0
        if float(error.abs().max()) == 0:  # exact, or few entries: a product each
            # torch's batched backward of hardsigmoid takes its 1/6 in single precision
            rtol = 1e-6 if "hardsigmoid" in name else 1e-8
            torch.testing.assert_close(values[key].flatten(), true, rtol=rtol, atol=1e-11)
        else:
            assert float(off.norm()) < 4.5 * float(error.norm()) + 1e-14
    if name.startswith("affine"):
        assert got.matvecs == 0
        assert not got.estimated
        assert got.method.startswith("exact")


@pytest.mark.parametrize("name", ["tanh mlp", "conv 1d"])
def test_the_error_bar_of_each_entry(name: str) -> None:
    model, x, y = double(*smooth()[name])
    loss = nn.CrossEntropyLoss()
    want = flat(model, loss, x, y)
    runs = [fk.hessian_diagonal(model, loss, (x, y), samples=16, seed=seed) for seed in range(24)]
    values, errors = torch.stack([r.values for r in runs]), torch.stack([r.stderr for r in runs])
    sampled = errors[0] > 0
    torch.testing.assert_close(values[:, ~sampled], want[~sampled].expand(24, -1), rtol=1e-9, atol=1e-12)
    z = ((values - want) / errors.clamp(min=1e-15))[:, sampled]
    assert abs(float(z.mean())) < 0.1
    assert 0.8 < float(z.std()) < 1.35  # Student's with 15 degrees of freedom: 1.07
    spread = (values - want)[:, sampled].square().mean().sqrt()
    assert float(spread) == pytest.approx(float(errors[:, sampled].square().mean().sqrt()), rel=0.25)


@pytest.mark.parametrize("loss", list(LOSSES))
def test_losses_on_ragged_loaders(loss: str) -> None:
    model = mlp(nn.ReLU(), nn.Tanh())
    x, loss_fn = torch.randn(7, 5).double(), LOSSES[loss]
    y = target(loss_fn, model, x)
    reduction = None if isinstance(loss_fn, nn.Module) else "sum"
    want = flat(model, loss_fn, x, y)
    loader = [(x[:3], y[:3]), (x[3:], y[3:])]
    got = fk.hessian_diagonal(
        model, loss_fn, loader, reduction=reduction, max_matvecs=2000, rtol=1e-6, seed=0
    )
    assert set(got.exact) == {"4.weight", "4.bias"}
    torch.testing.assert_close(got.values, want, rtol=1e-8, atol=1e-11)  # a product an entry
    small = fk.hessian_diagonal(
        model, loss_fn, loader, reduction=reduction, rtol=1e-6, seed=0, max_memory=20_000
    )
    torch.testing.assert_close(small.values, want, rtol=1e-8, atol=1e-11)


def test_it_is_drawn_to_a_tolerance() -> None:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Linear(8, 40), nn.Tanh(), nn.Linear(40, 40), nn.SiLU(), nn.Linear(40, 3)
    ).double()
    x, y = torch.randn(32, 8).double(), torch.randint(3, (32,))
    loss = nn.CrossEntropyLoss()
    want = fk.hessian(model, loss, (x, y)).to_dense().diagonal()
    for rtol in (0.3, 0.1):
        got = fk.hessian_diagonal(model, loss, (x, y), rtol=rtol, seed=3)
        assert got.converged
        assert got.samples < len(want)
        assert got.relative_error < 1.3 * rtol
        assert float((got.values - want).norm() / want.norm()) < 1.5 * rtol
    tight = fk.hessian_diagonal(model, loss, (x, y), rtol=0.001, max_matvecs=40, seed=3)
    assert not tight.converged
    assert tight.matvecs == 40
    assert "max_matvecs" in tight.notes[0]
    whole = fk.diagonal(fk.hessian(model, loss, (x, y)), samples=16, seed=0)
    part = fk.hessian_diagonal(model, loss, (x, y), samples=16, seed=0)
    assert float(part.stderr.norm()) < float(whole.stderr.norm())  # only the residual is sampled


def test_where_there_is_no_gauss_newton_diagonal() -> None:
    x, y = torch.randn(9, 5).double(), torch.randint(3, (9,))
    model = nn.Sequential(*mlp(nn.Tanh(), nn.ReLU()), nn.LogSoftmax(1))
    want = flat(model, nn.CrossEntropyLoss(), x, y)  # the same function
    got = fk.hessian_diagonal(model, nn.NLLLoss(), (x, y), samples=500)
    torch.testing.assert_close(got.values, want, rtol=1e-8, atol=1e-11)
    assert got.ggn is None
    assert "NLLLoss" in got.estimated["0.weight"]

    model = mlp(nn.ReLU())
    bent = lambda f, t: (f - t).cos().sum()  # noqa: E731
    t = torch.randn(9, 3).double()
    got = fk.hessian_diagonal(model, bent, (x, t), reduction="sum", samples=500)
    torch.testing.assert_close(got.values, flat(model, bent, x, t), rtol=1e-8, atol=1e-11)
    assert "not convex" in got.estimated["0.weight"]

    decay = lambda f, t: (f - t).square().sum() + len(f) * model[0].weight.pow(4).sum()  # noqa: E731
    got = fk.hessian_diagonal(model, decay, (x, t), reduction="sum", samples=500)
    torch.testing.assert_close(got.values, flat(model, decay, x, t), rtol=1e-8, atol=1e-11)
    assert "uses parameters" in got.estimated["0.weight"]

    own = fk.hessian_diagonal(
        model, None, [{"x": x, "y": y}], reduction="mean", samples=500,
        forward=lambda m, b: nn.functional.cross_entropy(m(b["x"]), b["y"]),
    )  # fmt: skip
    torch.testing.assert_close(own.values, flat(model, nn.CrossEntropyLoss(), x, y), rtol=1e-8, atol=1e-11)


def test_batches_of_any_kind_tokens_and_tied_tables() -> None:
    model, loss = TinyGPT().double(), TokenCrossEntropyLoss()
    x, y = torch.randint(11, (3, 4)), torch.randint(11, (3, 4))
    want = flat(model, loss, x, y)
    batches = [{"tokens": x[:2], "labels": y[:2]}, {"tokens": x[2:], "labels": y[2:]}]
    got = fk.hessian_diagonal(
        model, loss, batches, samples=40, seed=0, forward=lambda m, b: (m(b["tokens"]), b["labels"])
    )
    assert "tokens.weight" in got.estimated
    assert "down.weight" in got.exact
    z = ((got.values - want) / got.stderr.clamp(min=1e-12))[got.stderr > 0]
    assert float(z.square().mean().sqrt()) < 1.6
    exact = got.stderr == 0
    torch.testing.assert_close(got.values[exact], want[exact], rtol=1e-8, atol=1e-11)


def test_selected_parameters() -> None:
    model, x, y = mlp(nn.Tanh()), torch.randn(6, 5).double(), torch.arange(6) % 3
    loss = nn.CrossEntropyLoss()
    want = hessian_diagonal(model, loss, x, y)
    got = fk.hessian_diagonal(model, loss, (x, y), params=["2.*", "4.bias"], samples=200)
    assert list(got.as_dict()) == ["2.weight", "2.bias", "4.bias"]
    for key, value in got.as_dict().items():
        assert value.shape == dict(model.named_parameters())[key].shape
        torch.testing.assert_close(value.flatten(), want[key], rtol=1e-9, atol=1e-12)
    assert len(got) == got.layout.size


def test_a_custom_function_proves_nothing_even_under_a_known_name() -> None:
    class Relu(Tower):  # its node is called ReluBackward, as that of torch's own
        pass

    model = Lambda(lambda m, x: m.b(Relu.apply(m.a(x))), a=nn.Linear(3, 3), b=nn.Linear(3, 2)).double()
    x, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    got = fk.hessian_diagonal(model, nn.MSELoss(), (x, y), samples=100)
    assert not got.exact
    assert "custom autograd function" in got.estimated["a.weight"]


def test_other_samples_may_take_other_branches() -> None:
    def run(m: nn.Module, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.b(torch.where(x[:, :1] > 0, h.relu(), h.sin()) if bool((x[:, 0] < 0).any()) else h.relu())

    model = Lambda(run, a=nn.Linear(3, 3), b=nn.Linear(3, 2)).double()
    x = torch.randn(6, 3).double()
    x[:, 0] = torch.tensor([1.0, 2, 3, 4, 5, -1])  # the first few samples alone look piecewise affine
    y = torch.randn(6, 2).double()
    got = fk.hessian_diagonal(model, nn.MSELoss(), (x, y), samples=100)
    assert set(got.estimated) == {"a.weight", "a.bias"}
    torch.testing.assert_close(got.values, flat(model, nn.MSELoss(), x, y))


def test_scaling_laws() -> None:
    model, x, y = mlp(nn.SiLU()), torch.randn(6, 5).double(), torch.randn(6, 3).double()
    base = fk.hessian_diagonal(model, nn.MSELoss(), (x, y), samples=200).values
    twice = fk.hessian_diagonal(model, nn.MSELoss(), (x.repeat(2, 1), y.repeat(2, 1)), samples=200).values
    torch.testing.assert_close(twice, base)
    order = torch.randperm(6)
    torch.testing.assert_close(
        fk.hessian_diagonal(model, nn.MSELoss(), (x[order], y[order]), samples=200).values, base
    )
    summed = fk.hessian_diagonal(model, nn.MSELoss(reduction="sum"), (x, y), samples=200).values
    torch.testing.assert_close(summed, 18 * base)
    trace = fk.hessian_trace(model, nn.MSELoss(), (x, y), samples=400, seed=0)
    assert abs(trace.value - float(base.sum())) < 4 * trace.stderr + 1e-9


@pytest.mark.parametrize("name", ["mlp tanh", "one module twice", "tied across modules", "writes into input"])
def test_nothing_is_changed(name: str) -> None:
    model, x = networks()[name]
    model.train()
    y = torch.zeros_like(model(x.clone())).detach()
    before = snapshot(model, x)
    fk.hessian_diagonal(model, nn.MSELoss(), (x, y), samples=4, seed=0)
    after = snapshot(model, x)
    for key in before:
        assert same(before[key], after[key]), key


def test_bad_arguments() -> None:
    model, data = nn.Linear(3, 2), (torch.randn(4, 3), torch.arange(4) % 2)
    loss = nn.CrossEntropyLoss()
    for settings, match in (
        ({"rtol": 0.1, "samples": 3}, "rtol"),
        ({"samples": 1}, "samples"),
        ({"rtol": -1.0}, "rtol"),
        ({"max_matvecs": 1}, "max_matvecs"),
        ({"max_memory": 0}, "max_memory"),
        ({"params": "nothing"}, "params"),
        ({"seed": 1, "generator": torch.Generator()}, "seed"),
    ):
        with pytest.raises(ValueError, match=match):
            fk.hessian_diagonal(model, loss, data, **settings)
    with pytest.raises(ValueError, match="dropout"):
        fk.hessian_diagonal(nn.Sequential(model, nn.Dropout()), loss, data)
