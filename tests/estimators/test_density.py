"""Spectral densities: exact moments, merged ghosts, error bands."""

import matplotlib as mpl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupted import Failing, KilledError, symmetric

from flatkern.estimators import NotSymmetricError, eigsh, spectral_density
from flatkern.estimators.common import make_generator
from flatkern.estimators.lanczos import LockstepLanczos
from flatkern.estimators.probes import Probes
from flatkern.estimators.spectrum import merge_close
from flatkern.operators import as_operator

SPREAD = symmetric(torch.linspace(-1, 1, 60))
OUTLIERS = symmetric(torch.cat([torch.tensor([50.0, 49.0, 20.0]), torch.linspace(-1, 1, 197)]))


@pytest.mark.parametrize("reorthogonalize", [True, False])
@pytest.mark.parametrize("steps", [1, 3, 7])
def test_each_probe_is_exact_to_degree_2m_minus_1(steps, reorthogonalize):
    op = as_operator(SPREAD)
    vectors = Probes(op, make_generator(7, None, op.device)).signs(4) / 60**0.5
    result = spectral_density(SPREAD, probes=4, steps=steps, seed=7, reorthogonalize=reorthogonalize)
    power = vectors
    for degree in range(2 * steps):
        exact = (vectors * power).sum(1)
        assert torch.allclose(result.moment(degree).samples, exact, rtol=0, atol=1e-13)
        power = power @ SPREAD
    beyond = (vectors * power).sum(1)
    assert not torch.allclose(result.moment(2 * steps).samples, beyond, rtol=0, atol=1e-8)


def test_weights_sum_to_one_and_moments_have_true_errors():
    for seed in range(3):
        d = spectral_density(OUTLIERS, probes=8, steps=30, seed=seed)
        assert d.nodes.shape == d.weights.shape == (8, 30)
        assert torch.allclose(d.weights.sum(1), torch.ones(8, dtype=torch.float64))
        assert d.matvecs == 240
        for degree in range(5):
            exact = float(torch.linalg.matrix_power(OUTLIERS, degree).trace()) / 200
            assert abs(float(d.moments[degree]) - exact) <= 5 * float(d.stderr[degree]) + 1e-12
            assert float(d.moments[degree]) == pytest.approx(d.moment(degree).value, rel=1e-12)


def test_moment_intervals_cover():
    exact = float(OUTLIERS.square().sum()) / 200
    runs = [spectral_density(OUTLIERS, probes=12, steps=4, seed=s) for s in range(200)]
    covered = [abs(float(d.moments[2]) - exact) <= 2.2 * float(d.stderr[2]) for d in runs]  # t with 11 d.o.f.
    assert sum(covered) >= 176


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ghosts_are_merged(dtype):
    matrix = OUTLIERS.to(dtype)
    d = spectral_density(matrix, probes=3, steps=150, reorthogonalize=False, seed=0)
    nodes, weights = d.merged()
    assert float(weights.sum()) == pytest.approx(1.0, rel=1e-6)
    assert (nodes.diff() > d.resolution).all()
    for value in (50.0, 49.0, 20.0):
        near = (nodes - value).abs() < 1e-3
        assert float(weights[near].sum()) * 200 == pytest.approx(
            float(d.weights[(d.nodes - value).abs() < 1e-3].sum()) * 200 / 3, rel=1e-9
        )
        assert near.sum() <= 3
    dense = spectral_density(matrix.double(), probes=3, steps=150, reorthogonalize=True, seed=0)
    grid = torch.linspace(-3, 55, 200)
    gap = (d.density(grid, 0.5).values - dense.density(grid, 0.5).values).abs().sum() * 58 / 200
    assert float(gap) < 1e-4


def test_merging():
    nodes = torch.tensor(
        [[0.0, 1.0, 1.0 + 1e-9, 1.0 + 2e-9, 5.0], [1.0, 2.0, 3.0, 4.0, 5.0]], dtype=torch.float64
    )
    weights = torch.tensor([[0.1, 0.2, 0.3, 0.2, 0.2], [0.2] * 5], dtype=torch.float64)
    merged, total = merge_close(nodes, weights, 2e-9)
    assert total[0].tolist() == pytest.approx([0.1, 0.7, 0.0, 0.0, 0.2])
    assert merged[0].tolist() == pytest.approx([0, 1, 1, 1, 5])
    assert torch.equal(merged[1], nodes[1])
    assert torch.equal(total[1], weights[1])


