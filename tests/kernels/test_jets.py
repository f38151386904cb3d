"""Jets: values against float64, shapes and strides, refusals."""

from __future__ import annotations

import math

import mpmath as mp
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import jvp, vjp

from flatkern import kernels
from flatkern.kernels._activation_forms import KINDS
from flatkern.kernels._select import using

from .helpers import both, dtypes

kinds = pytest.mark.parametrize("kind", KINDS)
ALL = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["f32", "f64", "bf16"]
)
TORCH = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"),
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "elu": F.elu,
}


def truth(kind: str, z: Tensor) -> list[Tensor]:
    """φ, φ', φ'' of torch's own activation by autograd in float64."""
    z = z.double().requires_grad_()
    value = TORCH[kind](z)
    (slope,) = torch.autograd.grad(value.sum(), z, create_graph=True)
    bend = torch.zeros_like(z)
    if slope.requires_grad:
        (found,) = torch.autograd.grad(slope.sum(), z, allow_unused=True)
        bend = bend if found is None else found
    return [value.detach(), slope.detach(), bend.detach()]


def second_order(f, z, t):
    """f(z), Df[t_j], D²f[t_j, t_j] by forward over forward in float64."""
    z, t = z.double(), t.double()
    first = torch.stack([jvp(f, (z,), (d,))[1] for d in t])
    second = torch.stack([jvp(lambda x, d=d: jvp(f, (x,), (d,))[1], (z,), (d,))[1] for d in t])
    return f(z), first, second


def tolerance(dtype: torch.dtype) -> float:
    return {torch.float32: 4e-7, torch.float64: 1e-15, torch.bfloat16: 8e-3}[dtype]


def close(got: Tensor, expected: Tensor, factor: float = 1.0) -> None:
    scale = tolerance(got.dtype) * factor
    torch.testing.assert_close(got.double(), expected, rtol=scale, atol=scale)


@both
@ALL
@kinds
def test_derivatives_match_torch(which, dtype, kind):
    z = torch.cat([torch.linspace(-12, 12, 997), torch.randn(1031) * 2, torch.zeros(1)]).to(dtype)
    with using(which):
        got = kernels.activation_derivatives(z, kind)
    for mine, expected in zip(got, truth(kind, z), strict=True):
        assert mine.dtype == dtype
        close(mine, expected, 8 if dtype == torch.float64 else 2)  # torch's own second derivatives in float64


EXACT = {
    "relu": lambda z: max(z, mp.mpf(0)),
    "gelu": lambda z: z * mp.erfc(-z / mp.sqrt(2)) / 2,
    "gelu_tanh": lambda z: z / (1 + mp.exp(-2 * mp.sqrt(2 / mp.pi) * (z + mp.mpf("0.044715") * z**3))),
    "silu": lambda z: z / (1 + mp.exp(-z)),
    "tanh": mp.tanh,
    "sigmoid": lambda z: 1 / (1 + mp.exp(-z)),
    "softplus": lambda z: mp.log1p(mp.exp(z)),
    "elu": lambda z: z if z > 0 else mp.expm1(z),
}


@pytest.mark.skipif(kernels.active().kernels != "compiled", reason="no compiled kernels")
@dtypes
@kinds
def test_relative_accuracy(dtype, kind):
    """Near 0 and in the tails, where a formula that takes differences of ones has no digits left."""
    near = torch.logspace(-30, -0.5, 20, dtype=torch.float64)
    far = torch.linspace(3, 9, 13, dtype=torch.float64)
    z = torch.cat([-far, -near, near, far]).to(dtype)
    with using("compiled"):
        got = torch.stack(kernels.activation_derivatives(z, kind))
    with mp.workdps(120):
        exact = [[mp.diff(EXACT[kind], mp.mpf(x), order) for x in z.tolist()] for order in range(3)]
    expected = torch.tensor([[float(x) for x in row] for row in exact], dtype=torch.float64)
    expected = torch.where(expected.abs() < 1e-60, 0.0, expected)
    allowed = torch.full_like(expected, 12 * torch.finfo(dtype).eps)
    if kind == "gelu_tanh":  # the rounding of z + c z³ under the exponential; κ and c are rounded as well
        allowed *= 1 + z.double().abs() ** 3
    # φ' and φ'' of the products z σ cross 0 between: two terms of either sign
    size = expected.abs()
    if kind in ("gelu_tanh", "silu"):
        size = torch.maximum(size, expected[1:2].abs() * torch.tensor([[0.0], [1.0], [1.0]]))
    assert ((got.double() - expected).abs() <= allowed * size).all()


