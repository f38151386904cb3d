"""Parameters used directly: added, multiplied, divided by, expanded, with broadcasting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flatkern.layers.rule import Cotangent, Opened, Site, register
from flatkern.layers.term import DenseTerm

__all__ = ["reduced"]


def reduced(g: Cotangent, site: Site, factor: Tensor | float = 1.0) -> DenseTerm:
    """The gradient of an operand that was broadcast into the output: factor · g, summed over the broadcast axes.

    Args:
        g: the output's cotangent.
        site: the operation.
        factor: the derivative of each output entry in its operand entry: a number, or [*output] (broadcast).
    """
    if isinstance(factor, Tensor):
        lead = g.value.ndim - 1 - factor.ndim
        factor = factor.detach().reshape(1, *(1,) * lead, *factor.shape)
        value = site.samples_first(g.value * factor)
        plain = False
    else:
        value, plain = (g.samples_first, True) if factor == 1 else (g.samples_first * factor, False)
    summed = _to_shape(value, site.shape)
    whole = plain and summed.numel() == value.numel()
    return DenseTerm(summed, site.shape, g.energy if whole else None)


def _to_shape(value: Tensor, shape: torch.Size) -> Tensor:
    """[K, n, *sample's output] → [K, n, *shape], summed over axes that the operand lacks or has once."""
    extra = value.ndim - 2 - len(shape)
    axes = list(range(2, 2 + extra))
    axes += [2 + extra + j for j, size in enumerate(shape) if size == 1]
    axes = [axis for axis in axes if value.shape[axis] != 1]  # without one to sum it stays a view
    if axes:
        value = value.sum(axes, keepdim=True)
    return value.reshape(*value.shape[:2], *shape)


@register("Add")
def add(site: Site) -> Opened:
    """a + α b."""
    node: Any = site.node
    factor = 1.0 if site.operand == 0 else float(node._saved_alpha)
    return lambda g: reduced(g, site, factor)


@register("Sub")
def sub(site: Site) -> Opened:
    """a − α b."""
    node: Any = site.node
    factor = 1.0 if site.operand == 0 else -float(node._saved_alpha)
    return lambda g: reduced(g, site, factor)


@register("Mul")
def mul(site: Site) -> Opened | None:
    """a ∘ b."""
    node: Any = site.node
    other = node._saved_other if site.operand == 0 else node._saved_self
    return None if other is None else lambda g: reduced(g, site, other)


@register("Div")
def div(site: Site) -> Opened | None:
    """a / b."""
    node: Any = site.node
    if hasattr(node, "_saved_rounding_mode"):
        return None
    other = node._saved_other.detach()
    if site.operand == 0:
        return lambda g: reduced(g, site, 1 / other)
    numerator = node._saved_self
    return lambda g: reduced(g, site, -numerator.detach() / other.square())


@register("Expand")
def expand(site: Site) -> Opened:
    """One tensor for every sample: class tokens, initial states."""
    return lambda g: reduced(g, site)


@register("Repeat")
def repeat(site: Site) -> Opened | None:
    """Axes of length one repeated, or a vector once a sample, end to end (how instance norm repeats its scale)."""
    node: Any = site.node
    repeats = node._saved_repeats[len(node._saved_repeats) - len(site.shape) :]
    if all(size == 1 or times == 1 for size, times in zip(site.shape, repeats, strict=True)):
        return lambda g: reduced(g, site)
    if len(site.shape) != 1 or (site.layout is not None and site.layout.outer != 1):
        return None

    def term(g: Cotangent) -> DenseTerm:
        value = g.samples_first  # [K, n, r · d]
        return DenseTerm(value.reshape(*value.shape[:2], -1, *site.shape).sum(2), site.shape)

    return term


@register("PreluKernel")
def prelu(site: Site) -> Opened | None:
    """max(x, 0) + w min(x, 0)."""
    if site.operand != 1:
        return None
    node: Any = site.node
    factor = node._saved_self.detach().clamp(max=0)
    return lambda g: reduced(g, site, factor)
