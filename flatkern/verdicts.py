"""Which parameters the outputs are piecewise affine in, on the whole of the data: for them diag H = diag GGN."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from flatkern.affine import custom_function, degrees, hidden_parameters
from flatkern.linearize import Forward
from flatkern.losses import Loss
from flatkern.problem import preserve_state
from flatkern.sample_axis import footprint
from flatkern.samples import count_samples, take
from flatkern.tape import Tape, UnsupportedError, record

__all__ = ["loss_uses_parameters", "not_affine"]

_PILOT = 2
"""Samples of the run that tells how many fit."""
_COPIES = 3
"""Memory of a recorded run over that of its values."""


class _Bound(nn.Module):
    """A model with a batch, as a module of one argument that it ignores."""

    def __init__(self, model: nn.Module, batch: Any, forward: Forward) -> None:
        super().__init__()
        self.model, self._batch, self._run = model, batch, forward

    def forward(self, _: Tensor) -> Tensor:
        output, _target = self._run(self.model, self._batch)
        return output


def not_affine(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    parameters: Mapping[str, Tensor],
    forward: Forward | None,
    max_memory: int,
) -> dict[str, str]:
    """Parameters in which the outputs are not proven to be piecewise affine (entry by entry), with the reason.

    The run is recorded for all data, some samples at a time, as other samples may take other branches. Whatever a
    record cannot represent, and a custom ``autograd.Function`` anywhere, proves nothing.

    For a parameter that is not named the outputs are even jointly (piecewise) affine in all entries of that tensor,
    the other tensors fixed: degrees are counted a tensor. So its whole block of the residual is zero.
    """
    found: dict[str, str] = {}
    for inputs, _ in batches:
        n = count_samples(inputs)
        start, size = 0, min(_PILOT, n)
        while start < n and len(found) < len(parameters):
            part = take(inputs, slice(start, start + size))
            try:
                tape, output = _recorded(model, part, parameters, forward)
                reason = custom_function(output)
            except UnsupportedError as error:
                reason = f"the run cannot be followed: {error}"
            if reason:
                return {name: found.get(name, reason) for name in parameters}
            for name, degree in degrees(output, parameters, hidden_parameters(tape)).items():
                if not degree.proven:
                    found.setdefault(name, degree.reason)
            start += size
            size = max(1, max_memory * size // max(1, _COPIES * footprint(tape)))
            del tape, output
    return {name: found[name] for name in parameters if name in found}


def _recorded(
    model: nn.Module, part: Any, parameters: Mapping[str, Tensor], forward: Forward | None
) -> tuple[Tape, Tensor]:
    with preserve_state(model):
        if forward is None:
            return record(model, part, parameters)
        return record(_Bound(model, part, forward), torch.zeros(1), parameters)


def _below(root: Node | None) -> list[Node]:
    found = [] if root is None else [root]
    seen = set(found)
    for node in found:  # grows on the way
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                found.append(below)
    return found


def loss_uses_parameters(loss: Loss, output: Tensor, target: Any, model: nn.Module) -> bool:
    """Whether a callable loss depends on parameters of the model otherwise than through its output (weight decay)."""
    if not loss.callable:
        return False
    leaf = output.detach().clone().requires_grad_()
    with torch.enable_grad():
        value = loss.numerator(leaf.view_as(leaf), target)
    owned = {id(p) for p in model.parameters()}
    return any(id(getattr(node, "variable", None)) in owned for node in _below(value.grad_fn))
