"""Geometry by tangents and matrix-free, of parts of networks and of subspaces, against explicit float64 Jacobians."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import flatkern as fk
from flatkern.bidiagonal import LockstepBidiagonalization
from tests.core.networks import NAMES, TinyGPT, input_jacobian, networks, rule_networks

REAL = tuple(name for name in NAMES if name != "tokens")


def matrix(rows: int, columns: int, sigma: Tensor, seed: int = 0) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    u, v = (
        torch.linalg.qr(torch.randn(k, len(sigma), generator=g, dtype=torch.float64)).Q
        for k in (rows, columns)
    )
    return u * sigma @ v.T


def linear_model(w: Tensor) -> nn.Linear:
    model = nn.Linear(w.shape[1], w.shape[0], bias=False).double()
    with torch.no_grad():
        model.weight.copy_(w)
    return model


def jacobian_between(
    model: nn.Module, x: Tensor, source: nn.Module | None, target: nn.Module | None
) -> Tensor:
    """∂(what comes out of ``target``)/∂(what goes into ``source``) at their first calls, sample by sample."""
    rows = []
    for i in range(len(x)):
        seen: dict[str, Tensor] = {}

        def enter(_m, args, seen=seen):
            seen.setdefault("source", args[0])

        def leave(_m, _args, output, seen=seen):
            seen.setdefault("target", output)

        hooks = [] if source is None else [source.register_forward_pre_hook(enter)]
        hooks += [] if target is None else [target.register_forward_hook(leave)]
        point = x[i : i + 1].clone()
        point = point.requires_grad_() if point.is_floating_point() else point
        output = model(point.clone())
        for hook in hooks:
            hook.remove()
        begin = seen.get("source", point)
        end = seen.get("target", output)
        found = [
            torch.autograd.grad(e, begin, retain_graph=True, allow_unused=True)[0] for e in end.flatten()
        ]
        rows.append(
            torch.stack([torch.zeros_like(begin).flatten() if f is None else f.flatten() for f in found])
        )
    return torch.stack(rows)


@pytest.mark.parametrize("name", REAL)
def test_tangents_give_the_same_singular_values(name):
    model, x = networks()[name]
    sigma = torch.linalg.svdvals(input_jacobian(model, x))
    g = fk.geometry(model, x, method="tangents", params=(), max_memory=200_000)
    assert g.method == "tangents"
    scale = sigma[:, :1]
    torch.testing.assert_close(g.singular_values / scale, sigma / scale, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize(
    "name", [*REAL, *(n for n in rule_networks() if n not in ("bags", "gpt tied", "gpt untied"))]
)
def test_iteration_finds_the_same_values(name):
    model, x = {**networks(), **rule_networks()}[name]
    j = input_jacobian(model, x)
    sigma = torch.linalg.svdvals(j)
    g = fk.geometry(model, x, method="matrix-free", rtol=1e-9, max_steps=200, params=(), probes=2)
    torch.testing.assert_close(g.max_sensitivity.values, sigma[:, 0], rtol=1e-6, atol=0)
    energy = sigma.square()
    if min(j.shape[1:]) <= 8:  # the Krylov space is then all there is, and nothing is left to estimate
        torch.testing.assert_close(g.frobenius.values.square(), energy.sum(1), rtol=1e-6, atol=0)
        exact = energy.sum(1).square() / energy.square().sum(1)
        torch.testing.assert_close(g.local_dimensionality.values, exact, rtol=1e-6, atol=0)
    flat = x.flatten(1)
    image = torch.einsum("nij,nj->ni", j, flat).square().sum(1)
    assert g.iimls.value == pytest.approx(float((image / flat.shape[1]).mean()), rel=1e-6)
    assert g.normalized_mls.value == pytest.approx(
        float((flat.square().sum(1) * energy[:, 0]).mean()), rel=1e-6
    )


def test_the_three_ways_agree_where_all_can_go():
    model, x = networks()["vgg"]
    exact = fk.geometry(model, x)
    for method in ("tangents", "matrix-free"):
        g = fk.geometry(model, x, layers="*", method=method, rtol=1e-8, max_steps=60)
        assert g.method == method
        assert list(g.layers) == list(exact.layers)
        assert g.nmls.value == pytest.approx(exact.nmls.value, rel=1e-5)
        assert g.mls.value == pytest.approx(exact.mls.value, rel=1e-5)
        assert g.iimls.value == pytest.approx(exact.iimls.value, rel=1e-9)
        # three outputs: signs hit all of them, so even the sharpness' draws are near
        assert abs(g.sharpness.value - exact.sharpness.value) < 6 * g.sharpness.stderr


PARTS = [
    ("mlp tanh", "2", None),
    ("mlp tanh", None, "2"),
    ("mlp tanh", "2", "3"),
    ("vgg", "3", "6"),
    ("vgg", None, "4"),
    ("skip", "b", None),
    ("skip", "b", "b"),
    ("attention", "encoder.linear1", "head"),
    ("attention", None, "encoder.self_attn"),
    ("batch norm eval", "1", None),
    ("tokens", "token", None),
]


@pytest.mark.parametrize("method", ["cotangents", "tangents", "matrix-free"])
@pytest.mark.parametrize(("name", "source", "target"), PARTS)
def test_parts_of_networks(name, source, target, method):
    model, x = networks()[name]
    modules = dict(model.named_modules())
    if target == "encoder.self_attn":  # its output is a tuple
        want = jacobian_between(FirstOutput(model), x, None, None)
    else:
        want = jacobian_between(
            model, x, None if source is None else modules[source], None if target is None else modules[target]
        )
    sigma = torch.linalg.svdvals(want)
    g = fk.geometry(
        model, x, source=source, target=target, method=method, rtol=1e-8, max_steps=200, params=(), probes=0
    )
    assert (g.outputs, g.inputs, g.source, g.target) == (*want.shape[1:], source, target)
    torch.testing.assert_close(g.max_sensitivity.values, sigma[:, 0], rtol=1e-6, atol=1e-12)
    if method != "matrix-free":
        torch.testing.assert_close(g.singular_values, sigma, rtol=1e-5, atol=1e-7)


class FirstOutput(nn.Module):
    """The encoder's attention alone."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.attention = model.encoder.self_attn

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


