"""The trace: exact cases, unbiasedness, honest intervals and flags."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flatkern.estimators import trace
from flatkern.operators import hessian


def symmetric(values, seed=0):
    values = torch.as_tensor(values, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64)).Q
    return (q * values) @ q.T


FLAT = symmetric(torch.linspace(-1, 3, 80))
SKEWED = symmetric(torch.cat([torch.tensor([40.0, 25.0, 15.0]), torch.linspace(0, 1, 77)]))
TWO_SIGMA = 0.88  # of 200; a 95 % interval covers fewer with probability 1e-4


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
@pytest.mark.parametrize("matrix", [FLAT, SKEWED], ids=["flat", "skewed"])
def test_unbiased_and_covering_with_a_fixed_number_of_probes(matrix, method):
    truth = float(matrix.trace())
    runs = [trace(matrix, samples=24, method=method, seed=s) for s in range(200)]
    errors = torch.tensor([r.value - truth for r in runs])
    assert abs(errors.mean()) < 4 * errors.std() / 200**0.5
    stderr = torch.tensor([r.stderr for r in runs])
    assert 0.9 < float((stderr.square().mean() / errors.square().mean()).sqrt()) < 1.12
    covered = (errors.abs() <= 2.07 * stderr).double().mean()  # t with 23 degrees of freedom
    assert covered >= TWO_SIGMA
    assert all(r.matvecs == 24 * (1 if method == "hutchinson" else 3) for r in runs)


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
@pytest.mark.parametrize("matrix", [FLAT, SKEWED], ids=["flat", "skewed"])
def test_unbiased_and_covering_with_a_tolerance(matrix, method):
    truth = float(matrix.trace())
    runs = [trace(matrix, rtol=0.03, method=method, seed=s) for s in range(200)]
    errors = torch.tensor([r.value - truth for r in runs])
    stderr = torch.tensor([r.stderr for r in runs])
    assert abs(errors.mean()) < 4 * errors.std() / 200**0.5
    assert (errors.abs() <= 2 * stderr).double().mean() >= TWO_SIGMA
    converged = torch.tensor([r.converged for r in runs])
    assert converged.double().mean() > 0.6
    assert (stderr[converged] <= 0.03 * torch.tensor([abs(r.value) for r in runs])[converged]).all()
    assert all(r.notes for r in runs if not r.converged)


def test_exact_cases():
    diagonal = torch.diag(torch.arange(1.0, 101.0))
    assert float(trace(diagonal, samples=2, seed=0)) == 5050.0
    assert float(trace(torch.zeros(50, 50), seed=0)) == 0.0
    assert float(trace(torch.tensor([[3.0]]), seed=0)) == 3.0
    one = trace(FLAT, method="exact")
    assert (one.method, one.stderr, one.matvecs, one.converged) == ("exact", 0.0, 80, True)
    assert one.value == pytest.approx(float(FLAT.trace()), rel=1e-13)
    low_rank = symmetric([5.0, -2.0, 1.0] + [0.0] * 60)
    estimate = trace(low_rank, samples=5, method="hutch++", seed=1)
    assert estimate.value == pytest.approx(4.0, rel=1e-12)
    assert estimate.stderr < 1e-12


def test_nonsymmetric_operators_have_traces_too():
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(60, 60, generator=g, dtype=torch.float64) + 3 * torch.eye(60, dtype=torch.float64)
    for method in ("hutchinson", "hutch++"):
        estimate = trace(matrix, samples=400, method=method, seed=0)
        assert abs(estimate.value - float(matrix.trace())) < 4 * estimate.stderr + 1e-9


def test_auto_takes_the_exact_way_where_it_is_cheaper():
    assert trace(FLAT, rtol=1e-3, seed=0).method == "exact"
    assert trace(FLAT, rtol=0.2, seed=0).method == "hutchinson"
    assert trace(FLAT, samples=80, seed=0).method == "exact"
    assert trace(FLAT, rtol=1e-3, max_matvecs=70, seed=0).method != "exact"


@pytest.mark.parametrize("method", ["hutchinson", "hutch++"])
def test_the_budget_is_kept_and_said(method):
    for budget in (70, 100, 1000):
        estimate = trace(FLAT, rtol=1e-6, method=method, max_matvecs=budget, seed=0)
        assert estimate.matvecs <= budget
        assert not estimate.converged
        assert "max_matvecs" in estimate.notes[0]
    cut = trace(FLAT, samples=50, max_matvecs=20, seed=0, method="hutchinson")
    assert (cut.matvecs, cut.converged) == (20, False)
    balanced = symmetric([1.0] * 30 + [-1.0] * 30)
    estimate = trace(balanced, rtol=0.1, seed=0, max_matvecs=59)
    assert not estimate.converged
    assert abs(estimate.value) < 5 * estimate.stderr


def test_tolerances_combine_by_the_looser_one():
    loose = trace(FLAT, rtol=1e-9, atol=20.0, seed=0, method="hutchinson")
    assert loose.converged
    assert loose.stderr <= 20


def test_seeds_generators_and_the_global_state():
    before = torch.get_rng_state()
    a, b = trace(FLAT, samples=10, seed=5), trace(FLAT, samples=10, seed=5)
    assert a.value == b.value
    g = torch.Generator().manual_seed(5)
    assert trace(FLAT, samples=10, generator=g).value == a.value
    assert trace(FLAT, samples=10, generator=g).value != a.value
    assert trace(FLAT, samples=10).value != trace(FLAT, samples=10).value
    assert torch.equal(before, torch.get_rng_state())


def test_it_knows_the_data_behind_a_model_operator():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    op = hessian(model, nn.CrossEntropyLoss(), (torch.randn(9, 3).double(), torch.arange(9) % 2))
    estimate = trace(op, samples=20, seed=0, progress=True)
    assert estimate.num_data == 9
    assert estimate.sample_stderr is None
    assert len(estimate.samples) == 20
    assert abs(estimate.value - float(op.to_dense().trace())) < 5 * estimate.stderr


def test_bad_arguments_are_named():
    nan = FLAT.clone()
    nan[3, 3] = float("nan")
    for call, error, text in (
        (lambda: trace(torch.ones(3, 4)), ValueError, "square"),
        (lambda: trace(torch.ones(0, 0)), ValueError, "empty"),
        (lambda: trace("op"), TypeError, "op"),
        (lambda: trace(FLAT, samples=1), ValueError, "samples"),
        (lambda: trace(FLAT, samples=2.0), TypeError, "samples"),
        (lambda: trace(FLAT, rtol=0.0), ValueError, "rtol"),
        (lambda: trace(FLAT, atol=float("nan")), ValueError, "atol"),
        (lambda: trace(FLAT, method="lanczos"), ValueError, "method"),
        (lambda: trace(FLAT, max_matvecs=1), ValueError, "max_matvecs"),
        (lambda: trace(FLAT, method="exact", max_matvecs=10), ValueError, "max_matvecs"),
        (lambda: trace(FLAT, method="hutch++", max_matvecs=30), ValueError, "max_matvecs"),
        (lambda: trace(FLAT, seed=1, generator=torch.Generator()), ValueError, "seed"),
        (lambda: trace(FLAT, generator=3), TypeError, "generator"),
        (lambda: trace(FLAT, seed=-1), ValueError, "seed"),
        (lambda: trace(nan, seed=0), FloatingPointError, "NaN"),
        (lambda: trace(nan, method="exact"), FloatingPointError, "NaN"),
    ):
        with pytest.raises(error, match=text):
            call()


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20),
    st.sampled_from(["auto", "hutchinson", "hutch++", "exact"]),
    st.integers(0, 99),
)
def test_any_spectrum(values, method, seed):
    matrix = symmetric(values, seed)
    estimate = trace(matrix, samples=16, method=method, seed=seed)
    scale = max(abs(v) for v in values) * len(values)
    # six standard errors of 16 probes; tiny spectra leave rounding only
    assert abs(estimate.value - sum(values)) <= 10 * estimate.stderr + 1e-9 * scale + 1e-12
