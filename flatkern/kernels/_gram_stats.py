"""Log-determinant, trace and Frobenius norm of Gram matrices in one pass over the rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _gram
from ._checks import check_matrices, few_dims
from ._gram_pullback import gram_pullback
from ._reference import cholesky, logdet_of, on_finite, rows_factor, symmetric
from ._registration import differentiated, forward_rule, in_graph, quick, register
from ._select import runs_compiled

_KEPT = 6
"""How many of the factored form's outputs are the statistics; the Gram matrix and its inverse follow."""


class GramStats(NamedTuple):
    """What `gram_stats` returns, one entry a sample."""

    logdet: Tensor
    """log det(x xᵀ), float64 (twice the log of the volume that the rows span)."""
    trace: Tensor
    """tr(x xᵀ) = ‖x‖_F², float64."""
    frobenius_sq: Tensor
    """‖x xᵀ‖_F², float64."""
    rank_deficient: Tensor
    """bool: where the rows are numerically dependent and `logdet` is -inf."""
    pivot_ratio: Tensor
    """min_k d_k / G_kk of G = L D Lᵀ, float64, in [0, 1]: the squared sine of the smallest angle between a row and the
    span of those before it. Rounding included: an exact 0 may come out as something tiny of either sign."""
    bad_pivots: Tensor
    """int64: how many pivots are at or below the numerical rank's threshold (c − the numerical rank)."""


def gram_stats(x: Tensor) -> GramStats:
    r"""log det(x xᵀ), tr(x xᵀ) and ‖x xᵀ‖_F² of every sample, from one Gram matrix accumulated in float64.

    The Gram matrix G = x xᵀ is accumulated in float64 and is factored as L D Lᵀ. It squares the condition number:
    where a pivot falls below 10⁻⁸ of its diagonal entry (10⁻¹⁰ for float32 rows) its digits are lost in G, and that
    sample's rows are factored themselves, x = L Q, by modified Gram-Schmidt. The choice is made sample by sample inside
    the kernel: without an exception, and without a synchronization with a GPU.

    Rank. A pivot is no good at or below 2²⁰ c ε² of its diagonal entry (float32: c ε²: its rows are known no
    better), that is a condition number of about 10¹² (10⁶): `logdet` is -inf, `rank_deficient` set and `bad_pivots`
    counts them; c > d is deficient by construction. The test does not change when rows are rescaled. NaN or
    infinities in a sample give NaN.

    The derivative is ∂x = 2 (g_tr I + 2 g_F G + g_ld G⁻¹) x; where it may be asked for, G and G⁻¹ are kept from the
    same factorization. Where `logdet` is not finite its own part is NaN, or zero for a sample whose incoming gradient
    is zero, so that masked samples do no harm. `pivot_ratio` and the last two have no derivative.

    Args:
        x: [n, c, d] (or any batch shape [..., c, d]), float32 or float64, any strides. c = 0 gives logdet 0;
            d = 0 with c > 0 is rank deficient.

    Returns:
        GramStats of tensors [n]: float64, one bool, one int64.

    Cost: c(c + 1)d/2 + c³/6 multiply-adds a sample, x read once; c² d more for a sample that lost its digits, c³/3
        for the inverse, c² d for the derivative. Above c = 128 a product in float64 and `torch.linalg.cholesky_ex`.

    Raises:
        TypeError: another dtype or layout.
        ValueError: fewer than two dimensions.

    Example:
        >>> import torch
        >>> s = gram_stats(torch.tensor([[[2.0, 0.0], [0.0, 3.0]], [[1.0, 1.0], [2.0, 2.0]]]))
        >>> s.trace
        tensor([13., 10.], dtype=torch.float64)
        >>> s.rank_deficient
        tensor([False,  True])
    """
    check_matrices("gram_stats", x, square=False)
    return GramStats(*_apply(x))