def test_layers_of_a_part_are_those_inside():
    model, x = networks()["mlp tanh"]
    whole = fk.geometry(model, x)
    assert list(whole.layers) == ["0", "2", "4"]
    g = fk.geometry(model, x, source="2", target="3")
    assert list(g.layers) == ["2"]
    assert g.layers["2"].takes_model_input
    tail = fk.geometry(model, x, source="2")
    assert list(tail.layers) == ["2", "4"]
    torch.testing.assert_close(tail.max_sensitivity.values, whole.layers["2"].max_sensitivity.values)
    torch.testing.assert_close(tail.log_volume.values, whole.layers["2"].log_volume.values)
    assert tail.sharpness.value == pytest.approx(whole.sharpness.value)


def test_a_source_that_works_in_place():
    model, x = networks()["vgg"]
    g = fk.geometry(model, x, source="1")
    z = model[0](x).detach()
    assert model[1].inplace
    torch.testing.assert_close(g.input_norm_sq, z.flatten(1).square().sum(1))
    model[1].inplace = False  # for the oracle, which would see what became of z
    want = torch.linalg.svdvals(jacobian_between(model, x, model[1], None))
    torch.testing.assert_close(g.singular_values, want, rtol=1e-6, atol=1e-9)


def test_the_second_call_of_a_module():
    model, x = networks()["one module twice"]
    g = fk.geometry(model, x, source="0#2")
    layers = fk.geometry(model, x).layers
    torch.testing.assert_close(g.max_sensitivity.values, layers["0#2"].max_sensitivity.values)