@both
@kinds
def test_parameters(which, kind):
    z = torch.linspace(-5, 30, 700, dtype=torch.float64)
    given = {"elu": {"alpha": 0.3}, "softplus": {"beta": 2.5, "threshold": 8.0}}.get(kind)
    if given is None:
        with pytest.raises(ValueError, match="no parameter alpha"):
            kernels.activation_derivatives(z, kind, alpha=1.0)
        return
    f = {"elu": lambda z: F.elu(z, 0.3), "softplus": lambda z: F.softplus(z, 2.5, 8.0)}[kind]
    with using(which):
        got = kernels.activation_derivatives(z, kind, **given)
    one = torch.ones_like(z)
    slope = jvp(f, (z,), (one,))[1]
    bend = jvp(lambda x: jvp(f, (x,), (one,))[1], (z,), (one,))[1]
    for mine, expected in zip(got, (f(z), slope, bend), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-13, atol=1e-13)


@both
@ALL
@pytest.mark.parametrize("n", [0, 1, 7, 16, 33, 511, 512, 513, 2000])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_jet_and_pullback_of_every_length(which, dtype, n, k):
    z, g = torch.randn(2, n).to(dtype)
    t, s, dg = torch.randn(3, k, n).to(dtype)
    value, slope, bend = truth("gelu", z)
    with using(which):
        jet = kernels.activation_jet(z, t, "gelu")
        curve = kernels.activation_jet(z, t, "gelu", s=s)
        first = kernels.activation_jet(z, t, "gelu", order=1)
        pulled = kernels.activation_pullback(z, g, t, dg, "gelu")
    x, y, d = t.double(), s.double(), dg.double()
    close(jet.value, value, 2)
    close(jet.first, slope * x, 4)
    close(jet.second, bend * x * x, 8)
    close(curve.second, bend * x * x + slope * y, 8)
    assert first.second is None
    assert torch.equal(first.first, jet.first)
    close(pulled.cotangent, g.double() * slope, 4)
    close(pulled.tangents, d * slope + g.double() * bend * x, 8)


@both
@kinds
def test_special_values(which, kind):
    z = torch.tensor([0.0, -0.0, 1e30, -1e30, 200.0, -200.0, torch.nan])
    with using(which):
        value, slope, bend = kernels.activation_derivatives(z, kind)
    assert value[:-1].isfinite().all()
    assert slope[:-1].isfinite().all()
    assert bend[:-1].isfinite().all()
    assert value[-1].isnan()
    expected = truth(kind, torch.tensor([0.0, 200.0, -200.0]))
    for mine, theirs in zip((value, slope, bend), expected, strict=True):
        torch.testing.assert_close(mine[[0, 4, 5]].double(), theirs, rtol=1e-6, atol=1e-30)


@both
def test_large_results_that_pass_the_caches_by(which):
    z, t = torch.randn(1_600_003), torch.randn(1, 1_600_003)
    with using(which):
        jet = kernels.activation_jet(z, t, "tanh")
        same = kernels.activation_jet(z[-1000:], t[:, -1000:], "tanh")
    value = torch.tanh(z.double())
    close(jet.value, value, 2)
    close(jet.first, (1 - value**2) * t.double(), 4)
    torch.testing.assert_close(jet.second[:, -1000:], same.second)


def layouts(x: Tensor) -> dict[str, Tensor]:
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan, dtype=x.dtype)
    wide[..., 1::2] = x
    return {
        "transposed": x.mT.contiguous().mT,
        "sliced": wide[..., 1::2],
        "unaligned": torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    }


@both
def test_strides(which):
    z, g = torch.randn(2, 5, 37)
    t, dg = torch.randn(2, 3, 5, 37)
    w = torch.rand(37) + 0.5
    calls = {
        "derivatives": lambda z, g, t, dg: kernels.activation_derivatives(z, "silu"),
        "jet": lambda z, g, t, dg: kernels.activation_jet(z, t, "silu"),
        "pullback": lambda z, g, t, dg: kernels.activation_pullback(z, g, t, dg, "silu"),
        "softmax": lambda z, g, t, dg: (kernels.softmax_curvature(z, t, g),),
        "hvp": lambda z, g, t, dg: (kernels.cross_entropy_hvp(z, t),),
        "norm": lambda z, g, t, dg: (kernels.layer_norm_tangent(z, z[:, 0], t, w),),
        "norm curvature": lambda z, g, t, dg: (kernels.layer_norm_curvature(z, z[:, 0], t, g, w),),
    }
    with using(which):
        for name, f in calls.items():
            expected = f(z, g, t, dg)
            for layout in layouts(z):
                got = f(*(layouts(x)[layout] for x in (z, g, t, dg)))
                for a, b in zip(got, expected, strict=True):
                    torch.testing.assert_close(a, b, msg=f"{name}, {layout}")
            got = f(z, g, t[:1].expand(3, 5, 37), dg)
            for a, b in zip(got, f(z, g, t[[0, 0, 0]], dg), strict=True):
                torch.testing.assert_close(a, b, msg=f"{name}, expanded")