def reference(x: Tensor) -> tuple[Tensor, ...]:
    """From the Gram matrix in float64 and its Cholesky factor, or that of the rows; then G and G⁻¹."""
    c, d = x.shape[-2:]
    eps = torch.finfo(x.dtype).eps
    single = x.dtype == torch.float32
    G = _gram.reference(x)
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    finite = G.isfinite().all(-1).all(-1)
    tolerance = max(c, d) * torch.finfo(torch.float64).eps
    if single:
        tolerance = max(tolerance, c * eps**2)
    lost_below = max(tolerance, 1e-10 if single else 1e-8)

    def ratio_of(L: Tensor) -> Tensor:
        parts = L.diagonal(dim1=-2, dim2=-1).square() / diagonal
        return torch.where(diagonal > 0, parts, 0.0)

    L, good = cholesky(G, tolerance)
    lost = finite & (~good | (ratio_of(L) < lost_below).any(-1) | (c > d))
    L = torch.where(lost[..., None, None], rows_factor(x, lost), L)
    parts = ratio_of(L)
    tiny = L.diagonal(dim1=-2, dim2=-1).square() < torch.finfo(torch.float64).tiny
    bad = ((parts <= c * eps**2 * (1 if single else 2**20)) | tiny).sum(-1).clamp_min(c - d)
    good = finite & torch.where(lost, bad == 0, good)
    L = torch.where(good[..., None, None], L, torch.eye(c, dtype=torch.float64, device=x.device))
    ratio = torch.cat([parts.new_ones(*parts.shape[:-1], 1), parts], -1)
    return (
        logdet_of(L, good, finite),
        diagonal.sum(-1),
        G.square().sum((-2, -1)),
        finite & ~good,
        torch.where(finite, ratio.amin(-1), torch.nan),
        torch.where(lost, bad, 0),
        G,
        torch.where(good[..., None, None], torch.cholesky_inverse(L), 0.0),
    )


def _raw(x: Tensor) -> tuple[Tensor, ...]:
    if not runs_compiled(x):
        return reference(x)[:_KEPT]
    return tuple(t.reshape(x.shape[:-2]) for t in torch.ops.flatkern.gram_stats(few_dims(x)))


def _raw_factors(x: Tensor) -> tuple[Tensor, ...]:
    if not runs_compiled(x):
        return reference(x)
    batch, c = x.shape[:-2], x.shape[-2]
    out = torch.ops.flatkern.gram_stats_factors(few_dims(x))
    return (
        *(t.reshape(batch) for t in out[:_KEPT]),
        *(t.reshape(*batch, c, c) for t in out[_KEPT:]),
    )


@quick
class _GramStats(torch.autograd.Function):
    """x → the statistics, G, G⁻¹; the last two are outputs so that what is built on them has derivatives too."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, ...]:
        return _raw_factors(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(*output[3:_KEPT])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], output[0], *output[_KEPT:])
        ctx.save_for_forward(inputs[0], output[0], *output[_KEPT:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor | None:
        x, value, G, inverse = ctx.saved_tensors
        terms = []
        if any(g is not None for g in grads[:3]):
            g_logdet, g_trace, g_frobenius = (torch.zeros_like(value) if g is None else g for g in grads[:3])
            terms.append(gram_pullback(x, G, inverse, on_finite(g_logdet, value), g_trace, g_frobenius))
        g_gram, g_inverse = grads[_KEPT:]
        if g_gram is not None:
            terms.append((2 * symmetric(g_gram) @ x.double()).to(x.dtype))
        if g_inverse is not None:
            terms.append((-2 * inverse @ symmetric(g_inverse) @ (inverse @ x.double())).to(x.dtype))
        return sum(terms[1:], terms[0]) if terms else None

    @staticmethod
    @forward_rule
    def jvp(x: Tensor, value: Tensor, G: Tensor, inverse: Tensor, T: Tensor) -> tuple[Tensor | None, ...]:
        half = T.double() @ x.double().mT
        change = half + half.mT
        log_change = (inverse * change).sum((-2, -1))
        log_change = torch.where(
            value.isfinite(), log_change, on_finite(T.double().abs().sum((-2, -1)), value)
        )
        trace_change = change.diagonal(dim1=-2, dim2=-1).sum(-1)
        frobenius_change = 2 * (G * change).sum((-2, -1))
        return (
            log_change,
            trace_change,
            frobenius_change,
            None,
            None,
            None,
            change,
            -(inverse @ change @ inverse),
        )

    @staticmethod
    def vmap(_info: Any, in_dims: Any, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _factors(x.movedim(in_dims[0], 0)), (0,) * (_KEPT + 2)


def _factors(x: Tensor) -> tuple[Tensor, ...]:
    result: tuple[Tensor, ...] = _GramStats.apply(x) if differentiated(x) else _raw_factors(x)
    return result


@in_graph
def _apply(x: Tensor) -> tuple[Tensor, ...]:
    return _factors(x)[:_KEPT] if differentiated(x) else _raw(x)


def _fake(x: Tensor) -> tuple[Tensor, ...]:
    dtypes = (*[torch.float64] * 3, torch.bool, torch.float64, torch.int64)
    return tuple(x.new_empty(x.shape[:-2], dtype=dtype) for dtype in dtypes)


def _fake_factors(x: Tensor) -> tuple[Tensor, ...]:
    square = (*x.shape[:-1], x.shape[-2])
    return (*_fake(x), *(x.new_empty(square, dtype=torch.float64) for _ in range(2)))


register("gram_stats", _fake, outputs=_KEPT)
register("gram_stats_factors", _fake_factors, outputs=_KEPT + 2)
