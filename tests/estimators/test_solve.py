"""Linear solves: true residuals, each method's claims, columns that end apart, runs that survive."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupted import Failing, KilledError, symmetric

from flatkern.estimators import NotDefiniteError, solve

DEFINITE = symmetric(torch.logspace(-2, 1, 120))
INDEFINITE = symmetric(torch.cat([torch.linspace(-1, -0.1, 30), torch.linspace(0.2, 3, 90)]))
SINGULAR = symmetric(torch.cat([torch.zeros(10), torch.linspace(0.2, 3, 110)]))


def sides(count=4, dtype=torch.float64):
    return torch.randn(120, count, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


def true_residuals(matrix, solution, B):
    return torch.linalg.vector_norm(B - matrix @ solution.x.to(B), dim=0) / torch.linalg.vector_norm(B, dim=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("matrix", "method"),
    [
        (DEFINITE, "auto"),
        (DEFINITE, "cg"),
        (DEFINITE, "minres"),
        (INDEFINITE, "auto"),
        (INDEFINITE, "minres"),
    ],
)
def test_residuals_are_the_true_ones(matrix, method, dtype):
    matrix, B = matrix.to(dtype), sides(dtype=dtype)
    s = solve(matrix, B, method=method, tol=1e-3 if dtype == torch.float32 else 1e-10)
    assert s.converged.all()
    assert not [note for note in s.notes if "curvature" not in note]
    assert torch.allclose(s.residuals, true_residuals(matrix, s, B).double(), rtol=0.05)
    if dtype == torch.float64:
        assert torch.allclose(s.x, torch.linalg.solve(matrix, B), rtol=0, atol=1e-6)
        assert s.x.dtype == dtype


def test_negative_curvature_leads_on_to_minres_and_says_so():
    s = solve(INDEFINITE, sides())
    assert s.method == "cg, then minres"
    assert "curvature -" in s.notes[0]
    with pytest.raises(NotDefiniteError, match="pᵀ A p / pᵀ p = -"):
        solve(INDEFINITE, sides(), method="cg")
    assert solve(DEFINITE, sides()).method == "cg"
    negative = solve(-DEFINITE, sides(), tol=1e-9)
    assert negative.converged.all()


def test_one_vector_and_zero_sides():
    B = sides()
    alone = solve(DEFINITE, B[:, 0])
    assert alone.x.shape == (120,)
    assert torch.allclose(alone.x, solve(DEFINITE, B).x[:, 0], atol=1e-6)
    B[:, 1] = 0
    for method in ("cg", "minres"):
        s = solve(DEFINITE, B, method=method, x0=torch.ones_like(B))
        assert s.converged.all()
        assert not s.x[:, 1].any()
        assert s.residuals[1] == 0
    nothing = solve(DEFINITE, torch.zeros(120, 2, dtype=torch.float64))
    assert nothing.converged.all()
    assert nothing.matvecs == 0


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_columns_that_are_done_leave_the_block(method):
    vectors = torch.linalg.eigh(DEFINITE).eigenvectors
    B = torch.stack([vectors[:, 3], sides()[:, 0]], dim=1)  # the first takes one iteration
    op = Failing(DEFINITE)
    s = solve(op, B, method=method)
    assert s.converged.all()
    assert s.matvecs == 2 * 10 + (s.iterations - 10) + 2
    assert op.blocks == 10 + 1


@pytest.mark.parametrize("method", ["cg", "minres"])
def test_preconditioner_and_start(method):
    scale = torch.logspace(-2, 2, 120).double()
    matrix = DEFINITE * 1e-2 + torch.diag(scale)
    B, inverse = sides(), torch.diag(1 / matrix.diagonal())
    plain = solve(matrix, B, method=method)
    for given_as in (inverse, lambda v: inverse @ v, inverse.numpy()):
        s = solve(matrix, B, method=method, preconditioner=given_as)
        assert s.converged.all()
        assert s.iterations < plain.iterations / 2
        assert torch.allclose(s.residuals, true_residuals(matrix, s, B), rtol=1e-3)
    near = solve(matrix, B, method=method, x0=plain.x)
    assert near.converged.all()
    assert near.iterations == 0
    assert near.matvecs == 4
    with pytest.raises(NotDefiniteError, match="preconditioner"):
        solve(matrix, B, method=method, preconditioner=-inverse)


def test_a_singular_operator_gives_least_squares_and_no_convergence():
    B = sides()
    for method in ("minres", "auto"):
        s = solve(SINGULAR, B, method=method)
        least = torch.linalg.lstsq(SINGULAR, B, driver="gelsd").solution
        best = torch.linalg.vector_norm(B - SINGULAR @ least, dim=0) / torch.linalg.vector_norm(B, dim=0)
        assert torch.allclose(s.residuals, best, rtol=1e-4)
        assert not s.converged.any()
        assert "singular" in s.notes[-1]
    inside = solve(SINGULAR, SINGULAR @ B)
    assert inside.converged.all()


def test_rounding_is_not_reported_as_convergence():
    matrix = symmetric(torch.logspace(-5, 1, 120)).float()
    s = solve(matrix, sides(dtype=torch.float32), tol=1e-6, method="minres", max_matvecs=8000)
    measured = true_residuals(matrix.double(), s, sides(dtype=torch.float32).double())
    assert ((measured <= 1.2e-6) | ~s.converged).all()
    assert not s.converged.all()


def test_the_budget_ends_every_run():
    for most in (12, 13, 40, 77):
        s = solve(DEFINITE, sides(), max_matvecs=most)
        assert s.matvecs <= most
        assert not s.converged.any()
        assert "max_matvecs" in s.notes[0]
        assert torch.allclose(s.residuals, true_residuals(DEFINITE, s, sides()), rtol=1e-6)


def test_any_operator_like_object():
    array = DEFINITE.numpy()
    for op in (array, scipy.sparse.linalg.aslinearoperator(array), Failing(DEFINITE)):
        assert solve(op, sides()).converged.all()
    assert solve(array.astype(np.float32), sides(dtype=torch.float32), tol=1e-3).converged.all()


def test_bad_arguments_are_named():
    B, nan = sides(), DEFINITE.clone()
    nan[0, 0] = float("nan")
    for call, error, text in (
        (lambda: solve(torch.ones(3, 4), B), ValueError, "square"),
        (lambda: solve(DEFINITE, B.numpy()), TypeError, "B"),
        (lambda: solve(DEFINITE, B.float()), TypeError, "B"),
        (lambda: solve(DEFINITE, B[:5]), ValueError, "B"),
        (lambda: solve(DEFINITE, B[:, :0]), ValueError, "B"),
        (lambda: solve(DEFINITE, B * float("nan")), FloatingPointError, "B"),
        (lambda: solve(DEFINITE, B, x0=B[:, :1]), ValueError, "x0"),
        (lambda: solve(DEFINITE, B, tol=0.0), ValueError, "tol"),
        (lambda: solve(DEFINITE, B, method="lu"), ValueError, "method"),
        (lambda: solve(DEFINITE, B, max_matvecs=11), ValueError, "max_matvecs"),
        (lambda: solve(DEFINITE, B, preconditioner=torch.eye(3)), ValueError, "preconditioner"),
        (lambda: solve(DEFINITE, B, preconditioner=lambda v: v[:3]), ValueError, "preconditioner"),
        (lambda: solve(nan, B), FloatingPointError, "NaN"),
        (lambda: solve(nan, B, method="minres"), FloatingPointError, "NaN"),
    ):
        with pytest.raises(error, match=text):
            call()


def test_nothing_of_the_callers_is_changed():
    B, x0 = sides(), sides()
    before, start = B.clone(), x0.clone()
    solve(DEFINITE, B, x0=x0)
    assert torch.equal(B, before)
    assert torch.equal(x0, start)


def result(s):
    return s.x.tolist(), s.residuals.tolist(), s.matvecs, s.iterations, s.method, s.notes


@pytest.mark.parametrize(
    ("matrix", "method"), [(DEFINITE, "cg"), (INDEFINITE, "minres"), (INDEFINITE, "auto")]
)
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, matrix, method):
    vectors = torch.linalg.eigh(matrix).eigenvectors
    B = torch.cat([vectors[:, 3:4], sides()], dim=1)
    op = Failing(matrix)
    whole, blocks = solve(op, B, method=method), op.blocks
    for after in (0, 9, 10, 17, blocks - 1):
        path = tmp_path / f"{after}.npz"
        options = {"method": method, "checkpoint": path, "checkpoint_seconds": 0}
        with pytest.raises(KilledError):
            solve(Failing(matrix, after), B, **options)
        again = Failing(matrix)
        assert result(solve(again, B, **options)) == result(whole)
        assert again.blocks <= blocks - after + 1
        finished = Failing(matrix)
        assert result(solve(finished, B, **options)) == result(whole)
        assert finished.blocks == 0
    with pytest.raises(ValueError, match="checkpoint"):
        solve(matrix, 2 * B, **options)


def test_ctrl_c_returns_what_is_there(tmp_path):
    path = tmp_path / "state.npz"
    s = solve(Failing(DEFINITE, 7, interrupt=True), sides(), checkpoint=path)
    assert s.iterations == 8
    assert "interrupted" in s.notes[0]
    assert torch.allclose(s.residuals, true_residuals(DEFINITE, s, sides()), rtol=1e-6)
    whole = solve(Failing(DEFINITE), sides())
    assert result(solve(Failing(DEFINITE), sides(), checkpoint=path)) == result(whole)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(-6, 4).map(lambda e: 10.0**e), min_size=1, max_size=6),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from(["auto", "minres"]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 99),
)
def test_any_spectrum(values, copies, signed, method, dtype, seed):
    values = torch.tensor(values * copies, dtype=torch.float64)
    if signed:
        values[::2] *= -1
    matrix = symmetric(values, seed).to(dtype)
    g = torch.Generator().manual_seed(seed)
    B = matrix @ torch.randn(len(values), 2, generator=g, dtype=torch.float64).to(dtype)
    s = solve(matrix, B, method=method, max_matvecs=2000)
    measured = true_residuals(matrix.double(), s, B.double())
    tol = 1e-4 if dtype == torch.float32 else 1e-8
    assert torch.isfinite(s.x).all()
    assert ((measured <= 1.5 * tol) | ~s.converged).all()
    condition = float(values.abs().max() / values.abs().min())
    if condition < 1e3:
        assert s.converged.all()
