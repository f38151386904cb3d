"""XTrace and XNysTrace: exact where they must be, downdates against brute force, errors that cover."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from spectra import CASES, symmetric

from flatkern.estimators import NotSymmetricError, trace
from flatkern.estimators.xtrace import xtrace_values


@pytest.mark.parametrize("method", ["xtrace", "xnystrace"])
@pytest.mark.parametrize("rank", [0, 1, 3, 7])
def test_exact_with_one_test_vector_more_than_the_rank(method, rank):
    matrix = symmetric([1.0 + j for j in range(rank)] + [0.0] * (60 - rank), rank)
    truth = rank * (rank + 1) / 2
    digits = 1e-12 if method == "xtrace" else 1e-7
    for seed in range(10):
        estimate = trace(matrix, samples=max(2, rank + 1), method=method, seed=seed)
        assert estimate.value == pytest.approx(truth, rel=digits, abs=1e-25)
        assert estimate.stderr <= 10 * digits * truth + 1e-25
        assert estimate.matvecs == max(2, rank + 1) * (2 if method == "xtrace" else 1)
        more = trace(matrix, samples=20, method=method, seed=seed)
        assert more.value == pytest.approx(truth, rel=digits, abs=1e-25)
    if rank > 1:
        fewer = trace(matrix, samples=rank, method=method, seed=0)
        assert abs(fewer.value - truth) > 1e-4 * truth
        assert fewer.stderr > 1e-4 * truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("method", ["xtrace", "xnystrace", "hutch++", "auto"])
def test_finite_on_the_zero_operator(method, dtype):
    zero = torch.zeros(50, 50, dtype=dtype)
    for kwargs in ({"samples": 4}, {"rtol": 0.01}):
        estimate = trace(zero, method=method, seed=0, **kwargs)
        assert abs(estimate.value) < 1e-25
        assert estimate.stderr < 1e-25


def test_as_many_vectors_as_rows():
    matrix = symmetric(torch.linspace(0.1, 2, 12))
    for method in ("xtrace", "xnystrace"):
        estimate = trace(matrix, samples=12, method=method, seed=0)
        assert abs(estimate.value - float(matrix.trace())) < 6 * estimate.stderr + 1e-10


def brute_force(matrix, vectors, leave):
    """The value of vector leave[0] with the range that all but ``leave`` have found, by a fresh QR."""
    rest = [j for j in range(vectors.shape[1]) if j not in leave]
    q = torch.linalg.qr(matrix @ vectors[:, rest]).Q
    w = vectors[:, leave[0]] - q @ (q.T @ vectors[:, leave[0]])
    scale = (len(matrix) - q.shape[1]) / w.dot(w)
    return (q.T @ matrix @ q).trace() + scale * (w @ matrix @ w)


@pytest.mark.parametrize("symmetric_case", [True, False])
def test_downdates_are_what_leaving_out_gives(symmetric_case):
    g = torch.Generator().manual_seed(3)
    matrix = (
        torch.randn(30, 30, generator=g, dtype=torch.float64) @ torch.diag(0.8 ** torch.arange(30.0)).double()
    )
    if symmetric_case:
        matrix = matrix + matrix.T
    m = 6
    vectors = torch.randn(30, m, generator=g, dtype=torch.float64)
    q, c = torch.linalg.qr(matrix @ vectors)
    z = matrix @ q
    values, covariance = xtrace_values(
        c, q.T @ vectors, q.T @ z, z.T @ vectors, vectors.square().sum(0), 30, torch.finfo(torch.float64).eps
    )
    one = torch.stack([brute_force(matrix, vectors, [i]) for i in range(m)])
    torch.testing.assert_close(values, one, rtol=1e-9, atol=1e-9)
    changes = torch.zeros(m, m, dtype=torch.float64)
    for i in range(m):
        for j in range(m):
            if i != j:
                changes[i, j] = one[i] - brute_force(matrix, vectors, [i, j])
    expected = (changes * changes.T).sum() / (m * (m - 1))
    torch.testing.assert_close(covariance, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", ["skewed", "power", "exponential"])
@pytest.mark.parametrize("method", ["xtrace", "xnystrace"])
def test_unbiased_and_the_stated_error_is_the_error(method, case):
    matrix, n = CASES[case], 200
    truth = float(matrix.trace())
    runs = [trace(matrix, samples=16, method=method, seed=s) for s in range(n)]
    errors = torch.tensor([r.value - truth for r in runs])
    assert abs(errors.mean()) < 4 * errors.std() / n**0.5
    stated = torch.tensor([r.stderr for r in runs])
    # the leave-one-out error alone would give 0.6 to 0.75 on the spectra that decay
    assert 0.85 < float((stated.square().mean() / errors.square().mean()).sqrt()) < 1.25
    assert sum(low <= truth <= high for low, high in (r.interval(0.9) for r in runs)) >= 0.85 * n


def test_xnystrace_refuses_indefinite_and_nonsymmetric_operators():
    indefinite = symmetric([-5.0] * 20 + [1.0] * 40)
    for kwargs in ({"samples": 20}, {"rtol": 0.01}):
        with pytest.raises(ValueError, match=r"smallest Ritz value of this one is -"):
            trace(indefinite, method="xnystrace", seed=0, **kwargs)
        lopsided = 50 * torch.eye(60, dtype=torch.float64) + torch.triu(
            torch.ones(60, 60, dtype=torch.float64), 1
        )
        with pytest.raises(NotSymmetricError, match="op"):
            trace(lopsided, method="xnystrace", seed=0, **kwargs)


def test_limits_are_named():
    matrix = CASES["flat"]
    with pytest.raises(ValueError, match="samples"):
        trace(matrix, samples=81, method="xtrace")
    with pytest.raises(ValueError, match="max_memory"):
        trace(matrix, rtol=0.01, method="xtrace", max_memory=4 * 15 * 80 * 8)
    with pytest.raises(ValueError, match="max_matvecs"):
        trace(matrix, samples=20, method="xtrace", max_matvecs=39)
    bounded = trace(matrix, rtol=1e-4, method="xtrace", max_memory=4 * 20 * 80 * 8, seed=0)
    assert len(bounded.samples) <= 20
    assert not bounded.converged
    # where nothing can be kept, the automatic choice keeps nothing
    assert trace(matrix, rtol=0.1, max_memory=1, seed=0).method == "hutchinson"


@given(
    st.lists(st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 2.0, -1.0, 1e6]), min_size=2, max_size=24),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 50),
)
def test_any_spectrum(values, dtype, seed):
    matrix = symmetric(values, seed).to(dtype)
    scale = max(abs(v) for v in values) * len(values)
    estimate = trace(matrix, samples=len(values), method="xtrace", seed=seed)
    rounding = 1e3 * torch.finfo(dtype).eps * scale + 1e-25
    # P test vectors: what is left out of a range is one direction, and its form is the whole error
    assert abs(estimate.value - float(matrix.double().trace())) <= 12 * estimate.stderr + rounding
    if min(values) >= 0:
        estimate = trace(matrix, samples=len(values), method="xnystrace", seed=seed)
        assert abs(estimate.value - float(matrix.double().trace())) <= 12 * estimate.stderr + rounding
