"""Ghost norms: values against formed gradients, sizes around every tile, strides, derivatives, memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

from flatkern import kernels
from flatkern.kernels._ghost_shapes import take_formed
from flatkern.kernels._select import compiled_available, using

from .helpers import both, dtypes

forms = pytest.mark.parametrize("form", ["explicit", "gram", "auto"])
each_form = pytest.mark.parametrize("form", ["explicit", "gram"])
DOUBLE = torch.float64


def pair(lead=(), cotangents=(), positions=5, d_in=4, d_out=3, dtype=DOUBLE):
    return (
        torch.randn(*lead, positions, d_in, dtype=dtype),
        torch.randn(*cotangents, *lead, positions, d_out, dtype=dtype),
    )


def plain(a, g):
    return (g.double().mT @ a.double()).square().sum((-2, -1))


def scale(a, g):
    """Σ_{t,s} |g_t·g_s| |a_t·a_s| is at most this: what rounding errors are relative to."""
    norms = a.double().norm(dim=-1) * g.double().norm(dim=-1)
    return norms.sum(-1).square()


@both
@dtypes
@forms
@pytest.mark.parametrize("positions", [1, 2, 15, 17, 33, 97, 257])
@pytest.mark.parametrize("sizes", [(1, 1), (7, 10), (33, 8)])
def test_values(which, dtype, form, positions, sizes):
    a, g = pair((2,), (3,), positions, *sizes, dtype=dtype)
    with using(which):
        got = kernels.ghost_norm(a, g, form=form)
    assert got.dtype == DOUBLE
    assert ((got - plain(a, g)).abs() <= 4 * torch.finfo(dtype).eps * scale(a, g)).all()


@both
@dtypes
@each_form
@pytest.mark.parametrize("sizes", [(193, 130), (130, 200), (400, 17)])
def test_several_tiles_and_depths(which, dtype, form, sizes):
    a, g = pair((1,), (2,), 300, *sizes, dtype=dtype)
    with using(which):
        got = kernels.ghost_norm(a, g, form=form)
    torch.testing.assert_close(got, plain(a, g), rtol=100 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.skipif(not compiled_available(), reason="no compiled kernels")
@each_form
def test_no_less_accurate_than_torch(form):
    a, g = pair((20,), (), 150, 40, 30, dtype=torch.float32)
    exact = plain(a, g)
    if form == "explicit":
        theirs = (g.mT @ a).square().sum((1, 2), dtype=DOUBLE)
    else:
        theirs = ((a @ a.mT) * (g @ g.mT)).sum((1, 2), dtype=DOUBLE)
    with using("compiled"):
        ours = kernels.ghost_norm(a, g, form=form)
    assert (ours - exact).abs().mean() <= 2 * (theirs - exact).abs().mean()


@both
@each_form
def test_leading_dimensions_broadcast(which, form):
    shapes = [
        ((), ()),
        ((), (4,)),
        ((3,), (3,)),
        ((3,), (2, 3)),
        ((1,), (3,)),
        ((3,), (1,)),
        ((2, 1), (2, 3)),
        ((1, 3), (5, 2, 3)),
        ((2, 3), (3,)),
        ((0,), (4, 0)),
    ]
    with using(which):
        for of_a, of_g in shapes:
            a, g = torch.randn(*of_a, 5, 4, dtype=DOUBLE), torch.randn(*of_g, 5, 3, dtype=DOUBLE)
            torch.testing.assert_close(kernels.ghost_norm(a, g, form=form), plain(a, g))
        deep = torch.randn(*[1, 2] * 5, 3, 2, dtype=DOUBLE)
        torch.testing.assert_close(kernels.ghost_norm(deep, deep, form=form), plain(deep, deep))


@both
@each_form
def test_any_strides(which, form):
    a, g = pair((3,), (2,), 37, 21, 19)
    expected = plain(a, g)
    with using(which):
        for move in (
            lambda x: x.mT.contiguous().mT,
            lambda x: x.transpose(-3, -1).contiguous().transpose(-3, -1),
            lambda x: torch.stack([x, x.new_full(x.shape, torch.nan)], -1)[..., 0],
            lambda x: torch.cat([x, x], -2)[..., : x.shape[-2], :],
        ):
            torch.testing.assert_close(kernels.ghost_norm(move(a), g, form=form), expected)
            torch.testing.assert_close(kernels.ghost_norm(a, move(g), form=form), expected)


@both
@each_form
def test_empty_sizes(which, form):
    with using(which):
        for lead, positions, d_in, d_out in [
            ((0,), 3, 2, 2),
            ((2,), 0, 2, 2),
            ((2,), 3, 0, 2),
            ((2,), 3, 2, 0),
        ]:
            a, g = pair(lead, (), positions, d_in, d_out)
            assert torch.equal(kernels.ghost_norm(a, g, form=form), torch.zeros(lead, dtype=DOUBLE))
        assert kernels.ghost_norm(torch.ones(2, 3, 4), torch.ones(0, 2, 3, 4), form=form).shape == (0, 2)


@both
@each_form
def test_nan_stays_in_its_sample(which, form):
    a, g = pair((4,), (2,), 40, 20, 20)
    a[1, 17, 3] = torch.nan
    g[1, 2, 39, 19] = torch.nan
    with using(which):
        got = kernels.ghost_norm(a, g, form=form)
    bad = torch.zeros(2, 4, dtype=torch.bool)
    bad[:, 1] = bad[1, 2] = True
    assert torch.equal(got.isnan(), bad)


def test_the_form_is_chosen_by_multiplications():
    assert take_formed("auto", 1024, 64, 64, 1)
    assert not take_formed("auto", 64, 512, 512, 1)
    assert take_formed("auto", 1000, 100, 100, 10)


# -- convolutions
CONVOLUTIONS = [
    ((3, 4, 9), {"out": 6, "kernel": (3,), "padding": 1}),
    ((2, 3, 8, 8), {"out": 5, "kernel": (3, 3), "padding": 1}),
    ((2, 3, 20, 37), {"out": 5, "kernel": (3, 3), "padding": 0}),
    ((2, 4, 9, 7), {"out": 6, "kernel": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)}),
    ((2, 4, 11, 11), {"out": 6, "kernel": (5, 7), "groups": 2, "padding": 2}),
    ((1, 6, 32, 32), {"out": 6, "kernel": (3, 3), "groups": 6, "stride": 2}),
    ((2, 2, 5, 4, 6), {"out": 3, "kernel": (2, 2, 3), "padding": (0, 1, 1)}),
    ((2, 3, 4, 4), {"out": 5, "kernel": (1, 1)}),
]


def convolution(shape, out, kernel, dtype=DOUBLE, **geometry):
    """The input, three cotangents a sample, and the norms by autograd."""
    x = torch.randn(shape, dtype=dtype)
    weight = torch.randn(out, shape[1] // geometry.get("groups", 1), *kernel, dtype=dtype, requires_grad=True)
    f = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    y = f(x, weight, **geometry)
    g = torch.randn(3, *y.shape, dtype=dtype)
    norms = [
        [
            torch.autograd.grad(y[i], weight, c[i], retain_graph=True)[0].double().square().sum()
            for i in range(len(x))
        ]
        for c in g
    ]
    return x, g, torch.tensor(norms)


@both
@dtypes
@forms
@pytest.mark.parametrize(("shape", "geometry"), CONVOLUTIONS)
def test_convolutions(which, dtype, form, shape, geometry):
    x, g, expected = convolution(shape, dtype=dtype, **geometry)
    kernel, rest = geometry["kernel"], {k: v for k, v in geometry.items() if k not in ("out", "kernel")}
    with using(which):
        got = kernels.conv_ghost_norm(x, g, kernel, form=form, **rest)
        one = kernels.conv_ghost_norm(x, g[0], kernel, form=form, **rest)
        turned = kernels.conv_ghost_norm(x, g.transpose(-1, 2).contiguous().transpose(-1, 2), kernel, **rest)
    tolerance = {"rtol": 2000 * torch.finfo(dtype).eps, "atol": 0}
    torch.testing.assert_close(got, expected, **tolerance)
    torch.testing.assert_close(one, expected[0], **tolerance)
    torch.testing.assert_close(turned, expected, **tolerance)


@both
@each_form
def test_derivatives_of_a_convolution(which, form):
    x, g, _ = convolution((1, 2, 3, 4), out=2, kernel=(2, 3), padding=1)
    x.requires_grad_(), g.requires_grad_()

    def f(x, g):
        return kernels.conv_ghost_norm(x, g, (2, 3), padding=1, form=form)

    with using(which):
        assert gradcheck(f, (x, g), check_forward_ad=True, fast_mode=True)


# -- derivatives and transforms
@both
@each_form
def test_derivatives(which, form):
    a, g = (t.requires_grad_() for t in pair((2,), (2,), 3, 2, 3))

    def f(a, g):
        return kernels.ghost_norm(a, g, form=form)

    with using(which):
        assert gradcheck(
            f, (a, g), check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
        )
        assert gradgradcheck(f, (a, g), check_fwd_over_rev=True, check_rev_over_rev=True)
        assert gradcheck(lambda a: f(a, g.detach()), a, check_forward_ad=True)
        assert gradcheck(lambda g: f(a.detach(), g), g, check_forward_ad=True)


TRANSFORMS = {
    "grad": grad,
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    "hessian": hessian,
    "jacrev of jacfwd": lambda f: jacrev(jacfwd(f)),
    "jacfwd of jacfwd": lambda f: jacfwd(jacfwd(f)),
    "jvp": lambda f: lambda x: jvp(f, (x,), (torch.cos(x),))[1],
}


@both
@each_form
@pytest.mark.parametrize("argument", [0, 1])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(which, form, argument, transform):
    operands = pair((), (), 4, 3, 2)

    def of(norm):
        return lambda x: norm(*(x if i == argument else o for i, o in enumerate(operands)))

    expected = TRANSFORMS[transform](of(plain))(operands[argument])
    with using(which):
        got = TRANSFORMS[transform](of(lambda a, g: kernels.ghost_norm(a, g, form=form)))(operands[argument])
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(got, expected)


@both
@each_form
def test_vmap(which, form):
    a, g = pair((3, 2), (), 5, 4, 3)

    def f(a, g):
        return kernels.ghost_norm(a, g, form=form)

    with using(which):
        for dim in (0, 1):
            got = vmap(f, in_dims=dim)(a.movedim(0, dim), g.movedim(0, dim))
            torch.testing.assert_close(got, plain(a, g))
        torch.testing.assert_close(vmap(f, in_dims=(None, 1))(a[0], g.movedim(0, 1)), plain(a[:1], g))
        torch.testing.assert_close(vmap(f, in_dims=(1, None))(a.movedim(0, 1), g[0]), plain(a, g[:1]))
        torch.testing.assert_close(vmap(vmap(f))(a, g), plain(a, g))
        gradient = vmap(grad(lambda a, g: f(a, g).sum()), in_dims=(0, 0))
        torch.testing.assert_close(gradient(a, g), vmap(grad(lambda a, g: plain(a, g).sum()))(a, g))
        torch.testing.assert_close(
            jacrev(vmap(f, in_dims=(None, 0)))(a[0], g), jacrev(lambda a: plain(a, g))(a[0])
        )


@both
@pytest.mark.parametrize("differentiate", [False, True])
def test_compile_full_graph(which, differentiate):
    a, g = pair((2,), (3,))

    def f(a):
        return kernels.ghost_norm(a * 2, g).sum()

    f = grad(f) if differentiate else f
    torch.compiler.reset()
    with using(which):
        torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(a), f(a))


@pytest.mark.skipif(not compiled_available(), reason="no compiled kernels")
@dtypes
@each_form
def test_opcheck(dtype, form):
    for n in (0, 3):
        torch.library.opcheck(
            torch.ops.flatkern.ghost_norm.default,
            (*pair((n,), (2,), dtype=dtype), 1, form == "explicit"),
            test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
        )


def test_the_gradient_of_a_network_in_its_inputs():
    """‖∂ℓ/∂W‖² of a token-wise layer as a function of the layer's inputs, against autograd through autograd."""
    layer = nn.Linear(4, 3).double()
    x = torch.randn(5, 6, 4, dtype=DOUBLE)

    def by_autograd(x):
        def loss(weight):
            return functional_call(layer, {"weight": weight, "bias": layer.bias.detach()}, (x,)).tanh().sum()

        return grad(loss)(layer.weight.detach()).square().sum()

    def by_kernel(x):
        slope = 1 - layer(x).detach().tanh().square() if not x.requires_grad else 1 - layer(x).tanh().square()
        return kernels.ghost_norm(x, slope)

    torch.testing.assert_close(by_kernel(x), vmap(by_autograd)(x))


