"""Log-determinants of batches of small symmetric positive definite matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import check_matrices, few_dims
from ._reference import cholesky, logdet_of, on_finite, symmetric
from ._registration import differentiated, forward_rule, in_graph, quick, register
from ._select import runs_compiled


def spd_logdet(G: Tensor) -> Tensor:
    r"""log det G of symmetric positive definite matrices: Σ log d_k of G = L D Lᵀ.

    Only the lower triangle is read. A pivot d_k ≤ c ε G_kk (ε of G's dtype) is below the numerical rank: the
    result is -inf there, with no exception and no synchronization with a GPU. NaN or infinities in the lower
    triangle give NaN. The derivative is G⁻¹, as of `torch.linalg.slogdet`, that is of log det((G + Gᵀ) / 2);
    where the result is not finite it is NaN, or zero for a sample whose incoming gradient is zero.

    Args:
        G: [..., c, c], float32 or float64, any strides. c = 0 gives 0.

    Returns:
        [...], in G's dtype.

    Cost: c³/6 multiply-adds a sample, sixteen samples (float32, AVX-512) at a time; above c = 128
        `torch.linalg.cholesky_ex`. Where a derivative may be asked for the inverse comes out of the same factorization
        (c³/3 more), and the first derivative is a product with it.

    Raises:
        TypeError: another dtype or layout.
        ValueError: not square.

    Example:
        >>> import torch
        >>> spd_logdet(torch.diag(torch.tensor([1.0, 2.0, 3.0]))).exp().round()
        tensor(6.)
    """
    check_matrices("spd_logdet", G, square=True)
    return _apply(G)


def reference(G: Tensor) -> tuple[Tensor, Tensor]:
    """The log-determinant and the inverse (zeros where there is none) by Cholesky in float64."""
    L, good = cholesky(G, G.shape[-1] * torch.finfo(G.dtype).eps)
    inverse = torch.where(good[..., None, None], torch.cholesky_inverse(L), 0.0)
    finite = G.tril().isfinite().all(-1).all(-1)
    return logdet_of(L, good, finite).to(G.dtype), inverse.to(G.dtype)


def _raw(G: Tensor) -> tuple[Tensor, Tensor]:
    if not runs_compiled(G, cuda=False):
        return reference(G)
    value, inverse = torch.ops.flatkern.spd_logdet_inverse(few_dims(G))
    return value.reshape(G.shape[:-2]), inverse.reshape(G.shape)


@quick
class _SpdLogdet(torch.autograd.Function):
    """G → (log det G, G⁻¹): the inverse is an output so that what is built on it can be differentiated again."""

    @staticmethod
    def forward(G: Tensor) -> tuple[Tensor, Tensor]:
        return _raw(G)

    @staticmethod
    def setup_context(ctx: Any, _inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output)
        ctx.save_for_forward(*output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor | None:
        value, inverse = ctx.saved_tensors
        g_value, g_inverse = grads
        terms = []
        if g_value is not None:
            terms.append(on_finite(g_value, value)[..., None, None] * inverse)
        if g_inverse is not None:
            terms.append(-(inverse @ symmetric(g_inverse) @ inverse))
        return sum(terms[1:], terms[0]) if terms else None

    @staticmethod
    @forward_rule
    def jvp(value: Tensor, inverse: Tensor, T: Tensor) -> tuple[Tensor, Tensor]:
        change = (inverse * T).sum((-2, -1))
        change = torch.where(value.isfinite(), change, on_finite(T.abs().sum((-2, -1)), value))
        return change, -(inverse @ symmetric(T) @ inverse)

    @staticmethod
    def vmap(_info: Any, in_dims: Any, G: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return _both(G.movedim(in_dims[0], 0)), (0, 0)


def _both(G: Tensor) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _SpdLogdet.apply(G) if differentiated(G) else _raw(G)
    return result


@in_graph
def _apply(G: Tensor) -> Tensor:
    if differentiated(G):
        return _both(G)[0]
    if not runs_compiled(G):
        return reference(G)[0]
    value: Tensor = torch.ops.flatkern.spd_logdet(few_dims(G))
    return value.reshape(G.shape[:-2])


def _fake(g: Tensor) -> Tensor:
    return g.new_empty(g.shape[:-2])


def _fake_inverse(g: Tensor) -> tuple[Tensor, Tensor]:
    return g.new_empty(g.shape[:-2]), g.new_empty(g.shape)


register("spd_logdet", _fake)
register("spd_logdet_inverse", _fake_inverse, outputs=2)
