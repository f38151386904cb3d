"""Top eigenvalue and trace: flatkern, other packages and the explicit matrix agree."""

import statistics

import pytest
import torch

import flatkern as fk
from tests.operators.explicit import explicit_hessian, make
from tests.peers import products as peers

pytestmark = pytest.mark.peers
LOSS = torch.nn.CrossEntropyLoss()


@pytest.fixture(params=["mlp tanh", "conv"])
def problem(request):
    model, x = make(request.param, 12)
    y = torch.arange(12) % 3
    return model, (x, y), explicit_hessian(model, LOSS, x, y)


@pytest.fixture
def double():
    """PyHessian draws its vectors in the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def largest(model, batch):
    return float(fk.eigsh(fk.hessian(model, LOSS, batch), k=1, which="LM", tol=1e-10, seed=0).values[0])


def test_top_eigenvalue_of_pyhessian(problem, double):
    model, batch, matrix = problem
    values = torch.linalg.eigvalsh(matrix)
    truth = float(values[values.abs().argmax()])
    assert largest(model, batch) == pytest.approx(truth, rel=1e-9)
    peer = peers.pyhessian_operator(model, LOSS, data=batch)
    # its vectors have norm 1 − 1e-6 / |H v|: no closer than that
    (found,), _ = peer.eigenvalues(maxIter=5000, tol=1e-12)
    assert found == pytest.approx(truth, rel=1e-4)


def test_top_eigenvalue_of_hessian_eigenthings(problem):
    model, batch, _ = problem
    algorithms = pytest.importorskip("hessian_eigenthings.algorithms")
    operator = peers.eigenthings_operator(model, LOSS, [batch])
    # its default of 2 k steps is far from converged (15 % off here), as it says
    result = algorithms.lanczos(operator, k=1, max_iter=min(40, operator.size), seed=0)
    assert largest(model, batch) == pytest.approx(float(result.eigenvalues[0]), rel=1e-6)


def test_trace_of_pyhessian(problem, double):
    model, batch, matrix = problem
    truth = float(matrix.trace())
    estimate = fk.trace(fk.hessian(model, LOSS, batch), seed=0)
    assert abs(estimate.value - truth) <= 5 * estimate.stderr + 1e-10 * abs(truth)
    # tol=-1: it never stops early
    samples = peers.pyhessian_operator(model, LOSS, data=batch).trace(maxIter=400, tol=-1)
    stderr = statistics.stdev(samples) / len(samples) ** 0.5
    assert statistics.mean(samples) == pytest.approx(truth, abs=5 * stderr)


def test_trace_of_hessian_eigenthings(problem):
    model, batch, matrix = problem
    algorithms = pytest.importorskip("hessian_eigenthings.algorithms")
    operator = peers.eigenthings_operator(model, LOSS, [batch])
    result = algorithms.trace(operator, num_matvecs=400, method="hutchinson", seed=0)
    assert result.estimate == pytest.approx(float(matrix.trace()), abs=5 * result.stderr)
    ours = fk.trace(fk.hessian(model, LOSS, batch), seed=0)
    assert abs(ours.value - result.estimate) <= 5 * (result.stderr + ours.stderr)