@both
@ALL
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("shape", [(3, 1), (4, 5), (2, 16), (2, 3, 33), (2, 700), (0, 4), (9,)])
def test_softmax_curvature(which, dtype, log, shape):
    p = torch.softmax(3 * torch.randn(shape, dtype=torch.float64), -1).to(dtype)
    t, g = torch.randn(2, 2, *shape).to(dtype)
    f = torch.log_softmax if log else torch.softmax
    logits = p.double().log()  # what p is the softmax of, up to rounding
    with using(which):
        got = kernels.softmax_curvature(p, t, g[0], log=log)
    second = second_order(lambda x: f(x, -1), logits, t)[2]
    assert got.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    size = (second.abs() * g[0].double().abs()).sum(-1) + 1
    rounding = 3e-2 if dtype == torch.bfloat16 else 100 * torch.finfo(dtype).eps  # of p above all
    assert ((got.double() - (second * g[0].double()).sum(-1)).abs() <= rounding * size).all()


@both
@ALL
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", [(6, 3), (5, 16), (2, 4, 37), (3, 901)])
def test_cross_entropy_jet(which, dtype, smoothing, weighted, shape):
    z, t = (3 * torch.randn(shape)).to(dtype), torch.randn(2, *shape).to(dtype)
    target = torch.randint(shape[-1], shape[:-1])
    target.view(-1)[1] = -100
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    weight = (torch.rand(shape[-1]) + 0.5).to(wide) if weighted else None

    def f(x):
        return F.cross_entropy(
            x.reshape(-1, shape[-1]),
            target.reshape(-1),
            None if weight is None else weight.double(),
            label_smoothing=smoothing,
            reduction="none",
        ).reshape(target.shape)

    with using(which):
        got = kernels.cross_entropy_jet(z, target, t, weight=weight, label_smoothing=smoothing)
    exact = z.double()
    loss, pull = vjp(f, exact)
    gradient = pull(torch.ones_like(loss))[0]
    product = torch.stack([jvp(torch.func.grad(lambda x: f(x).sum()), (exact,), (d.double(),))[1] for d in t])
    factor = 40 if dtype != torch.bfloat16 else 2
    assert got.loss.dtype == wide
    torch.testing.assert_close(got.loss.double(), loss, rtol=1e-6, atol=1e-6)
    close(got.gradient, gradient, factor)
    close(got.product, product, factor)
    assert (got.gradient.reshape(-1, shape[-1])[1] == 0).all()
    assert (got.product.reshape(2, -1, shape[-1])[:, 1] == 0).all()


@both
@dtypes
def test_classes_on_any_axis(which, dtype):
    z, t = torch.randn(3, 7, 4, dtype=dtype), torch.randn(2, 3, 7, 4, dtype=dtype)
    target, scale = torch.randint(7, (3, 4)), torch.rand(3, 4, dtype=dtype)
    with using(which):
        assert torch.allclose(
            kernels.softmax_curvature(z, t, z.sin(), dim=1),
            kernels.softmax_curvature(z.movedim(1, -1), t.movedim(2, -1), z.sin().movedim(1, -1)),
        )
        assert torch.allclose(
            kernels.cross_entropy_hvp(z, t, scale=scale, dim=1),
            kernels.cross_entropy_hvp(z.movedim(1, -1), t.movedim(2, -1), scale=scale).movedim(-1, 2),
        )
        jet = kernels.cross_entropy_jet(z, target, t, dim=1)
    torch.testing.assert_close(jet.loss, F.cross_entropy(z, target, reduction="none"))
    assert jet.gradient.shape == z.shape
    assert jet.product.shape == t.shape


