"""fk.hessian_trace against explicit float64 Hessians: unbiased, error bars that cover, exact where it says so."""

from __future__ import annotations

import gc
import itertools
from functools import cache
from weakref import WeakSet

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatkern as fk
from flatkern import trace_allotted
from flatkern.residual import Chunk, Sites, Twice, double_backward, linearize, sites
from flatkern.residual.change import Draws
from flatkern.sample_axis import sample_axes
from tests.core.curved_networks import Lambda, piecewise_affine, smooth
from tests.core.explicit_diagonals import hessian_diagonal

torch.set_num_threads(1)
SMOOTH = sorted(smooth())
# one operation of these has no tangent rule, or a parameter's use is not understood
NO_SITES = {"weight product", "vector norm"}
PLAIN_PART = {"weight product", "scale, shift, temperature"}
# every change meets at most two nonlinearities, the second of them one dense layer on
CLOSED = {"tanh mlp", "gelu mlp", "silu without bias", "in place", "lora", "token-wise", "square batch"}
CLOSED |= {"mish and hardswish", "softplus and elu", "squared relu"}


class Keyed(Draws):
    """Signs that depend on the probe and the key alone, not on the order of drawing."""

    probe = 0

    def signs(self, key: tuple[object, ...], shape: tuple[int, ...]) -> Tensor:
        if key not in self._drawn:
            source = torch.Generator().manual_seed(hash((key, self.probe)) % (1 << 40))
            self._drawn[key] = torch.randint(0, 2, shape, generator=source).to(self._like) * 2 - 1
        return self._drawn[key]


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    model, x = smooth()[name]
    return model.double(), x.double() if x.is_floating_point() else x, torch.arange(len(x)) % 3


def chunk_of(model: nn.Module, x: Tensor) -> tuple[Chunk, Tensor]:
    parameters = dict(model.named_parameters())
    chunk = linearize(model, x, parameters, *sample_axes(model, x, parameters))
    return chunk, torch.randn(chunk.output.shape, dtype=torch.float64)


@cache
def truth(name: str) -> float:
    model, x, y = problem(name)
    return sum(float(d.sum()) for d in hessian_diagonal(model, nn.CrossEntropyLoss(), x, y).values())


@pytest.mark.parametrize("name", [n for n in SMOOTH if n not in NO_SITES])
def test_sites_equal_double_backward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, _ = problem(name)
    chunk, r = chunk_of(model, x)
    other, _ = chunk_of(model, x)  # Sites lets go of a chunk's values
    ways = Sites(chunk, r, local=False), Twice(other, r)
    for module in (sites, double_backward):
        monkeypatch.setattr(module, "Draws", Keyed)
    for probe in range(3):
        Keyed.probe = probe
        a, b = (e.draw(torch.Generator()) for e in ways)
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_sites_let_the_graph_go() -> None:
    model = nn.Sequential(
        nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)
    ).double()
    saved: WeakSet[_Saved] = WeakSet()

    def pack(t: Tensor) -> _Saved:
        with torch._C._DisableTorchDispatch():
            saved.add(kept := _Saved(t.detach()))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        chunk, r = chunk_of(model, torch.randn(6, 4, dtype=torch.float64))
        assert any(kept.tensor.shape == (6, 7) for kept in saved)
        way = Sites(chunk, r)
    gc.collect()
    assert not saved
    assert way.draw(torch.Generator()).shape == (6,)


class _Saved:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("name", SMOOTH)
def test_unbiased(name: str) -> None:
    model, x, y = problem(name)
    found = fk.hessian_trace(model, nn.CrossEntropyLoss(), (x, y), samples=160, seed=11)
    assert abs(found.value - truth(name)) < 4.5 * found.stderr + 1e-9, (found, truth(name))
    assert set(found.exact) | set(found.sampled) == {n for n, _ in model.named_parameters()}
    assert found.converged
    if found.stderr == 0:
        assert found.value == pytest.approx(truth(name), rel=1e-9)
    elif name not in PLAIN_PART:
        # the samples' own spread and that of the probes tell the same error
        assert found.samples is not None
        spread = float(found.samples.std()) / len(found.samples) ** 0.5
        assert abs(found.stderr - spread) < 0.3 * spread + 1e-9


