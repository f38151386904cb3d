"""The Gauss-Newton part sketched by groups and the residual sampled, planned together: moments, plans, coverage."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian, vmap

import flatkern as fk
from flatkern import trace_allotted
from flatkern.losses import resolve_loss
from flatkern.trace_groups import columns_of, group_columns, over_bound
from flatkern.trace_plan import RESERVE, Outlook, Scatter, Share, Way, allot
from flatkern.trace_survey import largest_and_some
from tests.core.curved_networks import Lambda

torch.set_num_threads(1)
N = 160


@pytest.fixture(autouse=True)
def _small_networks_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace_allotted, "LEAST_WORK", 0)


def _signs(k: int) -> Iterator[Tensor]:
    for pattern in itertools.product((-1.0, 1.0), repeat=k):
        yield torch.tensor(pattern, dtype=torch.float64)


@pytest.mark.parametrize(("alone", "count"), [(0, 1), (0, 3), (2, 1), (1, 2), (4, 1), (0, 5)])
def test_groups_have_the_mean_and_the_variance_they_say(alone: int, count: int) -> None:
    torch.manual_seed(0)
    n, k, outputs, parameters = 7, 5, 6, 4
    columns = torch.randn(k, n, outputs, dtype=torch.float64) * torch.rand(k, n, 1).double() ** 2
    jacobian = torch.randn(n, parameters, outputs, dtype=torch.float64)
    squares = columns.square().sum(2).T
    groups = group_columns(squares, alone, count)
    assert torch.equal(groups.sizes, torch.nn.functional.one_hot(groups.place, alone + count).sum(1).double())
    assert torch.equal(groups.sizes[:, :alone], torch.ones(n, alone).double())
    values, by_group = [], []
    for signs in _signs(k):
        roots = groups.combined(columns, signs.expand(n, k))
        parts = torch.einsum("npo,gno->gnp", jacobian, roots).square().sum(2)
        by_group.append(parts)
        values.append(parts.sum(0))
    drawn, parts = torch.stack(values), torch.stack(by_group)
    gradients = torch.einsum("npo,kno->nkp", jacobian, columns)
    gram = gradients @ gradients.mT
    torch.testing.assert_close(drawn.mean(0), gram.diagonal(dim1=1, dim2=2).sum(1))
    same = (groups.place.unsqueeze(2) == groups.place.unsqueeze(1)) & ~torch.eye(k, dtype=torch.bool)
    torch.testing.assert_close(drawn.var(0, correction=0), 2 * (gram.square() * same).sum((1, 2)))
    # the bound of a single draw, group by group, and what pairs says of aligned gradients
    bound = over_bound(groups.sizes).T * parts.square().mean(0)
    assert bool((parts.var(0, correction=0) <= bound + 1e-12).all())
    outer = squares.unsqueeze(2) * squares.unsqueeze(1)
    torch.testing.assert_close(groups.pairs, (outer * same).sum((1, 2)) / 2)


def test_bound_is_reached_by_parallel_gradients_of_two_columns() -> None:
    values = torch.tensor([0.0, 4.0])  # (1 ± 1)²
    assert values.var(correction=0) == over_bound(torch.tensor(2.0)) * values.square().mean()


def test_largest_columns_are_alone_and_equal_ones_are_spread() -> None:
    squares = torch.tensor([[1.0, 8.0, 2.0, 4.0], [1.0, 1.0, 1.0, 1.0]])
    groups = group_columns(squares, 2, 1)
    assert groups.place[0].tolist() == [2, 0, 2, 1]
    assert group_columns(squares, 0, 2).sizes[1].tolist() == [2.0, 2.0]
    zero = group_columns(torch.zeros(1, 4), 0, 4)
    assert zero.sizes.tolist() == [[1.0] * 4]


@pytest.mark.parametrize("classes", [3, 9, 20])
def test_columns_are_a_root_and_orthogonal_where_that_is_cheap(classes: int) -> None:
    torch.manual_seed(1)
    output, y = 6 * torch.randn(11, classes, dtype=torch.float64), torch.arange(11) % classes
    loss = resolve_loss(nn.CrossEntropyLoss(weight=torch.rand(classes).double() + 0.5), None)
    columns = columns_of(loss, output, y)
    assert loss.root is not None
    assert len(columns) == loss.columns(output)
    root = loss.root(output, y)
    torch.testing.assert_close(*(torch.einsum("knc,knd->ncd", s, s) for s in (columns, root)))
    gram = torch.einsum("knc,lnc->nkl", columns, columns)
    off = gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))
    assert (float(off.abs().max()) < 1e-12) == (classes <= 16)


def _outlook(samples: int, factor: float, probe: float, single: float, share: float = 1.0) -> Outlook:
    """Chunk whose variance lies evenly on this share of its samples."""

    def scatter(variance: float) -> Scatter:
        return Scatter(variance, variance**2 / (share * samples))

    sketches = {Way(4, 0, 0): 0.0, Way(0, 1, 1): 5.0, Way(0, 1, 2): 2.0, Way(2, 1, 2): 0.2}
    return Outlook(
        samples,
        {way: scatter(factor * variance) for way, variance in sketches.items()},
        scatter(probe),
        scatter(single),
    )


@pytest.mark.parametrize("share", [0.02, 0.05, 0.2])
def test_few_samples_get_probes_until_the_error_is_known(share: float) -> None:
    chunks = [_outlook(50, 1.0, 9.0, 20.0, share), _outlook(50, 0.0, 1e-6, 1e-6)]
    found = allot(chunks, 50.0, 1.5, 1000)
    assert found is not None
    probes, most = found[0].probes, chunks[0]
    total = most.sketches[found[0].way] + (most.probe.mean_of(probes) if probes > 1 else most.single)
    assert total.known
    assert total.variance**2 / total.squares < 40  # and not many more of them
    assert found[1].probes <= probes
    # where no number of probes that is allowed does it, the tolerance alone counts
    assert allot(chunks, 50.0, 1.5, 2) is not None


def test_a_pilot_has_the_largest_samples_and_stands_for_all() -> None:
    torch.manual_seed(0)
    sizes = torch.rand(200)
    chosen, counts = largest_and_some(sizes, 64)
    assert len(set(chosen.tolist())) == 64
    assert float(counts.sum()) == pytest.approx(200)
    assert set(sizes.argsort(descending=True)[:32].tolist()) <= set(chosen.tolist())
    assert float((counts * sizes[chosen]).sum()) == pytest.approx(float(sizes.sum()), rel=0.02)
    assert sorted(largest_and_some(sizes[:3], 2)[0].tolist())


def test_allotted_variance_is_kept_at_nearly_the_least_cost() -> None:
    chunks = [_outlook(60, 1.0, 9.0, 20.0), _outlook(40, 0.1, 1.0, 3.0)]
    ways = chunks[0].sketches

    def cost(shares: tuple[Share, ...]) -> float:
        return sum(
            c.samples * (s.way.cotangents + 1.5 * s.probes) for c, s in zip(chunks, shares, strict=True)
        )

    def variance(shares: tuple[Share, ...]) -> float:
        return sum(
            c.sketches[s.way].variance + (c.single.variance if s.probes == 1 else c.probe.variance / s.probes)
            for c, s in zip(chunks, shares, strict=True)
        )

    options = [Share(way, k) for way in ways for k in range(1, 25)]
    for allowed in (20.0, 5.0, 2.0):
        found = allot(chunks, allowed, 1.5, 1000)
        assert found is not None
        assert RESERVE * variance(tuple(found)) <= allowed
        least = min(
            cost(pair) for pair in itertools.product(options, repeat=2) if RESERVE * variance(pair) <= allowed
        )
        assert cost(tuple(found)) <= 1.15 * least
    assert allot(chunks, 1e-3, 1.5, 10) is None
    assert allot(chunks, 0.0, 1.5, 10) is None


def _network() -> nn.Module:
    torch.manual_seed(3)
    widths, layers = (5, 7, 6, 6, 5), []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Linear(a, b), nn.GELU()]
    model = nn.Sequential(*layers[:-1]).double()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.5)
    return model


@cache
def _problem() -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    """Network, data, and the explicit trace of every sample's Hessian."""
    model = _network()
    x = torch.randn(N, 5, dtype=torch.float64)
    y = torch.where(torch.rand(N) < 0.8, model(x).argmax(1), torch.randint(5, (N,)))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    shapes = [(name, p.shape, p.numel()) for name, p in parameters.items()]

    def loss(theta: Tensor, a: Tensor, label: Tensor) -> Tensor:
        parts = theta.split([size for _, _, size in shapes])
        given = {name: part.view(shape) for (name, shape, _), part in zip(shapes, parts, strict=True)}
        output = functional_call(model, given, (a.unsqueeze(0),))
        return nn.functional.cross_entropy(output, label.unsqueeze(0))

    theta = torch.cat([p.flatten() for p in parameters.values()])
    full = vmap(hessian(loss), in_dims=(None, 0, 0))(theta, x, y)
    return model, x, y, full.diagonal(dim1=1, dim2=2).sum(1)


