"""Properties over random shapes, dtypes and strides."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from flatkern import kernels
from flatkern.kernels._select import using

from .helpers import both

shapes = st.tuples(st.integers(0, 20), st.integers(1, 14), st.integers(1, 40))
orders = st.permutations([0, 1, 2])


def strided(shape, dtype, order, steps, seed):
    """A random tensor [n, c, d] whose memory order and steps are arbitrary."""
    generator = torch.Generator().manual_seed(seed)
    stored = [shape[k] * steps[k] for k in order]
    memory = torch.randn(stored, generator=generator, dtype=torch.float64).to(dtype)
    back = [order.index(k) for k in range(3)]
    return memory.permute(back)[:: steps[0], :: steps[1], :: steps[2]]


tensors = st.builds(
    strided,
    shapes,
    st.sampled_from([torch.float32, torch.float64]),
    orders,
    st.tuples(*[st.integers(1, 2)] * 3),
    st.integers(0, 2**31),
)


@both
@given(x=tensors)
def test_strides_never_matter(which, x):
    with using(which):
        for got, expected in zip(kernels.gram_stats(x), kernels.gram_stats(x.contiguous()), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-7)
        torch.testing.assert_close(kernels.gram(x), x.double() @ x.double().mT, rtol=1e-12, atol=1e-12)


@given(x=tensors)
def test_both_implementations_agree(x):
    with using("reference"):
        expected = kernels.gram_stats(x)
    with using("compiled"):
        got = kernels.gram_stats(x)
    assert torch.equal(got.rank_deficient, expected.rank_deficient)
    for a, b in zip(got[:3], expected[:3], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-5)


@both
@given(x=tensors, scale=st.sampled_from([0.25, 0.5, 2.0, 4.0]))
def test_scaling_and_signs(which, x, scale):
    c = x.shape[1]
    signs = torch.where(torch.arange(c) % 2 == 0, 1.0, -1.0).to(x.dtype)[:, None]
    with using(which):
        base, other = kernels.gram_stats(x), kernels.gram_stats(scale * signs * x)
    shift = 2 * c * torch.tensor(scale, dtype=torch.float64).log()
    assert torch.equal(base.rank_deficient, other.rank_deficient)
    torch.testing.assert_close(other.logdet, base.logdet + shift, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(other.trace, base.trace * scale**2, rtol=1e-12, atol=0)
    torch.testing.assert_close(other.frobenius_sq, base.frobenius_sq * scale**4, rtol=1e-12, atol=0)


@both
@given(x=tensors)
def test_inequalities(which, x):
    """Hadamard: det G ≤ Π G_kk; Cauchy–Schwarz: tr² / c ≤ ‖G‖_F² ≤ tr²."""
    with using(which):
        stats, G = kernels.gram_stats(x), kernels.gram(x)
    c = x.shape[1]
    hadamard = G.diagonal(dim1=1, dim2=2).log().sum(-1)
    assert (stats.logdet <= hadamard + 1e-9).all()
    assert (stats.trace.square() / c <= stats.frobenius_sq * (1 + 1e-12)).all()
    assert (stats.frobenius_sq <= stats.trace.square() * (1 + 1e-12)).all()


@both
@given(x=tensors)
def test_logdet_of_the_gram_is_the_logdet_of_the_stats(which, x):
    with using(which):
        stats = kernels.gram_stats(x.double())
        logdet = kernels.spd_logdet(kernels.gram(x))
    full = ~stats.rank_deficient
    torch.testing.assert_close(logdet[full], stats.logdet[full], rtol=1e-9, atol=1e-6)