def test_density_and_cumulative_against_the_spectrum():
    exact = torch.linalg.eigvalsh(OUTLIERS)
    d = spectral_density(OUTLIERS, probes=60, steps=60, seed=0)
    grid = torch.linspace(-2, 52, 300, dtype=torch.float64)
    sigma = 0.7
    curve = d.density(grid, sigma)
    truth = torch.exp(-0.5 * ((grid[:, None] - exact) / sigma) ** 2).mean(1) / (sigma * (2 * torch.pi) ** 0.5)
    assert ((curve.values - truth).abs() <= 5 * curve.stderr + 1e-6).all()
    whole = d.density()
    assert float(torch.trapezoid(whole.values, whole.grid)) == pytest.approx(1, rel=1e-3)
    steps = d.cumulative([-2.0, 0.0, 10.0, 30.0, 60.0])
    assert steps.values[0] == 0
    assert steps.values[-1] == pytest.approx(1.0)
    share = torch.tensor([(exact <= x).double().mean() for x in (-2.0, 0.0, 10.0, 30.0, 60.0)])
    assert (steps.values - share).abs().max() < 0.02
    assert (steps.values.diff() >= 0).all()


def test_one_probe_has_no_error_band():
    d = spectral_density(SPREAD, probes=1, steps=5, seed=0)
    assert d.stderr is None
    assert d.density().stderr is None
    assert d.cumulative().stderr is None


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0])
def test_multiples_of_the_identity(value):
    d = spectral_density(value * torch.eye(30, dtype=torch.float64), probes=3, steps=10, seed=0)
    nodes, weights = d.merged()
    assert nodes.tolist() == pytest.approx([value])
    assert weights.tolist() == pytest.approx([1.0])
    assert torch.isfinite(d.density().values).all()


def test_steps_beyond_the_dimension_and_one_by_one():
    d = spectral_density(torch.tensor([[4.0]]), seed=0)
    assert d.nodes.shape == (8, 1)
    assert d.moments.tolist() == [1, 4, 16, 64, 256]
    small = symmetric([1.0, 2.0, 2.0, 7.0])
    d = spectral_density(small, probes=50, steps=40, seed=0)
    assert d.nodes.shape == (50, 4)
    assert d.merged()[0].tolist() == pytest.approx([1.0, 2.0, 7.0])


def test_plot():
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    d = spectral_density(OUTLIERS, probes=4, steps=30, seed=0)
    ax = d.plot(label="H")
    assert ax.get_yscale() == "log"
    assert len(ax.collections) == 1
    assert d.plot(ax, sigma=0.1) is ax
    spectral_density(OUTLIERS, probes=1, steps=5, seed=0).plot(plt.subplots()[1])
    plt.close("all")


def test_seeds_and_the_global_state():
    before = torch.get_rng_state()
    a, b = spectral_density(SPREAD, seed=1), spectral_density(SPREAD, seed=1, progress=True)
    assert torch.equal(a.nodes, b.nodes)
    spectral_density(SPREAD)
    assert torch.equal(before, torch.get_rng_state())


def test_products_are_blocks_of_all_probes():
    class Recorder:
        shape, dtype, device = (60, 60), torch.float64, torch.device("cpu")
        calls = ()

        def __matmul__(self, v):
            self.calls = (*self.calls, v.shape)
            return SPREAD @ v

    recorder = Recorder()
    op = as_operator(recorder)
    run = LockstepLanczos(op, Probes(op, make_generator(0, None, op.device)).signs(5) / 60**0.5)
    for _ in range(7):
        run.step()
    assert recorder.calls == ((60, 5),) * 7


