"""Inner products of shared weights' gradients: against formed gradients, in both forms, by blocks and tiles."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, vmap

from flatkern import kernels
from flatkern.kernels import _ghost_gram

from .helpers import dtypes

each_form = pytest.mark.parametrize("form", ["explicit", "gram"])


def plain(a, g, b=None, h=None):
    b, h = (a, g) if b is None else (b, h)
    left, right = g.double().mT @ a.double(), h.double().mT @ b.double()
    return torch.einsum("kiod,ljod->ikjl", left, right)


def several(n=3, k=2, positions=5, d_in=4, d_out=3, dtype=torch.float64):
    return torch.randn(n, positions, d_in, dtype=dtype), torch.randn(k, n, positions, d_out, dtype=dtype)


@pytest.fixture(params=[False, True], ids=["whole", "blocks"])
def blocks(request, monkeypatch):
    """Tiles and blocks so small that all of them are cut."""
    if request.param:
        monkeypatch.setattr(_ghost_gram, "SIDE", 2)
        monkeypatch.setattr(_ghost_gram, "BLOCK", 4)


@dtypes
@pytest.mark.parametrize("form", ["explicit", "gram", "auto"])
@pytest.mark.parametrize("memory", [1, 2000, 1 << 26])
def test_values(blocks, dtype, form, memory):
    a, g = several(9, 2, dtype=dtype)
    b, h = several(4, 3, 7, dtype=dtype)
    for operands in ((a, g), (a, g, b, h), (b, h, a, g), (a, g, a.clone(), g.clone())):
        got = kernels.ghost_gram(*operands, form=form, max_memory=memory)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, plain(*operands), rtol=1e-10, atol=1e-10)


@each_form
def test_the_diagonal_is_the_norm_and_the_matrix_is_symmetric(blocks, form):
    a, g = several(7, 3)
    gram = kernels.ghost_gram(a, g, form=form).flatten(2).flatten(0, 1)
    torch.testing.assert_close(gram, gram.mT, rtol=1e-13, atol=1e-13)
    norms = kernels.ghost_norm(a, g)
    torch.testing.assert_close(gram.diagonal().reshape(7, 3).mT, norms)


@each_form
def test_empty_sizes(form):
    for n, k, positions, d_in, d_out in [
        (0, 2, 3, 4, 5),
        (2, 0, 3, 4, 5),
        (2, 1, 0, 4, 5),
        (2, 1, 3, 0, 5),
        (2, 1, 3, 4, 0),
    ]:
        a, g = several(n, k, positions, d_in, d_out)
        assert torch.equal(kernels.ghost_gram(a, g, form=form), torch.zeros(n, k, n, k, dtype=torch.float64))


@each_form
def test_derivatives(blocks, form):
    a, g = (t.requires_grad_() for t in several(3, 2, 3, 2, 2))
    b, h = several(2, 1, 4, 2, 2)
    assert gradcheck(lambda a, g: kernels.ghost_gram(a, g, form=form), (a, g), check_forward_ad=True)
    assert gradgradcheck(lambda a: kernels.ghost_gram(a, g.detach(), b, h, form=form), a)


@each_form
@pytest.mark.parametrize("transform", [grad, jacrev, jacfwd, hessian])
def test_transforms(blocks, form, transform):
    a, g = several(3, 2, 3, 2, 2)

    def f(function):
        return lambda a: (function(a, g).sin()).sum()

    expected = transform(f(plain))(a)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(transform(f(lambda a, g: kernels.ghost_gram(a, g, form=form)))(a), expected)
    many = torch.stack([a, 2 * a])
    got = vmap(lambda a: kernels.ghost_gram(a, g, form=form))(many)
    torch.testing.assert_close(got, torch.stack([plain(x, g) for x in many]))


def test_compile():
    a, g = several()
    torch.compiler.reset()
    f = torch.compile(kernels.ghost_gram, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(f(a, g), plain(a, g))


def test_refusals():
    a, g = several()
    with pytest.raises(ValueError, match="both of them or neither"):
        kernels.ghost_gram(a, g, a)
    with pytest.raises(ValueError, match=r"\[K, n, T, d_out\]"):
        kernels.ghost_gram(a, g[0])
    with pytest.raises(ValueError, match="d_in and d_out"):
        kernels.ghost_gram(a, g, a[..., :2], g)
    with pytest.raises(TypeError, match="everywhere"):
        kernels.ghost_gram(a, g.float())
    with pytest.raises(TypeError, match="use torch"):
        kernels.ghost_gram(a.half(), g.half())
    with pytest.raises(ValueError, match="use one of auto"):
        kernels.ghost_gram(a, g, form="fast")
