"""The exact fall-back: per-sample parameter gradients, for parameters that no layer rule covers."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import vjp, vmap

from flatkern.layers.shared_weight import row_energy
from flatkern.problem import call_with, preserve_state
from flatkern.samples import take

__all__ = ["per_sample_squared_norms"]


def per_sample_squared_norms(
    model: nn.Module,
    x: Any,
    roots: Tensor,
    parameters: Mapping[str, Tensor],
    max_memory: int,
    forward: Callable[[nn.Module, Any], tuple[Tensor, Any]] | None = None,
) -> tuple[dict[str, Tensor], str]:
    """Σ_k ‖∂(s_k·f_i)/∂p‖² for every parameter p given and every sample, by forming those gradients.

    Costs K backward passes and K·|p| numbers a sample, in chunks of samples under ``max_memory``. Vectorized over
    samples and cotangents where ``torch.func.vmap`` takes the model, else a loop over samples (same numbers).

    Args:
        model: the model.
        x: inputs [n, ...]; never written to.
        roots: cotangents s, [K, n, *output].
        parameters: by name; all of them leaves of ``model``.
        max_memory: bytes.
        forward: (model, batch) → (output, target) where the model is not simply called; then always a loop.

    Returns:
        {name: float64 [n]} and how it was done (``"vmap"`` or ``"loop over samples"``).
    """
    n, k = roots.shape[1], len(roots)
    if forward is not None:
        with preserve_state(model):
            return _loop(
                lambda i: forward(model, take(x, slice(i, i + 1)))[0], roots, parameters
            ), "loop over samples"
    primals = {name: p.detach() for name, p in parameters.items()}
    bytes_a_sample = 2 * k * sum(p.numel() * p.element_size() for p in primals.values())
    chunk = max(1, min(n, max_memory // max(1, bytes_a_sample)))

    def one_sample(x_i: Tensor, s_i: Tensor) -> dict[str, Tensor]:
        _, pull, *_ = vjp(lambda p: call_with(model, p, x_i.unsqueeze(0).clone()).squeeze(0), primals)

        def squares(s: Tensor) -> dict[str, Tensor]:
            return {name: row_energy(g.flatten()) for name, g in pull(s)[0].items()}

        return {name: v.sum(0) for name, v in vmap(squares)(s_i).items()}

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*performance drop.*")  # slower, still right
            # nothing outside is differentiated: recording would keep every sample's gradients
            with torch.no_grad(), preserve_state(model):
                norms = vmap(one_sample, chunk_size=chunk)(x.detach(), roots.movedim(0, 1))
    except (RuntimeError, ValueError, NotImplementedError):
        # control flow on data, in-place operations, operators without a batching rule
        with preserve_state(model):
            return _loop(
                lambda i: model(x[i : i + 1].detach().clone()), roots, parameters
            ), "loop over samples"
    return {name: v.detach() for name, v in norms.items()}, "vmap"


def _loop(
    output_of: Callable[[int], Tensor], roots: Tensor, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    tensors, n = list(parameters.values()), roots.shape[1]
    norms = {name: torch.zeros(n, dtype=torch.float64, device=roots.device) for name in parameters}
    for i in range(n):
        output = output_of(i)
        for root in roots[:, i : i + 1]:
            grads = torch.autograd.grad(output, tensors, root, retain_graph=True, allow_unused=True)
            for name, g in zip(parameters, grads, strict=True):
                if g is not None:
                    norms[name][i] += row_energy(g.flatten())
    return norms