def test_from_the_embedding_on_for_token_ids():
    torch.manual_seed(0)
    model, x = TinyGPT(tied=False).double(), torch.randint(11, (3, 5))
    want = torch.linalg.svdvals(jacobian_between(model, x, model.norm1, None))
    for method in ("cotangents", "matrix-free"):
        g = fk.geometry(model, x, source="norm1", method=method, rtol=1e-8, params=(), probes=0)
        torch.testing.assert_close(g.max_sensitivity.values, want[:, 0], rtol=1e-6, atol=0)
    with pytest.raises(TypeError, match="from the embedding's output on"):
        fk.geometry(model, x)
    frozen = model.requires_grad_(False)
    g = fk.geometry(frozen, x, source="norm1", probes=0)
    torch.testing.assert_close(g.max_sensitivity.values, want[:, 0])
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("method", ["cotangents", "tangents", "matrix-free"])
def test_volume_of_a_subspace(method):
    model, x = networks()["image output"]
    j = input_jacobian(model, x)
    columns = torch.randn(j.shape[1], 4, dtype=torch.float64)
    q = torch.linalg.qr(columns).Q
    for subspace, projection in ((columns, q), ([2, 0, -1], torch.eye(j.shape[1]).double()[:, [2, 0, -1]])):
        want = torch.linalg.svdvals(projection.T @ j)
        g = fk.geometry(model, x, subspace=subspace, method=method, probes=0, params=(), rtol=1e-8)
        assert g.outputs == projection.shape[1]
        torch.testing.assert_close(g.max_sensitivity.values, want[:, 0], rtol=1e-6, atol=0)
        if method != "matrix-free":
            torch.testing.assert_close(g.log_volume.values, want.log().sum(1), rtol=1e-6, atol=1e-8)


def test_sharpness_of_a_subspace_is_sketched_without_bias():
    model, x = networks()["image output"]
    columns = torch.randn(18, 5, dtype=torch.float64)
    exact = fk.geometry(model, x, subspace=columns, method="cotangents").sharpness
    sketch = fk.geometry(
        model, x, subspace=columns, method="matrix-free", probes=60, volume_steps=0
    ).sharpness
    assert sketch.stderr > 0
    assert abs(sketch.value - exact.value) < 5 * sketch.stderr


def test_singular_value_statistics():
    sigma = torch.tensor([4.0, 2.0, 1e-3, 0.0], dtype=torch.float64)
    x = torch.randn(3, 6, dtype=torch.float64)
    w = matrix(4, 6, sigma)
    for method in ("cotangents", "tangents"):
        g = fk.geometry(linear_model(w), x, method=method)
        assert g.log_volume.rank_deficient == 3
        assert "numerical rank 3 to 3 of 4" in g.log_volume.notes[0]
        assert g.rank.values.tolist() == [3, 3, 3]
        torch.testing.assert_close(g.pseudo_log_volume().values, sigma[:3].log().sum().expand(3))
        torch.testing.assert_close(g.pseudo_log_volume(1e-2).values, sigma[:2].log().sum().expand(3))
        assert "above 0.01 of the largest: 2 to 2 of 4" in g.pseudo_log_volume(1e-2).notes[0]
        torch.testing.assert_close(g.stable_rank.values, (sigma.square().sum() / 16).expand(3))
        torch.testing.assert_close(g.frobenius.values, sigma.norm().expand(3))
        assert g.condition_number.rank_deficient == 3
        assert g.log_lvr.value == -math.inf
        assert g.iimls.value == pytest.approx(float((x @ w.T).square().sum(1).mean() / 6))
        with pytest.raises(ValueError, match="threshold"):
            g.pseudo_log_volume(1.5)


def test_volumetric_ratios():
    model, x = networks()["mlp tanh"]
    g = fk.geometry(model, x)
    log_v = torch.linalg.svdvals(input_jacobian(model, x)).log().sum(1)
    assert g.log_lvr.value == pytest.approx(math.log(float(log_v.exp().mean())))
    relative = float(log_v.exp().std() / len(x) ** 0.5 / log_v.exp().mean())
    assert g.log_lvr.sample_stderr == pytest.approx(relative)
    layers = [torch.linalg.svdvals(jacobian_between(model, x, model[k], None)).prod(1) for k in (0, 2, 4)]
    assert g.log_nvr.value == pytest.approx(math.log(float(sum(layers).mean())))
    torch.testing.assert_close(g.layers["2"].log_volume.values, layers[1].log())


