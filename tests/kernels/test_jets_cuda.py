"""The jets' CUDA kernels, where there is a GPU and they were built."""

from __future__ import annotations

import pytest
import torch

from flatkern import kernels
from flatkern.kernels._activation_forms import KINDS
from flatkern.kernels._select import using

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not kernels.active().cuda, reason="built without CUDA kernels"),
]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def same(on_gpu, on_cpu):
    for a, b in zip(on_gpu, on_cpu, strict=True):
        allowed = 2e-2 if b.dtype == torch.bfloat16 else 200 * torch.finfo(b.dtype).eps
        torch.testing.assert_close(a.cpu(), b, rtol=allowed, atol=allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [0, 1, 7, 8, 1000, 100_003])
@pytest.mark.parametrize("kind", KINDS)
def test_activations(dtype, n, kind):
    z, g = torch.randn(2, n).to(dtype)
    t, dg = torch.randn(2, 3, n).to(dtype)
    with using("compiled"):
        for f in (
            lambda z, g, t, dg: kernels.activation_derivatives(z, kind),
            lambda z, g, t, dg: kernels.activation_jet(z, t, kind, s=dg),
            lambda z, g, t, dg: kernels.activation_pullback(z, g, t, dg, kind),
        ):
            same(f(*(x.cuda() for x in (z, g, t, dg))), f(z, g, t, dg))


def numbers(z):
    """One number a row, in the dtype that is computed in."""
    return z[..., 0].float() if z.dtype == torch.bfloat16 else z[..., 0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 4), (3, 1), (5, 10), (70, 33), (4, 1000), (3, 50257)])
def test_rows(dtype, shape):
    z, g = torch.randn(2, *shape).to(dtype)
    t, dg = torch.randn(2, 2, *shape).to(dtype)
    w = torch.rand(shape[-1]).to(dtype)
    target = torch.randint(shape[-1], shape[:-1])
    with using("compiled"):
        for f in (
            lambda z, g, t, dg, w, y: (kernels.softmax_curvature(z.softmax(-1), t, g),),
            lambda z, g, t, dg, w, y: (kernels.softmax_curvature(z.softmax(-1), t, g, log=True),),
            lambda z, g, t, dg, w, y: kernels.cross_entropy_jet(z, y, t),
            lambda z, g, t, dg, w, y: (kernels.layer_norm_tangent(z, numbers(z), t, w),),
            lambda z, g, t, dg, w, y: (kernels.layer_norm_curvature(z, numbers(z), t, g, w),),
        ):
            arguments = (z, g, t, dg, w, target)
            same(f(*(x.cuda() for x in arguments)), f(*arguments))


def test_capturable_without_a_synchronization():
    z, t = torch.randn(100, 37, device="cuda"), torch.randn(2, 100, 37, device="cuda")
    with using("compiled"):
        expected = kernels.softmax_curvature(z, t, z), kernels.activation_jet(z, t, "gelu").second
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = kernels.softmax_curvature(z, t, z), kernels.activation_jet(z, t, "gelu").second
        graph.replay()
    same([c.cpu() for c in captured], [e.cpu() for e in expected])