@both
@dtypes
def test_nothing_cancels_where_one_class_has_all(which, dtype):
    """p is 1 − δ there: δ and the entries of H v are all of the order e^−gap."""
    gap = 40.0 if dtype == torch.float64 else 18.0
    z = torch.tensor([[gap, 0.0, -1.0, 0.5]], dtype=dtype)
    v = torch.tensor([[[3.0, 4.0, 5.0, -2.0]]], dtype=dtype)
    target = torch.tensor([0])
    with using(which):
        jet = kernels.cross_entropy_jet(z, target, v)
    e = [1.0, math.exp(-gap), math.exp(-1 - gap), math.exp(0.5 - gap)]
    p = torch.tensor(e, dtype=torch.float64) / math.fsum(e)
    shifted = torch.tensor([0.0, 1.0, 2.0, -5.0], dtype=torch.float64)
    expected = p * (shifted - (p * shifted).sum())
    torch.testing.assert_close(jet.product[0, 0].double(), expected, rtol=2e-6, atol=0)
    if which == "compiled":
        torch.testing.assert_close(
            jet.loss.double(), torch.tensor([math.log1p(math.fsum(e[1:]))]).double(), rtol=2e-6, atol=0
        )


@both
def test_softmax_of_special_rows(which):
    z = torch.tensor([[0.0, -torch.inf, 1.0], [torch.nan, 0.0, 0.0], [1e4, 0.0, -1e4], [300.0, 300.0, 300.0]])
    t = torch.randn(1, 4, 3)
    with using(which):
        bent = kernels.softmax_curvature(torch.softmax(z, -1), t, torch.randn(4, 3))
        product = kernels.cross_entropy_hvp(z, t)
    assert bent[0, 1].isnan()
    assert product[0, 1].isnan().all()
    assert product[0, [0, 2, 3]].isfinite().all()
    assert bent[0, [0, 2, 3]].isfinite().all()


@both
@ALL
@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("shape", [(3, 2), (4, 5), (2, 16), (2, 3, 33), (2, 700), (0, 4), (9,)])
def test_layer_norm(which, dtype, shape, affine):
    x, g = (2 * torch.randn(2, *shape) + 0.5).double()
    t = torch.randn(2, *shape).to(dtype)
    d, eps = shape[-1], 1e-3
    weight = (torch.rand(d) + 0.5).to(dtype) if affine else None
    scale = 1.0 if weight is None else weight.double()

    def f(x):
        # not F.layer_norm, whose second tangents are wrong in torch 2.13
        c = x - x.mean(-1, keepdim=True)
        return c * (c.square().mean(-1, keepdim=True) + eps).rsqrt() * scale

    unit, _, inverse = torch.native_layer_norm(x, [d], None, None, eps)
    wide = torch.float32 if dtype == torch.bfloat16 else dtype
    given = unit.to(dtype), inverse[..., 0].to(wide), t
    with using(which):
        tangent = kernels.layer_norm_tangent(*given, weight)
        bent = kernels.layer_norm_curvature(*given, g.to(dtype), weight)
    _, first, second = second_order(f, x, t)
    assert tangent.dtype == dtype
    assert bent.dtype == wide
    close(tangent, first, 100 if dtype != torch.bfloat16 else 8)
    size = (second.abs() * g.abs()).sum(-1) + d
    rounding = 5e-2 if dtype == torch.bfloat16 else 100 * torch.finfo(dtype).eps
    assert ((bent.double() - (second * g).sum(-1)).abs() <= rounding * size).all()


@both
def test_rows_without_entries(which):
    unit, t = torch.zeros(3, 0), torch.zeros(2, 3, 0)
    with using(which):
        assert kernels.layer_norm_tangent(unit, torch.ones(3), t).shape == (2, 3, 0)
        assert kernels.layer_norm_curvature(unit, torch.ones(3), t, unit).shape == (2, 3)
        assert torch.equal(kernels.softmax_curvature(unit, t, unit), torch.zeros(2, 3))


@both
@dtypes
def test_results_into_given_memory(which, dtype):
    z, g = torch.randn(2, 100, dtype=dtype)
    t, s, dg = torch.randn(3, 2, 100, dtype=dtype)
    with using(which):
        for call, expected in (
            (
                lambda out: kernels.activation_derivatives(z, "elu", out=out),
                kernels.activation_derivatives(z, "elu"),
            ),
            (
                lambda out: kernels.activation_jet(z, t, "elu", s=s, out=out),
                kernels.activation_jet(z, t, "elu", s=s),
            ),
            (
                lambda out: kernels.activation_jet(z, t, "elu", order=1, out=out),
                kernels.activation_jet(z, t, "elu", order=1)[:2],
            ),
            (
                lambda out: kernels.activation_pullback(z, g, t, dg, "elu", out=out),
                kernels.activation_pullback(z, g, t, dg, "elu"),
            ),
        ):
            out = [torch.full_like(e, torch.nan) for e in expected]
            got = call(out)
            for a, b, c in zip(got, out, expected, strict=False):
                assert a is b
                torch.testing.assert_close(b, c)


