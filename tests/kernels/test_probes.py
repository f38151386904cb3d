"""Random rows: the generator's test vectors, the same numbers everywhere, their law, dots without storing them."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacfwd, jacrev, jvp, vmap

from flatkern import kernels
from flatkern.kernels._philox import NORMALS, SIGNS, philox
from flatkern.kernels._probes import reference_dot, reference_rows
from flatkern.kernels._select import compiled_available, using

from .helpers import both, dtypes

KINDS = pytest.mark.parametrize("kind", ["rademacher", "normal"])
CPU = torch.device("cpu")


# Random123's published vectors for philox4x32-10: counter, key, words
VECTORS = [
    ((0, 0, 0, 0), (0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        "d16cfe09 94fdcceb 5001e420 24126ea1",
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_published_vectors(counter, key, expected):
    words = [counter[0] | counter[1] << 32, counter[2] | counter[3] << 32]
    block, row = (torch.tensor(w - (1 << 64) if w >> 63 else w) for w in words)
    words = philox(key[0] | key[1] << 32, row, block, SIGNS)
    assert " ".join(f"{int(w):08x}" for w in words) == expected


@both
def test_signs_are_the_bits_of_the_words(which):
    with using(which):
        rows = kernels.rademacher(77, 2, 300, first=5)
    for i, row in enumerate(rows):
        bits = []
        for block in range(3):
            for word in philox(77, torch.tensor(5 + i), torch.tensor(block), SIGNS):
                bits += [int(word) >> k & 1 for k in range(32)]
        assert row.tolist() == [1 - 2 * b for b in bits[:300]]


@both
def test_normals_are_box_muller_of_the_words(which):
    with using(which):
        row = kernels.normal(3, 1, 4000, first=9)[0].double()
    words = philox(3, torch.tensor(9), torch.arange(1000), NORMALS)
    for k in (0, 2):
        u, x = words[k].double() / 2**32, words[k + 1]
        angle = (x >> 30).double() * (math.pi / 2) + ((x & 0x3FFFFFFF).double() - 2**29) * (math.pi / 2**31)
        radius = (-2 * u.log()).sqrt()
        torch.testing.assert_close(row[k::4], radius * angle.cos(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(row[k + 1 :: 4], radius * angle.sin(), rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(not compiled_available(), reason="no compiled kernels")
@KINDS
@dtypes
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**63 - 1),
    first=st.integers(0, 2**40),
    count=st.integers(0, 4),
    size=st.integers(0, 1000) | st.just(70_001),
)
def test_compiled_and_reference_have_the_same_bits(kind, dtype, seed, first, count, size):
    draw = getattr(kernels, kind)
    with using("compiled"):
        got = draw(seed, count, size, first=first, dtype=dtype)
    with using("reference"):
        expected = draw(seed, count, size, first=first, dtype=dtype)
    assert got.dtype == dtype
    assert torch.equal(got, expected)


@pytest.mark.skipif(not compiled_available(), reason="no compiled kernels")
@pytest.mark.parametrize("isa", ["baseline", "avx2", "avx512"])
def test_every_instruction_set_gives_the_same_bits(isa):
    code = (
        "import torch; from flatkern import kernels as k; print(k.active().isa);"
        "print(k.normal(5, 3, 10_001).view(torch.int32).long().sum().item(),"
        "k.rademacher(5, 3, 10_001).cumsum(1).long().sum().item())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FLATKERN_ISA": isa},
        capture_output=True,
        text=True,
        check=True,
    )
    taken, sums = run.stdout.splitlines()
    if taken != isa:
        pytest.skip(f"this processor has no {isa}")
    normal, signs = kernels.normal(5, 3, 10_001), kernels.rademacher(5, 3, 10_001)
    assert sums == f"{normal.view(torch.int32).long().sum().item()} {signs.cumsum(1).long().sum().item()}"


@both
@KINDS
def test_chunks_and_rows_and_dtypes_agree(which, kind):
    draw = getattr(kernels, kind)
    with using(which):
        whole = draw(1, 6, 70_000)
        assert torch.equal(torch.cat([draw(1, 2, 70_000, first=f) for f in (0, 2, 4)]), whole)
        assert torch.equal(draw(1, 6, 70_000, dtype=torch.float64), whole.double())
        assert torch.equal(draw(1, 6, 333), whole[:, :333])
    assert torch.equal(
        reference_rows(kind, 1, (2, 4), (1001, 1999), CPU).to(whole.dtype), whole[2:4, 1001:1999]
    )


@KINDS
def test_thread_counts_agree(kind):
    draw, before = getattr(kernels, kind), torch.get_num_threads()
    x = torch.randn(3, 500_000)
    try:
        rows, dots = [], []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            rows.append(draw(1, 3, 500_000))
            dots.append(kernels.rademacher_dot(x, 1))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, rows[0]) for r in rows)
    assert all(torch.equal(d, dots[0]) for d in dots)


def test_no_generator_is_touched():
    state = torch.get_rng_state()
    kernels.rademacher(0, 2, 100)
    kernels.normal(0, 2, 100)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_law_of_signs():
    rows = kernels.rademacher(11, 64, 20_000, dtype=torch.float64)
    assert set(rows.unique().tolist()) == {-1.0, 1.0}
    assert abs(float(rows.mean())) < 4 / math.sqrt(rows.numel())
    gram = rows @ rows.mT / rows.shape[1]
    off = gram[~torch.eye(64, dtype=torch.bool)]
    assert float(off.abs().max()) < 5.5 / math.sqrt(rows.shape[1])
    assert abs(float(off.square().mean()) * rows.shape[1] - 1) < 0.1
    lagged = (rows[:, 1:] * rows[:, :-1]).mean()
    assert abs(float(lagged)) < 4 / math.sqrt(rows.numel())


def test_the_law_of_normals():
    x = kernels.normal(11, 8, 100_000, dtype=torch.float64)
    n = x.numel()
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - mean) < 4.5 * math.sqrt(variance / n)
    ordered = x.flatten().sort().values
    cdf = 0.5 * (1 + torch.erf(ordered / math.sqrt(2)))
    gap = (cdf - (torch.arange(n) + 0.5) / n).abs().max()
    assert float(gap) < 1.8 / math.sqrt(n)  # Kolmogorov: exceeded with probability 0.003
    assert 4.3 < float(x.abs().max()) < 6.8
    assert abs(float((x[:, ::2] * x[:, 1::2]).mean())) < 4.5 / math.sqrt(n / 2)


def test_seeds_and_kinds_are_independent():
    a, b = kernels.rademacher(0, 1, 50_000), kernels.rademacher(1, 1, 50_000)
    c = kernels.normal(0, 1, 50_000)
    for x, y in ((a, b), (a, c), (a.abs() * a, c.sign())):
        assert abs(float((x * y).mean())) < 5 / math.sqrt(50_000)


# -- dots -------------------------------------------------------------------------------------------------
@both
@dtypes
@pytest.mark.parametrize("shape", [(3, 1), (2, 129), (2, 4, 1000), (1, 140_000), (0, 5), (3, 0), (2, 0, 7)])
def test_dot(which, dtype, shape):
    x = torch.randn(shape, dtype=dtype)
    signs = kernels.rademacher(8, shape[-2], shape[-1], first=2, dtype=torch.float64)
    with using(which):
        got = kernels.rademacher_dot(x, 8, first=2)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, (x.double() * signs).sum(-1), rtol=1e-12, atol=1e-10)


@both
def test_dot_takes_any_strides(which):
    x = torch.randn(7, 50, 6)
    with using(which):
        for same in (x.permute(2, 0, 1), x.permute(2, 0, 1).contiguous().flip(2).flip(2), x[..., ::2].mT):
            torch.testing.assert_close(
                kernels.rademacher_dot(same, 1),
                reference_dot(same.contiguous(), 1, 0),
                rtol=1e-12,
                atol=1e-10,
            )


@both
def test_derivatives_of_a_dot(which):
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    signs = kernels.rademacher(4, 3, 5, dtype=torch.float64)

    def f(x):
        return kernels.rademacher_dot(x, 4)

    with using(which):
        assert gradcheck(f, x, check_forward_ad=True, check_batched_grad=True)
        assert gradgradcheck(lambda x: f(x) ** 2, x, check_fwd_over_rev=True)
        y = x.detach()[0]
        expected = torch.zeros(3, 3, 5, dtype=torch.float64)
        expected[range(3), range(3)] = signs
        for jacobian in (jacrev(f)(y), jacfwd(f)(y)):
            torch.testing.assert_close(jacobian, expected)
        tangent = torch.randn_like(y)
        torch.testing.assert_close(jvp(f, (y,), (tangent,))[1], (tangent * signs).sum(1))
        torch.testing.assert_close(
            jacfwd(jacrev(lambda y: f(y).square().sum()))(y).flatten(0, 1).flatten(1),
            2 * expected.flatten(1).mT @ expected.flatten(1),
        )
        torch.testing.assert_close(vmap(vmap(f))(x.detach()[None]), f(x.detach())[None])
        torch.testing.assert_close(vmap(f, in_dims=2)(x.detach().permute(1, 2, 0)), f(x.detach()))


@both
def test_compile(which):
    x = torch.randn(3, 40)

    def f(x):
        return kernels.rademacher_dot(x.sin(), 4) * 2

    with using(which):
        got = torch.compile(f, fullgraph=True, backend="aot_eager")(x)
        torch.testing.assert_close(got, f(x))


@pytest.mark.skipif(not compiled_available(), reason="no compiled kernels")
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("rademacher", (torch.empty(0), 1, 2, 3, 50)),
        ("normal", (torch.empty(0, dtype=torch.float64), 1, 2, 3, 50)),
        ("rademacher_dot", (torch.randn(2, 3, 50), 1, 0)),
    ],
)
def test_opcheck(name, args):
    torch.library.opcheck(
        getattr(torch.ops.flatkern, name).default,
        args,
        test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_static"),
    )


# -- refusals ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: kernels.rademacher(-1, 2, 3), ValueError, "seed"),
        (lambda: kernels.rademacher(2**63, 2, 3), ValueError, "seed"),
        (lambda: kernels.normal(0, -2, 3), ValueError, "count"),
        (lambda: kernels.normal(0, 2, 3.0), TypeError, "size"),
        (lambda: kernels.normal(0, 2, 3, first=-1), ValueError, "first"),
        (lambda: kernels.rademacher(0, 2, 3, dtype=torch.bfloat16), TypeError, "float32 or torch.float64"),
        (lambda: kernels.rademacher_dot(torch.ones(3), 0), ValueError, "k, size"),
        (lambda: kernels.rademacher_dot([1.0], 0), TypeError, "Tensor"),
        (lambda: kernels.rademacher_dot(torch.ones(2, 3, dtype=torch.int64), 0), TypeError, "dtype"),
    ],
)
def test_refusals(call, error, message):
    with pytest.raises(error, match=message):
        call()


# -- the NumPy door ---------------------------------------------------------------------------------------
native = pytest.importorskip("flatkern.native", reason="the NumPy door was not built")


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("threads", [1, 3])
def test_native_has_the_same_numbers(dtype, threads):
    tensor_dtype = torch.from_numpy(np.empty(0, dtype)).dtype
    for kind in ("rademacher", "normal"):
        got = getattr(native, kind)(3, 2, 300_000, first=1, dtype=dtype, threads=threads)
        expected = getattr(kernels, kind)(3, 2, 300_000, first=1, dtype=tensor_dtype)
        assert got.dtype == dtype
        np.testing.assert_array_equal(got, expected.numpy())
    x = np.random.default_rng(0).standard_normal((2, 3, 1000)).astype(dtype)
    got = native.rademacher_dot(np.asfortranarray(x), 3, first=1, threads=threads)
    np.testing.assert_allclose(
        got, kernels.rademacher_dot(torch.from_numpy(x), 3, first=1).numpy(), rtol=1e-12
    )
    assert native.rademacher_dot(np.zeros((2, 0, 5)), 3).shape == (2, 0)


def test_native_refusals():
    with pytest.raises(TypeError, match="float32 or float64"):
        native.normal(0, 1, 2, dtype=np.float16)
    with pytest.raises(ValueError, match="seed"):
        native.rademacher(-1, 1, 2)
    with pytest.raises(TypeError, match=r"numpy\.ndarray"):
        native.rademacher_dot([[1.0]], 0)
