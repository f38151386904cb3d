"""Attention by query blocks is torch's decomposed form in every derivative, stores no T × T, gives no silent zeros."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatkern.kernels import _attention_layout, attention
from flatkern.operators.graph_memory import graph_bytes

DOUBLE = torch.float64


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Several blocks and chunks at these sizes."""
    monkeypatch.setattr(_attention_layout, "ROWS", 3)
    monkeypatch.setattr(_attention_layout, "CAUSAL_ROWS", 2)
    monkeypatch.setattr(_attention_layout, "BATCH_BYTES", 320)


def decomposed(q, k, v, attn_mask=None, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **options)


def random(*shape, dtype=DOUBLE):
    return torch.randn(*shape, dtype=dtype)


def boolean_mask():
    mask = torch.rand(2, 1, 5, 6) > 0.4
    mask[..., 0] = True
    mask[0, 0, 2] = False  # a row without keys
    return mask


def float_mask():
    mask = random(3, 5, 6)
    mask[0, 1], mask[1, 1, :3] = -torch.inf, -torch.inf
    return mask


def gqa():
    return random(2, 6, 5, 4), random(2, 3, 6, 4), random(2, 3, 6, 7)


def plain():
    return random(2, 3, 5, 4), random(2, 3, 6, 4), random(2, 3, 6, 7)


# name → (tensors that are differentiated, options that are not)
CASES = {
    "plain": lambda: (plain(), {}),
    "causal": lambda: (plain(), {"is_causal": True}),
    "causal, more queries": lambda: (
        (random(2, 7, 4), random(2, 3, 4), random(2, 3, 4)),
        {"is_causal": True},
    ),
    "boolean": lambda: (plain(), {"attn_mask": boolean_mask()}),
    "padding": lambda: (
        plain(),
        {"attn_mask": torch.tensor([[True] * 6, [True] * 2 + [False] * 4])[:, None, None]},
    ),
    "one mask": lambda: (plain(), {"attn_mask": torch.rand(5, 6) > 0.5, "scale": 0.9}),
    "float": lambda: ((*plain(), float_mask()), {}),
    "float row": lambda: ((*plain(), random(2, 1, 1, 6)), {"scale": -0.3}),
    "float column": lambda: ((*plain(), random(1, 5, 1)), {}),
    "fixed float": lambda: (plain(), {"attn_mask": float_mask()}),
    "gqa": lambda: (gqa(), {"enable_gqa": True, "is_causal": True}),
    "broadcast": lambda: ((random(5, 4), random(3, 1, 6, 4), random(2, 6, 2)), {}),
    "no batch": lambda: ((random(5, 4), random(6, 4), random(6, 4)), {}),
}
everywhere = pytest.mark.parametrize("name", CASES)


def scalar(form, options):
    return lambda *tensors: (form(*tensors, **options).sin() * 1.3).sum()


def twice(f, tensors, vectors, **batched):
    leaves = [t.clone().requires_grad_() for t in tensors]
    gradient = torch.autograd.grad(f(*leaves), leaves, create_graph=True)
    return torch.autograd.grad(gradient, leaves, vectors, **batched)


def ggn_push(f, tensors, vectors, **batched):
    leaves = [t.clone().requires_grad_() for t in tensors]
    w = leaves[0].new_zeros(()).requires_grad_()
    pulled = torch.autograd.grad(f(*leaves), leaves, w, create_graph=True)
    return torch.autograd.grad(pulled, w, vectors, **batched)


def every(f, tensors):
    return tuple(range(len(tensors)))


def stacked(vectors):
    return tuple(torch.stack([t, 2 * t, t * t]) for t in vectors)


# the transform → a function of (scalar function, tensors, vectors)
TRANSFORMS = {
    "value": lambda f, x, u: f(*x),
    "grad": lambda f, x, u: grad(f, every(f, x))(*x),
    "jvp": lambda f, x, u: jvp(f, x, u)[1],
    "jvp of grad": lambda f, x, u: jvp(grad(f, every(f, x)), x, u)[1],
    "vjp of grad": lambda f, x, u: vjp(grad(f, every(f, x)), *x)[1](u),
    "grad of jvp": lambda f, x, u: grad(lambda *t: jvp(f, t, u)[1], every(f, x))(*x),
    "double backward": twice,
    "double backward, batched": lambda f, x, u: twice(f, x, stacked(u), is_grads_batched=True),
    "gradient in the cotangent": ggn_push,
    "gradient in the cotangent, batched": lambda f, x, u: ggn_push(f, x, stacked(u), is_grads_batched=True),
    "vmap of jvp of grad": lambda f, x, u: vmap(lambda *t: jvp(grad(f, every(f, x)), x, t)[1])(*stacked(u)),
    "vmap of vjp of grad": lambda f, x, u: vmap(lambda *t: vjp(grad(f, every(f, x)), *x)[1](t))(*stacked(u)),
    "vmap over one input": lambda f, x, u: vmap(grad(f, every(f, x)), (0, *(None,) * (len(x) - 1)))(
        stacked(x)[0], *x[1:]
    ),
    "vmap over the last axis": lambda f, x, u: vmap(f, (None, None, -1, *(None,) * (len(x) - 3)))(
        *x[:2], torch.stack([x[2], x[2] ** 2], -1), *x[3:]
    ),
}