# -- the NumPy door, memory, threads, refusals
@pytest.mark.cpu_kernels
@dtypes
@each_form
def test_numpy(dtype, form):
    native = pytest.importorskip("flatkern.native", reason="the NumPy door was not built")
    a, g = pair((5,), (2,), 40, 9, 8, dtype=dtype)
    expected = kernels.ghost_norm(a, g, form=form).numpy()
    for threads in (1, 3):
        np.testing.assert_allclose(
            native.ghost_norm(a.numpy(), g.numpy(), form=form, threads=threads), expected
        )
    turned = np.asfortranarray(a.numpy()), g.numpy()[..., ::-1]
    np.testing.assert_allclose(native.ghost_norm(*turned, form=form), expected, rtol=1e-5)
    assert native.ghost_norm(a.numpy()[0], g.numpy()[0, 0], form=form).shape == ()
    x, g, _ = convolution((2, 4, 9, 7), out=6, kernel=(3, 2), groups=2, dtype=dtype)
    got = native.conv_ghost_norm(x.numpy(), g.numpy(), (3, 2), groups=2, form=form)
    np.testing.assert_allclose(
        got, kernels.conv_ghost_norm(x, g, (3, 2), groups=2, form=form).numpy(), rtol=1e-5
    )
    with pytest.raises(TypeError, match="float32"):
        native.ghost_norm(a.numpy(), a.numpy().astype(np.int32))
    with pytest.raises(ValueError, match="positions"):
        native.ghost_norm(np.ones((3, 2)), np.ones((4, 2)))


