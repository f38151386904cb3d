"""Every transform of the jets is right, and not zero, for both implementations."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, vmap

from flatkern import kernels
from flatkern.kernels._activation_forms import KINDS
from flatkern.kernels._jet_operator import _operators
from flatkern.kernels._select import jets_available, using

from .helpers import both
from .test_transforms import TRANSFORMS

TARGET = torch.tensor([1, 0, 4])


def operands(x: Tensor, c: type[Tensor] | None = None) -> tuple[Tensor, ...]:
    """Primal, cotangent, tangents, tangents of the cotangent, a row's worth and one number a row, made of x [3, 5]."""
    t = torch.stack([x.sin(), x * x - 0.5])
    dg = torch.stack([x.cos(), 0.3 * x])
    return x, torch.tanh(2 * x), t, dg, x[0].exp(), x[:, 0].square() + 0.1


def weighted(outputs: tuple[Tensor, ...]) -> Tensor:
    """A scalar that every entry of every output moves."""
    total = torch.zeros((), dtype=torch.float64)
    for o in outputs:
        weight = torch.linspace(0.5, 1.5, o.numel(), dtype=o.dtype).reshape(o.shape)
        total = total + (weight * o).sum()
    return total


def reference(name: str, setting: tuple[float, ...], *given: Tensor | None) -> tuple[Tensor, ...]:
    return _operators[name].reference(setting, given)


def own(name: str, x: Tensor) -> tuple[Tensor, ...]:
    z, g, t, dg, row, scale = operands(x)
    return {
        "derivatives": lambda: kernels.activation_derivatives(z, "gelu"),
        "jet": lambda: kernels.activation_jet(z, t, "silu", s=dg),
        "first order": lambda: kernels.activation_jet(z, t, "tanh", order=1)[:2],
        "pullback": lambda: kernels.activation_pullback(z, g, t, dg, "softplus", beta=2.0),
        "softmax": lambda: (kernels.softmax_curvature(z, t, g),),
        "log_softmax": lambda: (kernels.softmax_curvature(z, t, g, log=True),),
        "hvp": lambda: (kernels.cross_entropy_hvp(z, t, scale=scale),),
        "cross_entropy": lambda: kernels.cross_entropy_jet(z, TARGET, t, weight=row),
        "layer_norm": lambda: (kernels.layer_norm_tangent(z, scale, t, row),),
        "layer_norm curvature": lambda: (kernels.layer_norm_curvature(z, scale, t, g, row),),
    }[name]()


def plain(name: str, x: Tensor) -> tuple[Tensor, ...]:
    """The same of torch's operators alone."""
    z, g, t, dg, row, scale = operands(x)
    silu, tanh = KINDS.index("silu"), KINDS.index("tanh")
    if name == "cross_entropy":
        log_p = torch.log_softmax(z, -1)
        p, w = log_p.exp(), row[TARGET]
        one_hot = torch.nn.functional.one_hot(TARGET, 5).double()
        product = w[:, None] * (p * t - p * (p * t).sum(-1, keepdim=True))
        return -w * (one_hot * log_p).sum(-1), w[:, None] * (p - one_hot), product
    return {
        "derivatives": lambda: reference("activation_derivatives", (KINDS.index("gelu"), 1.0, 0.0), z),
        "jet": lambda: reference("activation_jet", (silu, 1.0, 0.0, 2), z, t, dg),
        "first order": lambda: reference("activation_jet", (tanh, 1.0, 0.0, 1), z, t, None),
        "pullback": lambda: reference(
            "activation_pullback", (KINDS.index("softplus"), 2.0, 20.0), z, g, t, dg
        ),
        "softmax": lambda: reference("softmax_curvature", (0.0,), z, t, g),
        "log_softmax": lambda: reference("softmax_curvature", (1.0,), z, t, g),
        "hvp": lambda: reference("cross_entropy_hvp", (), z, scale, t),
        "layer_norm": lambda: reference("norm_tangent", (), z, scale, t, row),
        "layer_norm curvature": lambda: reference("norm_curvature", (), z, scale, t, g, row),
    }[name]()


ALL = (
    "derivatives",
    "jet",
    "first order",
    "pullback",
    "softmax",
    "log_softmax",
    "hvp",
    "cross_entropy",
    "layer_norm",
    "layer_norm curvature",
)
NAMES = pytest.mark.parametrize("name", ALL)
FEW = pytest.mark.parametrize("name", ["pullback", "cross_entropy", "layer_norm curvature"])


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


@both
@FEW
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transform(which, name, transform, x):
    with using(which):
        got = TRANSFORMS[transform](lambda x: weighted(own(name, x)))(x)
    expected = TRANSFORMS[transform](lambda x: weighted(plain(name, x)))(x)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@both
@NAMES
@pytest.mark.parametrize("transform", ["grad", "jvp", "jvp of grad"])
def test_first_transforms(which, name, transform, x):
    with using(which):
        got = TRANSFORMS[transform](lambda x: weighted(own(name, x)))(x)
    expected = TRANSFORMS[transform](lambda x: weighted(plain(name, x)))(x)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


@both
@NAMES
@pytest.mark.parametrize("dim", [0, 2])
def test_vmap(which, name, dim, x):
    many = torch.stack([x, 2 * x, x - 1, x * x])
    moved = many.movedim(0, dim)
    with using(which):
        got = vmap(lambda x: tuple(own(name, x)), in_dims=dim)(moved)
        slope = vmap(grad(lambda x: weighted(own(name, x))), in_dims=dim)(moved)
        nested = vmap(vmap(lambda x: tuple(own(name, x))))(many[None])
    expected = [plain(name, y) for y in many]
    for i, (a, b) in enumerate(zip(got, nested, strict=True)):
        torch.testing.assert_close(a, torch.stack([e[i] for e in expected]))
        torch.testing.assert_close(a, b[0])
    for s, y in zip(slope, many, strict=True):
        torch.testing.assert_close(s, grad(lambda y: weighted(plain(name, y)))(y))


