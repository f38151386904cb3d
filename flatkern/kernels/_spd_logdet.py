"""Log-determinants of batches of small symmetric positive definite matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import check_matrices, few_dims
from ._reference import cholesky, logdet_of, on_finite, symmetric
from ._registration import differentiated, forward_rule, front, in_graph, quick, register
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
        `torch.linalg.cholesky_ex`. The derivative costs c³/2: it factors again, which is cheaper than to write the
        inverse in the forward pass and to read it back.

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
    L, good = cholesky(G, G.shape[-1] * torch.finfo(G.dtype).eps)
    return logdet_of(L, good, G.tril().isfinite().all(-1).all(-1)).to(G.dtype)


def reference_pullback(G: Tensor, weight: Tensor) -> Tensor:
    """weight · G⁻¹, by Cholesky in float64; NaN where there is no inverse, or zero where the weight is."""
    L, good = cholesky(G, G.shape[-1] * torch.finfo(G.dtype).eps)
    scale = torch.where(good | (weight == 0), weight, torch.nan)
    inverse = torch.where(good[..., None, None], torch.cholesky_inverse(L), 1.0)
    return (scale[..., None, None] * inverse).to(G.dtype)


def _raw(G: Tensor) -> Tensor:
    if not runs_compiled(G):
        return reference(G)
    value: Tensor = torch.ops.flatkern.spd_logdet(few_dims(G))
    return value.reshape(G.shape[:-2])


def _raw_pullback(G: Tensor, weight: Tensor) -> Tensor:
    if not runs_compiled(G):
        return reference_pullback(G, weight)
    few = few_dims(G)
    out: Tensor = torch.ops.flatkern.spd_pullback(few, weight.reshape(few.shape[:-2]).contiguous())
    return out.reshape(G.shape)


@quick
class _SpdLogdet(torch.autograd.Function):
    @staticmethod
    def forward(G: Tensor) -> Tensor:
        return _raw(G)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        return _pullback(ctx.saved_tensors[0], grads[0])

    @staticmethod
    @forward_rule
    def jvp(G: Tensor, value: Tensor, T: Tensor) -> Tensor:
        inverse = _pullback(G, value.isfinite().to(G.dtype))
        change = (inverse * T).sum((-2, -1))
        return torch.where(value.isfinite(), change, on_finite(T.abs().sum((-2, -1)), value))

    @staticmethod
    def vmap(_info: Any, in_dims: Any, G: Tensor) -> tuple[Tensor, int]:
        return _apply(G.movedim(in_dims[0], 0)), 0


@quick
class _Pullback(torch.autograd.Function):
    """(G, w) → w G⁻¹."""

    @staticmethod
    def forward(G: Tensor, weight: Tensor) -> Tensor:
        return _raw_pullback(G, weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], _output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor]:
        G, weight = ctx.saved_tensors
        inverse = _pullback(G, torch.ones_like(weight))
        through = inverse @ symmetric(grads[0]) @ inverse
        return -weight[..., None, None] * through, (grads[0] * inverse).sum((-2, -1))

    @staticmethod
    @forward_rule
    def jvp(G: Tensor, weight: Tensor, T: Tensor | None, w: Tensor | None) -> Tensor:
        inverse = _pullback(G, torch.ones_like(weight))
        change = torch.zeros_like(inverse)
        if T is not None:
            change = change - weight[..., None, None] * (inverse @ symmetric(T) @ inverse)
        if w is not None:
            change = change + w[..., None, None] * inverse
        return change

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Tensor) -> tuple[Tensor, int]:
        return _pullback(*front(info, in_dims, operands)), 0


@in_graph
def _apply(G: Tensor) -> Tensor:
    value: Tensor = _SpdLogdet.apply(G) if differentiated(G) else _raw(G)
    return value


@in_graph
def _pullback(G: Tensor, weight: Tensor) -> Tensor:
    tracked = differentiated(G) or differentiated(weight)
    value: Tensor = _Pullback.apply(G, weight) if tracked else _raw_pullback(G, weight)
    return value


def _fake(g: Tensor) -> Tensor:
    return g.new_empty(g.shape[:-2])


def _fake_pullback(g: Tensor, _weight: Tensor) -> Tensor:
    return g.new_empty(g.shape)


register("spd_logdet", _fake)
register("spd_pullback", _fake_pullback)
