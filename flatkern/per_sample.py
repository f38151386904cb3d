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

Forward = Callable[[nn.Module, Any], tuple[Tensor, Any]]

__all__ = ["per_sample_gradients", "per_sample_squared_norms"]


def per_sample_squared_norms(
    model: nn.Module,
    x: Any,
    roots: Tensor,
    parameters: Mapping[str, Tensor],
    max_memory: int,
    forward: Forward | None = None,
) -> tuple[dict[str, Tensor], str]:
    """Σ_k ‖∂(s_k·f_i)/∂p‖² for every parameter p given and every sample, by forming those gradients.

    Costs K backward passes and K·|p| numbers a sample, in chunks of samples under ``max_memory``. Vectorized over
    samples and cotangents where ``torch.func.vmap`` takes the model, else a loop over samples (same numbers).

    Args:
        model: the model.
        x: inputs [n, ...], or a batch that ``forward`` understands; never written to.
        roots: cotangents s, [K, n, *output].
        parameters: by name; all of them leaves of ``model``.
        max_memory: bytes.
        forward: (model, batch) → (output, target) where the model is not simply called; then always a loop.

    Returns:
        {name: float64 [n]} and how it was done (``"vmap"`` or ``"loop over samples"``).
    """
    bytes_a_sample = 2 * len(roots) * sum(p.numel() * p.element_size() for p in parameters.values())
    chunk = max(1, max_memory // max(1, bytes_a_sample))
    return _per_sample(model, x, roots, parameters, forward, lambda g: row_energy(g.flatten()), True, chunk)


def per_sample_gradients(
    model: nn.Module, x: Any, roots: Tensor, parameters: Mapping[str, Tensor], forward: Forward | None = None
) -> tuple[dict[str, Tensor], str]:
    """∂(s_ik·f_i)/∂p itself, {name: [K, n, |p|]}: K·n·|p| numbers."""
    rows, how = _per_sample(model, x, roots, parameters, forward, lambda g: g.flatten(), False, None)
    return {name: value.transpose(0, 1) for name, value in rows.items()}, how


def _per_sample(
    model: nn.Module,
    x: Any,
    roots: Tensor,
    parameters: Mapping[str, Tensor],
    forward: Forward | None,
    of: Callable[[Tensor], Tensor],
    summed: bool,
    chunk: int | None,
) -> tuple[dict[str, Tensor], str]:
    """``of`` every gradient, over cotangents summed or stacked: {name: [n, ...] or [n, K, ...]}."""

    def over_cotangents(values: Tensor) -> Tensor:
        return values.sum(0) if summed else values

    def loop(output_of: Callable[[int], Tensor]) -> tuple[dict[str, Tensor], str]:
        with preserve_state(model):
            return _loop(output_of, roots, parameters, of, over_cotangents), "loop over samples"

    if forward is not None:
        return loop(lambda i: forward(model, take(x, slice(i, i + 1)))[0])
    primals = {name: p.detach() for name, p in parameters.items()}

    def one_sample(x_i: Tensor, s_i: Tensor) -> dict[str, Tensor]:
        _, pull, *_ = vjp(lambda p: call_with(model, p, x_i.unsqueeze(0).clone()).squeeze(0), primals)

        def reduced(s: Tensor) -> dict[str, Tensor]:
            return {name: of(g) for name, g in pull(s)[0].items()}

        return {name: over_cotangents(v) for name, v in vmap(reduced)(s_i).items()}

    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*performance drop.*")  # slower, still right
            # nothing outside is differentiated: recording would keep every sample's gradients
            with torch.no_grad(), preserve_state(model):
                found = vmap(one_sample, chunk_size=chunk)(x.detach(), roots.movedim(0, 1))
    except (RuntimeError, ValueError, NotImplementedError):
        # control flow on data, in-place operations, operators without a batching rule
        return loop(lambda i: model(x[i : i + 1].detach().clone()))
    return {name: v.detach() for name, v in found.items()}, "vmap"


def _loop(
    output_of: Callable[[int], Tensor],
    roots: Tensor,
    parameters: Mapping[str, Tensor],
    of: Callable[[Tensor], Tensor],
    over_cotangents: Callable[[Tensor], Tensor],
) -> dict[str, Tensor]:
    tensors = list(parameters.values())
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for i in range(roots.shape[1]):
        output = output_of(i)
        values: dict[str, list[Tensor]] = {name: [] for name in parameters}
        for root in roots[:, i : i + 1]:
            grads = torch.autograd.grad(output, tensors, root, retain_graph=True, allow_unused=True)
            for (name, p), g in zip(parameters.items(), grads, strict=True):
                values[name].append(of(torch.zeros_like(p) if g is None else g))
        for name, parts in values.items():
            found[name].append(over_cotangents(torch.stack(parts)).detach())
    return {name: torch.stack(parts) for name, parts in found.items()}