@both
def test_vmap_over_single_operands(which, x):
    """Unbatched operands beside batched ones, the norms' weight among them."""
    t, weights = torch.stack([x, x.sin()]), torch.rand(4, 5, dtype=torch.float64) + 0.5
    with using(which):
        many = vmap(lambda w: kernels.layer_norm_tangent(x, x[:, 0], t, w))(weights)
        bent = vmap(lambda w: kernels.layer_norm_curvature(x, x[:, 0], t, x, w), in_dims=1)(weights.mT)
        jets = vmap(lambda d: kernels.activation_jet(x, d, "tanh").second)(torch.stack([t, 2 * t]))
        for i, w in enumerate(weights):
            torch.testing.assert_close(many[i], kernels.layer_norm_tangent(x, x[:, 0], t, w))
            torch.testing.assert_close(bent[i], kernels.layer_norm_curvature(x, x[:, 0], t, x, w))
        torch.testing.assert_close(jets[1], kernels.activation_jet(x, 2 * t, "tanh").second)


@both
@NAMES
def test_gradcheck(which, name):
    x = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4)) * 0.7
    x.requires_grad_()
    with using(which):
        assert gradcheck(
            lambda x: weighted(own(name, x)), x, check_forward_ad=True, check_batched_grad=True,
            check_batched_forward_grad=True, fast_mode=True,
        )  # fmt: skip
        assert gradgradcheck(
            lambda x: weighted(own(name, x)),
            x,
            check_fwd_over_rev=True,
            check_rev_over_rev=True,
            fast_mode=True,
        )


@both
@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck_of_every_kind(which, kind):
    z = torch.tensor([-2.1, -0.3, 0.4, 1.7], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[0.5, -1.0, 2.0, 1.0]], dtype=torch.float64, requires_grad=True)
    with using(which):
        assert gradcheck(
            lambda z, t: tuple(kernels.activation_jet(z, t, kind)), (z, t), check_forward_ad=True
        )


@both
def test_plain_forward_mode_is_not_zero(which):
    z, t = torch.randn(4), torch.randn(2, 4)
    with using(which), forward_ad.dual_level():
        dual = forward_ad.make_dual(z, torch.ones(4))
        tangent = forward_ad.unpack_dual(kernels.activation_jet(dual, t, "tanh").first).tangent
    expected = -2 * z.tanh() * (1 - z.tanh() ** 2) * t
    torch.testing.assert_close(tangent, expected)


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_have_the_dtype_of_the_input(which, dtype):
    z = torch.randn(3, 4).to(dtype).requires_grad_()
    t = torch.randn(2, 3, 4).to(dtype).requires_grad_()
    with using(which):
        kernels.cross_entropy_jet(z, torch.tensor([0, 1, 2]), t).product.float().square().sum().backward()
        assert z.grad.dtype == t.grad.dtype == dtype
        assert z.grad.abs().sum() > 0


@both
@pytest.mark.parametrize(
    "name",
    [n if n in ("jet", "cross_entropy") else pytest.param(n, marks=pytest.mark.slow) for n in ALL],
)
def test_compile_full_graph(which, name, x):
    torch.compiler.reset()
    with using(which):
        got = torch.compile(lambda x: tuple(own(name, x)), fullgraph=True, backend="aot_eager")(x)
    for a, b in zip(got, plain(name, x), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@both
@FEW
@pytest.mark.parametrize("transform", ["grad", "jvp"])
def test_compile_of_transforms(which, name, transform, x):
    torch.compiler.reset()
    f = TRANSFORMS[transform](lambda x: weighted(own(name, x)))
    with using(which):
        got = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(got, TRANSFORMS[transform](lambda x: weighted(plain(name, x)))(x))


@pytest.mark.slow
@both
@FEW
def test_compile_with_backward(which, name, x):
    torch.compiler.reset()
    x.requires_grad_()
    with using(which):
        torch.compile(lambda x: weighted(own(name, x)), fullgraph=True, backend="aot_eager")(x).backward()
    torch.testing.assert_close(x.grad, grad(lambda x: weighted(plain(name, x)))(x.detach()))


@pytest.mark.skipif(not jets_available(), reason="no compiled kernels")
def test_opcheck():
    z, g = torch.randn(2, 3, 5)
    t, dg = torch.randn(2, 2, 3, 5)
    w, scale = torch.rand(5), torch.rand(3)
    ops = torch.ops.flatkern
    for op, arguments in (
        (ops.activation_derivatives, (z, 1, 1.0, 0.0)),
        (ops.activation_derivatives_out, (z, 1, 1.0, 0.0, *torch.empty(3, 3, 5))),
        (ops.activation_jet, (z, t, None, 4, 1.0, 0.0, 1)),
        (ops.activation_jet, (z, t, dg, 4, 1.0, 0.0, 2)),
        (ops.activation_jet_out, (z, t, None, 4, 1.0, 0.0, z.clone(), t.clone(), None)),
        (ops.activation_pullback, (z, g, t, dg, 6, 2.0, 20.0)),
        (ops.activation_pullback_out, (z, g, t, dg, 6, 2.0, 20.0, z.clone(), t.clone())),
        (ops.softmax_curvature, (z, t, g, True)),
        (ops.cross_entropy_hvp, (z, None, t)),
        (ops.logsumexp_jet, (z, scale, t)),
        (ops.norm_tangent, (z, scale, t, w)),
        (ops.norm_curvature, (z, scale, t, g, None)),
    ):
        # not test_autograd_registration: derivatives belong to the Python function
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
