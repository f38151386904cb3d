"""Degrees of freedom of sums of variances, against the spread of such sums and the intervals that they give."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flatkern.freedom import SummedVariance
from flatkern.results import Estimate


def _draws(deviations: Tensor, count: int, runs: int) -> Tensor:
    source = torch.Generator().manual_seed(0)
    return deviations * torch.randn(runs, count, len(deviations), generator=source, dtype=torch.float64)


@pytest.mark.parametrize("count", [2, 4, 9])
def test_one_variance_has_its_own_freedom(count: int) -> None:
    found = SummedVariance.of_means(torch.randn(count, 1, dtype=torch.float64))
    assert found.dof == count - 1
    assert found.freedom == pytest.approx(count - 1)


@pytest.mark.parametrize(
    ("weights", "true"), [((1, 1, 1, 1), 4), ((1, 0, 0, 0), 1), ((3, 1, 1, 1, 1, 1, 1), 5.4)]
)
def test_freedom_is_that_of_the_sums_spread(weights: tuple[float, ...], true: float) -> None:
    variances = torch.tensor(weights, dtype=torch.float64)
    effective = float(variances.sum() ** 2 / variances.square().sum())
    assert effective == pytest.approx(true)
    draws = _draws(variances.sqrt(), 5, 4000)
    found = [SummedVariance.of_means(run) for run in draws]
    sums = torch.tensor([f.value for f in found], dtype=torch.float64)
    assert float(sums.mean()) == pytest.approx(float(variances.sum()) / 5, rel=0.05)
    # Var V = 2 V²/ν
    assert 2 * float(sums.mean() ** 2 / sums.var()) == pytest.approx(4 * effective, rel=0.12)
    middle = sorted(f.freedom for f in found)[2000]
    assert middle == pytest.approx(4 * effective, rel=0.25)


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_intervals_cover_where_few_samples_count(samples: int) -> None:
    deviations = torch.full((40,), 1e-3, dtype=torch.float64)
    deviations[:samples] = 1
    covered = 0
    for run in _draws(deviations, 3, 2000):
        error = SummedVariance.of_means(run)
        value = float(run.mean(0).sum())
        low, high = Estimate(value, error.stderr, dof=error.dof).interval(0.9)
        covered += low <= 0 <= high
    assert 0.86 < covered / 2000 < 0.97  # the normal quantile covers 0.77 of the first


def test_sums_scale_and_add() -> None:
    a, b = SummedVariance(), SummedVariance()
    a.add(torch.tensor([1.0, 2.0]), 3)
    b.add(4.0, 1)
    both = a + b
    assert both.value == 7
    assert both.doubt == pytest.approx(5 / 5 + 16 / 3)
    scaled = both.scaled(0.5)
    assert scaled.stderr == pytest.approx(both.stderr / 2)
    assert scaled.freedom == pytest.approx(both.freedom)
    many = SummedVariance()
    many.add(torch.tensor([1.0]), 3, torch.tensor([2.0]))
    assert (many.value, many.doubt) == (2.0, 2 / 5)


def test_nothing_drawn_has_no_freedom_to_state() -> None:
    none = SummedVariance()
    assert (none.stderr, none.dof) == (0.0, None)
    known = SummedVariance()
    known.add(2.0, float("inf"))
    assert known.dof is None
    assert SummedVariance.of_means(torch.randn(1, 3)).dof is None
