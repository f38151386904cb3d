"""Square roots of the output Hessian of any convex loss, by autograd and an eigendecomposition a sample."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from flatkern._loss import Loss

__all__ = ["LARGEST_OUTPUT", "with_roots"]

LARGEST_OUTPUT = 1024
"""Output entries a sample up to which N × N Hessians are formed."""


def with_roots(loss: Loss) -> Loss:
    """The loss, with roots from autograd's Hessian where it has no closed form.

    Raises (when the roots are taken):
        ValueError: more than ``LARGEST_OUTPUT`` outputs a sample, or a Hessian that is not positive semi-definite.
    """
    if loss.root is not None:
        return loss

    def root(output: Tensor, target: Tensor) -> Tensor:
        columns = _columns(loss, output, target)  # [n, N, K]
        return columns.permute(2, 0, 1).reshape(columns.shape[2], *output.shape)

    def sketch(output: Tensor, target: Tensor, signs: Tensor) -> Tensor:
        columns = _columns(loss, output, target)
        return (columns @ signs.to(columns.dtype).reshape(len(output), -1, 1)).reshape(output.shape)

    return replace(loss, root=root, sketch=sketch)


def _columns(loss: Loss, output: Tensor, target: Tensor) -> Tensor:
    entries = output[0].numel()
    if entries > LARGEST_OUTPUT:
        raise ValueError(
            f"loss_fn: {loss.name} has no closed-form output Hessian, and a sample has {entries} outputs (the limit "
            f"for forming it is {LARGEST_OUTPUT}); use fk.trace(fk.ggn(model, loss_fn, data)), or torch's loss modules"
        )
    hessians = _hessians(loss, output, target)
    values, vectors = torch.linalg.eigh(hessians)
    eps = torch.finfo(output.dtype).eps
    floor = -100 * entries * eps * values.abs().amax(1).clamp(min=torch.finfo(output.dtype).tiny)
    worst = (values[:, 0] - floor).min()
    if bool(worst < 0):
        sample = int((values[:, 0] - floor).argmin())
        raise ValueError(
            f"loss_fn: {loss.name} is not convex in the output: sample {sample} of a batch has the output-Hessian "
            f"eigenvalue {float(values[sample, 0]):.3g}, so the Gauss-Newton matrix has no square root; use "
            "fk.trace(fk.ggn(model, loss_fn, data))"
        )
    return vectors * values.clamp(min=0).sqrt().unsqueeze(1)


def _hessians(loss: Loss, output: Tensor, target: Tensor) -> Tensor:
    """∂²(numerator)/∂f² of each sample, [n, N, N], by one backward pass through the loss an output entry."""
    n, entries = len(output), output[0].numel()
    leaf = output.detach().clone().requires_grad_()
    value = loss.numerator(leaf.view_as(leaf), target)
    zero = output.new_zeros(n, entries, entries)
    if not value.requires_grad:
        return zero
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=True, allow_unused=True)
    if gradient is None or not gradient.requires_grad:
        return zero
    rows = []
    for entry in gradient.reshape(n, entries).sum(0):
        (row,) = torch.autograd.grad(entry, leaf, retain_graph=True, allow_unused=True)
        rows.append(zero[:, 0] if row is None else row.reshape(n, entries))
    hessians = torch.stack(rows, 1)
    return (hessians + hessians.mT) / 2