@pytest.mark.cpu_kernels
@pytest.mark.skipif(not compiled_available(), reason="no compiled kernels")
@each_form
def test_memory_does_not_grow_with_the_sizes(form):
    """torch's allocator gives out one number a sample and cotangent, and nothing else."""
    for positions, width in ((64, 32), (600, 300)):
        a, g = pair((2,), (3,), positions, width, width, dtype=torch.float32)
        with using("compiled"), torch.profiler.profile(profile_memory=True) as profile:
            kernels.ghost_norm(a, g, form=form)
        given = [e.cpu_memory_usage for e in profile.events() if e.cpu_memory_usage > 0]
        assert 0 < sum(given) <= 4096


@each_form
def test_threads_do_not_change_the_result(form):
    a, g = pair((40,), (2,), 100, 30, 20, dtype=torch.float32)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(kernels.ghost_norm(a, g, form=form))
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(*results, rtol=1e-12, atol=0)


@both
def test_refusals(which):
    a, g = pair((2,))
    with using(which):
        for dtype in (torch.float16, torch.bfloat16, torch.int64, torch.complex64):
            with pytest.raises(TypeError, match=r"torch\.float32 or torch\.float64"):
                kernels.ghost_norm(a.to(dtype), g.to(dtype))
        with pytest.raises(TypeError, match="g: expected"):
            kernels.ghost_norm(a, g.float())
        with pytest.raises(TypeError, match="Tensor"):
            kernels.ghost_norm(a, [1.0])
        with pytest.raises(ValueError, match="positions"):
            kernels.ghost_norm(a, g[:, 1:])
        with pytest.raises(ValueError, match="broadcast"):
            kernels.ghost_norm(a, torch.cat([g, g[:1]]))
        with pytest.raises(ValueError, match="use one of auto, explicit, gram"):
            kernels.ghost_norm(a, g, form="fast")
        x, g, _ = convolution((2, 4, 9, 7), out=6, kernel=(3, 2))
        for change, words in (
            ({"kernel_size": ()}, "kernel_size"),
            ({"kernel_size": (3, 0)}, "kernel_size"),
            ({"stride": (1, 0)}, "stride"),
            ({"padding": (1,)}, "padding"),
            ({"dilation": 0}, "dilation"),
            ({"groups": 3}, "groups"),
            ({"kernel_size": (30, 2)}, "smaller than the kernel"),
            ({"stride": 2}, "g: expected"),
        ):
            with pytest.raises(ValueError, match=words):
                kernels.conv_ghost_norm(x, g, **{"kernel_size": (3, 2), **change})
