"""Correlations against scipy and by hand."""

import math

import numpy as np
import pytest
from scipy import stats

from flatkern.experiments.correlation import correlate, correlation_table, holm, pearson, spearman


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=12)
    return x, 0.7 * x + rng.normal(size=12)


def test_coefficients_equal_scipys(pair: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = pair
    r, rho, n = correlate(x, y, resamples=300)
    assert n == 12
    assert r.value == pytest.approx(stats.pearsonr(x, y).statistic, rel=1e-12)
    assert r.p_value == pytest.approx(stats.pearsonr(x, y).pvalue)
    assert rho.value == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-12)
    assert rho.p_value == pytest.approx(stats.spearmanr(x, y).pvalue)


def test_by_hand() -> None:
    x, y = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 10.0])
    # deviations of y from its mean 4: −3, −1, −2, 6; Σ dx dy = 4.5 + .5 − 1 + 9 = 13; Σ dx² = 5; Σ dy² = 50
    assert float(pearson(x, y)) == pytest.approx(13 / math.sqrt(250))
    # ranks of y: 1, 3, 2, 4; 1 − 6 Σ d²/(n³ − n) = 1 − 12/60
    assert float(spearman(x, y)) == pytest.approx(0.8)


def test_along_an_axis(pair: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = pair
    table = pearson(np.stack([x, y]), np.stack([y, y]), axis=1)
    assert table[0] == pytest.approx(float(pearson(x, y)))
    assert table[1] == pytest.approx(1.0)


def test_the_interval_is_scipys_bca_and_the_same_every_time(pair: tuple[np.ndarray, np.ndarray]) -> None:
    x, y = pair
    r, _, _ = correlate(x, y, resamples=500, seed=7)
    again, _, _ = correlate(x, y, resamples=500, seed=7)
    assert r == again
    expected = stats.bootstrap(
        (x, y), pearson, paired=True, vectorized=True, n_resamples=500, rng=np.random.default_rng(7)
    ).confidence_interval
    assert (r.low, r.high) == (pytest.approx(expected.low), pytest.approx(expected.high))
    assert r.low < r.value < r.high


def test_intervals_cover() -> None:
    """A nominal 95 % interval of 25 pairs with ρ = 0.5 covers it in most of 60 repetitions."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(60):
        x, y = rng.multivariate_normal([0, 0], [[1, 0.5], [0.5, 1]], size=25).T
        r = correlate(x, y, resamples=300)[0]
        covered += r.low <= 0.5 <= r.high
    assert covered >= 50


def test_values_that_do_not_vary_or_are_not_finite() -> None:
    r, rho, n = correlate([1.0] * 6, [1, 2, 3, 4, 5, 6])
    assert math.isnan(r.value)
    assert math.isnan(rho.value)
    r, _, n = correlate([1, 2, 3, 4, math.inf, math.nan, 5], [2, 4, 6, 8, 1, 1, 10])
    assert n == 5
    assert r.value == pytest.approx(1.0)
    assert math.isnan(correlate([1, 2, 3], [1, 2, 3])[0].value)


def test_holm() -> None:
    # sorted .01 .02 .03 .04, times 4 3 2 1: .04 .06 .06 .04, made monotone
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    corrected = holm([math.nan, 0.5, 0.9])
    assert math.isnan(corrected[0])
    assert corrected[1:] == pytest.approx([1.0, 1.0])


def test_table_has_every_pair_once() -> None:
    rng = np.random.default_rng(2)
    columns = {name: list(rng.normal(size=8)) for name in "abcd"}
    table = correlation_table(columns, resamples=100)
    assert [(c.first, c.second) for c in table] == [
        ("a", "b"), ("a", "c"), ("a", "d"), ("b", "c"), ("b", "d"), ("c", "d")
    ]  # fmt: skip
    assert [c.pearson.p_holm for c in table] == pytest.approx(holm([c.pearson.p_value for c in table]))
