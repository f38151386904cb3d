"""Every transform is right, and not zero, for both implementations."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

from flatkern import kernels
from flatkern.kernels._select import using

from .helpers import both


def own(name):
    """One of the kernels as a scalar function of x [c, d]."""
    return {
        "spd_logdet": lambda x: kernels.spd_logdet(x @ x.mT),
        "gram": lambda x: (kernels.gram(x) ** 3).sum(),
        "logdet": lambda x: kernels.gram_stats(x).logdet,
        "trace": lambda x: kernels.gram_stats(x).trace,
        "frobenius_sq": lambda x: kernels.gram_stats(x).frobenius_sq,
        "all": lambda x: sum(kernels.gram_stats(x)[:3]),
        "spectrum": lambda x: spectral(kernels.gram_spectrum(x, 2)),
    }[name]


def spectral(s):
    """A function of every field that is smooth and has no symmetry."""
    return s.sigma_max.pow(3) + s.participation_ratio + s.log_volume + (s.singular_values.sin()).sum(-1)


def plain(name):
    """The same of torch's own operators. Not slogdet: its jacrev(jacfwd) is silently zero in torch 2.13."""

    def logdet(x):
        return 2 * torch.linalg.cholesky(x @ x.mT).diagonal(dim1=-2, dim2=-1).log().sum(-1)

    def trace(x):
        return (x * x).sum((-2, -1))

    def frobenius_sq(x):
        return (x @ x.mT).square().sum((-2, -1))

    def spectrum(x):  # eigvalsh has the transforms that svdvals lacks
        squares = torch.linalg.eigvalsh(x @ x.mT).flip(-1)
        values = squares.sqrt()
        ratio = squares.sum(-1).square() / squares.square().sum(-1)
        volume = values[..., :2].log().sum(-1)
        return spectral(kernels.GramSpectrum(values, values[..., 0], ratio, volume))

    return {
        "spd_logdet": logdet,
        "gram": lambda x: ((x @ x.mT) ** 3).sum(),
        "logdet": logdet,
        "trace": trace,
        "frobenius_sq": frobenius_sq,
        "all": lambda x: logdet(x) + trace(x) + frobenius_sq(x),
        "spectrum": spectrum,
    }[name]


NAMES = pytest.mark.parametrize(
    "name", ["spd_logdet", "gram", "logdet", "trace", "frobenius_sq", "all", "spectrum"]
)
TRANSFORMS = {
    "grad": grad,
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "jacrev of jacrev": lambda f: jacrev(jacrev(f)),
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(f)),
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(f)),
    "jvp": lambda f: lambda x: jvp(f, (x,), (torch.cos(x),))[1],
    "vjp": lambda f: lambda x: vjp(f, x)[1](torch.tensor(0.7, dtype=x.dtype))[0],
    "jvp of grad": lambda f: lambda x: jvp(grad(f), (x,), (torch.cos(x),))[1],
    "grad of jvp": lambda f: grad(lambda x: jvp(f, (x,), (torch.cos(x.detach()),))[1]),
}


@both
@NAMES
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform(which, name, transform):
    x = torch.randn(3, 5, dtype=torch.float64)
    with using(which):
        got = TRANSFORMS[transform](own(name))(x)
    expected = TRANSFORMS[transform](plain(name))(x)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@both
