"""The inverse of symmetric positive definite matrices: what the derivatives of the log-determinants need.

Private: where a matrix is not numerically positive definite the inverse is all zeros, and the caller, which
knows the samples concerned, turns that into NaN or drops it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import few_dims
from ._reference import cholesky
from ._registration import forward_rule, in_graph, quick, register
from ._select import runs_compiled


def reference(G: Tensor) -> Tensor:
    """By Cholesky in float64."""
    L, good = cholesky(G, G.shape[-1] * torch.finfo(G.dtype).eps)
    inverse = torch.cholesky_inverse(L)
    return torch.where(good[..., None, None], inverse, 0.0).to(G.dtype)


def _raw(G: Tensor) -> Tensor:
    if not runs_compiled(G, cuda=False):
        return reference(G)
    inverse: Tensor = torch.ops.flatkern.spd_inverse(few_dims(G))
    return inverse.reshape(G.shape)


def _symmetric(T: Tensor) -> Tensor:
    return (T + T.mT) / 2


@quick
class _SpdInverse(torch.autograd.Function):
    @staticmethod
    def forward(G: Tensor) -> Tensor:
        return _raw(G)

    @staticmethod
    def setup_context(ctx: Any, _inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        (inverse,) = ctx.saved_tensors
        return -(inverse @ _symmetric(grads[0]) @ inverse)

    @staticmethod
    @forward_rule
    def jvp(inverse: Tensor, T: Tensor) -> Tensor:
        return -(inverse @ _symmetric(T) @ inverse)

    @staticmethod
    def vmap(_info: Any, in_dims: Any, G: Tensor) -> tuple[Tensor, int]:
        return spd_inverse(G.movedim(in_dims[0], 0)), 0


@in_graph
def spd_inverse(G: Tensor) -> Tensor:
    """G⁻¹ from the lower triangle; [..., c, c] → [..., c, c]; derivatives are those of ((G + Gᵀ) / 2)⁻¹."""
    result: Tensor = _SpdInverse.apply(G)
    return result


def _fake(g: Tensor) -> Tensor:
    return torch.empty_like(g, memory_format=torch.contiguous_format)


register("spd_inverse", _fake)
