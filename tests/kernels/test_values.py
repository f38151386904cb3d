"""Values against float64 oracles: sizes, strides, dtypes, condition numbers."""

from __future__ import annotations

import pytest
import torch

from flatkern import kernels
from flatkern.kernels._select import using

from .helpers import both, dtypes, oracle_logdet, oracle_rows_logdet, rows, spd

SIZES = [1, 2, 3, 5, 7, 8, 10, 31, 32, 33, 64, 65, 100, 128, 129]


@both
@dtypes
@pytest.mark.parametrize("c", SIZES)
def test_spd_logdet_is_no_worse_than_twice_slogdet(which, dtype, c):
    G = spd(21, c, 10.0, dtype)
    expected = oracle_logdet(G)
    allowed = 2 * (torch.linalg.slogdet(G).logabsdet - expected).abs().max() + 2 * c * torch.finfo(dtype).eps
    with using(which):
        got = kernels.spd_logdet(G)
    assert got.dtype == dtype
    assert got.shape == (21,)
    assert (got.double() - expected).abs().max() <= allowed


@both
@dtypes
@pytest.mark.parametrize("c", SIZES)
@pytest.mark.parametrize("extra", [0, 5], ids=["d=c", "d=c+5"])
def test_gram_stats_match_the_oracle(which, dtype, c, extra):
    n = 100 if c <= 10 else 9
    x = rows(n, c, c + extra, 10.0, dtype)
    G = x.double() @ x.double().mT
    with using(which):
        stats = kernels.gram_stats(x)
        product = kernels.gram(x)
    assert {t.dtype for t in stats[:3]} == {torch.float64}
    assert stats.rank_deficient.dtype == torch.bool
    assert not stats.rank_deficient.any()
    torch.testing.assert_close(stats.logdet, oracle_rows_logdet(x), rtol=0, atol=1e-12 * (c + 10))
    torch.testing.assert_close(stats.trace, G.diagonal(dim1=1, dim2=2).sum(-1), rtol=1e-13, atol=0)
    torch.testing.assert_close(stats.frobenius_sq, G.square().sum((1, 2)), rtol=1e-13, atol=0)
    torch.testing.assert_close(product, G, rtol=1e-13, atol=1e-14)
    assert torch.equal(product, product.mT)


def rms(error: torch.Tensor) -> float:
    return float(error.square().mean().sqrt())


