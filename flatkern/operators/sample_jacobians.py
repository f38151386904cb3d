"""Dense per-sample Jacobians in the parameters, for models whose samples do not interact."""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import jacrev, vmap

from flatkern.problem import call_with, differentiation

__all__ = ["sample_jacobians"]

_CHUNK_BYTES = 1 << 26


def sample_jacobians(model: nn.Module, parameters: Mapping[str, Tensor], x: Tensor, result: Tensor) -> None:
    """Write ∂f(x_i)/∂θ into ``result`` [n, N, P], parameters in their order.

    N backward passes on every chunk of samples, vectorized by ``vmap``; a model that it does not take (a recurrent
    layer, control flow on values) is run sample by sample.
    """
    names = list(parameters)
    values = tuple(p.detach() for p in parameters.values())

    def rows(x_i: Tensor) -> tuple[Tensor, ...]:
        def output(*theta: Tensor) -> Tensor:
            return call_with(model, dict(zip(names, theta, strict=True)), x_i.unsqueeze(0).clone()).reshape(
                -1
            )

        jacobians: tuple[Tensor, ...] = jacrev(output, argnums=tuple(range(len(values))))(*values)
        return jacobians

    step = max(1, _CHUNK_BYTES // max(1, result[0].numel() * result.element_size()))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="There is a performance drop")
            for start in range(0, len(x), step):
                part = slice(start, start + step)
                result[part] = _joined(vmap(rows)(x[part]), result[part])
    except (RuntimeError, NotImplementedError):
        for i in range(len(x)):
            result[i] = _one_sample(model, tuple(parameters.values()), x[i : i + 1], result[i])


def _joined(parts: tuple[Tensor, ...], like: Tensor) -> Tensor:
    return torch.cat([t.reshape(*like.shape[:-1], -1).to(like.dtype) for t in parts], dim=-1)


def _one_sample(model: nn.Module, leaves: tuple[Tensor, ...], x: Tensor, like: Tensor) -> Tensor:
    with differentiation():
        output = model(x.clone()).reshape(-1)
    rows = torch.zeros_like(like)
    if not output.requires_grad:
        return rows
    for row, unit in zip(rows, torch.eye(len(output), dtype=output.dtype, device=output.device), strict=True):
        found = torch.autograd.grad(output, leaves, unit, retain_graph=True, allow_unused=True)
        parts = [torch.zeros_like(p) if t is None else t for t, p in zip(found, leaves, strict=True)]
        row.copy_(_joined(tuple(parts), row))
    return rows