SHARES = {
    "plain sketch, single probe": Share(Way(0, 1, 1), 1),
    "two groups, two probes": Share(Way(0, 2, 1), 2),
    "one alone, others twice": Share(Way(1, 1, 2), 2),
    "all alone, three probes": Share(Way(4, 0, 0), 3),
}


@pytest.mark.parametrize("name", SHARES)
def test_every_way_is_unbiased_and_never_understates_its_error(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x, y, traces = _problem()
    monkeypatch.setattr(trace_allotted, "allot", lambda chunks, *_: [SHARES[name] for _ in chunks])
    runs = [fk.hessian_trace(model, nn.CrossEntropyLoss(), (x, y), rtol=0.9, seed=s) for s in range(60)]
    true = float(traces.mean())
    values = torch.tensor([r.value for r in runs], dtype=torch.float64)
    spread = float(values.std())
    assert abs(float(values.mean()) - true) < 4 * spread / 60**0.5
    stated = math.sqrt(sum(r.stderr**2 for r in runs) / 60)
    assert stated > 0.75 * spread  # 60 runs know the spread to 9 %
    way = SHARES[name].way
    if way.draws != 1 and SHARES[name].probes > 1:
        assert stated < 1.3 * spread  # no bound, an estimate
    by_sample = torch.stack([r.per_sample for r in runs if r.per_sample is not None])
    error = by_sample.std(0) / 60**0.5
    assert bool(((by_sample.mean(0) - traces).abs() < 6 * error + 1e-9).all())
    for run in runs[:2]:
        assert run.per_sample is not None
        assert float(run.per_sample.mean()) == pytest.approx(run.value, rel=1e-9)
        assert ("sign sketch" in run.method) == (way.draws > 0)
        assert bool(run.exact) == (way.draws == 0 and len(run.sampled) < len(list(model.parameters())))
        assert set(run.exact) | set(run.sampled) == {name for name, _ in model.named_parameters()}


def test_planned_runs_cover_the_explicit_trace() -> None:
    model, x, y, traces = _problem()
    true = float(traces.mean())
    runs = [fk.hessian_trace(model, nn.CrossEntropyLoss(), (x, y), rtol=0.1, seed=s) for s in range(60)]
    assert all("residual of" in r.method and r.stderr > 0 for r in runs)
    assert any("sign sketch" in r.method for r in runs)
    z = torch.tensor([(r.value - true) / r.stderr for r in runs])
    assert abs(float(z.mean())) < 0.5
    assert float(z.std()) < 1.25
    assert sum(r.converged for r in runs) > 50
    assert all(r.converged == (r.stderr <= 0.1 * abs(r.value)) for r in runs)


def _conv() -> tuple[nn.Module, Tensor, Tensor]:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1), nn.GELU(), nn.Conv2d(3, 3, 3), nn.GELU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(12, 6), nn.SiLU(), nn.Linear(6, 4),
    )  # fmt: skip
    return model.double(), torch.randn(N, 1, 6, 6, dtype=torch.float64), torch.arange(N) % 4