@pytest.mark.slow
@pytest.mark.parametrize("name", SMOOTH)
def test_z_scores(name: str) -> None:
    model, x, y = problem(name)
    z = []
    for seed in range(40):
        # the probes' values have long tails: few of them would give error bars that are too short too often
        found = fk.hessian_trace(model, nn.CrossEntropyLoss(), (x, y), samples=100, seed=seed)
        z.append((found.value - truth(name)) / max(found.stderr, 1e-12))
    scores = torch.tensor(z)
    if float(scores.abs().max()) > 100:
        scores = scores * 0 if abs(found.value - truth(name)) < 1e-9 else scores
    assert abs(float(scores.mean())) < 4 / 40**0.5
    assert float(scores.std()) < 1.4


def test_layers_of_networks_that_need_no_draws() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    x, y = torch.randn(7, 4, dtype=torch.float64), torch.arange(7) % 3
    found = fk.hessian_trace(model, nn.CrossEntropyLoss(), (x, y), per_layer=True)
    true = hessian_diagonal(model, nn.CrossEntropyLoss(), x, y)
    assert found.per_layer is not None
    assert found.per_layer_stderr == {"0": 0.0, "2": 0.0}
    for layer in ("0", "2"):
        part = sum(float(d.sum()) for name, d in true.items() if name.startswith(layer))
        assert found.per_layer[layer] == pytest.approx(part, rel=1e-9)


def test_layers_where_some_batches_need_no_draws() -> None:
    torch.manual_seed(0)
    layers = [nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 3)]
    curved = Lambda(
        lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.a(x))))), a=layers[0], b=layers[1], c=layers[2]
    )
    straight = Lambda(
        lambda m, x: m.c(torch.relu(m.b(torch.relu(m.a(x))))), a=layers[0], b=layers[1], c=layers[2]
    )
    both = Lambda(lambda m, x: x, curved=curved.double(), straight=straight.double())
    loss = nn.CrossEntropyLoss(reduction="sum")
    data = [
        {"x": torch.randn(n, 4, dtype=torch.float64), "y": torch.arange(n) % 3, "way": way}
        for way, n in (("straight", 7), ("curved", 5))
    ]
    true = sum(
        float(d.sum())
        for b in data
        for d in hessian_diagonal(getattr(both, b["way"]), loss, b["x"], b["y"]).values()
    )
    for batches in (data, data[::-1]):
        found = fk.hessian_trace(
            both, loss, batches, per_layer=True, samples=300, seed=0,
            forward=lambda m, b: (getattr(m, b["way"])(b["x"]), b["y"]),
        )  # fmt: skip
        assert found.per_layer is not None
        assert sum(found.per_layer.values()) == pytest.approx(found.value)
        assert found.stderr > 0
        assert abs(found.value - true) < 4 * found.stderr


def test_draws_that_coincide_are_no_exact_value() -> None:
    torch.manual_seed(0)
    layers = [m for _ in range(4) for m in (nn.Linear(1, 1), nn.Tanh())][:-1]
    model, x, y = nn.Sequential(*layers).double(), torch.randn(1, 1).double(), torch.randn(1, 1).double()
    true = sum(float(d.sum()) for d in hessian_diagonal(model, nn.MSELoss(), x, y).values())
    runs = [fk.hessian_trace(model, nn.MSELoss(), (x, y), samples=2, seed=s) for s in range(30)]
    blind = [r for r in runs if r.stderr != r.stderr]
    assert blind
    assert all(abs(r.value - true) > 1e-12 for r in blind)
    assert all("coincide" in r.notes[-1] and r.samples is not None for r in blind)
    assert all(r.stderr > 0 for r in runs if r not in blind)
    # nothing to draw from: a fitted model has no residual
    fitted = fk.hessian_trace(model, nn.MSELoss(), (x, model(x).detach()), samples=2, seed=0)
    assert fitted.stderr == 0


@pytest.mark.parametrize("planned", [False, True])
def test_a_fitted_first_batch_does_not_set_the_tolerance(
    planned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trace_allotted, "LEAST_WORK", 0 if planned else 1 << 60)
    torch.manual_seed(2)
    widths = (3, 5, 5, 4, 6)
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.Tanh())][:-1]
    model = nn.Sequential(*layers).double()
    data = []
    for noise in (1e-3, 1.0):
        x = torch.randn(150, 3, dtype=torch.float64)
        data.append((x, (model(x) + noise * torch.randn(150, 6, dtype=torch.float64)).detach()))
    runs = [fk.hessian_trace(model, nn.MSELoss(), data, rtol=0.01, seed=s) for s in range(8)]
    assert sum(r.converged for r in runs) >= 7
    if not planned:
        tight = [fk.hessian_trace(model, nn.MSELoss(), data, rtol=5e-4, seed=s) for s in range(8)]
        assert sum(r.converged for r in tight) >= 6


