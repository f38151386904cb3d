"""Gauss-Newton traces: every loss, exact and sketched, any kind of batch, large vocabularies; gradient norms."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flatkern as fk
from flatkern.losses import TokenCrossEntropyLoss, resolve_loss
from tests.core.networks import NAMES, TinyGPT, networks, parameter_jacobian, rule_networks

PEERS = "/tmp/peers-site"


def explicit_trace(model, loss_fn, x, y):
    output = model(x.clone()).detach()
    size = output.numel()
    hessian = torch.autograd.functional.hessian(lambda f: loss_fn(f, y), output).reshape(size, size)
    n = len(x)
    hessian = hessian.reshape(n, size // n, n, size // n)
    return sum(
        float(torch.einsum("iap,iaib,ibp->", j, hessian, j)) for j in parameter_jacobian(model, x).values()
    )


def token_problems():
    weight = torch.rand(11).double() + 0.5
    x = torch.randint(11, (3, 5))
    y = torch.randint(11, (3, 5))
    y[0, :3] = -100
    q = torch.rand(3, 5, 11).double().softmax(-1)
    last = nn.Identity()
    second = _Moved()
    return {
        "token": (last, TokenCrossEntropyLoss(), x, y),
        "token weights smoothing": (last, TokenCrossEntropyLoss(weight=weight, label_smoothing=0.1), x, y),
        "token probabilities": (last, TokenCrossEntropyLoss(weight=weight), x, q),
        "classes second": (second, nn.CrossEntropyLoss(weight=weight, label_smoothing=0.1), x, y),
        "classes second sum": (second, nn.CrossEntropyLoss(reduction="sum"), x, y),
    }


class _Moved(nn.Module):
    def forward(self, z):
        return z.movedim(-1, 1)


@pytest.mark.parametrize(
    "name",
    ["token", "token weights smoothing", "token probabilities", "classes second", "classes second sum"],
)
def test_token_losses(name):
    torch.manual_seed(0)
    after, loss_fn, x, y = token_problems()[name]
    model = nn.Sequential(TinyGPT(), after).double()
    want = explicit_trace(model, loss_fn, x, y)
    got = fk.ggn_trace(model, loss_fn, (x, y), method="exact", per_layer=True, per_parameter=True)
    assert got.value == pytest.approx(want, rel=1e-9)
    assert sum(got.per_layer.values()) == pytest.approx(want, rel=1e-9)
    assert sum(got.per_parameter.values()) == pytest.approx(want, rel=1e-9)
    sketch = fk.ggn_trace(model, loss_fn, [(x[:1], y[:1]), (x[1:], y[1:])], method="sketch", samples=400)
    assert abs(sketch.value - want) < 4 * sketch.stderr
    assert sketch.stderr < 0.1 * want


def test_a_table_tied_to_its_head_counts_the_cross_terms():
    torch.manual_seed(0)
    model, untied = TinyGPT().double(), TinyGPT(tied=False).double()
    state = model.state_dict()
    untied.load_state_dict(state)
    x, y = torch.randint(11, (3, 5)), torch.randint(11, (3, 5))
    loss_fn = TokenCrossEntropyLoss()
    tied = fk.ggn_trace(model, loss_fn, (x, y), method="exact").value
    assert tied == pytest.approx(explicit_trace(model, loss_fn, x, y))
    apart = fk.ggn_trace(untied, loss_fn, (x, y), method="exact").value
    assert abs(tied - apart) > 1e-3 * tied


def _softplus_loss(f, y):
    return (F.softplus(f).sum(1).square() + (f - y).pow(4).sum(1)).mean()


@pytest.mark.parametrize(
    ("loss_fn", "reduction"),
    [
        (nn.HuberLoss(delta=0.7), None),
        (nn.SmoothL1Loss(beta=0.5, reduction="sum"), None),
        (nn.BCEWithLogitsLoss(pos_weight=torch.tensor([1.0, 2.0, 3.0]).double()), None),
        (nn.MSELoss(), None),
        (_softplus_loss, "mean"),
        (lambda f, y: (f.logsumexp(1) - (f * y).sum(1)).sum(), "sum"),
    ],
)
def test_other_convex_losses_exact_and_sketched(loss_fn, reduction):
    model, x = networks()["mlp tanh"]
    y = torch.rand(7, 3).double()
    want = explicit_trace(model, loss_fn, x, y)
    assert fk.ggn_trace(model, loss_fn, (x, y), reduction=reduction).value == pytest.approx(want, rel=1e-8)
    sketch = fk.ggn_trace(model, loss_fn, (x, y), reduction=reduction, method="sketch", samples=300)
    assert abs(sketch.value - want) < 4 * sketch.stderr
    two = fk.ggn_trace(model, loss_fn, [(x[:3], y[:3]), (x[3:], y[3:])], reduction=reduction)
    assert two.value == pytest.approx(want, rel=1e-8)


def test_a_loss_that_is_not_convex_is_refused_only_where_it_is_not():
    model, x = nn.Linear(3, 2).double(), torch.randn(4, 3).double()
    fk.ggn_trace(model, lambda f, y: f.cosh().sum(), (x, x), reduction="sum")
    with pytest.raises(ValueError, match="eigenvalue -"):
        fk.ggn_trace(model, lambda f, y: (-f.square()).sum(), (x, x), reduction="sum")
    wide = nn.Linear(3, 1025)
    with pytest.raises(ValueError, match="1025 outputs"):
        fk.ggn_trace(
            wide, lambda f, y: f.cosh().sum(), (x.float(), x), reduction="sum", method="sketch", samples=2
        )


@pytest.mark.parametrize("name", ["mlp tanh", "vgg", "attention", "one module twice"])
def test_the_sketch_is_unbiased_and_its_error_covers(name):
    model, x = networks()[name]
    y = torch.arange(len(x)) % model(x).shape[1]
    want = fk.ggn_trace(model, nn.CrossEntropyLoss(), (x, y)).value
    runs = [
        fk.ggn_trace(model, nn.CrossEntropyLoss(), (x, y), method="sketch", samples=8, seed=s)
        for s in range(60)
    ]
    values = torch.tensor([r.value for r in runs], dtype=torch.float64)
    errors = torch.tensor([r.stderr for r in runs], dtype=torch.float64)
    spread = float(values.std())
    assert abs(float(values.mean()) - want) < 4 * spread / 60**0.5 + 1e-12 * want  # exact for two classes
    assert float(errors.square().mean()) ** 0.5 == pytest.approx(spread, rel=0.35)
    inside = ((values - want).abs() < 2 * errors + 1e-12 * want).double().mean()
    assert inside > 0.8
    assert all(float(r.samples.mean()) == pytest.approx(r.value) for r in runs)


def test_a_sketch_keeps_its_noise_out_of_the_error_over_samples():
    torch.manual_seed(0)
    widths = (
        torch.nn.Linear(4, 20),
        torch.nn.Tanh(),
        torch.nn.Linear(20, 6),
        torch.nn.Tanh(),
        torch.nn.Linear(6, 80),
    )
    model = torch.nn.Sequential(*widths).double()
    model[4].weight.data[:, 0] *= 10  # all outputs go along one direction, so that draws spread
    x = torch.randn(60, 4, dtype=torch.float64)
    exact = fk.sharpness(model, x, method="exact")
    sketches = [fk.sharpness(model, x, method="sketch", samples=2, seed=s) for s in range(30)]
    noisy = sum(float(s.per_sample.var()) / 60 for s in sketches) / 30
    kept = sum(s.sample_stderr**2 for s in sketches) / 30
    assert noisy > 2 * exact.sample_stderr**2  # else there is nothing to take out
    assert kept == pytest.approx(exact.sample_stderr**2, rel=0.5)
    assert fk.sharpness(model, x, method="sketch", samples=1).sample_stderr is None
    assert all(s.dof >= 2 for s in sketches)


def test_complex_operations_have_no_rules():
    class Spectral(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = torch.nn.Parameter(torch.randn(3))
            self.pairs = torch.nn.Parameter(torch.randn(3, 2, 2))
            self.scale = torch.nn.Parameter(torch.randn(2, 2))

        def forward(self, x):
            z = torch.fft.rfft(x + self.shift, dim=1) @ torch.view_as_complex(self.pairs)
            z = z * torch.view_as_complex(self.scale)
            return torch.fft.irfft(z, n=x.shape[1], dim=1)[:, 1].tanh()

    torch.manual_seed(0)
    model, x, y = Spectral().double(), torch.randn(6, 5, 3).double(), torch.arange(6) % 2
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    rows = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, (x,)))(parameters)
    squares = sum(float(part.square().sum()) for part in rows.values())
    assert fk.sharpness(model, x).value == pytest.approx(squares / 6, rel=1e-10)
    flat = torch.cat([rows[name].flatten(2) for name in parameters], 2)
    torch.testing.assert_close(
        fk.ntk(model, x).reshape(6, 2, 6, 2), torch.einsum("nap,mbp->namb", flat, flat)
    )
    loss = torch.nn.CrossEntropyLoss()
    matrix = fk.hessian(model, loss, (x, y)) @ torch.eye(flat.shape[2], dtype=torch.float64)
    blocks = torch.func.hessian(lambda p: loss(torch.func.functional_call(model, p, (x,)), y))(parameters)
    diagonal = torch.cat([blocks[n][n].reshape(p.numel(), -1).diagonal() for n, p in parameters.items()])
    torch.testing.assert_close(matrix.diagonal(), diagonal)
    for mode in ("kept", "rebuilt", "forward"):
        again = fk.hessian(model, loss, (x, y), mode=mode)
        torch.testing.assert_close(again @ torch.eye(flat.shape[2], dtype=torch.float64), matrix)
    ggn = fk.ggn(model, loss, (x, y)) @ torch.eye(flat.shape[2], dtype=torch.float64)
    torch.testing.assert_close(ggn.diagonal(), fk.ggn_diagonal(model, loss, (x, y)).values)
    assert fk.hessian_trace(model, loss, (x, y)).value == pytest.approx(float(diagonal.sum()), rel=1e-9)
    assert fk.flatness(model, loss, (x, y), seed=0)["ggn_trace"].value > 0


def test_the_sketch_reaches_its_tolerance_and_auto_takes_the_cheaper_way():
    torch.manual_seed(0)
    model, x = (
        nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 100)).double(),
        torch.randn(40, 6).double(),
    )
    y = torch.arange(40)
    exact = fk.ggn_trace(model, nn.CrossEntropyLoss(), (x, y), method="exact")
    loose = fk.ggn_trace(model, nn.CrossEntropyLoss(), (x, y), rtol=0.05)
    assert "sketch" in loose.method
    assert loose.converged
    assert loose.passes < 99
    assert 0 < loose.stderr <= 0.05 * loose.value
    assert abs(loose.value - exact.value) < 4 * loose.stderr
    assert fk.ggn_trace(model, nn.CrossEntropyLoss(), (x, y), rtol=1e-4).value == pytest.approx(exact.value)
    one = fk.sharpness(model, x, method="sketch", samples=1)
    assert one.stderr != one.stderr
    assert "no standard error" in one.notes[0]
    same = [fk.sharpness(model, x, method="sketch", samples=3, seed=5).value for _ in range(2)]
    assert same[0] == same[1]


def test_scaling_laws():
    model, x = networks()["vgg"]
    y = torch.tensor([0, 1, 2, 1])

    def value(loss_fn, *data, **options):
        return fk.ggn_trace(model, loss_fn, data, **options).value

    base = value(nn.CrossEntropyLoss(), x, y)
    assert value(nn.CrossEntropyLoss(), torch.cat([x, x]), torch.cat([y, y])) == pytest.approx(base)
    assert value(nn.CrossEntropyLoss(), x.flip(0), y.flip(0)) == pytest.approx(base)
    assert value(nn.CrossEntropyLoss(reduction="sum"), x, y) == pytest.approx(4 * base)
    tripled = value(lambda f, t: 3 * F.cross_entropy(f, t), x, y, reduction="mean")
    assert tripled == pytest.approx(3 * base)


def test_the_softmax_sketch_keeps_its_digits_in_float32():
    """The textbook form cancels where one class has nearly all the weight."""
    z = torch.tensor([[25.0, 0.0, 1.0, -3.0], [3.0, 2.0, 40.0, 39.0]]).unsqueeze(2)
    signs = torch.tensor([[1.0, -1.0, 1.0, 1.0], [-1.0, 1.0, -1.0, 1.0]]).unsqueeze(2)
    loss = resolve_loss(nn.CrossEntropyLoss())
    y = torch.tensor([[0], [1]])
    exact = loss.sketch(z.double(), y, signs.double())
    torch.testing.assert_close(loss.sketch(z, y, signs).double(), exact, rtol=1e-5, atol=0)
    p = z.double().softmax(1)
    plain = p.sqrt() * signs - p * (p.sqrt() * signs).sum(1, keepdim=True)
    torch.testing.assert_close(exact, plain, rtol=1e-3, atol=1e-12)


def test_a_vocabulary_of_fifty_thousand_in_bounded_memory():
    torch.manual_seed(0)
    model = TinyGPT(50_000, 32, 16)
    x = torch.randint(50_000, (2, 16))
    logits = 2 * 16 * 50_000 * 4
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    got = fk.ggn_trace(model, TokenCrossEntropyLoss(), (x, x.roll(-1, 1)), rtol=0.2)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert "sketch" in got.method
    assert got.passes < 100
    assert got.notes == ()
    assert got.value > 0
    assert grown < 30 * logits  # a row of logits for every class would take 50,000 of them
    norms = fk.gradient_norms(model, TokenCrossEntropyLoss(), (x, x.roll(-1, 1)))
    loss = F.cross_entropy(model(x[:1]).flatten(0, 1), x[:1].roll(-1, 1).flatten(), reduction="sum")
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert float(norms.values[0]) == pytest.approx(sum(float(g.square().sum()) for g in grads), rel=1e-4)


def test_dict_batches_through_forward():
    torch.manual_seed(0)
    model = TinyGPT().double()
    tokens = torch.randint(11, (5, 5))

    def forward(m, batch):
        return m(batch["input_ids"])[:, :-1], batch["input_ids"][:, 1:]

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = model

        def forward(self, x):
            return self.inner(x)[:, :-1]

    want = explicit_trace(Shifted(), TokenCrossEntropyLoss(), tokens, tokens[:, 1:])
    batches = [{"input_ids": tokens[:2]}, {"input_ids": tokens[2:]}]
    got = fk.ggn_trace(model, TokenCrossEntropyLoss(), batches, forward=forward, method="exact")
    assert got.value == pytest.approx(want, rel=1e-9)
    small = fk.ggn_trace(
        model, TokenCrossEntropyLoss(), batches, forward=forward, method="exact", max_memory=200_000
    )
    assert small.value == pytest.approx(want, rel=1e-9)
    norms = fk.gradient_norms(model, TokenCrossEntropyLoss(), batches, forward=forward)
    assert len(norms) == 5
    with pytest.raises(ValueError, match="keep the samples on axis 0"):
        fk.ggn_trace(
            model,
            nn.CrossEntropyLoss(),
            {"input_ids": tokens},
            forward=lambda m, b: (m(b["input_ids"]).flatten(0, 1), b["input_ids"].flatten()),
        )


def test_parameters_without_a_rule_under_forward():
    model, x = rule_networks()["bilinear"]
    y = torch.tensor([0, 1, 1])
    want = fk.ggn_trace(model, nn.CrossEntropyLoss(), (x, y)).value
    got = fk.ggn_trace(
        model, nn.CrossEntropyLoss(), {"x": x, "y": y}, forward=lambda m, b: (m(b["x"]), b["y"])
    )
    assert got.value == pytest.approx(want)
    assert "loop over samples" in got.notes[0]


@pytest.mark.parametrize("name", NAMES)
def test_gradient_norms_against_autograd_a_sample(name):
    model, x = networks()[name]
    output = model(x.clone())
    y = torch.randn_like(output)

    def one(i):
        loss = (model(x[i : i + 1].clone()) - y[i : i + 1]).square().sum()
        grads = torch.autograd.grad(
            loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True
        )
        return sum(float(g.square().sum()) for g in grads if g is not None)

    got = fk.gradient_norms(model, nn.MSELoss(), (x, y), per_layer=True)
    want = torch.tensor([one(i) for i in range(len(x))], dtype=torch.float64)
    torch.testing.assert_close(got.values, want, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(sum(got.per_layer.values()), want, rtol=1e-8, atol=1e-12)


def test_gradient_norms_of_weighted_labels_and_callables():
    model, x = networks()["mlp tanh"]
    y = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([0.5, 1.0, 2.0]).double(), ignore_index=1)
    got = fk.gradient_norms(model, loss_fn, [(x[:4], y[:4]), (x[4:], y[4:])]).values
    assert got[1] == 0
    plain = fk.gradient_norms(model, nn.CrossEntropyLoss(), (x, y)).values
    torch.testing.assert_close(got[2], 4 * plain[2])
    own = fk.gradient_norms(model, lambda f, t: F.cross_entropy(f, t), (x, y), reduction="mean").values
    torch.testing.assert_close(own, plain)
    with pytest.raises(ValueError, match="behaves like a sum"):
        fk.gradient_norms(
            model, lambda f, t: F.cross_entropy(f, t, reduction="sum"), (x, y), reduction="mean"
        )


@pytest.mark.peers
@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_backpack_agrees(kind, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, PEERS])
    backpack = pytest.importorskip("backpack")
    from backpack import extensions

    torch.manual_seed(0)
    if kind == "mlp":
        model, x = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(5, 6)
    else:
        model = nn.Sequential(
            nn.Conv2d(1, 2, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3)
        )
        x = torch.randn(5, 1, 4, 4)
    model, x, y = model.double(), x.double(), torch.tensor([0, 1, 2, 1, 0])
    trace = fk.ggn_trace(model, nn.CrossEntropyLoss(), (x, y)).value
    norms = fk.gradient_norms(model, nn.CrossEntropyLoss(), (x, y)).values
    backpack.extend(model)
    loss = backpack.extend(nn.CrossEntropyLoss())
    with backpack.backpack(extensions.DiagGGNExact(), extensions.BatchL2Grad()):
        loss(model(x), y).backward()
    theirs = sum(float(p.diag_ggn_exact.sum()) for p in model.parameters())
    assert trace == pytest.approx(theirs, rel=1e-10)
    torch.testing.assert_close(norms, 25 * sum(p.batch_l2 for p in model.parameters()))


@pytest.mark.parametrize("gap", [0.0, 3.0, 30.0])
def test_the_sketch_of_few_classes_takes_orthogonal_columns(gap):
    z = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    z[:, 2] += gap
    y = torch.tensor([0, 1, 2, 3, -100])
    loss = resolve_loss(nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=-100))
    every = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=4)), dtype=torch.float64)  # [16, 4]
    images = torch.stack([loss.sketch(z, y, signs.expand(5, 4)) for signs in every])  # S ε
    s = torch.einsum("kna,kb->nab", images, every) / len(every)  # S = E (S ε) εᵀ
    p = z.softmax(1)
    want = torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)
    want.diagonal(dim1=1, dim2=2).copy_(p * (p.unsqueeze(1) * (1 - torch.eye(4, dtype=p.dtype))).sum(2))
    want[4] = 0  # ignored
    size = want.flatten(1).norm(dim=1)[:, None, None]
    assert bool(((s @ s.mT - want).abs() <= 1e-13 * size).all())
    between = s.mT @ s
    between.diagonal(dim1=1, dim2=2).zero_()
    assert bool((between.abs() <= 1e-13 * size).all())


def test_one_draw_is_close_where_classes_are_few():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 48), nn.Tanh(), nn.Linear(48, 6))
    x, y = torch.randn(32, 12), torch.randint(6, (32,))
    exact = fk.ggn_trace(model, nn.CrossEntropyLoss(), (x, y), method="exact").value
    draws = [
        fk.ggn_trace(model, nn.CrossEntropyLoss(), (x, y), method="sketch", samples=1, seed=s).value
        for s in range(12)
    ]
    assert sum((d / exact - 1) ** 2 for d in draws) / len(draws) < 0.02**2