@pytest.mark.parametrize("name", ["spd_logdet", "logdet", "trace", "frobenius_sq", "all", "spectrum"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_vmap(which, name, dim):
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    moved = x.movedim(0, dim)
    with using(which):
        torch.testing.assert_close(vmap(own(name), in_dims=dim)(moved), plain(name)(x))
        torch.testing.assert_close(vmap(grad(own(name)), in_dims=dim)(moved), vmap(grad(plain(name)))(x))
        torch.testing.assert_close(
            vmap(vmap(hessian(own(name))))(x[None]), vmap(hessian(plain(name)))(x)[None], rtol=1e-9, atol=1e-9
        )


@both
@pytest.mark.parametrize(
    "function",
    [
        lambda x: kernels.spd_logdet(x @ x.mT),
        kernels.gram,
        lambda x: kernels.gram_stats(x)[:3],
        kernels.gram_singular_values,
        lambda x: kernels.gram_spectrum(x, 2)[1:],
        lambda x: kernels.gram_singular_values(x.mT),
    ],
    ids=["spd_logdet", "gram", "gram_stats", "singular_values", "spectrum", "more rows"],
)
def test_gradcheck(which, function):
    x = torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    with using(which):
        assert gradcheck(
            function, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
        )
        assert gradgradcheck(function, x, check_fwd_over_rev=True, check_rev_over_rev=True)


@both
def test_gradient_of_the_logdet_alone_is_that_of_slogdet(which):
    """With respect to G itself: the symmetric gradient G⁻¹, although one triangle is read."""
    x = torch.randn(5, 4, 6, dtype=torch.float64)
    G = (x @ x.mT).requires_grad_()
    with using(which):
        (got,) = torch.autograd.grad(kernels.spd_logdet(G).sum(), G)
    (expected,) = torch.autograd.grad(torch.linalg.slogdet(G).logabsdet.sum(), G)
    torch.testing.assert_close(got, expected)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_gradient_has_the_dtype_of_the_input(which, dtype):
    x = torch.randn(5, 4, 6, dtype=dtype, requires_grad=True)
    with using(which):
        sum(kernels.gram_stats(x)[:3]).sum().backward()
        assert x.grad.dtype == dtype
        sum(kernels.gram_stats(x)[:3])[0].backward()
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.detach(), torch.ones_like(x))
            out = forward_ad.unpack_dual(kernels.gram(dual))
            assert out.tangent.dtype == torch.float64
            assert out.tangent.abs().min() > 0


@both
def test_through_a_network_with_functional_call(which):
    """The use in earnest: the volume of a representation, differentiated in the parameters."""
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).double()
    params = {k: v.detach() for k, v in net.named_parameters()}
    inputs = torch.randn(3, 6, dtype=torch.float64)

    def volume(logdet):
        def f(p):
            J = vmap(jacrev(lambda x: functional_call(net, p, (x,))))(inputs)
            return logdet(J).sum()

        return f

    with using(which):
        got = grad(volume(lambda J: kernels.gram_stats(J).logdet))(params)
    expected = grad(volume(lambda J: torch.linalg.slogdet(J @ J.mT).logabsdet))(params)
    for name in params:
        torch.testing.assert_close(got[name], expected[name], rtol=1e-8, atol=1e-8)


COMPILED = {
    "value": lambda f: f,
    "grad": grad,
    "vmap of grad": lambda f: lambda x: vmap(grad(f))(torch.stack([x, 2 * x])),
    "jvp": TRANSFORMS["jvp"],
    "hessian by reverse": lambda f: jacrev(jacrev(f)),
}


@both
@pytest.mark.parametrize("name", ["spd_logdet", "gram", "all", "spectrum"])
@pytest.mark.parametrize("transform", COMPILED)
def test_compile_full_graph(which, name, transform):
    torch.compiler.reset()
    x = torch.randn(3, 5, dtype=torch.float64)
    f = COMPILED[transform](own(name))
    with using(which):
        got = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, COMPILED[transform](plain(name))(x), rtol=1e-9, atol=1e-9)


@both
@pytest.mark.parametrize("name", ["spd_logdet", "gram", "all", "spectrum"])
def test_compile_with_backward(which, name):
    torch.compiler.reset()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    with using(which):
        torch.compile(own(name), fullgraph=True, backend="aot_eager")(x).backward()
    torch.testing.assert_close(x.grad, grad(plain(name))(x.detach()))


@pytest.mark.slow
@both
@pytest.mark.parametrize("name", ["spd_logdet", "gram", "all", "spectrum"])
def test_compile_with_inductor(which, name):
    torch.compiler.reset()
    x = torch.randn(3, 5, dtype=torch.float64)
    with using(which):
        got = torch.compile(grad(own(name)), fullgraph=True)(x)
    torch.testing.assert_close(got, grad(plain(name))(x), rtol=1e-9, atol=1e-9)


@both
@pytest.mark.parametrize("name", ["spd_logdet", "all", "spectrum"])
def test_vmap_over_a_graph_of_plain_autograd(which, name):
    """Differentiated from outside: the rows that require gradients lie below the batched tensor."""
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=True)
    with using(which):
        (got,) = torch.autograd.grad(vmap(own(name))(x).sum(), x)
    (expected,) = torch.autograd.grad(vmap(plain(name))(x).sum(), x)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@both
def test_the_pullback_with_some_operands_outside_the_batch(which):
    x, inner = torch.randn(4, 3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)

    def f(w):
        return grad(lambda y: (w * kernels.gram_stats(y).logdet).sum())(inner)

    with using(which):
        got = vmap(f)(torch.arange(1.0, 5.0, dtype=torch.float64))
        one = grad(lambda y: kernels.gram_stats(y).logdet)(inner)
        both_ways = vmap(lambda y: kernels.gram_stats(y + inner).logdet)(x)
    torch.testing.assert_close(got, torch.arange(1.0, 5.0, dtype=torch.float64)[:, None, None] * one)
    torch.testing.assert_close(both_ways, plain("logdet")(x + inner))