def test_covers_with_two_probes_and_many_samples() -> None:
    torch.manual_seed(0)
    layers = [
        nn.Linear(6, 8),
        nn.Tanh(),
        nn.Linear(8, 8),
        nn.GELU(),
        nn.Linear(8, 8),
        nn.SiLU(),
        nn.Linear(8, 3),
    ]
    model = nn.Sequential(*layers).double()
    x, y = torch.randn(200, 6, dtype=torch.float64), torch.randint(3, (200,))
    true = sum(float(d.sum()) for d in hessian_diagonal(model, nn.CrossEntropyLoss(), x, y).values())
    runs = [fk.hessian_trace(model, nn.CrossEntropyLoss(), (x, y), samples=2, seed=s) for s in range(60)]
    z = torch.tensor([(r.value - true) / r.stderr for r in runs])
    assert abs(float(z.mean())) < 0.5
    assert 0.75 < float(z.std()) < 1.3


@pytest.mark.parametrize("name", sorted(piecewise_affine()))
def test_piecewise_affine_is_exact(name: str) -> None:
    model, x = piecewise_affine()[name]
    model, x = model.double(), x.double() if x.is_floating_point() else x
    y = torch.arange(len(x)) % 3
    true = sum(float(d.sum()) for d in hessian_diagonal(model, nn.CrossEntropyLoss(), x, y).values())
    found = fk.hessian_trace(model, nn.CrossEntropyLoss(), (x, y))
    assert found.stderr == 0
    assert found.sampled == {}
    assert abs(found.value - true) < 1e-9 * max(1, abs(true))
    assert "exact" in found.method


@pytest.mark.parametrize("name", sorted(CLOSED))
def test_two_hidden_layers_need_no_sampling(name: str) -> None:
    model, x, y = problem(name)
    found = fk.hessian_trace(model, nn.CrossEntropyLoss(), (x, y), seed=0)
    assert found.stderr == 0
    assert found.value == pytest.approx(truth(name), rel=1e-9)
    assert found.sampled  # not proven, and exact all the same
    assert "closed form" in found.method


@pytest.mark.parametrize(
    "name", ["deep tanh mlp", "deep, token-wise, padded", "two ways to one place", "transformer"]
)
def test_closed_forms_spread_less_than_drawing_everything(name: str) -> None:
    model, x, _ = problem(name)
    r = chunk_of(model, x)[1]
    values = []
    for local in (False, True):
        way = Sites(chunk_of(model, x)[0], r, local=local)
        source = torch.Generator().manual_seed(0)
        values.append(torch.stack([way.draw(source) for _ in range(400)]))
    drawn, closed = values
    error = ((drawn.var(0) + closed.var(0)) / 400).sqrt()
    assert bool(((drawn.mean(0) - closed.mean(0)).abs() < 5 * error + 1e-12).all())
    assert float(closed.var(0).sum()) < float(drawn.var(0).sum())


def _losses() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(2)
    labels = torch.tensor([0, 2, 1, 2, 0, 1])
    ignored = labels.clone()
    ignored[1] = -100
    weights = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    return {
        "weights, smoothing, ignored": (nn.CrossEntropyLoss(weight=weights, label_smoothing=0.2), ignored),
        "sum": (nn.CrossEntropyLoss(reduction="sum"), labels),
        "probabilities": (nn.CrossEntropyLoss(), torch.randn(6, 3).double().softmax(1)),
        "mse": (nn.MSELoss(), torch.randn(6, 3).double()),
        "bce": (nn.BCEWithLogitsLoss(pos_weight=weights), torch.rand(6, 3).double()),
        "huber": (nn.HuberLoss(delta=0.4), torch.randn(6, 3).double()),
    }