@both
@dtypes
@pytest.mark.parametrize("condition", [1e0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("c", [3, 10, 33])
def test_condition_numbers(which, dtype, condition, c):
    G = spd(100, c, condition, dtype)
    expected = oracle_logdet(G)
    theirs = rms(torch.linalg.slogdet(G).logabsdet - expected)
    if which == "reference":  # LAPACK's Cholesky itself, which rounds a little more than its pivoted LU
        diagonal = torch.linalg.cholesky(G).diagonal(dim1=1, dim2=2)
        theirs = max(theirs, rms(2 * diagonal.log().sum(-1) - expected))
    allowed = 2 * theirs + 4 * c * torch.finfo(dtype).eps
    x = rows(100, c, 2 * c + 1, condition, dtype)
    with using(which):
        assert rms(kernels.spd_logdet(G).double() - expected) <= allowed
        # the Gram squares the condition number; in float64 that costs condition² ε, for float32 inputs too
        error = (kernels.gram_stats(x).logdet - oracle_rows_logdet(x)).abs().max()
    assert error <= 1e-12 * c + 10 * c * condition**2 * torch.finfo(torch.float64).eps


@both
@dtypes
@pytest.mark.parametrize("d", [1, 2, 7, 8, 15, 16, 17, 63, 100, 130, 515, 2500])
def test_every_length_of_row(which, dtype, d):
    x = torch.randn(5, 6, d, dtype=dtype)
    with using(which):
        got = kernels.gram(x)
        trace = kernels.gram_stats(x).trace
    torch.testing.assert_close(got, x.double() @ x.double().mT, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(trace, x.double().square().sum((1, 2)), rtol=1e-13, atol=0)


@both
@dtypes
@pytest.mark.parametrize("shape", [(0, 4, 6), (1, 4, 6), (3, 4, 6), (4, 6), (2, 3, 4, 6), (2, 0, 4, 6)])
def test_batch_shapes(which, dtype, shape):
    x = torch.randn(shape, dtype=dtype)
    with using(which):
        G = kernels.gram(x)
        stats = kernels.gram_stats(x)
        value = kernels.spd_logdet(G.to(dtype))
    assert G.shape == (*shape[:-1], 4)
    assert all(t.shape == shape[:-2] for t in stats)
    assert value.shape == shape[:-2]
    torch.testing.assert_close(stats.logdet.to(dtype), value, rtol=1e-3, atol=1e-3)


@both
@dtypes
def test_many_batch_dimensions(which, dtype):
    x = torch.randn(*([2] * 11), 3, 5, dtype=dtype).permute(*reversed(range(11)), 11, 12)
    with using(which):
        got = kernels.gram_stats(x).logdet
        flat = kernels.gram_stats(x.reshape(-1, 3, 5)).logdet
    torch.testing.assert_close(got.reshape(-1), flat)


def layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same numbers in other places: the result must not depend on the strides."""
    n, c, d = x.shape
    wide = torch.full((n, 2 * c, 3 * d + 1), torch.nan, dtype=x.dtype)
    wide[:, ::2, 1::3] = x
    padded = torch.full((n, c, d + 3), torch.nan, dtype=x.dtype)
    padded[..., 2 : d + 2] = x
    return {
        "transposed": x.mT.contiguous().mT,
        "batch last": x.permute(1, 2, 0).contiguous().permute(2, 0, 1),
        "sliced": wide[:, ::2, 1::3],
        "padded": padded[..., 2 : d + 2],
        "unaligned": torch.cat([x.new_zeros(1), x.flatten()])[1:].view(n, c, d),
    }


@both
@dtypes
@pytest.mark.parametrize("c", [2, 3, 4, 10, 33])
def test_strides(which, dtype, c):
    x = torch.randn(19, c, c + 4, dtype=dtype)
    G = spd(19, c, 10.0, dtype)
    with using(which):
        stats, logdet = kernels.gram_stats(x), kernels.spd_logdet(G)
        for name, same in layouts(x).items():
            for got, expected in zip(kernels.gram_stats(same), stats, strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11, msg=name)
        for name, same in layouts(G).items():
            torch.testing.assert_close(kernels.spd_logdet(same), logdet, rtol=1e-5, atol=1e-5, msg=name)


@both
def test_expanded_samples_and_rows(which):
    one = torch.randn(1, 4, 7, dtype=torch.float64)
    with using(which):
        expanded = kernels.gram_stats(one.expand(11, 4, 7))
        assert torch.equal(expanded.logdet, kernels.gram_stats(one).logdet.expand(11))
        assert kernels.gram_stats(one[:, :1].expand(1, 3, 7)).rank_deficient.all()
        assert kernels.spd_logdet(spd(1, 5).expand(3, 2, 5, 5)).shape == (3, 2)


@both
def test_only_the_lower_triangle_is_read(which):
    G = spd(9, 6)
    garbage = G.tril() + torch.full_like(G, torch.nan).triu(1).nan_to_num(nan=1e30)
    garbage = torch.where(torch.ones(6, 6).triu(1).bool(), torch.nan, garbage)
    with using(which):
        torch.testing.assert_close(kernels.spd_logdet(garbage), kernels.spd_logdet(G))


@both
@dtypes
def test_scale_invariance_over_the_whole_range(which, dtype):
    """A pivot is judged against its own diagonal entry, so units of the rows do not matter."""
    x = torch.randn(7, 4, 9, dtype=dtype)
    with using(which):
        base = kernels.gram_stats(x).logdet
        for exponent in (-30, -10, 10, 30):
            scaled = kernels.gram_stats(x * 2.0**exponent)
            torch.testing.assert_close(scaled.logdet, base + 8 * exponent * torch.tensor(2.0).double().log())
        mixed = x * torch.tensor([1e-12, 1.0, 1e6, 1e12], dtype=dtype)[:, None]
        assert not kernels.gram_stats(mixed).rank_deficient.any()


@pytest.mark.slow
@both
@dtypes
@pytest.mark.parametrize("c", range(1, 131))
def test_every_size(which, dtype, c):
    x = rows(17, c, c + 3, 5.0, dtype)
    with using(which):
        stats = kernels.gram_stats(x)
    torch.testing.assert_close(stats.logdet, oracle_rows_logdet(x), rtol=0, atol=1e-11 * (c + 1))


@both
@dtypes
@pytest.mark.parametrize("c", [3, 10, 16, 40])
@pytest.mark.parametrize("threads", [1, 2])
def test_derivatives_past_the_caches_are_those_of_few_samples(which, dtype, c, threads):
    """Large results are stored in another way; an odd number of samples leaves a group unfilled."""
    n = (4 << 20) // (c * c * dtype.itemsize) // 16 * 16 + 21
    G, weight = spd(7, c, 10.0, dtype).repeat(n // 7 + 1, 1, 1)[:n], torch.randn(n, dtype=dtype)
    before = torch.get_num_threads()

    def derivative(part: slice) -> torch.Tensor:
        leaf = G[part].clone().requires_grad_()
        return torch.autograd.grad(kernels.spd_logdet(leaf), leaf, weight[part])[0]

    with using(which):
        torch.set_num_threads(threads)
        try:
            whole = derivative(slice(0, n))
        finally:
            torch.set_num_threads(before)
        halves = [derivative(slice(0, n // 2)), derivative(slice(n // 2, n))]
    torch.testing.assert_close(
        whole, torch.cat(halves), rtol=1e-4 if dtype == torch.float32 else 1e-12, atol=0
    )