def test_a_bottleneck_and_a_softmax_are_seen_in_the_graph():
    torch.manual_seed(0)
    x = torch.randn(2, 12)
    narrow = nn.Sequential(nn.Linear(12, 3), nn.Tanh(), nn.Linear(3, 8))
    for method in ("cotangents", "tangents", "matrix-free"):
        g = fk.geometry(narrow, x, method=method)
        assert g.rank_bound == 3
        assert g.log_volume.rank_deficient == 2
        assert "rank ≤ 3 < N = 8" in g.log_volume.notes[0]
        assert (g.log_volume.values == -math.inf).all()
    soft = nn.Sequential(nn.Linear(12, 8), nn.Softmax(-1))
    g = fk.geometry(soft, x, method="matrix-free")
    assert g.rank_bound == 7
    assert "normalized" in g.log_volume.notes[0]
    assert fk.geometry(nn.Sequential(nn.Linear(12, 8), nn.LayerNorm(8), nn.Linear(8, 8)), x).rank_bound == 7

    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.narrow, self.wide = narrow, nn.Linear(12, 8)

        def forward(self, x):
            return self.narrow(x) + self.wide(x)

    assert fk.geometry(Around(), x).rank_bound == 8  # the skip goes around it

    class Spectrum(nn.Module):
        def forward(self, x):
            return torch.view_as_real(torch.fft.rfft(x)).flatten(1)[
                :, :10
            ]  # 6 complex numbers, 10 of their parts

    assert fk.geometry(Spectrum(), torch.randn(2, 10).double()).rank_bound == 10
    wide = fk.geometry(nn.Linear(3, 5), torch.randn(2, 3), method="matrix-free")
    assert wide.rank_bound == 3
    assert "N = 5 outputs exceed M = 3 inputs" in wide.log_volume.notes[0]


# -- iteration -------------------------------------------------------------------------------------------


def spread_model(n_out: int = 40, n_in: int = 60) -> tuple[nn.Module, Tensor]:
    sigma = torch.logspace(0, -1.5, n_out, dtype=torch.float64)
    return linear_model(matrix(n_out, n_in, sigma)), sigma


def test_bidiagonalization_obeys_its_relations_and_residuals():
    a = torch.stack([matrix(12, 20, torch.logspace(0, -k, 12, dtype=torch.float64), k) for k in (1, 2, 3)])
    start = torch.randn(3, 12, dtype=torch.float64)
    run = LockstepBidiagonalization(
        lambda u: torch.einsum("rsl,rs->rl", a, u), lambda v: torch.einsum("rsl,rl->rs", a, v), start, 12
    )
    sigma = torch.linalg.svdvals(a)
    for step in range(1, 13):
        run.step()
        found = run.bidiagonals()
        gap = (found.values[:, :, None] - sigma[:, None, :]).abs().min(2).values
        assert (gap <= found.residuals + 1e-10).all()
        assert (found.values[:, 0] <= sigma[:, 0] + 1e-10).all()
        q = run.basis
        torch.testing.assert_close(q @ q.mT, torch.eye(step).double().expand(3, -1, -1), rtol=0, atol=1e-10)
        c = a @ a.mT
        first, second = found.captured
        torch.testing.assert_close(first, torch.einsum("rms,rst,rmt->r", q, c, q))
        torch.testing.assert_close(second, (q @ c).square().sum((1, 2)))
    torch.testing.assert_close(run.bidiagonals().values, sigma, rtol=1e-6, atol=1e-9)


def test_bidiagonalization_of_an_exhausted_space():
    a = torch.diag(torch.tensor([2.0, 2.0, 0.0, 0.0], dtype=torch.float64))[None]
    run = LockstepBidiagonalization(
        lambda u: torch.einsum("rsl,rs->rl", a, u), lambda v: torch.einsum("rsl,rl->rs", a, v),
        torch.ones(1, 4, dtype=torch.float64), 4,
    )  # fmt: skip
    for _ in range(4):
        run.step()
    found = run.bidiagonals()
    assert float(found.values[0, 0]) == pytest.approx(2)
    integral = float((found.weights * found.values.square()).sum())
    assert integral == pytest.approx(2.0)  # u₁ᵀ A Aᵀ u₁ with two of four entries seen


