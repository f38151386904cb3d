"""Stated 90 % intervals cover the truth, at a width that is not bought; the automatic choice is a good one."""

import pytest
import torch
from spectra import CASES

from flatkern.estimators import trace
from flatkern.operators import as_operator
from flatkern.results import Estimate
from flatkern.student import student_quantile


def check(case, method, rtol, seeds, least):
    matrix = as_operator(CASES[case])
    matrix.semidefinite = case != "flat"
    truth = float(CASES[case].trace())
    runs = [trace(matrix, rtol=rtol, method=method, seed=s, max_matvecs=4000) for s in range(seeds)]
    intervals = [r.interval(0.90) for r in runs]
    inside = [low - 1e-12 * truth <= truth <= high + 1e-12 * truth for low, high in intervals]
    assert sum(inside) >= least * seeds, sum(inside) / seeds
    # the fixed-size interval of as many values with the error that the runs really have
    width = sum(high - low for low, high in intervals) / seeds
    errors = torch.tensor([r.value - truth for r in runs])
    dof = sorted(r.dof or 10**6 for r in runs)[seeds // 2]
    assert (
        width <= 1.5 * 2 * student_quantile(0.95, dof) * float(errors.square().mean().sqrt()) + 1e-9 * truth
    )
    assert abs(errors.mean()) < 4 * errors.std() / seeds**0.5 + 1e-12 * truth
    assert sum(r.converged for r in runs) >= 0.6 * seeds
    return runs


@pytest.mark.parametrize("method", ["auto", "hutchinson", "hutch++", "xtrace"])
@pytest.mark.parametrize("case", ["flat", "skewed"])
def test_intervals_cover(case, method):
    check(case, method, 0.1, 60, 0.80)


@pytest.mark.slow
@pytest.mark.parametrize("rtol", [0.03, 0.1])
@pytest.mark.parametrize("method", ["auto", "hutchinson", "hutch++", "xtrace"])
@pytest.mark.parametrize("case", list(CASES))
def test_intervals_cover_over_400_seeds(case, method, rtol):
    check(case, method, rtol, 400, 0.85)


def test_the_automatic_choice_follows_the_spectrum():
    # large enough that the exact way does not win
    def methods(values, **attributes):
        op = as_operator(Diagonalized(torch.as_tensor(values, dtype=torch.float64)))
        op.__dict__.update(attributes)
        return {trace(op, rtol=0.01, seed=s, max_matvecs=10**5).method for s in range(3)}

    i = torch.arange(1, 3001, dtype=torch.float64)
    assert methods(torch.linspace(-1, 3, 3000)) == {"hutchinson"}
    assert methods(torch.cat([torch.tensor([300.0, -200.0, 100.0]), 1e-3 * i[3:].cos()])) == {"xtrace"}
    assert methods(i**-2.0, semidefinite=True) == {"xnystrace"}


class Diagonalized:
    """H diag(λ) H with a Householder reflection H along a random vector: dense, and quick to apply."""

    dtype = torch.float64

    def __init__(self, values):
        g = torch.Generator().manual_seed(0)
        self.values, self.shape = values, (len(values), len(values))
        signs = torch.randn(8, len(values), generator=g, dtype=torch.float64)
        self.mirrors = signs / signs.norm(dim=1, keepdim=True)

    def __matmul__(self, block):
        for v in self.mirrors:
            block = block - 2 * v[:, None] * (v @ block)
        block = self.values[:, None] * block
        for v in self.mirrors.flip(0):
            block = block - 2 * v[:, None] * (v @ block)
        return block


def test_intervals_of_an_estimate():
    from scipy.stats import t

    for probability in (0.02, 0.5, 0.6, 0.9, 0.95, 0.995, 0.9999):
        for dof in (1, 2, 3, 4, 15, 16, 99, 100, 999, 1000, 10**6):
            expected = t.ppf(probability, dof)
            assert student_quantile(probability, dof) == pytest.approx(expected, rel=2e-7, abs=1e-12)
    assert Estimate(value=3.0).interval() == (3.0, 3.0)
    low, high = Estimate(value=3.0, stderr=1.0).interval(0.95)
    assert (low, high) == pytest.approx((3 - 1.959964, 3 + 1.959964), abs=1e-5)
    for level in (0.0, 1.0, -1.0, 2.0):
        with pytest.raises(ValueError, match="level"):
            Estimate(value=3.0, stderr=1.0).interval(level)
    with pytest.raises(ValueError, match="dof"):
        student_quantile(0.9, 0)
    with pytest.raises(ValueError, match="probability"):
        student_quantile(1.0, 3)