@everywhere
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_it_is_the_decomposed_form(name, transform):
    tensors, options = CASES[name]()
    vectors = tuple(random(*t.shape) for t in tensors)
    run = TRANSFORMS[transform]
    got = run(scalar(attention, options), tensors, vectors)
    expected = run(scalar(decomposed, options), tensors, vectors)
    got, expected = (torch.utils._pytree.tree_leaves(r) for r in (got, expected))
    assert len(got) == len(expected)
    for ours, theirs in zip(got, expected, strict=True):
        # reverse over forward of torch's form is NaN where a row has no key
        known = theirs.isfinite()
        assert ours.isfinite().all()
        assert known.all() or transform == "grad of jvp"
        torch.testing.assert_close(ours[known], theirs[known], rtol=1e-9, atol=1e-10)
    assert any(t.abs().max() > 1e-3 for t in got)


@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"attn_mask": torch.tensor([[True, True, True], [False, True, True]])}],
)
def test_whole_hessians(options):
    q, k, v = random(1, 2, 2), random(1, 3, 2), random(1, 3, 2)
    ours, theirs = (lambda q, form=form: scalar(form, options)(q, k, v) for form in (attention, decomposed))
    expected = jacrev(jacrev(theirs))(q)
    for transform in (hessian, lambda f: jacrev(jacrev(f)), lambda f: jacrev(jacfwd(f))):
        torch.testing.assert_close(transform(ours)(q), expected, rtol=1e-9, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 3), st.integers(1, 7), st.integers(1, 7), st.integers(1, 4), st.integers(1, 4),
    st.booleans(), st.sampled_from([None, 0.0, -0.7, 2.0]), st.integers(0, 10**6),
)  # fmt: skip
def test_any_shape(batch, queries, keys, width, values, causal, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((batch, queries, width), (batch, keys, width), (batch, keys, values))
    tensors = [torch.randn(s, generator=generator, dtype=DOUBLE) for s in shapes]
    vectors = [torch.randn(s, generator=generator, dtype=DOUBLE) for s in shapes]
    ours, theirs = (
        twice(scalar(form, {"is_causal": causal, "scale": scale}), tensors, vectors)
        for form in (attention, decomposed)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", ["plain", "causal", "gqa", "float row"])
def test_gradcheck(name):
    tensors, options = CASES[name]()
    leaves = tuple(t.requires_grad_() for t in tensors)

    def f(*t):
        return attention(*t, **options)

    assert gradcheck(f, leaves, fast_mode=True, check_forward_ad=True, check_batched_grad=True)
    assert gradgradcheck(f, leaves, fast_mode=True, check_fwd_over_rev=True, check_rev_over_rev=True)


def test_plain_forward_mode():
    (q, k, v), _ = CASES["plain"]()
    u = random(*q.shape)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(attention(forward_ad.make_dual(q, u), k, v)).tangent
    torch.testing.assert_close(tangent, jvp(lambda t: decomposed(t, k, v), (q,), (u,))[1])


def thrice(f, q, u):
    leaf = q.clone().requires_grad_()
    (first,) = torch.autograd.grad(f(leaf), leaf, create_graph=True)
    (second,) = torch.autograd.grad(first, leaf, u, create_graph=True)
    return torch.autograd.grad(second, leaf, u)


@pytest.mark.parametrize(
    "run",
    [
        thrice,
        lambda f, q, u: jvp(lambda t: jvp(f, (t,), (u,))[1], (q,), (u,)),
        lambda f, q, u: jvp(lambda t: jvp(grad(f), (t,), (u,))[1], (q,), (u,)),
        lambda f, q, u: grad(lambda t: jvp(grad(f), (t,), (u,))[1].sum())(q),
        lambda f, q, u: grad(lambda t: (vjp(grad(f), t)[1](u)[0] * u).sum())(q),
        lambda f, q, u: jacfwd(jacfwd(f))(q),
    ],
    ids=["reverse", "forward over forward", "forward over forward over reverse", "reverse over forward over reverse",
         "reverse, torch.func", "jacfwd of jacfwd"],
)  # fmt: skip
def test_what_it_lacks_raises(run):
    (q, k, v), _ = CASES["plain"]()
    with pytest.raises(NotImplementedError, match=r"SDPBackend\.MATH"):
        run(lambda t: attention(t, k, v).sin().sum(), q, random(*q.shape))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["plain", "causal", "boolean", "float"])
def test_low_precision_is_no_worse_than_twice_torch(name, dtype):
    tensors, options = CASES[name]()
    rounded = [t.to(dtype) for t in tensors]
    exact = [t.double() for t in rounded]
    wide = scalar(decomposed, options)
    low = [r.clone().requires_grad_() for r in rounded]
    for form, errors in (first := {attention: [], decomposed: []}).items():
        out = form(*low, **options)
        assert out.dtype == dtype
        grads = torch.autograd.grad((out.float().sin() * 1.3).sum(), low)
        expected = grad(wide, every(wide, exact))(*exact)
        errors += [float((a.double() - b).abs().max()) for a, b in zip(grads, expected, strict=True)]
    for ours, theirs in zip(first[attention], first[decomposed], strict=True):
        assert ours <= 2 * theirs + 4 * torch.finfo(dtype).eps


def test_a_mask_of_the_least_number_does_not_overflow():
    q, k, v = (random(1, 4, 3, dtype=torch.float32) for _ in range(3))
    mask = torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), torch.finfo(torch.float32).min)
    mask[0] = torch.finfo(torch.float32).min  # all equal: the mean of the values
    torch.testing.assert_close(attention(q, k, v, mask), decomposed(q, k, v, mask))
    torch.testing.assert_close(attention(q, k, v, mask)[:, 0], v.mean(1))
    vectors = [torch.randn_like(t) for t in (q, k, v)]
    ours, theirs = (
        twice(scalar(form, {"attn_mask": mask}), (q, k, v), vectors) for form in (attention, decomposed)
    )
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_large_scores_neither_overflow_nor_vanish():
    q, k, v = (random(2, 5, 4, dtype=torch.float32) for _ in range(3))
    torch.testing.assert_close(attention(1e3 * q, 1e2 * k, v), decomposed(1e3 * q, 1e2 * k, v))


