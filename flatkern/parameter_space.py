"""From the place where a parameter enters an operation back to the parameter's own entries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from flatkern.layers.term import Term
from flatkern.uses import DerivedTerm, ParameterUse

__all__ = ["entries_of", "own_term", "spread"]

_DIGIT = 1 << 20
"""Indices are pulled back in digits that float32 holds exactly."""


def _source(uses: Sequence[ParameterUse]) -> GradientEdge | None:
    """Where a term over these uses lives; ``None``: in the parameter itself."""
    first = uses[0]
    if first.source is None or len({use.chain for use in uses}) > 1 or first.chain is None:
        return None
    return GradientEdge(*first.source)


def spread(uses: Sequence[ParameterUse], parameter: Tensor, values: Tensor) -> Tensor:
    """Values of the operand's entries → those of the parameter's entries, 0 where an entry is not in the operand.

    Only transposes, views, slices and splits lie between, so each entry is there at most once.
    """
    edge = _source(uses)
    if edge is None:
        return values.reshape(parameter.shape)
    (found,) = torch.autograd.grad([edge], [parameter], [values.to(parameter.dtype)], retain_graph=True)
    return found


def entries_of(uses: Sequence[ParameterUse], parameter: Tensor, shape: Sequence[int]) -> Tensor | None:
    """The parameter's flat index of each operand entry, int64 [entries]; ``None``: the same order as the parameter.

    Args:
        uses: of one term.
        parameter: whose entries.
        shape: the operand's.
    """
    edge = _source(uses)
    if edge is None:
        return None
    size = torch.Size(shape).numel()
    number = torch.arange(1, size + 1, device=parameter.device)
    digits = []
    for digit in (number % _DIGIT, number // _DIGIT):
        value = digit.to(parameter.dtype).reshape(tuple(shape))
        (found,) = torch.autograd.grad([edge], [parameter], [value], retain_graph=True)
        digits.append(found.flatten().round().long())
    back = digits[0] + _DIGIT * digits[1]  # [parameter's entries] → number of the operand entry, 0 for none
    present = torch.nonzero(back).flatten()
    places = torch.empty(size, dtype=torch.long, device=parameter.device)
    places[back[present] - 1] = present
    return places


def own_term(parameter: Tensor, groups: Sequence[tuple[Sequence[ParameterUse], Term]]) -> Term:
    """All terms of a parameter as one, in the parameter's own space."""
    parts = []
    for uses, term in groups:
        edge = _source(uses) if uses else None
        parts.append((None if edge is None else (edge.node, edge.output_nr), term))
    if len(parts) == 1 and parts[0][0] is None:
        return parts[0][1]
    return DerivedTerm(parameter, parts)
