"""fk.flatness: every number is that of the quantity's own function; what is shared, shown and refused."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import flatkern as fk
from flatkern.flatness_measures import QUANTITIES
from flatkern.gradient_gram import parameter_gradients
from flatkern.linearize import linearizations
from flatkern.losses import TokenCrossEntropyLoss
from flatkern.problem import select_parameters
from flatkern.root_sets import gradients_for
from tests.core.networks import NAMES, RULE_NAMES, TinyGPT, networks, rule_networks
from tests.core.test_ggn_spectrum import LOSSES, target
from tests.core.test_left_as_found import same, snapshot

ALL = {**networks(), **rule_networks()}


def explicit(model, loss_fn, x, y, reduction):
    """By the single functions, exactly, and plain autograd for loss and gradient."""
    same_loss = {"reduction": reduction}
    value = loss_fn(model(x.clone()), y)
    parameters = list(select_parameters(model).values())
    grads = torch.autograd.grad(value, parameters, allow_unused=True)
    norms = fk.gradient_norms(model, loss_fn, (x, y), **same_loss).values
    entries = fk.hessian_diagonal(model, loss_fn, (x, y), samples=5000, **same_loss).values
    theta = torch.cat([p.detach().flatten() for p in parameters])
    return {
        "loss": float(value.detach()),
        "gradient_norm": sum(float(g.square().sum()) for g in grads if g is not None) ** 0.5,
        "gradient_norms": float(norms.mean()),
        "sharpness": fk.sharpness(model, x).value,
        "ggn_trace": fk.ggn_trace(model, loss_fn, (x, y), method="exact", **same_loss).value,
        "hessian_trace": float(entries.sum()),
        "max_eigenvalue": float(fk.max_eigenvalue(model, loss_fn, (x, y), tol=1e-6, seed=0, **same_loss)),
        "adaptive_sharpness": 0.5 * float(entries @ theta.square()),
        "relative_flatness": fk.relative_flatness(
            model, loss_fn, (x, y), samples=200, seed=0, **same_loss
        ).value,
    }


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("name", ["mlp tanh", "mlp relu no bias", "functional"])
def test_values_are_those_of_the_single_functions(name, loss):
    model, x = networks()[name]
    loss_fn = LOSSES[loss]
    y = target(loss_fn, model, x)
    reduction = None if isinstance(loss_fn, nn.Module) else "sum"
    want = explicit(model, loss_fn, x, y, reduction)
    loader = [(x[:3], y[:3]), (x[3:], y[3:])]
    got = fk.flatness(model, loss_fn, loader, reduction=reduction, seed=0)
    assert list(got) == list(QUANTITIES)
    assert got.shared_seconds > 0
    assert not got.notes
    for key, value in want.items():
        m = got[key]
        assert m.reason == ""
        if key == "max_eigenvalue":
            assert m.value == pytest.approx(value, abs=m.error_bound + 1e-9)
        else:
            assert abs(m.value - value) <= 1e-7 * abs(value) + 4.5 * m.stderr, (key, m)
        if m.per_layer and key != "gradient_norm":
            assert sum(m.per_layer.values()) == pytest.approx(m.value)
    per_layer = got["gradient_norm"].per_layer
    assert sum(v**2 for v in per_layer.values()) ** 0.5 == pytest.approx(got["gradient_norm"].value)
    scale = got["fisher_trace"].value / got["gradient_norms"].value
    fisher = fk.ggn_diagonal(model, loss_fn, (x, y), fisher="empirical", reduction=reduction).values.sum()
    assert got["fisher_trace"].value == pytest.approx(float(fisher)), scale


OFTEN = (
    "mlp tanh",
    "vgg",
    "weight norm",
    "attention",
    "tokens",
    "sequence first",
    "gpt tied",
    "direct",
    "frames",
)
SOME = [n if n in OFTEN else pytest.param(n, marks=pytest.mark.slow) for n in NAMES + RULE_NAMES]


@pytest.mark.parametrize("name", SOME)
def test_the_shared_pass_on_all_architectures(name):
    model, x = ALL[name]
    y = torch.rand_like(model(x.clone()).detach())
    wanted = ["gradient_norm", "gradient_norms", "sharpness", "ggn_trace"]
    got = fk.flatness(model, nn.MSELoss(), (x, y), quantities=wanted)
    assert list(got) == wanted
    norms = fk.gradient_norms(model, nn.MSELoss(), (x, y), per_layer=True)
    assert got["gradient_norms"].value == pytest.approx(norms.mean)
    for key, single in (
        ("sharpness", fk.sharpness(model, x, per_layer=True, method="exact")),
        ("ggn_trace", fk.ggn_trace(model, nn.MSELoss(), (x, y), per_layer=True, method="exact")),
    ):
        m = got[key]
        assert abs(m.value - single.value) <= 1e-9 * single.value + 4.5 * m.stderr
        if not m.stderr:
            assert m.per_layer == pytest.approx(single.per_layer)
            assert m.sample_stderr == pytest.approx(single.sample_stderr)


@pytest.mark.parametrize("name", NAMES + RULE_NAMES)
def test_combined_cotangents_are_those_pulled_back(name):
    model, x = ALL[name]
    parameters = select_parameters(model)
    for samples in (x, x[:1]):
        for lin in linearizations(model, samples, parameters, with_input=False, max_memory=1 << 30):
            torch.manual_seed(0)
            outputs = lin.output[0].numel()
            sets = [torch.randn(k, *lin.output.shape).to(lin.output) for k in (2, outputs)]
            for roots, found in zip(
                [*sets, sets[0]], gradients_for(model, lin, [*sets, sets[0]], parameters), strict=True
            ):
                want = parameter_gradients(model, lin, roots, parameters)
                assert found.terms.keys() == want.terms.keys()
                for key, terms in want.terms.items():
                    for a, b in zip(found.terms[key], terms, strict=True):
                        every = slice(0, lin.n), slice(0, len(roots))
                        torch.testing.assert_close(
                            a.explicit(*every), b.explicit(*every), rtol=1e-9, atol=1e-11
                        )
            few = list(gradients_for(model, lin, [sets[0][:1]], parameters))
            assert few[0].k == 1


def test_tokens_in_batches_of_any_kind():
    torch.manual_seed(0)
    model, loss = TinyGPT(tied=False).double(), TokenCrossEntropyLoss()
    x, y = torch.randint(11, (4, 4)), torch.randint(11, (4, 4))
    batches = [{"tokens": x[:3], "labels": y[:3]}, {"tokens": x[3:], "labels": y[3:]}]
    got = fk.flatness(
        model, loss, batches, forward=lambda m, b: (m(b["tokens"]), b["labels"]), seed=0, rtol=0.1,
        quantities=["loss", "sharpness", "ggn_trace", "hessian_trace", "adaptive_sharpness", "relative_flatness"],
    )  # fmt: skip
    entries = fk.hessian_diagonal(model, loss, (x, y), samples=5000).values
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    for key, want in {
        "loss": float(loss(model(x), y).detach()),
        "sharpness": fk.sharpness(model, x, method="exact").value,
        "ggn_trace": fk.ggn_trace(model, loss, (x, y), method="exact").value,
        "hessian_trace": float(entries.sum()),
        "adaptive_sharpness": 0.5 * float(entries @ theta.square()),
        "relative_flatness": fk.relative_flatness(model, loss, (x, y)).value,
    }.items():
        assert abs(got[key].value - want) <= 1e-7 * abs(want) + 4.5 * got[key].stderr, key


def test_many_outputs_take_sketches():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 80)).double()
    x, y, loss = torch.randn(12, 4).double(), torch.randint(80, (12,)), nn.CrossEntropyLoss()
    got = fk.flatness(model, loss, (x, y), seed=0)
    assert "79 cotangents a sample" in got.notes[0]
    assert got.shared_seconds == 0
    entries = fk.hessian_diagonal(model, loss, (x, y), samples=5000).values
    theta = torch.cat([p.detach().flatten() for p in model.parameters()])
    for key, want in {
        "sharpness": fk.sharpness(model, x, method="exact").value,
        "ggn_trace": fk.ggn_trace(model, loss, (x, y), method="exact").value,
        "hessian_trace": float(entries.sum()),
        "adaptive_sharpness": 0.5 * float(entries @ theta.square()),
        "gradient_norms": fk.gradient_norms(model, loss, (x, y)).mean,
    }.items():
        assert abs(got[key].value - want) <= 1e-7 * abs(want) + 4.5 * got[key].stderr, key
    assert got["ggn_trace"].stderr > 0
    assert got["hessian_trace"].stderr > 0


def test_what_cannot_be_had_is_said():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.LogSoftmax(1)).double()
    x, y = torch.randn(5, 1, 4, 4).double(), torch.arange(5)
    got = fk.flatness(model, nn.NLLLoss(), (x, y), seed=0)
    assert "NLLLoss is linear" in got["ggn_trace"].reason
    assert got["ggn_trace"].value is None
    assert "no dense layer" in got["relative_flatness"].reason
    want = fk.hessian(model, nn.NLLLoss(), (x, y)).to_dense()
    assert got["hessian_trace"].value == pytest.approx(float(want.trace()))
    assert got["max_eigenvalue"].value == pytest.approx(float(torch.linalg.eigvalsh(want)[-1]), rel=1e-3)
    assert "no shared pass" in str(got)
    assert "NLLLoss is linear" in str(got)
    assert json.dumps(got.to_dict())


def test_text_dict_and_figure():
    model, x = networks()["mlp tanh"]
    y = torch.arange(len(x)) % 3
    got = fk.flatness(model, nn.CrossEntropyLoss(), (x, y), seed=0)
    text = str(got)
    for name in QUANTITIES:
        assert name in text
    assert "7 samples, 155 parameters" in text
    plain = json.loads(json.dumps(got.to_dict()))
    assert plain["measures"]["ggn_trace"]["value"] == got["ggn_trace"].value
    assert plain["measures"]["ggn_trace"]["per_layer"].keys() == {"0", "2", "4"}
    assert plain["num_data"] == 7
    assert got.layers == ("0", "2", "4")
    assert len(got) == len(QUANTITIES)
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    axes = got.plot()
    split = [m for m in got.measures.values() if m.per_layer]
    assert len(axes) == len(split)
    for ax, m in zip(axes, split, strict=True):
        assert ax.get_title() == m.name
        assert [bar.get_width() for bar in ax.patches] == pytest.approx(list(m.per_layer.values()))
    one = fk.flatness(model, nn.CrossEntropyLoss(), (x, y), quantities="ggn_trace")
    import matplotlib.pyplot as plt

    ax = plt.figure().subplots()
    assert one.plot(ax) is ax
    with pytest.raises(ValueError, match="axes"):
        got.plot([ax])
    with pytest.raises(ValueError, match="plot"):
        fk.flatness(model, nn.CrossEntropyLoss(), (x, y), quantities="loss").plot()
    plt.close("all")


def test_selected_parameters_and_layer():
    model, x = networks()["mlp relu no bias"]
    y = torch.arange(len(x)) % 3
    loss = nn.CrossEntropyLoss()
    got = fk.flatness(model, loss, (x, y), params=["0.*", "2.*"], layer="2", seed=0)
    assert got.layers == ("0", "2")
    assert got.num_parameters == 6 * 8 + 8 * 8
    assert got["ggn_trace"].value == pytest.approx(
        fk.ggn_trace(model, loss, (x, y), params=["0.*", "2.*"]).value
    )
    assert got["relative_flatness"].value == pytest.approx(
        fk.relative_flatness(model, loss, (x, y), layer="2").value
    )
    other = fk.flatness(model, loss, (x, y), params="0.*", quantities="relative_flatness")
    assert other["relative_flatness"].value == pytest.approx(fk.relative_flatness(model, loss, (x, y)).value)


def test_chunks_and_seeds():
    model, x = networks()["vgg"]
    y = torch.arange(len(x)) % 3
    a = fk.flatness(model, nn.CrossEntropyLoss(), (x, y), seed=3)
    b = fk.flatness(model, nn.CrossEntropyLoss(), (x, y), seed=3)
    small = fk.flatness(model, nn.CrossEntropyLoss(), (x, y), seed=3, max_memory=200_000)
    for key in a:
        # products may be done another way, which is chosen by timing
        assert a[key].value == pytest.approx(b[key].value, rel=1e-9)
        assert small[key].value == pytest.approx(
            a[key].value, rel=1e-3, abs=4.5 * (a[key].stderr + small[key].stderr)
        )


@pytest.mark.parametrize(
    "name", ["mlp tanh", "one module twice", "tied across modules", "skip", "writes into input"]
)
def test_nothing_is_changed(name):
    model, x = networks()[name]
    model.train()
    y = torch.zeros_like(model(x.clone())).detach()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = snapshot(model, x)
    fk.flatness(model, nn.MSELoss(), (x, y), seed=0, rtol=0.5)
    after = snapshot(model, x)
    for key in before:
        assert same(before[key], after[key]), key


def test_bad_arguments():
    model, data = nn.Linear(3, 2), (torch.randn(4, 3), torch.arange(4) % 2)
    loss = nn.CrossEntropyLoss()
    for settings, match in (
        ({"quantities": "trace"}, "quantities"),
        ({"quantities": []}, "quantities"),
        ({"rtol": 0.0}, "rtol"),
        ({"params": "none"}, "params"),
        ({"max_memory": -1}, "max_memory"),
    ):
        with pytest.raises(ValueError, match=match):
            fk.flatness(model, loss, data, **settings)
    broken = torch.full((4, 3), float("nan"))
    with pytest.raises(ValueError, match="NaN"):
        fk.flatness(model, loss, (broken, data[1]))
    with pytest.raises(ValueError, match="output and loss are needed apart"):
        fk.flatness(model, None, data, forward=lambda m, b: m(b[0]).sum(), reduction="mean")


@pytest.mark.parametrize("shuffle", [False, True])
def test_loaders_are_read_and_left_as_found(shuffle):
    model, x = networks()["mlp tanh"]
    y = torch.arange(len(x)) % 3
    loss, source = nn.CrossEntropyLoss(), torch.Generator().manual_seed(3)
    for generator in (source, None):
        loader = DataLoader(TensorDataset(x, y), batch_size=3, shuffle=shuffle, generator=generator)
        for measure in (fk.hessian_diagonal, fk.adaptive_sharpness, fk.relative_flatness, fk.flatness):
            few = (
                {"samples": 4}
                if measure is not fk.flatness
                else {"quantities": ["ggn_trace", "max_eigenvalue"]}
            )
            before = torch.get_rng_state(), source.get_state()
            got = measure(model, loss, loader, seed=0, **few)
            assert torch.equal(before[0], torch.get_rng_state())
            assert torch.equal(before[1], source.get_state())
            want = measure(model, loss, (x, y), seed=0, **few)
            if measure is fk.flatness:
                assert got["ggn_trace"].value == pytest.approx(want["ggn_trace"].value)
            elif measure is fk.hessian_diagonal:
                torch.testing.assert_close(got.ggn, want.ggn)
            else:
                assert abs(got.value - want.value) <= 1e-9 + 10 * (got.stderr + want.stderr)


def test_mixed_precision_parameters_in_perturbed_losses():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2).double()

        def forward(self, x):
            return self.b(self.a(x).double())

    model = Mixed()
    data = torch.randn(5, 3), torch.randn(5, 2).double()
    got = fk.adaptive_sharpness(model, nn.MSELoss(), data, rho=0.1, samples=20, control_variate=False, seed=0)
    want = fk.adaptive_sharpness(
        copy.deepcopy(model).double(), nn.MSELoss(), (data[0].double(), data[1]),
        rho=0.1, samples=20, control_variate=False, seed=0,
    )  # fmt: skip
    assert got.value == pytest.approx(want.value, rel=1e-2, abs=3e-4)
