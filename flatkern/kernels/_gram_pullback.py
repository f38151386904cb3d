"""The derivative of a Gram matrix's statistics in its rows: a linear map of the rows, in one pass over them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import few_dims
from ._registration import differentiated, forward_rule, front, in_graph, quick, register
from ._select import runs_compiled


@in_graph
def gram_pullback(
    x: Tensor, G: Tensor, inverse: Tensor, g_logdet: Tensor, g_trace: Tensor, g_frobenius: Tensor
) -> Tensor:
    """2 (g_tr I + 2 g_F G + g_ld G⁻¹) x for rows x [..., c, d], in x's dtype; the rest is float64.

    G and its inverse are symmetric. A matrix whose weight is zero is left out, whatever it holds.
    """
    operands = (x, G, inverse, g_logdet, g_trace, g_frobenius)
    result: Tensor = _Pullback.apply(*operands) if any(map(differentiated, operands)) else _raw(*operands)
    return result


def reference(
    x: Tensor, G: Tensor, inverse: Tensor, g_logdet: Tensor, g_trace: Tensor, g_frobenius: Tensor
) -> Tensor:
    """As one matrix product in float64."""
    factor = 2 * g_trace[..., None, None] * torch.eye(x.shape[-2], dtype=torch.float64, device=x.device)
    for weight, matrix in ((4 * g_frobenius, G), (2 * g_logdet, inverse)):
        w = weight[..., None, None]
        factor = factor + torch.where(w == 0, 0.0, w * matrix)
    return (factor @ x.double()).to(x.dtype)


def _raw(*operands: Tensor) -> Tensor:
    x, *rest = operands
    if not runs_compiled(x):
        return reference(x, *rest)
    few = few_dims(x)
    batch = few.shape[:-2]
    matrices = [t.reshape(*batch, *t.shape[-2:]).contiguous() for t in rest[:2]]
    weights = [t.expand(x.shape[:-2]).reshape(batch).contiguous() for t in rest[2:]]
    out: Tensor = torch.ops.flatkern.gram_pullback(few, *matrices, *weights)
    return out.reshape(x.shape)


@quick
class _Pullback(torch.autograd.Function):
    @staticmethod
    def forward(
        x: Tensor, G: Tensor, inverse: Tensor, g_logdet: Tensor, g_trace: Tensor, g_frobenius: Tensor
    ) -> Tensor:
        return _raw(x, G, inverse, g_logdet, g_trace, g_frobenius)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, ...]:
        x, G, inverse, g_logdet, g_trace, g_frobenius = ctx.saved_tensors
        (w,) = grads
        K = w.double() @ x.double().mT
        return (
            gram_pullback(w, G, inverse, g_logdet, g_trace, g_frobenius),  # the map is symmetric
            4 * g_frobenius[..., None, None] * K,
            2 * g_logdet[..., None, None] * K,
            2 * (inverse * K).sum((-2, -1)),
            2 * K.diagonal(dim1=-2, dim2=-1).sum(-1),
            4 * (G * K).sum((-2, -1)),
        )

    @staticmethod
    @forward_rule
    def jvp(
        x: Tensor, G: Tensor, inverse: Tensor, g_logdet: Tensor, g_trace: Tensor, g_frobenius: Tensor, *T: Any
    ) -> Tensor:
        weights = (g_logdet, g_trace, g_frobenius)
        change = torch.zeros_like(x)
        if T[0] is not None:
            change = change + gram_pullback(T[0], G, inverse, *weights)
        if any(t is not None for t in T[3:]):
            moved = (torch.zeros_like(w) if t is None else t for w, t in zip(weights, T[3:], strict=True))
            change = change + gram_pullback(x, G, inverse, *moved)
        if T[1] is not None or T[2] is not None:
            dG, dinverse = (torch.zeros_like(G) if t is None else t for t in T[1:3])
            change = change + gram_pullback(x, dG, dinverse, g_logdet, torch.zeros_like(g_trace), g_frobenius)
        return change

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Tensor) -> tuple[Tensor, int]:
        return gram_pullback(*front(info, in_dims, operands)), 0


def _fake(
    x: Tensor, _gram: Tensor, _inverse: Tensor, _logdet: Tensor, _trace: Tensor, _frobenius: Tensor
) -> Tensor:
    return x.new_empty(x.shape)


register("gram_pullback", _fake)
