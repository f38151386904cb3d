"""Log-determinant, trace and Frobenius norm of Gram matrices in one pass over the rows."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _gram
from ._checks import check_matrices, few_dims
from ._gram import gram
from ._reference import logdet, on_finite
from ._registration import forward_rule, in_graph, quick, register
from ._select import runs_compiled
from ._spd_inverse import spd_inverse


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


def gram_stats(x: Tensor) -> GramStats:
    r"""log det(x xᵀ), tr(x xᵀ) and ‖x xᵀ‖_F² of every sample, from one Gram matrix accumulated in float64.

    The Gram matrix G = x xᵀ is not kept. A pivot of G = L D Lᵀ at or below max(max(c, d) ε₆₄, c ε²) times its
    diagonal entry (ε of x's dtype) is below the numerical rank: `logdet` is -inf and `rank_deficient` set,
    without an exception or a synchronization with a GPU; c > d is deficient by construction. In float64 that
    is a condition number of x of about 10⁷, in float32 of about 10⁶. NaN or infinities in a sample give NaN.

    The derivative is ∂x = 2 (g_tr I + 2 g_F G + g_ld G⁻¹) x. Where `logdet` is not finite its own part is
    NaN, or zero for a sample whose incoming gradient is zero, so that masked samples do no harm.

    Args:
        x: [n, c, d] (or any batch shape [..., c, d]), float32 or float64, any strides. c = 0 gives logdet 0;
            d = 0 with c > 0 is rank deficient.

    Returns:
        GramStats of float64 (and one bool) tensors [n].

    Cost: c(c + 1)d/2 + c³/6 multiply-adds a sample, x read once. Above c = 128 a product in float64 and
        `torch.linalg.cholesky_ex`.

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


def reference(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the Gram matrix in float64 and its Cholesky factor."""
    c, d = x.shape[-2:]
    G = _gram.reference(x)
    tolerance = max(max(c, d) * torch.finfo(torch.float64).eps, c * torch.finfo(x.dtype).eps ** 2)
    value = logdet(G, tolerance)
    if c > d:
        value = torch.where(value.isnan(), value, -torch.inf)
    trace = G.diagonal(dim1=-2, dim2=-1).sum(-1)
    return value, trace, G.square().sum((-2, -1)), value.isneginf()


def _raw(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not runs_compiled(x):
        return reference(x)
    batch = x.shape[:-2]
    a, b, c, d = torch.ops.flatkern.gram_stats(few_dims(x))
    return a.reshape(batch), b.reshape(batch), c.reshape(batch), d.reshape(batch)


@quick
class _GramStats(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return _raw(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        ctx.mark_non_differentiable(output[3])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], output[0])
        ctx.save_for_forward(inputs[0], output[0])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor | None:
        x, value = ctx.saved_tensors
        g_logdet, g_trace, g_frobenius, _ = grads
        # the c × c factor first: x is larger, and is then multiplied once
        factors = []
        if g_trace is not None:
            identity = torch.eye(x.shape[-2], dtype=torch.float64, device=x.device)
            factors.append(2 * g_trace[..., None, None] * identity)
        if g_logdet is not None or g_frobenius is not None:
            G = gram(x)
            if g_frobenius is not None:
                factors.append(4 * g_frobenius[..., None, None] * G)
            if g_logdet is not None:
                factors.append(2 * on_finite(g_logdet, value)[..., None, None] * spd_inverse(G))
        if not factors:
            return None
        return (sum(factors[1:], factors[0]) @ x.double()).to(x.dtype)

    @staticmethod
    @forward_rule
    def jvp(x: Tensor, value: Tensor, T: Tensor) -> tuple[Tensor | None, ...]:
        T, wide, G = T.double(), x.double(), gram(x)
        log_change = 2 * (spd_inverse(G) @ wide * T).sum((-2, -1))
        log_change = torch.where(value.isfinite(), log_change, on_finite(T.abs().sum((-2, -1)), value))
        return log_change, 2 * (wide * T).sum((-2, -1)), 4 * (G @ wide * T).sum((-2, -1)), None

    @staticmethod
    def vmap(_info: Any, in_dims: Any, x: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        return _apply(x.movedim(in_dims[0], 0)), (0, 0, 0, 0)


@in_graph
def _apply(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    value: tuple[Tensor, Tensor, Tensor, Tensor] = _GramStats.apply(x)
    return value


def _fake(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = [x.new_empty(x.shape[:-2], dtype=torch.float64) for _ in range(3)]
    return wide[0], wide[1], wide[2], x.new_empty(x.shape[:-2], dtype=torch.bool)


register("gram_stats", _fake, outputs=4)
