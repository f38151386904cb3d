"""Gram matrices of the rows of batches of matrices, accumulated in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import check_matrices, few_dims
from ._registration import differentiated, forward_rule, in_graph, quick, register
from ._select import runs_compiled


def gram(x: Tensor) -> Tensor:
    """The Gram matrix x xᵀ of the rows of x, accumulated and returned in float64.

    A log-determinant or a small eigenvalue taken from a Gram matrix in float32 has lost half its digits;
    products of two float32 numbers are exact in float64.

    Args:
        x: [..., c, d], float32 or float64, any strides. d = 0 gives zeros.

    Returns:
        [..., c, c], float64, symmetric. NaN and infinities propagate.

    Cost: c(c + 1)d/2 multiply-adds a sample; x is read once. Above c = 128 a product in float64.

    Raises:
        TypeError: another dtype or layout.
        ValueError: fewer than two dimensions.

    Example:
        >>> import torch
        >>> gram(torch.tensor([[1.0, 2.0], [0.0, 1.0]]))
        tensor([[5., 2.],
                [2., 1.]], dtype=torch.float64)
    """
    check_matrices("gram", x, square=False)
    return _apply(x)


def reference(x: Tensor) -> Tensor:
    """As a matrix product in float64."""
    wide = x.double()
    product = wide @ wide.mT
    # a library's product of large matrices need not be symmetric to the last bit
    return product.tril() + product.tril(-1).mT


def _raw(x: Tensor) -> Tensor:
    if not runs_compiled(x):
        return reference(x)
    value: Tensor = torch.ops.flatkern.gram(few_dims(x))
    return value.reshape(*x.shape[:-1], x.shape[-2])


@quick
class _Gram(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return _raw(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], _output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        (x,) = ctx.saved_tensors
        (grad,) = grads
        return ((grad + grad.mT) @ x.double()).to(x.dtype)

    @staticmethod
    @forward_rule
    def jvp(x: Tensor, T: Tensor) -> Tensor:
        half = T.double() @ x.double().mT
        return half + half.mT

    @staticmethod
    def vmap(_info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:
        return _apply(x.movedim(in_dims[0], 0)), 0


@in_graph
def _apply(x: Tensor) -> Tensor:
    value: Tensor = _Gram.apply(x) if differentiated(x) else _raw(x)
    return value


def _fake(x: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], x.shape[-2]), dtype=torch.float64)


register("gram", _fake)
