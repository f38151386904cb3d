"""Rank deficiency, NaN, infinities, empty sizes, refused arguments."""

from __future__ import annotations

import pytest
import torch

from flatkern import kernels
from flatkern.kernels._select import using

from .helpers import both, dtypes, spd


@both
@dtypes
@pytest.mark.parametrize("c", [2, 5, 8, 10, 33, 130])
def test_dependent_rows_are_minus_infinity(which, dtype, c):
    x = torch.randn(8, c, c + 9, dtype=dtype)
    x[1, -1] = x[1, 0]
    x[3, -1] = 2 * x[3, 0]
    x[4, 0] = 0
    x[6] = 0
    bad = torch.tensor([False, True, False, True, True, False, True, False])
    with using(which):
        stats = kernels.gram_stats(x)
        G = kernels.gram(x)
        logdet = kernels.spd_logdet(G)
    assert torch.equal(stats.rank_deficient, bad)
    assert torch.equal(stats.logdet.isneginf(), bad)
    assert torch.equal(logdet.isneginf(), bad)
    assert stats.trace.isfinite().all()
    assert stats.frobenius_sq.isfinite().all()


@both
@dtypes
def test_a_combination_of_rows_counts_as_dependent(which, dtype):
    x = torch.randn(50, 6, 40, dtype=dtype)
    x[:, 5] = x[:, 0] - 2 * x[:, 1] + 0.5 * x[:, 2]
    with using(which):
        assert kernels.gram_stats(x).rank_deficient.all()


@both
@dtypes
def test_more_rows_than_columns_is_rank_deficient_by_construction(which, dtype):
    with using(which):
        stats = kernels.gram_stats(torch.randn(5, 7, 6, dtype=dtype))
    assert stats.rank_deficient.all()
    assert stats.logdet.isneginf().all()


@both
@dtypes
@pytest.mark.parametrize("c", [2, 3, 9])
def test_indefinite_is_minus_infinity_never_nan(which, dtype, c):
    G = spd(6, c, 10.0, dtype)
    G[0] = -G[0]
    G[1, 0, 0] = 0
    G[2, -1, -1] = -1
    G[3] = 0
    G[4, 1, 0] = G[4, 0, 1] = 1e15  # the elimination overflows float32
    with using(which):
        value = kernels.spd_logdet(G)
    assert value[:5].isneginf().all()
    assert value[5].isfinite()


@both
@dtypes
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("c", [1, 3, 6, 12])
def test_nan_and_infinities_give_nan_for_their_sample_alone(which, dtype, value, c):
    G = spd(20, c, 10.0, dtype)
    G[3, -1, 0] = value
    G[17, -1, -1] = value
    x = torch.randn(20, c, c + 2, dtype=dtype)
    x[3, -1, 0] = value
    x[17, 0, -1] = value
    bad = torch.zeros(20, dtype=torch.bool)
    bad[[3, 17]] = True
    with using(which):
        assert torch.equal(kernels.spd_logdet(G).isnan(), bad)
        stats = kernels.gram_stats(x)
    assert torch.equal(stats.logdet.isnan(), bad)
    assert torch.equal(~stats.trace.isfinite(), bad)
    assert not stats.rank_deficient.any()


@both
@dtypes
def test_nan_wins_over_rank_deficiency(which, dtype):
    G = torch.zeros(1, 4, 4, dtype=dtype)
    G[0, 3, 2] = torch.nan
    x = torch.zeros(1, 5, 3, dtype=dtype)
    x[0, 4, 2] = torch.nan
    with using(which):
        assert kernels.spd_logdet(G).isnan().all()
        assert kernels.gram_stats(x).logdet.isnan().all()


@both
@dtypes
def test_empty_sizes(which, dtype):
    with using(which):
        assert torch.equal(kernels.spd_logdet(torch.zeros(3, 0, 0, dtype=dtype)), torch.zeros(3, dtype=dtype))
        none = kernels.gram_stats(torch.zeros(3, 0, 5, dtype=dtype))
        assert torch.equal(none.logdet, torch.zeros(3, dtype=torch.float64))
        assert not none.rank_deficient.any()
        flat = kernels.gram_stats(torch.zeros(3, 2, 0, dtype=dtype))
        assert flat.rank_deficient.all()
        assert flat.logdet.isneginf().all()
        assert torch.equal(flat.trace, torch.zeros(3, dtype=torch.float64))
        assert torch.equal(
            kernels.gram(torch.zeros(2, 3, 0, dtype=dtype)), torch.zeros(2, 3, 3, dtype=torch.float64)
        )
        assert kernels.gram(torch.zeros(2, 0, 3, dtype=dtype)).shape == (2, 0, 0)


FUNCTIONS = [
    kernels.spd_logdet,
    kernels.gram,
    kernels.gram_stats,
    kernels.gram_singular_values,
    kernels.gram_spectrum,
]


@both
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64, torch.complex128]
)
def test_other_dtypes_raise_and_name_the_supported_ones(which, function, dtype):
    with using(which), pytest.raises(TypeError, match=r"torch\.float32 or torch\.float64"):
        function(torch.ones(2, 3, 3, dtype=dtype))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_other_refusals(function):
    with pytest.raises(TypeError, match="Tensor"):
        function([[1.0]])
    with pytest.raises(TypeError, match="layout"):
        function(torch.eye(3).to_sparse())
    with pytest.raises(ValueError, match="two dimensions"):
        function(torch.ones(3))
    with pytest.raises(ValueError, match="square"):
        kernels.spd_logdet(torch.ones(2, 3, 4))


@both
def test_gradient_of_masked_samples_is_zero_and_of_the_others_honest(which):
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    x[1, 0] = x[1, 1]
    x.requires_grad_()
    with using(which):
        stats = kernels.gram_stats(x)
        masked = torch.where(stats.rank_deficient, 0.0, stats.logdet).sum()
        (grad,) = torch.autograd.grad(masked, x, retain_graph=True)
        assert grad.isfinite().all()
        assert (grad[1] == 0).all()
        assert (grad[0] != 0).all()
        (whole,) = torch.autograd.grad(stats.logdet.sum(), x)
        assert whole[1].isnan().all()
        assert whole[[0, 2]].isfinite().all()
        _, tangent = torch.func.jvp(
            lambda x: kernels.gram_stats(x).logdet, (x.detach(),), (torch.ones_like(x),)
        )
    assert tangent[1].isnan()
    assert tangent[[0, 2]].isfinite().all()


@both
def test_threads_do_not_change_the_result(which):
    x = torch.randn(5000, 10, 33, dtype=torch.float32)
    before = torch.get_num_threads()
    try:
        with using(which):
            torch.set_num_threads(1)
            one = kernels.gram_stats(x)
            torch.set_num_threads(2)
            two = kernels.gram_stats(x)
    finally:
        torch.set_num_threads(before)
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-12)