def test_error_bars_of_the_estimates_cover():
    """Energies, dimensionality, volume and rank: z-scores over 30 seeds of 3 samples."""
    model, sigma = spread_model(24, 30)
    x = torch.randn(3, 30, dtype=torch.float64)
    energy = sigma.square()
    exact = {
        "energy": float(energy.sum()),
        "participation": float(energy.sum() ** 2 / energy.square().sum()),
        "volume": float(sigma.log().sum()),
    }
    scores: dict[str, list[float]] = {name: [] for name in exact}
    means: dict[str, list[float]] = {name: [] for name in exact}
    for seed in range(30):
        g = fk.geometry(
            model,
            x,
            method="matrix-free",
            seed=seed,
            probes=8,
            volume_steps=24,
            max_steps=3,
            rtol=1e-3,
            params=(),
        )
        pairs = {
            "energy": (g.frobenius.values.square(), 2 * g.frobenius.values * g.frobenius.errors),
            "participation": (g.local_dimensionality.values, g.local_dimensionality.errors),
            "volume": (g.log_volume.values, g.log_volume.errors),
        }
        for name, (values, errors) in pairs.items():
            scores[name] += ((values - exact[name]) / errors).tolist()
            means[name] += values.tolist()
        assert (g.max_sensitivity.values <= sigma[0] * (1 + 1e-9)).all()
        assert (g.max_sensitivity.upper >= sigma[0] * (1 - 1e-9)).all()
    for name, z in scores.items():
        inside = float(
            (torch.tensor(z).abs() < 2.36).double().mean()
        )  # 95 % of Student's t with 7 degrees of freedom
        assert inside > 0.8, name
        values = torch.tensor(means[name])
        bias = float(values.mean() - exact[name]) / float(values.std() / len(values) ** 0.5)
        assert abs(bias) < 4, name


def test_a_quadrature_that_has_not_converged_is_bracketed():
    model, sigma = spread_model()
    x = torch.randn(1, 60, dtype=torch.float64)
    short = fk.geometry(model, x, method="matrix-free", probes=200, volume_steps=6, params=())
    truth = float(sigma.log().sum())
    error = float(short.log_volume.errors[0])
    assert float(short.log_volume.values[0]) > truth - 4 * error
    assert float(short.log_volume.lower[0]) < truth + 4 * error
    assert float(short.log_volume.lower[0]) < float(short.log_volume.values[0])


def test_rank_and_pseudo_volume_by_quadrature():
    """A gap between the kept singular values and zero: what the quadrature needs."""
    sigma = torch.linspace(1, 3, 15, dtype=torch.float64)
    model = linear_model(matrix(40, 60, sigma))
    g = fk.geometry(
        model, torch.randn(2, 60).double(), method="matrix-free", probes=64, volume_steps=25, params=()
    )
    assert g.log_volume.rank_deficient == 2
    assert "a Ritz value shows it" in g.log_volume.notes[0]
    for i in range(2):
        assert abs(float(g.rank.values[i]) - 15) < 4 * float(g.rank.errors[i])
        gap = float(g.pseudo_log_volume().values[i] - sigma.log().sum())
        assert abs(gap) < 4 * float(g.pseudo_log_volume().errors[i])
    with pytest.raises(ValueError, match="threshold"):
        g.pseudo_log_volume(0.1)


def test_leading_singular_values_and_their_volume():
    sigma = torch.cat([torch.tensor([30.0, 20.0, 10.0]), torch.linspace(1, 0.1, 37)]).double()
    model = linear_model(matrix(40, 60, sigma))
    x = torch.randn(2, 60, dtype=torch.float64)
    g = fk.geometry(model, x, method="matrix-free", rtol=1e-3, max_steps=20, probes=0, params=())
    assert g.singular_values.shape[1] >= 1
    k = g.singular_values.shape[1]
    torch.testing.assert_close(g.singular_values, sigma[:k].expand(2, -1), rtol=2e-3, atol=0)
    torch.testing.assert_close(g.top_log_volume(1).values, sigma[0].log().expand(2), rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="singular values have converged"):
        g.top_log_volume(39)
    with pytest.raises(ValueError, match="condition_number"):
        _ = g.condition_number
    assert math.isnan(g.log_volume.mean)
    assert math.isnan(g.sharpness.value)


