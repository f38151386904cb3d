"""The diagonal: exact cases, unbiased entries, honest errors, flags."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spectra import CASES, FLAT, POWER, symmetric
from torch import nn

from flatkern.estimators import NotSymmetricError, diagonal
from flatkern.operators import ggn


def test_exact_cases():
    for matrix in (torch.diag(torch.arange(1.0, 101.0)), torch.zeros(50, 50), FLAT):
        result = diagonal(matrix, method="exact")
        torch.testing.assert_close(result.values, matrix.double().diagonal())
        assert (result.method, result.matvecs, result.converged) == ("exact", len(matrix), True)
        assert not result.stderr.any()
    entries = torch.arange(1.0, 101.0)
    one = diagonal(torch.diag(entries), samples=2, method="hutchinson", seed=0)  # no variance
    assert torch.equal(one.values, entries.double())
    low_rank = symmetric([5.0, -2.0, 1.0] + [0.0] * 60)
    result = diagonal(low_rank, samples=6, method="xdiag", seed=1)
    torch.testing.assert_close(result.values, low_rank.diagonal(), rtol=1e-11, atol=1e-12)
    assert result.matvecs == 12
    zero = diagonal(torch.zeros(50, 50), samples=4, method="xdiag", seed=0)
    assert not zero.values.any()
    assert not zero.stderr.any()


@pytest.mark.parametrize("method", ["hutchinson", "xdiag"])
@pytest.mark.parametrize("case", list(CASES))
def test_unbiased_entries_with_their_own_errors(case, method):
    matrix, n = CASES[case], 150
    runs = [diagonal(matrix, samples=12, method=method, seed=s) for s in range(n)]
    errors = torch.stack([r.values for r in runs]) - matrix.diagonal()
    deviation = errors.mean(0) / (errors.std(0) / n**0.5)
    assert deviation.abs().max() < 4.5
    assert 0.6 < float(deviation.square().mean()) < 1.9  # few independent entries: outliers correlate them
    stated = torch.stack([r.stderr for r in runs]).square().mean(0).sqrt()
    ratio = stated / errors.square().mean(0).sqrt()
    assert 0.9 < float(ratio.median()) < 1.2
    assert float(ratio.min()) > 0.6
    inside = (errors.abs() <= 1.796 * torch.stack([r.stderr for r in runs])).double().mean()
    assert inside >= 0.85


def test_a_tolerance_is_planned_for_and_met():
    for case, matrix in CASES.items():
        runs = [diagonal(matrix, rtol=0.3, seed=s) for s in range(20)]
        errors = torch.tensor(
            [float((r.values - matrix.diagonal()).norm() / matrix.diagonal().norm()) for r in runs]
        )
        assert errors.square().mean().sqrt() <= 0.36, case
        assert sum(r.converged for r in runs) >= 12
        assert all(r.relative_error <= 0.3 for r in runs if r.converged)
        assert all(r.notes for r in runs if not r.converged)
    assert diagonal(FLAT, rtol=1e-3, seed=0).method == "exact"
    cut = diagonal(FLAT, rtol=1e-3, max_matvecs=60, seed=0)
    assert cut.matvecs <= 60
    assert not cut.converged
    assert "max_matvecs" in cut.notes[0]


def test_a_network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    op = ggn(model, nn.CrossEntropyLoss(), (torch.randn(20, 5).double(), torch.arange(20) % 3))
    truth = op.to_dense().diagonal()
    exact = diagonal(op)
    assert exact.method == "xdiag" or exact.method == "exact"
    torch.testing.assert_close(diagonal(op, method="exact").values, truth)
    result = diagonal(op, samples=20, method="xdiag", seed=0, progress=True)
    assert ((result.values - truth).abs() <= 6 * result.stderr + 1e-12).all()


def test_nonsymmetric_operators():
    g = torch.Generator().manual_seed(0)
    matrix = torch.randn(70, 70, generator=g, dtype=torch.float64)
    result = diagonal(matrix, samples=300, method="hutchinson", seed=0)
    assert ((result.values - matrix.diagonal()).abs() <= 5 * result.stderr).all()
    assert diagonal(matrix, rtol=0.5, seed=0).method != "xdiag"
    for kwargs in ({"samples": 16}, {"rtol": 0.1}):
        with pytest.raises(NotSymmetricError, match="op"):
            diagonal(matrix, method="xdiag", seed=0, **kwargs)


def test_bad_arguments_are_named():
    nan = FLAT.clone()
    nan[3, 3] = float("nan")
    for kwargs, error, text in (
        ({"samples": 1}, ValueError, "samples"),
        ({"samples": 81, "method": "xdiag"}, ValueError, "samples"),
        ({"samples": 8, "rtol": 0.1}, ValueError, "rtol"),
        ({"rtol": -1.0}, ValueError, "rtol"),
        ({"method": "bekas"}, ValueError, "method"),
        ({"method": "exact", "max_matvecs": 10}, ValueError, "max_matvecs"),
        ({"method": "xdiag", "max_memory": 100}, ValueError, "max_memory"),
        ({"seed": -1}, ValueError, "seed"),
    ):
        with pytest.raises(error, match=text):
            diagonal(FLAT, **kwargs)
    for method in ("exact", "hutchinson", "xdiag", "auto"):
        with pytest.raises(FloatingPointError, match="NaN"):
            diagonal(nan, method=method, seed=0)


@given(
    st.lists(st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 2.0, -1.0, 1e6]), min_size=2, max_size=24),
    st.sampled_from(["xdiag", "hutchinson"]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_any_spectrum(values, method, dtype):
    matrix = symmetric(values).to(dtype)
    result = diagonal(matrix, samples=max(2, len(values) // 2), method=method, seed=0)
    assert bool(torch.isfinite(result.values).all())
    assert bool(torch.isfinite(result.stderr).all())
    assert result.stderr.dtype == torch.float64


def test_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    assert torch.equal(diagonal(POWER, samples=5, seed=2).values, diagonal(POWER, samples=5, seed=2).values)
    assert torch.equal(before, torch.get_rng_state())
