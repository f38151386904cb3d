"""The CUDA kernels, where there is a GPU and they were built."""

from __future__ import annotations

import pytest
import torch

from flatkern import kernels
from flatkern.kernels._select import using

from .helpers import oracle_rows_logdet, rows, spd

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not kernels.active().cuda, reason="built without CUDA kernels"),
]
SIZES = [1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 32, 33, 64, 65, 127, 128, 129]
DTYPES = [torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", SIZES)
@pytest.mark.parametrize("n", [0, 1, 3, 1000])
def test_same_as_the_cpu(dtype, c, n):
    x, G = rows(n, c, c + 5, 10.0, dtype), spd(n, c, 10.0, dtype)
    with using("compiled"):
        stats, product = kernels.gram_stats(x.cuda()), kernels.gram(x.cuda())
        logdet = kernels.spd_logdet(G.cuda())
        expected = kernels.gram_stats(x)
    for a, b in zip(stats, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-11, atol=1e-11 * (c + 1))
    torch.testing.assert_close(stats.logdet.cpu(), oracle_rows_logdet(x), rtol=0, atol=1e-11 * (c + 1))
    torch.testing.assert_close(product.cpu(), kernels.gram(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(logdet.cpu(), kernels.spd_logdet(G), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [3, 10, 33])
def test_strides_edges_and_streams(dtype, c):
    x = torch.randn(50, c, c + 3, dtype=dtype, device="cuda")
    x[1, -1] = x[1, 0]
    x[2, 0, 0] = torch.nan
    x[3, -1, -1] = torch.inf
    expected = kernels.gram_stats(x.cpu())
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream), using("compiled"):
        for same in (x, x.mT.contiguous().mT, x.permute(1, 2, 0).contiguous().permute(2, 0, 1)):
            got = kernels.gram_stats(same)
            stream.synchronize()
            assert torch.equal(got.rank_deficient.cpu(), expected.rank_deficient)
            torch.testing.assert_close(
                got.logdet.cpu(), expected.logdet, equal_nan=True, rtol=1e-9, atol=1e-9
            )


@pytest.mark.parametrize("c", [10, 40])
def test_capturable_without_a_synchronization(c):
    x = torch.randn(100, c, c + 3, device="cuda")
    with using("compiled"):
        expected = kernels.gram_stats(x).logdet
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = kernels.gram_stats(x).logdet
        graph.replay()
    torch.testing.assert_close(captured, expected)


@pytest.mark.parametrize("c", [5, 20])
def test_derivatives(c):
    x = torch.randn(3, c, c + 4, dtype=torch.float64)

    def f(x):
        s = kernels.gram_stats(x)
        return (s.logdet + s.trace + 0.1 * s.frobenius_sq).sum()

    with using("compiled"):
        for transform in (torch.func.grad, lambda f: torch.func.jacrev(torch.func.grad(f))):
            torch.testing.assert_close(transform(f)(x.cuda()).cpu(), transform(f)(x), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("c", [3, 10, 40, 128])
@pytest.mark.parametrize("condition", [1e6, 1e10])
def test_lost_digits_are_found_on_the_device(c, condition):
    x = rows(20, c, c + 5, condition)
    x[3, -1] = x[3, 0]
    with using("compiled"):
        stats = kernels.gram_stats(x.cuda())
        leaf = x.cuda().requires_grad_()
        (got,) = torch.autograd.grad(kernels.gram_stats(leaf).logdet[:3].sum(), leaf)
    assert stats.rank_deficient.cpu().tolist() == [i == 3 for i in range(20)]
    assert stats.bad_pivots[3] == 1
    kept = [i for i in range(20) if i != 3]
    error = (stats.logdet.cpu() - oracle_rows_logdet(x)).abs()[kept].max()
    assert error < 1e-13 * condition * c + 1e-6
    U, S, Vh = torch.linalg.svd(x[:3], full_matrices=False)
    expected = 2 * (U / S[:, None]) @ Vh
    assert ((got[:3].cpu() - expected).abs().amax() / expected.abs().amax()) < 1e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [1, 2, 3, 5, 8, 17, 32, 33, 64, 65])
@pytest.mark.parametrize("n", [0, 1, 50])
def test_spectra(dtype, c, n):
    x = rows(n, c, c + 5, 1e3, dtype)
    expected = torch.linalg.svdvals(x.double())
    with using("compiled"):
        on_gpu = x.cuda()
        torch.testing.assert_close(kernels.gram_singular_values(on_gpu).cpu(), expected, rtol=1e-9, atol=0)
        strided = on_gpu.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        torch.testing.assert_close(kernels.gram_singular_values(strided).cpu(), expected, rtol=1e-9, atol=0)
        leaf = on_gpu.requires_grad_()
        (got,) = torch.autograd.grad(kernels.gram_spectrum(leaf).log_volume.sum(), leaf)
    U, S, Vh = torch.linalg.svd(x.double(), full_matrices=False)
    want = (U / S[..., None, :]) @ Vh
    allowed = 1e-6 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(got.cpu().double(), want, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("c", [4, 12])
def test_spectra_that_the_gram_has_lost(c):
    x = rows(8, c, c + 4, 1e8)
    x[3] = 0
    x[4, -1] = x[4, 0]
    x[5, 0, 0] = torch.nan
    expected = torch.linalg.svdvals(x[[0, 1, 2, 3, 4, 6, 7]])
    with using("compiled"):
        got = kernels.gram_singular_values(x.cuda()).cpu()
    assert got[5].isnan().all()
    kept = got[[0, 1, 2, 3, 4, 6, 7]]
    assert ((kept - expected).abs() <= 1e-14 * c * expected[:, :1]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("c", [1, 2, 5, 31, 33, 64, 100, 128])
def test_derivative_of_logdet(dtype, c):
    G = spd(20, c, 10.0, dtype)
    weight = torch.randn(20, dtype=dtype)
    weight[1] = 0
    for name in ("cuda", "cpu"):
        leaf = G.to(name).requires_grad_()
        with using("compiled"):
            (got,) = torch.autograd.grad(kernels.spd_logdet(leaf), leaf, weight.to(name))
        expected = weight[:, None, None].double() * torch.linalg.inv(G.double())
        allowed = 1e-10 if dtype == torch.float64 else 2e-3
        torch.testing.assert_close(got.cpu().double(), expected, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("c", "d"), [(1, 1), (5, 3), (10, 200), (64, 65), (128, 70)])
def test_derivative_of_gram_statistics(dtype, c, d):
    x = torch.randn(3, c, d, dtype=dtype)
    results = []
    for name in ("cuda", "cpu"):
        leaf = x.to(name).requires_grad_()
        with using("compiled"):
            s = kernels.gram_stats(leaf)
            logdet = torch.where(s.rank_deficient, 0.0, s.logdet)
            (got,) = torch.autograd.grad((logdet + s.trace + 0.1 * s.frobenius_sq).sum(), leaf)
        results.append(got.cpu())
    allowed = 1e-9 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(results[0], results[1], rtol=allowed, atol=allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["explicit", "gram"])
@pytest.mark.parametrize("positions", [0, 1, 63, 64, 65, 700])
def test_ghost_norms(dtype, form, positions):
    a, g = torch.randn(3, positions, 70, dtype=dtype), torch.randn(2, 3, positions, 130, dtype=dtype)
    with using("compiled"):
        got = kernels.ghost_norm(a.cuda(), g.cuda(), form=form)
        turned = kernels.ghost_norm(a.mT.contiguous().mT.cuda(), g.cuda(), form=form)
    expected = (g.double().mT @ a.double()).square().sum((-2, -1))
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-4 if dtype == torch.float32 else 1e-11, atol=0)
    torch.testing.assert_close(turned.cpu(), expected, rtol=1e-4 if dtype == torch.float32 else 1e-11, atol=0)


@pytest.mark.parametrize("form", ["explicit", "gram"])
def test_ghost_norms_of_convolutions(form):
    x, g = torch.randn(2, 4, 9, 13), torch.randn(3, 2, 6, 9, 13)
    with using("compiled"):
        got = kernels.conv_ghost_norm(x.cuda(), g.cuda(), (3, 3), padding=1, groups=2, form=form)
        expected = kernels.conv_ghost_norm(x.double(), g.double(), (3, 3), padding=1, groups=2)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=0)