def test_refusals():
    z, t = torch.randn(4, 3), torch.randn(2, 4, 3)
    with pytest.raises(TypeError, match=r"float16.*supported are"):
        kernels.activation_derivatives(z.half(), "relu")
    with pytest.raises(TypeError, match=r"torch\.Tensor"):
        kernels.activation_derivatives([1.0], "relu")
    with pytest.raises(TypeError, match="layout"):
        kernels.activation_derivatives(z.to_sparse(), "relu")
    with pytest.raises(ValueError, match="kinds are relu"):
        kernels.activation_derivatives(z, "swish")
    with pytest.raises(ValueError, match="beta must be positive"):
        kernels.activation_derivatives(z, "softplus", beta=0.0)
    with pytest.raises(ValueError, match="unsqueeze"):
        kernels.activation_jet(z, t[0], "relu")
    with pytest.raises(ValueError, match="must have shape"):
        kernels.activation_jet(z, t[:, :2], "relu")
    with pytest.raises(TypeError, match="convert one"):
        kernels.activation_jet(z, t.double(), "relu")
    with pytest.raises(ValueError, match="order"):
        kernels.activation_jet(z, t, "relu", order=3)
    with pytest.raises(ValueError, match="s has no effect"):
        kernels.activation_jet(z, t, "relu", s=t, order=1)
    with pytest.raises(ValueError, match="must hold 3"):
        kernels.activation_derivatives(z, "relu", out=[z])
    with pytest.raises(ValueError, match="contiguous"):
        kernels.activation_derivatives(z.mT.contiguous(), "relu", out=[z.clone().mT] * 3)
    with pytest.raises(ValueError, match="takes no derivatives"):
        kernels.activation_derivatives(z.clone().requires_grad_(), "relu", out=[z.clone() for _ in range(3)])
    with pytest.raises(ValueError, match="dim=2"):
        kernels.softmax_curvature(z, t, z, dim=2)
    with pytest.raises(ValueError, match="at least 1 axis"):
        kernels.softmax_curvature(torch.tensor(1.0), torch.randn(2), torch.tensor(1.0))
    with pytest.raises(ValueError, match="g must have shape"):
        kernels.softmax_curvature(z, t, z[:2])
    with pytest.raises(ValueError, match="scale"):
        kernels.cross_entropy_hvp(z, t, scale=torch.ones(3))
    with pytest.raises(TypeError, match="int64"):
        kernels.cross_entropy_jet(z, torch.zeros(4), t)
    with pytest.raises(ValueError, match="target must have shape"):
        kernels.cross_entropy_jet(z, torch.zeros(3, dtype=torch.long), t)
    with pytest.raises(ValueError, match="label_smoothing"):
        kernels.cross_entropy_jet(z, torch.zeros(4, dtype=torch.long), t, label_smoothing=2.0)
    with pytest.raises(ValueError, match="weight must have shape"):
        kernels.layer_norm_tangent(z, z[:, 0], t, torch.ones(4))
    with pytest.raises(ValueError, match="inverse must have shape"):
        kernels.layer_norm_tangent(z, z[:, :1], t)
    with pytest.raises(TypeError, match=r"inverse is torch\.bfloat16.*use torch\.float32"):
        kernels.layer_norm_curvature(z.bfloat16(), z[:, 0].bfloat16(), t.bfloat16(), z.bfloat16())
    with pytest.raises(ValueError, match="g must have shape"):
        kernels.layer_norm_curvature(z, z[:, 0], t, z[:2])


def test_operands_are_left_alone():
    z, g = torch.randn(2, 4, 9)
    t, dg = torch.randn(2, 3, 4, 9)
    copies = [x.clone() for x in (z, g, t, dg)]
    kernels.activation_pullback(z, g, t, dg, "tanh")
    kernels.cross_entropy_jet(z, torch.zeros(4, dtype=torch.long), t, label_smoothing=0.1)
    kernels.layer_norm_tangent(z, z[:, 0], t, z[0])
    kernels.layer_norm_curvature(z, z[:, 0], t, g, z[0])
    kernels.softmax_curvature(z, t, g, log=True)
    assert all(torch.equal(x, c) for x, c in zip((z, g, t, dg), copies, strict=True))
