"""What `gram_stats` says of the rank, and samples whose Gram matrix has lost its digits."""

from __future__ import annotations

import pytest
import torch

from flatkern import kernels
from flatkern.kernels._select import using

from .helpers import both, dtypes, oracle_rows_logdet, rows


@both
@pytest.mark.parametrize("c", [2, 4, 10, 33, 140])
@pytest.mark.parametrize("condition", [1e3, 1e6, 1e9, 1e12])
def test_a_lost_gram_is_replaced_by_the_rows_own_factor(which, condition, c):
    """The error grows with the condition number, not with its square."""
    x = rows(12, c, c + 7, condition)
    x[5] = torch.randn(c, c + 7, dtype=torch.float64)  # well conditioned beside the others
    with using(which):
        stats = kernels.gram_stats(x)
    assert not stats.rank_deficient.any()
    assert (stats.bad_pivots == 0).all()
    eps = torch.finfo(torch.float64).eps
    # the Gram matrix is trusted down to a pivot ratio of 1e-8
    allowed = 200 * c * (min(condition, 1e8) ** 2 * eps if condition < 1e4 else condition * eps) + 1e-6
    assert (stats.logdet - oracle_rows_logdet(x)).abs().max() <= allowed
    assert stats.pivot_ratio[5] > 1e-3 / c


@both
@pytest.mark.parametrize("d", [600, 1100])
def test_long_rows_are_factored_block_by_block(which, d):
    x = rows(3, 5, d, 1e9)
    with using(which):
        stats = kernels.gram_stats(x)
    assert (stats.logdet - oracle_rows_logdet(x)).abs().max() < 1e-5
    assert not stats.rank_deficient.any()


@both
@dtypes
@pytest.mark.parametrize("c", [3, 8, 12, 130])
def test_pivots_are_those_of_the_orthogonalized_rows(which, dtype, c):
    x = torch.randn(9, c, c + 4, dtype=dtype)
    R = torch.linalg.qr(x.double().mT, mode="r").R
    expected = (R.diagonal(dim1=1, dim2=2).square() / x.double().square().sum(-1)).amin(-1)
    with using(which):
        stats = kernels.gram_stats(x)
    torch.testing.assert_close(stats.pivot_ratio, expected, rtol=1e-7, atol=0)
    assert stats.pivot_ratio.dtype == torch.float64
    assert stats.bad_pivots.dtype == torch.int64


@both
@dtypes
@pytest.mark.parametrize("c", [3, 9, 20])
@pytest.mark.parametrize("rank", [1, 2])
def test_bad_pivots_count_what_is_missing_from_full_rank(which, dtype, c, rank):
    x = torch.randn(7, c, rank, dtype=dtype) @ torch.randn(7, rank, c + 3, dtype=dtype)
    full = torch.randn(7, c, c + 3, dtype=dtype)
    full[3, 1] = 0
    full[4, 0] = torch.nan
    with using(which):
        stats, other = kernels.gram_stats(x), kernels.gram_stats(full)
        tall = kernels.gram_stats(torch.randn(2, c, 2, dtype=dtype))
        nothing = kernels.gram_stats(torch.zeros(2, c, 4, dtype=dtype))
    assert (stats.bad_pivots == c - rank).all()
    assert (stats.pivot_ratio.abs() < 1e-12).all()
    assert other.bad_pivots.tolist() == [0, 0, 0, 1, 0, 0, 0]
    assert other.pivot_ratio[3] == 0
    assert other.pivot_ratio[4].isnan()
    assert tall.bad_pivots.tolist() == [c - 2] * 2
    assert nothing.bad_pivots.tolist() == [c] * 2
    assert nothing.pivot_ratio.tolist() == [0.0] * 2


@both
@pytest.mark.parametrize("c", [3, 10])
@pytest.mark.parametrize("condition", [1e2, 1e7, 1e10])
def test_the_gradient_keeps_its_digits(which, c, condition):
    """∂ log det = 2 (x⁺)ᵀ, from the singular value decomposition."""
    x = rows(6, c, c + 5, condition).requires_grad_()
    U, S, Vh = torch.linalg.svd(x.detach(), full_matrices=False)
    expected = 2 * (U / S[:, None]) @ Vh
    with using(which):
        (got,) = torch.autograd.grad(kernels.gram_stats(x).logdet.sum(), x)
        _, tangent = torch.func.jvp(
            lambda x: kernels.gram_stats(x).logdet, (x.detach(),), (torch.ones_like(x),)
        )
    error = (got - expected).abs().amax((1, 2)) / expected.abs().amax((1, 2))
    assert error.max() < 1e-14 * condition * c + 1e-10 * (condition > 1e3) + 1e-8
    torch.testing.assert_close(tangent, expected.sum((1, 2)), rtol=1e-4, atol=0)


@both
@dtypes
@pytest.mark.parametrize("shape", [(0, 4, 6), (2, 3, 4, 6), (4, 6)])
def test_gradients_of_every_batch_shape(which, dtype, shape):
    x = torch.randn(shape, dtype=dtype).mT.contiguous().mT.requires_grad_()
    with using(which):
        (got,) = torch.autograd.grad(sum(t.sum() for t in kernels.gram_stats(x)[:3]), x)
    wide = x.detach().double().requires_grad_()
    G = wide @ wide.mT
    value = torch.linalg.slogdet(G).logabsdet.sum() + wide.square().sum() + G.square().sum()
    (expected,) = torch.autograd.grad(value, wide)
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected.to(dtype), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@both
@dtypes
@pytest.mark.parametrize("c", [1, 5, 16, 64, 128, 129, 300, 1024])
def test_every_size_class_forward_and_backward(which, dtype, c):
    x = (rows(2, c, c + 9, 20.0, dtype) * 3).requires_grad_()
    U, S, Vh = torch.linalg.svd(x.detach().double(), full_matrices=False)
    with using(which):
        stats = kernels.gram_stats(x)
        (got,) = torch.autograd.grad(stats.logdet.sum(), x)
    torch.testing.assert_close(stats.logdet, 2 * S.log().sum(-1), rtol=1e-11, atol=1e-10 * c)
    torch.testing.assert_close(got.double(), 2 * (U / S[:, None]) @ Vh, rtol=1e-5, atol=1e-5)
