"""Singular values through Gram matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flatkern import kernels
from flatkern.kernels._select import compiled_available, using

from .helpers import both, dtypes, rows

SIZES = [1, 2, 3, 5, 8, 9, 10, 16, 31, 33, 64, 65]


@both
@dtypes
@pytest.mark.parametrize("c", SIZES)
def test_values_against_svdvals(which, dtype, c):
    n = 21 if c < 20 else 5
    x = torch.randn(n, c, c + 6, dtype=dtype)
    expected = torch.linalg.svdvals(x.double())
    with using(which):
        got, other = kernels.gram_singular_values(x), kernels.gram_singular_values(x.mT)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(other, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.skipif(not compiled_available(), reason="no compiled kernels")
@pytest.mark.parametrize("c", [3, 10, 32, 64])
@pytest.mark.parametrize("condition", [10.0, 1e4])
def test_eigenvalues_are_no_worse_than_twice_those_of_eigvalsh(c, condition):
    """Of the Gram matrix; the oracle is the decomposition of the rows."""
    x = rows(40, c, c + 3, condition)
    expected = torch.linalg.svdvals(x).square()
    theirs = (torch.linalg.eigvalsh(x @ x.mT).flip(-1) - expected).abs().max()
    with using("compiled"):
        ours = (kernels.gram_singular_values(x).square() - expected).abs().max()
    assert ours <= 2 * theirs + 4 * torch.finfo(torch.float64).eps


@both
@pytest.mark.parametrize("c", [2, 5, 10, 40])
@pytest.mark.parametrize("least", [1e-6, 1e-9, 1e-12])
def test_a_small_value_is_found_although_the_gram_has_lost_it(which, c, least):
    x = rows(10, c, c + 4, 10.0)
    U, S, Vh = torch.linalg.svd(x, full_matrices=False)
    S[1::2, -1] = least
    x = U * S[:, None] @ Vh
    with using(which):
        got = kernels.gram_singular_values(x)
    torch.testing.assert_close(got, S, rtol=1e-14 / least + 1e-9, atol=0)


@pytest.mark.cpu_kernels
@both
@pytest.mark.parametrize("c", [3, 12, 70])
def test_not_precise_leaves_small_values_to_the_gram(which, c):
    x = rows(5, c, c + 4, 1e9)
    expected = torch.linalg.svdvals(x)
    with using(which):
        got = kernels.gram_singular_values(x, precise=False)
        exact = kernels.gram_singular_values(x)
    torch.testing.assert_close(got[:, 0], expected[:, 0], rtol=1e-12, atol=0)
    assert ((got.square() - expected.square()).abs() < 1e-15 * c**2).all()
    assert ((got[:, -1] - expected[:, -1]).abs() > 1e-10).any()
    torch.testing.assert_close(exact, expected, rtol=1e-5, atol=0)


@both
@pytest.mark.parametrize("c", [4, 12])
def test_repeated_and_zero_values(which, c):
    x = torch.zeros(6, c, c + 1, dtype=torch.float64)
    x[0, :, :c] = torch.eye(c, dtype=torch.float64)
    x[1, :, :c] = torch.diag(torch.arange(c) % 2 + 1.0)
    x[2, 0, 0] = 3
    x[3] = 1
    x[4, 1:, :c] = torch.eye(c, dtype=torch.float64)[1:] * 1e150
    with using(which):
        got = kernels.gram_spectrum(x)
    expected = torch.linalg.svdvals(x)
    assert ((got.singular_values - expected).abs() <= 1e-14 * c * expected[:, :1]).all()
    ratio = expected.square().sum(-1).square() / expected.pow(4).sum(-1)
    torch.testing.assert_close(got.participation_ratio[:4], ratio[:4])
    assert got.participation_ratio[5] == 0
    assert got.log_volume.isneginf().tolist() == [False, False, True, True, True, True]
    with using(which):
        assert kernels.gram_spectrum(x, 1).log_volume[2] == torch.tensor(3.0, dtype=torch.float64).log()


@both
@dtypes
def test_statistics(which, dtype):
    x = torch.randn(2, 7, 4, 30, dtype=dtype)
    values = torch.linalg.svdvals(x.double())
    with using(which):
        s = kernels.gram_spectrum(x, 3)
    torch.testing.assert_close(s.sigma_max, values[..., 0])
    torch.testing.assert_close(s.log_volume, values[..., :3].log().sum(-1))
    torch.testing.assert_close(
        s.participation_ratio, values.square().sum(-1).square() / values.pow(4).sum(-1)
    )


@both
@dtypes
def test_strides_empty_sizes_and_not_finite(which, dtype):
    x = torch.randn(9, 5, 8, dtype=dtype)
    x[2, 0, 0] = torch.nan
    x[6, -1, -1] = torch.inf
    with using(which):
        expected = kernels.gram_singular_values(x)
        assert expected[[2, 6]].isnan().all()
        assert expected[[0, 1, 3, 4, 5, 7, 8]].isfinite().all()
        for same in (x.mT.contiguous().mT, x.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
            torch.testing.assert_close(kernels.gram_singular_values(same), expected, equal_nan=True)
        assert kernels.gram_singular_values(x[:0]).shape == (0, 5)
        assert kernels.gram_singular_values(x[:, :0]).shape == (9, 0)
        assert kernels.gram_spectrum(x[:, :, :0]).sigma_max.tolist() == [0.0] * 9
        assert kernels.gram_spectrum(x).log_volume[2].isnan()


@both
def test_gradient_of_a_value_that_the_gram_has_lost(which):
    x = rows(4, 5, 9, 1e8).requires_grad_()
    U, S, Vh = torch.linalg.svd(x.detach(), full_matrices=False)
    with using(which):
        (got,) = torch.autograd.grad(kernels.gram_singular_values(x).log().sum(), x)
    expected = (U / S[:, None]) @ Vh
    assert ((got - expected).abs().amax((1, 2)) / expected.abs().amax((1, 2))).max() < 1e-5


def test_refusals():
    x = torch.randn(2, 3, 5)
    for k in (0, 4, -1):
        with pytest.raises(ValueError, match="between 1 and"):
            kernels.gram_spectrum(x, k)
    for k in (True, 1.0):
        with pytest.raises(TypeError, match="integer"):
            kernels.gram_spectrum(x, k)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_over_arrays(dtype):
    native = pytest.importorskip("flatkern.native")
    x = np.random.default_rng(0).standard_normal((300, 6, 19)).astype(dtype)
    expected = np.linalg.svd(x.astype(np.float64), compute_uv=False)
    for same in (x, np.asfortranarray(x), np.swapaxes(x, 1, 2)):
        np.testing.assert_allclose(native.gram_singular_values(same, threads=2), expected, rtol=1e-9)
    with pytest.raises(ValueError, match="64"):
        native.gram_singular_values(np.ones((65, 70)))
    with pytest.raises(TypeError, match="float32 or float64"):
        native.gram_singular_values(np.ones((2, 3), dtype=np.int64))