@pytest.mark.parametrize("name", _losses())
@pytest.mark.parametrize("batched", [False, True])
def test_losses_and_ragged_batches(name: str, batched: bool) -> None:
    model, x, _ = problem("deep tanh mlp")
    loss, y = _losses()[name]
    true = sum(float(d.sum()) for d in hessian_diagonal(model, loss, x, y).values())
    data = [(x[:4], y[:4]), (x[4:], y[4:])] if batched else (x, y)
    found = fk.hessian_trace(model, loss, data, samples=400, seed=3)
    assert found.stderr > 0
    assert abs(found.value - true) < 4.5 * found.stderr


def test_tokens() -> None:
    torch.manual_seed(0)
    model = Lambda(
        lambda m, t: F.linear(F.gelu(m.f(F.silu(m.e(t)))), m.e.weight),
        e=nn.Embedding(7, 6),
        f=nn.Linear(6, 6),
    ).double()
    x, y = torch.randint(7, (4, 5)), torch.randint(7, (4, 5))
    y[0, :2] = -100
    loss = fk.losses.TokenCrossEntropyLoss()
    true = sum(float(d.sum()) for d in hessian_diagonal(model, loss, x, y).values())
    found = fk.hessian_trace(model, loss, (x, y), samples=500, seed=5)
    assert abs(found.value - true) < 4.5 * found.stderr


@pytest.mark.parametrize("name", ["conv", "transformer", "layer norm"])
def test_per_layer(name: str) -> None:
    model, x, y = problem(name)
    diagonal = hessian_diagonal(model, nn.CrossEntropyLoss(), x, y)
    found = fk.hessian_trace(model, nn.CrossEntropyLoss(), (x, y), samples=80, seed=4, per_layer=True)
    assert found.per_layer is not None
    assert found.per_layer_stderr is not None
    assert sum(found.per_layer.values()) == pytest.approx(found.value, rel=1e-9)
    true: dict[str, float] = {}
    for key, values in diagonal.items():
        layer = key.rpartition(".")[0]
        true[layer] = true.get(layer, 0.0) + float(values.sum())
    for layer, value in true.items():
        assert abs(found.per_layer[layer] - value) < 4.5 * found.per_layer_stderr[layer] + 1e-9, layer


def test_selected_parameters() -> None:
    model, x, y = problem("transformer")
    diagonal = hessian_diagonal(model, nn.CrossEntropyLoss(), x, y)
    names = ["embed.weight", "encoder.linear1.bias", "encoder.norm1.weight"]
    found = fk.hessian_trace(model, nn.CrossEntropyLoss(), (x, y), params=names, samples=150, seed=1)
    true = sum(float(diagonal[n].sum()) for n in names)
    assert abs(found.value - true) < 4.5 * found.stderr


def test_tolerance_is_met_and_memory_chunks_change_nothing() -> None:
    model, x, y = problem("deep tanh mlp")
    found = fk.hessian_trace(model, nn.CrossEntropyLoss(), (x, y), rtol=0.05, seed=0, max_samples=20000)
    assert found.converged
    assert 0 < found.stderr <= 0.05 * abs(found.value)
    chunked = fk.hessian_trace(model, nn.CrossEntropyLoss(), (x, y), samples=400, seed=0, max_memory=6000)
    assert abs(chunked.value - truth("deep tanh mlp")) < 4.5 * chunked.stderr


def test_fewer_parameters_than_probes() -> None:
    model, x, y = problem("deep tanh mlp")
    found = fk.hessian_trace(model, nn.CrossEntropyLoss(), (x, y), rtol=0.0005, seed=0)
    assert "exact on the Hessian" in found.method
    assert found.value == pytest.approx(truth("deep tanh mlp"), rel=1e-9)


def test_too_few_probes_are_said() -> None:
    model, x, y = problem("deep tanh mlp")
    found = fk.hessian_trace(
        model, nn.CrossEntropyLoss(), (x, y), rtol=1e-6, seed=0, max_samples=4, method="sites"
    )
    assert not found.converged
    assert any("max_samples" in note for note in found.notes)


def test_scaling_laws() -> None:
    model, x, y = problem("conv")
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    kwargs = {"samples": 300, "seed": 7}
    mean = fk.hessian_trace(model, nn.CrossEntropyLoss(), (x, y), **kwargs)
    total = fk.hessian_trace(model, nn.CrossEntropyLoss(reduction="sum"), (x, y), **kwargs)
    assert total.value == pytest.approx(len(x) * mean.value, rel=1e-9)  # same seed, same probes
    assert total.stderr == pytest.approx(len(x) * mean.stderr, rel=1e-9)
    for data in ((x[order], y[order]), (torch.cat([x, x]), torch.cat([y, y]))):
        other = fk.hessian_trace(model, nn.CrossEntropyLoss(), data, **kwargs)
        assert abs(other.value - mean.value) < 4.5 * (other.stderr**2 + mean.stderr**2) ** 0.5