@pytest.mark.parametrize("shape", [(0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4)])
def test_empty(shape):
    batch, queries, keys, width = shape
    q, k, v = random(batch, queries, width), random(batch, keys, width), random(batch, keys, 5)
    out = attention(q.requires_grad_(), k, v)
    torch.testing.assert_close(out, torch.zeros(batch, queries, 5, dtype=DOUBLE))
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert not gradient.any()


def test_autocast_as_torch_does():
    q, k, v = (random(2, 5, 4, dtype=torch.float32) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = attention(q, k, v), decomposed(q, k, v)
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_no_weights_are_stored(monkeypatch):
    monkeypatch.undo()
    length = 512
    q, k, v = (random(2, length, 16, dtype=torch.float32).requires_grad_() for _ in range(3))
    gradients = torch.autograd.grad(attention(q, k, v).square().sum(), (q, k, v), create_graph=True)
    stored = graph_bytes(gradients, (q, k, v))
    assert 0 < stored < 2 * length * length * 4 / 2
    with torch.no_grad():  # what the graph needs: O, its cotangents, row statistics, the results
        assert stored <= 8 * q.numel() * 4 + 2 * 2 * length * 2 * 4


def test_no_reference_cycle():
    import gc
    import weakref

    def kept():
        q, k, v = (t.requires_grad_() for t in CASES["plain"]()[0])
        out = attention(q, k, v)
        gradients = torch.autograd.grad(out.sin().sum(), (q, k, v), create_graph=True)
        return [weakref.ref(t) for t in (q, out, *gradients)]

    gc.collect()
    gc.disable()
    try:
        assert all(ref() is None for ref in kept())
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.ones(2, 3).int(),) * 3, {}, TypeError, "query"),
        ((torch.ones(2, 3), torch.ones(2, 3).double(), torch.ones(2, 3)), {}, TypeError, "key"),
        ((torch.ones(3),) * 3, {}, ValueError, "two dimensions"),
        ((torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 3)), {}, ValueError, "Lk, d"),
        ((torch.ones(2, 2, 3), torch.ones(3, 2, 3), torch.ones(3, 2, 3)), {}, ValueError, "broadcast"),
        ((torch.ones(2, 3),) * 3, {"attn_mask": torch.ones(3, 3)}, ValueError, "attn_mask"),
        ((torch.ones(2, 3),) * 3, {"attn_mask": torch.ones(2, 2).int()}, TypeError, "attn_mask"),
        ((torch.ones(2, 3),) * 3, {"attn_mask": torch.ones(2, 2), "is_causal": True}, ValueError, "not both"),
        ((torch.ones(3, 2, 3), *(torch.ones(2, 2, 3),) * 2), {"enable_gqa": True}, ValueError, "multiple"),
    ],
)
def test_bad_input_says_what_is_wrong(arguments, options, error, message):
    with pytest.raises(error, match=message):
        attention(*arguments, **options)


def test_compiled_into_a_graph():
    (q, k, v), _ = CASES["plain"]()
    q.requires_grad_()
    compiled = torch.compile(lambda t: attention(t, k, v).sin().sum(), fullgraph=True, backend="aot_eager")
    (ours,) = torch.autograd.grad(compiled(q), q)
    (theirs,) = torch.autograd.grad(decomposed(q, k, v).sin().sum(), q)
    torch.testing.assert_close(ours, theirs)


def test_nan_stays_where_it_is():
    q, k, v = (random(1, 5, 4) for _ in range(3))
    q[0, 2, 1] = math.nan
    out = attention(q, k, v)
    assert out[0, 2].isnan().all()
    assert out[0, [0, 1, 3, 4]].isfinite().all()