def test_an_unconverged_run_says_so():
    model, _ = spread_model()
    x = torch.randn(1, 60, dtype=torch.float64)
    g = fk.geometry(model, x, method="matrix-free", rtol=1e-9, max_steps=3, probes=0, params=())
    assert any("residual above rtol" in note for note in g.notes)


def test_float32_and_small_memory_change_nothing_else():
    model, x = networks()["vgg"]
    want = fk.geometry(model, x, method="matrix-free", rtol=1e-6, probes=0, params=())
    for dtype, memory in ((torch.float64, 60_000), (torch.float32, None)):
        m, y = model.to(dtype), x.to(dtype)
        g = fk.geometry(m, y, method="matrix-free", rtol=1e-6, probes=0, params=(), max_memory=memory)
        torch.testing.assert_close(g.max_sensitivity.values, want.max_sensitivity.values, rtol=1e-4, atol=0)
        assert g.dtype == dtype


def test_half_precision_models_keep_vectors_in_single():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 6)), torch.randn(3, 12)
    want = torch.linalg.svdvals(input_jacobian(model.double(), x.double()))
    model, x = model.bfloat16(), x.bfloat16()
    for method in ("cotangents", "tangents", "matrix-free"):
        g = fk.geometry(
            model, x, method=method, probes=0, params=(), layers=() if method == "cotangents" else None
        )
        torch.testing.assert_close(g.max_sensitivity.values, want[:, 0], rtol=3e-2, atol=0)


def test_auto_chooses_by_cost():
    x = torch.randn(2, 300)
    assert fk.geometry(nn.Linear(300, 5), x, params=()).method == "cotangents"
    wide = nn.Sequential(nn.Linear(4, 600), nn.Tanh())
    assert fk.geometry(wide, torch.randn(2, 4), params=()).method == "tangents"
    both = nn.Linear(300, 500)
    assert fk.geometry(both, x, params=(), probes=0).method == "matrix-free"
    assert (
        fk.geometry(both, x, params=(), probes=8, volume_steps=40).method == "cotangents"
    )  # no dearer, and exact
    assert fk.geometry(nn.Linear(300, 100), x, params=(), probes=0, max_memory=20_000).method == "matrix-free"


def test_nothing_is_left_behind():
    model, x = networks()["attention"]
    model.head.bias.requires_grad_(False)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    wanted = [p.requires_grad for p in model.parameters()]
    rng = torch.get_rng_state()
    fk.geometry(model, x, method="matrix-free", source="encoder.linear1", target="head")
    with pytest.raises(ValueError, match="does not depend differentiably"):
        fk.geometry(model, x, method="matrix-free", source="head", target="encoder")
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), rng)
    assert not x.requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"source": "nope"}, ValueError, "source: 'nope' is no module"),
        ({"target": "2#3"}, ValueError, "target: '2#3' was not called"),
        ({"source": "2#3"}, ValueError, "source: '2#3' was not called"),
        ({"source": 3}, TypeError, "source: expected a module's name"),
        ({"method": "fast"}, ValueError, "method: expected one of"),
        ({"rtol": 2}, ValueError, "rtol"),
        ({"probes": -1}, ValueError, "probes"),
        ({"max_steps": 0}, ValueError, "max_steps"),
        ({"volume_steps": 1.5}, ValueError, "volume_steps"),
        ({"subspace": []}, ValueError, "subspace: it is empty"),
        ({"subspace": [0, 0]}, ValueError, "subspace: an index is there twice"),
        ({"subspace": [7]}, ValueError, "subspace: an index lies outside the 3 entries"),
        ({"subspace": torch.ones(3, 2)}, ValueError, "linearly dependent"),
        ({"subspace": torch.ones(4, 1)}, ValueError, "N = 3 entries"),
        ({"subspace": [True, False, True]}, TypeError, "subspace"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    model, x = networks()["mlp tanh"]
    with pytest.raises(error, match=message):
        fk.geometry(model, x, **arguments)
