"""Diagonals of the Hessian and of the Gauss-Newton matrix in full, entry by entry, for small float64 networks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from flatkern.operators.forms import twice_differentiable

LossFunction = Callable[[Tensor, Tensor], Tensor]


def run(model: nn.Module, x: Tensor) -> Tensor:
    """The output with a graph that can be differentiated twice."""
    with twice_differentiable(model):
        return model(x.clone())


def hessian_diagonal(model: nn.Module, loss: LossFunction, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """∂²L/∂θ_k² for every entry, flat, by parameter."""
    named = dict(model.named_parameters())
    values = list(named.values())
    gradients = torch.autograd.grad(loss(run(model, x), y), values, create_graph=True, allow_unused=True)
    found = {}
    for (name, p), g in zip(named.items(), gradients, strict=True):
        diagonal = torch.zeros(p.numel(), dtype=p.dtype)
        if g is not None:
            for k, entry in enumerate(g.reshape(-1)):
                if entry.requires_grad:
                    (row,) = torch.autograd.grad(entry, p, retain_graph=True, allow_unused=True)
                    if row is not None:
                        diagonal[k] = row.reshape(-1)[k]
        found[name] = diagonal
    return found


def ggn_diagonal(model: nn.Module, loss: LossFunction, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """(JᵀH_L J)_kk for every entry, flat, by parameter, from the whole Jacobian."""
    named = dict(model.named_parameters())
    output = run(model, x)
    curvature = torch.autograd.functional.hessian(
        lambda f: loss(f.reshape(output.shape), y), output.detach().reshape(-1)
    )
    rows = [
        torch.autograd.grad(entry, list(named.values()), retain_graph=True, allow_unused=True)
        for entry in output.reshape(-1)
    ]
    found = {}
    for i, (name, p) in enumerate(named.items()):
        jacobian = torch.stack(
            [
                torch.zeros(p.numel(), dtype=p.dtype) if (g := row[i]) is None else g.reshape(-1)
                for row in rows
            ]
        )
        found[name] = torch.einsum("ak,ab,bk->k", jacobian, curvature, jacobian)
    return found