def test_bad_arguments_are_named():
    d = spectral_density(SPREAD, probes=2, steps=3, seed=0)
    nan = SPREAD.clone()
    nan[0, 0] = float("inf")
    for call, error, text in (
        (lambda: spectral_density(torch.ones(3, 4)), ValueError, "square"),
        (lambda: spectral_density(SPREAD, probes=0), ValueError, "probes"),
        (lambda: spectral_density(SPREAD, steps=0), ValueError, "steps"),
        (lambda: spectral_density(nan, seed=0), FloatingPointError, "NaN"),
        (lambda: spectral_density(torch.triu(torch.ones(50, 50)), seed=0), NotSymmetricError, "symmetric"),
        (lambda: d.density(sigma=0.0), ValueError, "sigma"),
        (lambda: d.density(grid=[[1.0]]), ValueError, "grid"),
        (lambda: d.cumulative(grid=[float("nan")]), ValueError, "grid"),
        (lambda: d.moment(-1), ValueError, "degree"),
    ):
        with pytest.raises(error, match=text):
            call()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3, allow_subnormal=False), min_size=1, max_size=25),
    st.integers(1, 40),
    st.booleans(),
    st.integers(0, 99),
)
def test_any_spectrum(values, steps, reorthogonalize, seed):
    matrix = symmetric(values, seed)
    d = spectral_density(matrix, probes=3, steps=steps, reorthogonalize=reorthogonalize, seed=seed)
    assert torch.allclose(d.weights.sum(1), torch.ones(3, dtype=torch.float64))
    scale = max(map(abs, values)) + 1e-300
    assert d.nodes[d.weights > 1e-12].abs().max() <= scale * (1 + 1e-9)
    assert torch.isfinite(d.density().values).all()


# -- outliers counted exactly ------------------------------------------------------------------------------
def test_deflation_counts_outliers_exactly_and_shrinks_the_error():
    pairs = eigsh(OUTLIERS, k=3, seed=0, tol=1e-9)
    exact = [float(torch.linalg.matrix_power(OUTLIERS, d).trace()) / 200 for d in range(5)]
    plain = spectral_density(OUTLIERS, probes=8, steps=30, seed=0)
    for given_as in (pairs, (pairs.values, pairs.vectors)):
        d = spectral_density(OUTLIERS, probes=8, steps=30, seed=0, deflate=given_as)
        assert d.matvecs == 8 * 30 + 3
        assert torch.allclose(d.weights.sum(1), torch.ones(8, dtype=torch.float64))
        assert (d.nodes.diff(dim=1) >= 0).all()
        assert d.stderr[1] < plain.stderr[1] / 4
        assert (d.stderr[2:] < plain.stderr[2:] / 100).all()
        assert ((d.moments - torch.tensor(exact)).abs() <= 5 * d.stderr + 1e-9).all()
        nodes, weights = d.merged()
        for value in (50.0, 49.0, 20.0):
            near = (nodes - value).abs() < 1e-6
            assert float(weights[near].sum()) * 200 == pytest.approx(1.0)
        assert float(d.cumulative([10.0]).values) == pytest.approx(197 / 200)
        assert float(d.cumulative([10.0]).stderr) == pytest.approx(0.0, abs=1e-12)


def test_deflation_is_unbiased_and_its_intervals_cover():
    pairs = eigsh(OUTLIERS, k=3, seed=0)
    exact = float(OUTLIERS.square().sum()) / 200
    runs = [spectral_density(OUTLIERS, probes=12, steps=4, seed=s, deflate=pairs) for s in range(100)]
    gaps = torch.stack([d.moments[2] for d in runs]) - exact
    assert abs(float(gaps.mean())) <= 4 * float(gaps.std()) / 10 + 1e-7
    covered = [abs(float(d.moments[2]) - exact) <= 2.2 * float(d.stderr[2]) for d in runs]  # t with 11 d.o.f.
    assert sum(covered) >= 87


def test_deflated_runs_stay_out_of_the_outliers():
    pairs = eigsh(OUTLIERS.float(), k=3, seed=0)
    d = spectral_density(OUTLIERS.float(), probes=3, steps=80, seed=0, reorthogonalize=False, deflate=pairs)
    nodes, weights = d.merged()
    assert float(weights[nodes > 10].sum()) * 200 == pytest.approx(3.0, abs=1e-4)


