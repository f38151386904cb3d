"""The Hessian's largest eigenvalue against eigvalsh, with its bound, warm start and safety."""

import pytest
import torch
from torch import nn

import flatkern as fk


@pytest.fixture
def problem():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 3)).double()
    return model, nn.CrossEntropyLoss(), (torch.randn(40, 5).double(), torch.arange(40) % 3)


def test_against_eigvalsh(problem):
    model, loss_fn, (x, y) = problem
    for data in ((x, y), [(x[:30], y[:30]), (x[30:], y[30:])]):
        for params in (None, "0.*"):
            exact = torch.linalg.eigvalsh(fk.hessian(*problem, params=params).to_dense())
            for tol in (1e-1, 1e-3, 1e-8):
                result = fk.max_eigenvalue(model, loss_fn, data, params=params, tol=tol, seed=0)
                assert result.converged
                assert result.error_bound <= tol * exact.abs().max() * (1 + 1e-9)
                assert abs(float(result) - exact[-1]) <= result.error_bound + 1e-12
                assert result.vector.shape == (len(exact),)
                assert result.num_data == 40


def test_the_bound_is_the_true_residual(problem):
    op = fk.hessian(*problem)
    for budget in (2, 4, 8):
        result = fk.max_eigenvalue(*problem, tol=1e-12, max_matvecs=budget, seed=0)
        assert not result.converged
        assert result.matvecs <= budget
        residual = (op @ result.vector - result.value * result.vector).norm()
        assert result.error_bound == pytest.approx(float(residual), rel=1e-8)
        nearest = (torch.linalg.eigvalsh(op.to_dense()) - result.value).abs().min()
        assert nearest <= result.error_bound + 1e-12


def test_a_warm_start_while_training(problem):
    model, loss_fn, data = problem
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    result, warm, cold = None, 0, 0
    for _ in range(4):
        optimizer.zero_grad()
        loss_fn(model(data[0]), data[1]).backward()
        optimizer.step()
        gradients = [p.grad.clone() for p in model.parameters()]
        result = fk.max_eigenvalue(model, loss_fn, data, start=result, seed=0)
        fresh = fk.max_eigenvalue(model, loss_fn, data, seed=0)
        exact = torch.linalg.eigvalsh(fk.hessian(model, loss_fn, data).to_dense())[-1]
        assert float(result) == pytest.approx(float(exact), rel=1e-5)
        assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), gradients, strict=True))
        warm, cold = warm + result.matvecs, cold + fresh.matvecs
    assert warm < cold - 8
    pairs = fk.eigsh(fk.hessian(model, loss_fn, data), k=3, seed=0)
    assert fk.max_eigenvalue(model, loss_fn, data, start=pairs, seed=0).converged


def test_options_reach_the_operator_and_the_search(problem, tmp_path):
    model, _, (x, y) = problem
    summed = fk.max_eigenvalue(
        model,
        lambda out, target: nn.functional.cross_entropy(out, target, reduction="sum"),
        (x, y),
        reduction="sum",
        max_memory=0,
        verify=True,
        checkpoint=tmp_path / "run",
        seed=0,
    )
    mean = fk.max_eigenvalue(*problem, seed=0)
    assert summed.verified
    assert not mean.verified
    assert float(summed) == pytest.approx(40 * float(mean), rel=1e-4)
    assert (tmp_path / "run").exists()
    for options, error, text in (
        ({"tol": -1.0}, ValueError, "tol"),
        ({"start": torch.ones(3)}, ValueError, "start"),
        ({"max_matvecs": 1}, ValueError, "max_matvecs"),
        ({"params": "nothing"}, ValueError, "params"),
    ):
        with pytest.raises(error, match=text):
            fk.max_eigenvalue(*problem, **options)


def test_train_mode_is_that_of_the_operator():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double().train()
    given = (model, nn.CrossEntropyLoss(), (torch.randn(20, 5).double(), torch.arange(20) % 3))
    with pytest.raises((ValueError, RuntimeError)):
        fk.max_eigenvalue(*given, seed=1)
    result = fk.max_eigenvalue(*given, train_mode=True, tol=1e-6, seed=1)
    exact = torch.linalg.eigvalsh(fk.hessian(*given, train_mode=True, seed=1).to_dense())[-1]
    assert float(result) == pytest.approx(float(exact), rel=1e-8)
    assert model.training