def _transformer() -> tuple[nn.Module, Tensor, Tensor]:
    model = Lambda(
        lambda m, x: m.head(m.block(m.embed(x)).mean(1)),
        embed=nn.Linear(3, 8),  # layer norms of four channels bend without bound
        block=nn.TransformerEncoderLayer(
            8, 2, 8, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
        ),
        head=nn.Linear(8, 3),
    ).eval()
    return model.double(), torch.randn(N, 3, 3, dtype=torch.float64), torch.arange(N) % 3


def _reference(model: nn.Module, loss: nn.Module, data: object) -> float:
    return fk.trace(fk.hessian(model, loss, data), method="exact").value


@pytest.mark.parametrize("make", [_conv, _transformer])
def test_convolutions_and_attention(make: object, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    model, x, y = make()  # type: ignore[operator]
    loss = nn.CrossEntropyLoss()
    monkeypatch.setattr(trace_allotted, "allot", lambda chunks, *_: [Share(Way(1, 1, 2), 3) for _ in chunks])
    runs = [fk.hessian_trace(model, loss, (x, y), rtol=0.5, seed=s) for s in range(6)]
    assert all("sign sketch" in r.method for r in runs)
    true = _reference(model, loss, (x, y))
    z = torch.tensor([(r.value - true) / r.stderr for r in runs])
    assert float(z.abs().max()) < 4
    assert float(z.square().mean()) < 4


@pytest.mark.parametrize("kind", ["loader", "forward", "weights", "mse", "double-backward"])
def test_data_and_losses(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y, _ = _problem()
    loss: nn.Module = nn.CrossEntropyLoss()
    data: object = (x, y)
    more: dict[str, object] = {}
    if kind == "loader":
        data = [(x[:130], y[:130]), (x[130:], y[130:])]
    elif kind == "forward":
        data = [{"x": x[:131], "y": y[:131], "n": "a"}, {"x": x[131:], "y": y[131:], "n": "b"}]
        more["forward"] = lambda m, b: (m(b["x"]), b["y"])
    elif kind == "weights":
        y = torch.where(torch.arange(N) % 9 == 0, -100, y)
        loss, data = nn.CrossEntropyLoss(weight=torch.arange(1.0, 6).double(), label_smoothing=0.1), (x, y)
    elif kind == "mse":
        loss, data = nn.MSELoss(), (x, torch.randn(N, 5, generator=torch.Generator().manual_seed(0)).double())
    else:
        more["method"] = kind
    monkeypatch.setattr(trace_allotted, "allot", lambda chunks, *_: [Share(Way(0, 2, 2), 2) for _ in chunks])
    runs = [fk.hessian_trace(model, loss, data, rtol=0.5, seed=s, **more) for s in range(8)]  # type: ignore[arg-type]
    assert all("sign sketch" in r.method for r in runs)
    true = _reference(model, loss, (x, data[1] if isinstance(data, tuple) else y))
    z = torch.tensor([(r.value - true) / r.stderr for r in runs])
    assert float(z.abs().max()) < 4.5
    assert abs(float(z.mean())) < 4 / 8**0.5


def _error(model: nn.Module, loss: nn.Module, data: list[tuple[Tensor, Tensor]]) -> float:
    """Of a planned run, in stated errors."""
    found = fk.hessian_trace(model, loss, data, rtol=0.1, seed=0)
    true = _reference(model, loss, [(torch.cat([x for x, _ in data]), torch.cat([y for _, y in data]))])
    return abs(found.value - true) / found.stderr


@pytest.mark.parametrize("kind", ["all ignored", "no residual", "no curvature"])
def test_a_first_batch_that_tells_nothing(kind: str) -> None:
    model, x, y, _ = _problem()
    half = N // 2
    if kind == "all ignored":
        loss: nn.Module = nn.CrossEntropyLoss()
        y = torch.where(torch.arange(N) < half, -100, y)
    else:
        loss = nn.MSELoss() if kind == "no residual" else nn.HuberLoss()
        shift = torch.where(torch.arange(N) < half, 0.0 if kind == "no residual" else 9.0, 0.3).double()
        y = model(x).detach() + shift.unsqueeze(1)
    data = [(torch.cat([x[:half]] * 2), torch.cat([y[:half]] * 2)), (x[half:], y[half:])]
    assert _error(model, loss, data) < 5


@pytest.mark.parametrize("planned", [False, True])
@pytest.mark.parametrize("kept", [1, 3, 5])
def test_error_bars_hold_where_few_samples_count(
    kept: int, planned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not planned:
        monkeypatch.setattr(trace_allotted, "LEAST_SAMPLES", N + 1)
    model, x, y, traces = _problem()
    few = torch.randperm(N, generator=torch.Generator().manual_seed(kept))[:kept]
    labels = torch.full_like(y, -100)
    labels[few] = y[few]
    true = float(traces[few].mean())
    runs = [fk.hessian_trace(model, nn.CrossEntropyLoss(), (x, labels), rtol=0.1, seed=s) for s in range(80)]
    assert all(r.dof is not None for r in runs)
    assert sorted(r.dof or 0 for r in runs)[40] >= 8
    covered = sum(low <= true <= high for low, high in (r.interval(0.9) for r in runs))
    assert covered >= 65  # 72 are expected; two probes and the normal quantile covered 40 to 62


@pytest.mark.parametrize("kept", [1, 2, 3])
def test_few_samples_that_count(kept: int) -> None:
    model, x, y, _ = _problem()
    loss, most = nn.CrossEntropyLoss(), torch.arange(N) >= kept
    # the pilot is on these alone, and too few of them do not show where the samples lie
    values = [
        fk.hessian_trace(model, loss, (x, torch.where(most, -100, y)), rtol=0.1, seed=s).value
        for s in range(16)
    ]
    true = _reference(model, loss, (x[:kept], y[:kept]))
    drawn = torch.tensor(values, dtype=torch.float64)
    assert abs(float(drawn.mean()) - true) < 4.5 * float(drawn.std()) / 4 + 1e-9


class _Changing:
    """Other batches every time: in another order, or of other sizes."""

    def __init__(self, x: Tensor, y: Tensor, *, sizes: bool) -> None:
        self._x, self._y, self._sizes = x, y, sizes
        self._times, self._source = 0, torch.Generator().manual_seed(0)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        self._times += 1
        n = len(self._x)
        order = torch.arange(n) if self._sizes else torch.randperm(n, generator=self._source)
        rest = 2 + self._times if self._sizes else 5
        for part in (order[:N], order[N : n - rest], order[n - rest :]):
            yield self._x[part], self._y[part]


@pytest.mark.parametrize("sizes", [False, True])
def test_batches_that_change_are_not_planned(sizes: bool) -> None:
    model, x, y, traces = _problem()
    x, y = torch.cat([x, x[:40]]), torch.cat([y, y[:40]])
    true = float(torch.cat([traces, traces[:40]]).mean())
    runs = [
        fk.hessian_trace(model, nn.CrossEntropyLoss(), _Changing(x, y, sizes=sizes), rtol=0.1, seed=s)
        for s in range(8)
    ]
    assert all(r.converged and r.method.startswith("exact GGN trace") for r in runs)
    z = torch.tensor([(r.value - true) / r.stderr for r in runs])
    assert float(z.abs().max()) < 4.5
    planned = fk.hessian_trace(
        model, nn.CrossEntropyLoss(), [(x[:N], y[:N]), (x[N:], y[N:])], rtol=0.1, seed=0
    )
    assert "sign sketch" in planned.method


@pytest.mark.parametrize("kind", ["relu", "two hidden layers", "samples", "per_layer"])
def test_exact_parts_stay_exact(kind: str) -> None:
    torch.manual_seed(0)
    act = nn.ReLU if kind == "relu" else nn.GELU
    layers = [nn.Linear(5, 6), act(), nn.Linear(6, 6), act()]
    if kind in ("samples", "per_layer"):
        layers += [nn.Linear(6, 6), act()]
    model = nn.Sequential(*layers, nn.Linear(6, 5)).double()
    x, y = torch.randn(N, 5, dtype=torch.float64), torch.arange(N) % 5
    goal: dict[str, object] = {"samples": 2} if kind == "samples" else {"rtol": 0.2}
    found = fk.hessian_trace(
        model, nn.CrossEntropyLoss(), (x, y), seed=0, per_layer=kind == "per_layer", **goal
    )  # type: ignore[arg-type]
    assert "sketch" not in found.method
    assert found.method.startswith("exact")
    if kind in ("relu", "two hidden layers"):
        assert found.stderr == 0
        true = _reference(model, nn.CrossEntropyLoss(), (x, y))
        assert found.value == pytest.approx(true, rel=1e-9)
    else:
        assert set(found.exact) == {"6.weight", "6.bias"}


def test_little_work_is_not_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y, _ = _problem()
    monkeypatch.undo()
    found = fk.hessian_trace(model, nn.CrossEntropyLoss(), (x, y), rtol=0.1, seed=0)
    assert found.method.startswith("exact GGN trace")
    assert found.samples is not None


def test_left_as_found_and_reproducible() -> None:
    model, x, y, _ = _problem()
    kept, state = x.clone(), torch.get_rng_state()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        runs = [fk.hessian_trace(model, nn.CrossEntropyLoss(), (x, y), rtol=0.1, seed=5) for _ in range(2)]
        assert not torch.is_grad_enabled()
    assert runs[0].value == runs[1].value
    assert runs[0].stderr == runs[1].stderr
    assert torch.equal(x, kept)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_samples_that_mix_are_refused() -> None:
    model = Lambda(
        lambda m, x: m.c(torch.tanh(m.b(torch.tanh(m.a(x - x.mean(0)))))),
        a=nn.Linear(5, 5),
        b=nn.Linear(5, 5),
        c=nn.Linear(5, 5),
    ).double()
    _, x, y, _ = _problem()
    with pytest.raises(ValueError, match="samples"):
        fk.hessian_trace(model, nn.CrossEntropyLoss(), (x, y), rtol=0.1, seed=0)
