"""The three-term step: values, derivatives, in place, and a whole run against torch.linalg.eigvalsh."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacfwd, jacrev, vmap

from flatkern import kernels
from flatkern.kernels._lanczos_step import reference
from flatkern.kernels._select import compiled_available, using

from .helpers import both, dtypes


def inputs(*shape, dtype=torch.float64):
    w, v, u = (torch.randn(*shape, dtype=dtype) for _ in range(3))
    return w, v, u, torch.rand(shape[:-1], dtype=torch.float64)


@both
@dtypes
@settings(max_examples=12, deadline=None)
@given(rows=st.integers(0, 4), size=st.integers(0, 300) | st.sampled_from([65_536, 140_001]))
def test_values(which, dtype, rows, size):
    w, v, u, beta = inputs(rows, size, dtype=dtype)
    v = torch.nn.functional.normalize(v)
    with using(which):
        residual, alpha, norm = kernels.lanczos_step(w, v, u, beta)
    exact_alpha = (w.double() * v.double()).sum(1)
    exact = w.double() - exact_alpha[:, None] * v.double() - beta[:, None] * u.double()
    terms = (
        w.double().abs() + exact_alpha[:, None].abs() * v.double().abs() + beta[:, None] * u.double().abs()
    )
    assert residual.dtype == dtype
    assert alpha.dtype == norm.dtype == torch.float64
    torch.testing.assert_close(alpha, exact_alpha, rtol=1e-12, atol=1e-10)
    assert ((residual.double() - exact).abs() <= 4 * torch.finfo(dtype).eps * terms + 1e-13).all()
    torch.testing.assert_close(norm, residual.double().norm(dim=1), rtol=1e-12, atol=1e-12)


@both
@pytest.mark.parametrize("place", ["previous", "image", "fresh", "strided"])
def test_in_place(which, place):
    w, v, u, beta = inputs(3, 5000)
    expected = reference(w, v, u, beta)
    out = {"previous": u, "image": w, "fresh": torch.empty_like(w)}.get(
        place, torch.empty(5000, 3).double().mT
    )
    with using(which):
        step = kernels.lanczos_step(w, v, u, beta, out=out)
    assert step.residual is out
    for got, want in zip(step, expected, strict=True):
        torch.testing.assert_close(got, want)


@both
def test_any_strides_and_leading_dimensions(which):
    w, v, u, beta = inputs(2, 3, 40)
    expected = reference(w, v, u, beta)
    with using(which):
        for change in (lambda t: t.permute(2, 0, 1).contiguous().permute(1, 2, 0), lambda t: t[..., :40]):
            for got, want in zip(kernels.lanczos_step(change(w), v, change(u), beta), expected, strict=True):
                torch.testing.assert_close(got, want)


@both
def test_derivatives(which):
    tensors = [t.requires_grad_() for t in inputs(2, 4)]
    with using(which):
        f = kernels.lanczos_step
        assert gradcheck(f, tensors, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(f, tensors, check_fwd_over_rev=True)
        w, v, u, beta = (t.detach() for t in tensors)

        def scalar(f):
            return lambda v: (lambda s: (s[0] ** 3).sum() + (s[1] * s[2]).sum())(f(w, v, u, beta))

        for transform in (jacrev, jacfwd, hessian, lambda f: jacrev(jacfwd(f))):
            expected = transform(scalar(reference))(v)
            assert expected.abs().max() > 1e-3
            torch.testing.assert_close(transform(scalar(f))(v), expected)
        for moved in (0, 1):
            batched = (t.unsqueeze(moved) for t in (w, v, u, beta))
            for a, b in zip(vmap(f, in_dims=moved)(*batched), f(w, v, u, beta), strict=True):
                torch.testing.assert_close(a[0], b)
        shared = vmap(f, in_dims=(0, None, None, None))(torch.stack([w, 2 * w]), v, u, beta)
        torch.testing.assert_close(shared[1][1], f(2 * w, v, u, beta).alpha)


@both
def test_the_norm_of_a_zero_residual_has_a_zero_derivative(which):
    v = torch.eye(3, dtype=torch.float64)[:1].requires_grad_()
    with using(which):
        step = kernels.lanczos_step(2 * v.detach(), v, torch.zeros_like(v.detach()), torch.zeros(1))
        (grad,) = torch.autograd.grad(step.norm.sum(), v)
    assert step.norm.item() == 0
    assert torch.isfinite(grad).all()


@both
def test_compile(which):
    w, v, u, beta = inputs(2, 50)

    def f(w):
        residual, alpha, norm = kernels.lanczos_step(w * 2, v, u, beta)
        return residual.sum() + alpha.sum() + norm.sum()

    with using(which):
        torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(w), f(w))


@pytest.mark.skipif(not compiled_available(), reason="no compiled kernels")
def test_opcheck():
    w, v, u, beta = inputs(2, 50)
    torch.library.opcheck(
        torch.ops.flatkern.lanczos_step.default,
        (w, v, u, beta, torch.empty_like(w)),
        test_utils=("test_schema", "test_faketensor"),
    )


@both
def test_a_run_gives_the_spectrum(which):
    """n steps on a matrix with n simple eigenvalues, made orthogonal again: the tridiagonal has them all."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=generator)).Q
    matrix = basis * torch.arange(1.0, 13.0, dtype=torch.float64) @ basis.mT
    current = torch.randn(1, 12, dtype=torch.float64, generator=generator)
    current /= current.norm()
    previous, beta, seen = torch.zeros_like(current), torch.zeros(1), []
    alphas, betas = [], []
    with using(which):
        for _ in range(12):
            seen.append(current)
            residual, alpha, norm = kernels.lanczos_step(current @ matrix, current, previous, beta)
            for _ in range(2):
                residual = residual - residual @ torch.cat(seen).mT @ torch.cat(seen)
            norm = residual.norm(dim=1)
            alphas.append(alpha)
            betas.append(norm)
            previous, current, beta = current, residual / norm[:, None], norm
    tridiagonal = torch.diag(torch.cat(alphas)) + torch.diag(torch.cat(betas)[:-1], 1)
    values = torch.linalg.eigvalsh(tridiagonal, UPLO="U")
    torch.testing.assert_close(values, torch.arange(1.0, 13.0, dtype=torch.float64))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"image": [1.0]}, TypeError, "image"),
        ({"image": torch.ones(3)}, ValueError, "image"),
        ({"current": torch.ones(2, 4)}, TypeError, "current"),
        ({"previous": torch.ones(2, 5, dtype=torch.float64)}, ValueError, "previous"),
        ({"beta": torch.ones(3)}, ValueError, "beta"),
        ({"out": torch.ones(2, 5, dtype=torch.float64)}, ValueError, "out"),
        ({"out": torch.ones(2, 4)}, ValueError, "out"),
        (
            {"image": torch.ones(2, 4, dtype=torch.float64, requires_grad=True), "out": torch.ones(2, 4)},
            TypeError,
            "out",
        ),
    ],
)
def test_refusals(change, error, message):
    given = dict(zip(("image", "current", "previous", "beta"), inputs(2, 4), strict=True)) | change
    with pytest.raises(error, match=message):
        kernels.lanczos_step(**given)


@pytest.mark.cpu_kernels
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("threads", [1, 2])
def test_native(dtype, threads):
    native = pytest.importorskip("flatkern.native", reason="the NumPy door was not built")
    tensors = inputs(3, 200_000)
    w, v, u, beta = (t.numpy() for t in tensors)
    w, v, u = (x.astype(dtype) for x in (w, v, u))
    got = native.lanczos_step(np.asfortranarray(w), v, u, beta, threads=threads)
    expected = kernels.lanczos_step(*map(torch.from_numpy, (w, v, u, beta)))
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b.numpy())
    with pytest.raises(ValueError, match="expected image"):
        native.lanczos_step(w, v, u, beta[:2])
    with pytest.raises(TypeError, match="one dtype"):
        native.lanczos_step(w, v, u.astype(np.float64 if dtype == np.float32 else np.float32), beta)
