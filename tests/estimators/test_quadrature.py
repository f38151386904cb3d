"""Lanczos and its quadratures: exactness, and the side each rule is on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupted import symmetric

from flatkern.estimators.common import make_generator
from flatkern.estimators.function_trace import Integrand
from flatkern.estimators.lanczos import LockstepLanczos
from flatkern.estimators.probes import Probes
from flatkern.estimators.quadrature import check_signs
from flatkern.operators import as_operator

FUNCTIONS = {
    "log": (torch.log, "bernstein"),
    "sqrt": (torch.sqrt, "bernstein"),
    "inverse": (torch.reciprocal, "completely_monotone"),
    "exp(-x)": (lambda x: torch.exp(-x), "completely_monotone"),
    "exp": (lambda x: torch.exp(x / 10), "absolutely_monotone"),
}


def lanczos(matrix, steps, probes=3, seed=0, keep=10**6):
    op = as_operator(matrix)
    start = Probes(op, make_generator(seed, None, op.device)).signs(probes) / len(matrix) ** 0.5
    run = LockstepLanczos(op, start, keep=keep)
    for _ in range(steps):
        run.step()
    return run, start


def forms(matrix, start, f):
    values, vectors = torch.linalg.eigh(matrix.double())
    return ((start.double() @ vectors) ** 2) @ f(values)


@pytest.mark.parametrize(
    "values", [torch.linspace(1, 3, 20), torch.logspace(-3, 2, 20), torch.linspace(-2, 5, 20)]
)
def test_n_steps_find_a_simple_spectrum(values):
    run, _ = lanczos(symmetric(values), 20)
    for nodes in run.tridiagonals().gauss().nodes:
        assert torch.allclose(nodes, values.double(), rtol=0, atol=1e-12 * float(values.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "values",
    [torch.cat([torch.logspace(2, 4, 10), torch.linspace(-1, 1, 290)]), torch.logspace(-12, 6, 300)],
    ids=["outliers", "graded"],
)
def test_one_pass_keeps_the_basis_orthogonal(values, dtype):
    run, _ = lanczos(symmetric(values).to(dtype), 120)
    alive = int((run.tridiagonals().off_diagonal[0] > 0).sum())
    basis = torch.cat(run._filled(120), dim=1)[0, :alive].double()
    off = basis @ basis.T - torch.eye(alive)
    assert off.abs().max() < 100 * torch.finfo(dtype).eps


@pytest.mark.parametrize("keep", [0, 3, 10**6])
@pytest.mark.parametrize("steps", [1, 2, 5])
def test_degrees_of_exactness(steps, keep):
    matrix = symmetric(torch.linspace(-1, 1, 40))
    run, start = lanczos(matrix, steps, keep=keep)
    runs = run.tridiagonals()
    for rule, degree in (
        (runs.gauss(), 2 * steps - 1),
        (runs.radau(-1.5), 2 * steps),
        (runs.radau(1.2), 2 * steps),
    ):
        assert torch.allclose(rule.weights.sum(1), torch.ones(3, dtype=torch.float64))
        for d in range(degree + 2):
            exact = forms(matrix, start, lambda x, d=d: x**d)
            gap = (rule.integrate(lambda x, d=d: x**d) - exact).abs().max()
            assert (gap < 1e-13) == (d <= degree)


def test_radau_has_the_node():
    run, _ = lanczos(symmetric(torch.linspace(1, 2, 30)), 4)
    for node in (0.5, 2.5):
        nodes = run.tridiagonals().radau(node).nodes
        assert nodes.shape == (3, 5)
        assert torch.allclose((nodes - node).abs().amin(1), torch.zeros(3, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("keep", [0, 10**6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_each_bound_is_on_its_side(name, keep, dtype):
    f, signs = FUNCTIONS[name]
    values = torch.cat([torch.tensor([40.0, 25.0, 15.0]), torch.linspace(0.02, 1, 97)])
    matrix = symmetric(values).to(dtype)
    slack = 200 * torch.finfo(dtype).eps * 40 / 0.02
    floor, ceiling = 0.02 * (1 - 1e-3), 40.0 * (1 + 1e-3)
    gauss_below = signs != "bernstein"
    floor_below = signs != "completely_monotone"
    for steps in (1, 3, 8, 20, 40):
        run, start = lanczos(matrix, steps, keep=keep)
        runs, exact = run.tridiagonals(), forms(matrix, start, f)
        sign = 1 if gauss_below else -1
        assert (sign * (exact - runs.gauss().integrate(f)) >= -slack).all()
        sign = 1 if floor_below else -1
        assert (sign * (exact - runs.radau(floor).integrate(f)) >= -slack).all()
        assert (sign * (exact - runs.radau(ceiling).integrate(f)) <= slack).all()
        both = Integrand(f, signs, floor, ceiling, False, torch.finfo(dtype).eps).evaluate(runs)
        assert (both.lower <= exact + slack).all()
        assert (both.upper >= exact - slack).all()
        if steps <= 3 and dtype == torch.float64:  # the bounds say something: they are not the value itself
            assert (both.upper > both.lower).all()
    assert (both.upper - both.lower).max() < 2e-2 * exact.abs().max()


def test_a_tight_floor_is_kept_off_the_ritz_values():
    # most of the spectrum sits at the floor, as with a GGN of low rank and a shift
    values = torch.cat([torch.full((160,), 1e-3), torch.logspace(-2, 2, 40)])
    matrix = symmetric(values)
    for steps in (5, 30, 60):
        run, start = lanczos(matrix, steps)
        exact = forms(matrix, start, torch.log)
        both = Integrand(torch.log, "bernstein", 1e-3, None, True, 2e-16).evaluate(run.tridiagonals())
        assert (both.lower <= exact + 1e-8).all()
        assert (both.upper >= exact - 1e-8).all()
    assert both.width < 1e-6


def test_an_exhausted_run_is_exact():
    run, start = lanczos(symmetric([1.0] * 20 + [3.0] * 20), 9)
    rule = run.tridiagonals()
    exact = forms(symmetric([1.0] * 20 + [3.0] * 20), start, torch.log)
    for quadrature in (rule.gauss(), rule.radau(0.5)):
        assert torch.allclose(quadrature.integrate(torch.log), exact, rtol=1e-12)


def test_state_and_restore_are_bit_identical():
    matrix = symmetric(torch.linspace(-1, 4, 80)).float()
    for keep in (0, 7, 100):
        whole, start = lanczos(matrix, 25, keep=keep)
        half, _ = lanczos(matrix, 12, keep=keep)
        other = LockstepLanczos(as_operator(matrix), torch.zeros_like(start), keep=keep)
        other.restore({key: value.clone() for key, value in half.state().items()})
        for _ in range(13):
            other.step()
        for a, b in zip(whole.state().values(), other.state().values(), strict=True):
            assert torch.equal(a, b)


def test_functions_are_checked():
    runs = lanczos(symmetric(torch.linspace(-1, 1, 10)), 4)[0].tridiagonals()
    for f, error, text in (
        (torch.log, ValueError, "Ritz value"),
        (lambda x: 1.0, TypeError, "tensor"),
        (lambda x: x.sum(), ValueError, "shape"),
        (lambda x: x.float(), ValueError, "float64"),
    ):
        with pytest.raises(error, match=text):
            runs.gauss().integrate(f)
    check_signs(torch.log, (-1, 1), 0.1, 9.0)
    check_signs(lambda x: 0 * x, (1, -1), 0.1, 9.0)
    for f, signs in (
        (torch.sin, (-1, 1)),
        (torch.log, (1, -1)),
        (torch.square, (-1, 1)),
        (torch.exp, (1, -1)),
    ):
        with pytest.raises(ValueError, match="bracket"):
            check_signs(f, signs, 0.1, 9.0)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-6, 3).map(lambda e: 10.0**e), min_size=1, max_size=6),
    st.integers(1, 6),
    st.integers(1, 30),
    st.sampled_from([0, 4, 1000]),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 99),
)
def test_brackets_of_any_spectrum(values, copies, steps, keep, dtype, seed):
    matrix = symmetric(values * copies, seed).to(dtype)
    run, start = lanczos(matrix, min(steps, len(matrix)), seed=seed, keep=keep)
    eps, runs = torch.finfo(dtype).eps, run.tridiagonals()
    delta = min(values)  # A + δ I has the floor δ and no zero

    def f(x):
        return torch.log(x.clamp(min=0) + delta)

    both = Integrand(f, "bernstein", 0.0, 1.5 * max(values), False, eps).evaluate(runs)
    exact = forms(matrix, start, f)
    slack = 500 * eps * max(values) / delta + 1e-12
    assert (both.lower <= exact + slack).all()
    assert (both.upper >= exact - slack).all()
