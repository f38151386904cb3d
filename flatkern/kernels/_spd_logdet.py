"""Log-determinants of batches of small symmetric positive definite matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import check_matrices, few_dims
from ._reference import logdet, on_finite
from ._registration import forward_rule, in_graph, quick, register
from ._select import runs_compiled
from ._spd_inverse import spd_inverse


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
        `torch.linalg.cholesky_ex`. The derivative costs c³/2 more.

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


def reference(G: Tensor) -> Tensor:
    """By Cholesky in float64."""
    return logdet(G, G.shape[-1] * torch.finfo(G.dtype).eps).to(G.dtype)


def _raw(G: Tensor) -> Tensor:
    if not runs_compiled(G):
        return reference(G)
    value: Tensor = torch.ops.flatkern.spd_logdet(few_dims(G))
    return value.reshape(G.shape[:-2])


@quick
class _SpdLogdet(torch.autograd.Function):
    @staticmethod
    def forward(G: Tensor) -> Tensor:
        return _raw(G)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        G, value = ctx.saved_tensors
        return on_finite(grads[0], value)[..., None, None] * spd_inverse(G)

    @staticmethod
    @forward_rule
    def jvp(G: Tensor, value: Tensor, T: Tensor) -> Tensor:
        change = (spd_inverse(G) * T).sum((-2, -1))
        return torch.where(value.isfinite(), change, on_finite(T.abs().sum((-2, -1)), value))

    @staticmethod
    def vmap(_info: Any, in_dims: Any, G: Tensor) -> tuple[Tensor, int]:
        return _apply(G.movedim(in_dims[0], 0)), 0


@in_graph
def _apply(G: Tensor) -> Tensor:
    value: Tensor = _SpdLogdet.apply(G)
    return value


def _fake(g: Tensor) -> Tensor:
    return g.new_empty(g.shape[:-2])


register("spd_logdet", _fake)