def test_same_seed_same_number_and_global_generator_untouched() -> None:
    model, x, y = problem("gelu mlp")
    state = torch.get_rng_state()
    a = fk.hessian_trace(model, nn.CrossEntropyLoss(), (x, y), samples=3, seed=9)
    b = fk.hessian_trace(
        model, nn.CrossEntropyLoss(), (x, y), samples=3, generator=torch.Generator().manual_seed(9)
    )
    assert a.value == b.value
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("name", ["conv, batch norm, average", "in place", "transformer", "weight product"])
def test_left_as_found(name: str) -> None:
    model, x, y = problem(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kept, threads, mkldnn = x.clone(), torch.get_num_threads(), torch.backends.mkldnn.enabled
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with torch.no_grad():
        fk.hessian_trace(model, nn.CrossEntropyLoss(), (x, y), samples=2, seed=0)
        assert not torch.is_grad_enabled()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(bool((p.grad == 1).all()) for p in model.parameters())
    assert torch.equal(x, kept)
    assert (threads, mkldnn) == (torch.get_num_threads(), torch.backends.mkldnn.enabled)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def _straight_through() -> nn.Module:
    class Rounded(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.round()

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:
            return g

    return Lambda(lambda m, x: m.b(torch.tanh(Rounded.apply(m.a(x)))), a=nn.Linear(4, 4), b=nn.Linear(4, 3))


def test_falls_back_and_says_why() -> None:
    model, x, y = problem("tanh mlp")
    log_p = nn.Sequential(model, nn.LogSoftmax(1))
    found = fk.hessian_trace(log_p, nn.NLLLoss(), (x, y), samples=400, seed=0)
    assert "NLLLoss" in found.method
    assert abs(found.value - truth("tanh mlp")) < 4.5 * found.stderr + 1e-9
    custom = _straight_through().double()
    found = fk.hessian_trace(custom, nn.CrossEntropyLoss(), (x, y), samples=300, seed=0)
    assert "Rounded" in found.method
    true = sum(float(d.sum()) for d in hessian_diagonal(custom, nn.CrossEntropyLoss(), x, y).values())
    assert abs(found.value - true) < 4.5 * found.stderr + 1e-9
    with pytest.raises(ValueError, match="method"):
        fk.hessian_trace(custom, nn.CrossEntropyLoss(), (x, y), method="sites")


def test_detached_values_are_constants_as_for_autograd() -> None:
    model = Lambda(
        lambda m, x: m.b(torch.tanh(m.a(x)) * m.a(x).detach()), a=nn.Linear(4, 4), b=nn.Linear(4, 3)
    ).double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.arange(5) % 3
    true = sum(float(d.sum()) for d in hessian_diagonal(model, nn.CrossEntropyLoss(), x, y).values())
    found = fk.hessian_trace(model, nn.CrossEntropyLoss(), (x, y), samples=400, seed=0)
    assert abs(found.value - true) < 4.5 * found.stderr + 1e-9


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"rtol": 0.0}, "rtol"),
        ({"samples": 1}, "samples"),
        ({"method": "magic"}, "method"),
        ({"seed": 1, "generator": torch.Generator()}, "seed"),
        ({"max_memory": -1}, "max_memory"),
        ({"params": "nothing"}, "params"),
    ],
)
def test_bad_arguments(kwargs: dict[str, object], match: str) -> None:
    model, x, y = problem("tanh mlp")
    with pytest.raises((ValueError, TypeError), match=match):
        fk.hessian_trace(model, nn.CrossEntropyLoss(), (x, y), **kwargs)  # type: ignore[arg-type]


def test_single_sample() -> None:
    model, x, _ = problem("conv")
    x, y = x[:1], torch.tensor([1])
    true = sum(float(d.sum()) for d in hessian_diagonal(model, nn.CrossEntropyLoss(), x, y).values())
    found = fk.hessian_trace(model, nn.CrossEntropyLoss(), (x, y), samples=500, seed=0)
    assert abs(found.value - true) < 4.5 * found.stderr