def test_only_converged_eigenpairs_of_this_operator_are_taken():
    pairs = eigsh(OUTLIERS, k=3, seed=0)
    values, vectors = pairs.values, pairs.vectors
    for given_as, error, text in (
        ((values, vectors[:, :2]), ValueError, "expected values"),
        ((values, vectors.float()), TypeError, "float32"),
        ((values + 1, vectors), ValueError, "residual"),
        ((values, torch.linalg.qr(torch.randn(200, 3, dtype=torch.float64)).Q), ValueError, "residual"),
        ((values[[0, 0]], vectors[:, [0, 0]]), ValueError, "orthonormal"),
        (3, TypeError, "Eigenpairs"),
    ):
        with pytest.raises(error, match="deflate.*" + text):
            spectral_density(OUTLIERS, seed=0, deflate=given_as)


# -- runs that end early -----------------------------------------------------------------------------------
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path):
    pairs = eigsh(OUTLIERS, k=2, seed=0)
    for case, options in enumerate(({}, {"reorthogonalize": 5}, {"deflate": (pairs.values, pairs.vectors)})):
        options = {"probes": 4, "steps": 12, "seed": 3} | options
        op = Failing(OUTLIERS)
        whole, blocks = spectral_density(op, **options), op.blocks
        for after in range(0, blocks, 3):
            path = tmp_path / f"{case}-{after}.npz"
            kept = {"checkpoint": path, "checkpoint_seconds": 0}
            with pytest.raises(KilledError):
                spectral_density(Failing(OUTLIERS, after), **options, **kept)
            again = Failing(OUTLIERS)
            d = spectral_density(again, **options, **kept)
            assert torch.equal(d.nodes, whole.nodes)
            assert torch.equal(d.weights, whole.weights)
            assert torch.equal(d.moments, whole.moments)
            assert d.matvecs == whole.matvecs
            assert again.blocks <= blocks - after + 2
        for other in ({"seed": 4}, {"steps": 13}, {"reorthogonalize": False}):
            with pytest.raises(ValueError, match="checkpoint"):
                spectral_density(OUTLIERS, **(options | other), **kept)


def test_ctrl_c_returns_the_steps_made(tmp_path):
    path, options = tmp_path / "state.npz", {"probes": 4, "steps": 12, "seed": 3}
    d = spectral_density(Failing(OUTLIERS, 6, interrupt=True), checkpoint=path, **options)
    assert not d.converged
    assert d.notes == ("interrupted after 7 of 12 steps",)
    assert d.nodes.shape == (4, 7)
    assert torch.equal(d.nodes, spectral_density(OUTLIERS, **(options | {"steps": 7})).nodes)
    whole = spectral_density(Failing(OUTLIERS), checkpoint=path, **options)
    assert whole.converged
    assert torch.equal(whole.nodes, spectral_density(Failing(OUTLIERS), **options).nodes)


def test_the_budget_ends_a_run():
    d = spectral_density(OUTLIERS, probes=4, steps=12, seed=3, max_matvecs=31)
    assert d.matvecs == 28
    assert not d.converged
    with pytest.raises(ValueError, match="max_matvecs"):
        spectral_density(OUTLIERS, probes=4, max_matvecs=3)


def test_a_few_kept_vectors_are_worth_most_of_a_whole_basis():
    values = torch.cat([torch.logspace(1, 2, 8), torch.linspace(-1, 1, 592)]).double()
    matrix = symmetric(values).float()

    def distance(keep):
        d = spectral_density(matrix, probes=4, steps=60, seed=0, reorthogonalize=keep)
        grid = torch.linspace(-2, 101, 20000, dtype=torch.float64)
        truth = (values <= grid[:, None]).double().mean(1)
        return float((d.cumulative(grid).values - truth).abs().sum())

    none, few, all_of_them = distance(0), distance(15), distance(True)
    assert all_of_them < few < none
    assert few < 0.5 * (none + all_of_them)
