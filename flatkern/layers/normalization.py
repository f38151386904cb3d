"""Scale and shift of normalization layers: y = γ ∘ x̂ + β, so their gradients are Σ_t g_t ∘ x̂_t and Σ_t g_t."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flatkern.layers.elementwise import reduced
from flatkern.layers.rule import Opened, Site, register
from flatkern.layers.term import DenseTerm, Term

__all__: list[str] = []


@register("NativeLayerNorm")
def layer_norm(site: Site) -> Opened | None:
    """Operands (x, γ, β); normalized over the last axes, which γ and β have."""
    node: Any = site.node
    if site.operand == 2:
        return lambda g: reduced(g, site)
    if site.operand != 1:
        return None
    factor = (node._saved_input.detach() - node._saved_result1) * node._saved_result2
    return lambda g: reduced(g, site, factor)


@register("NativeGroupNorm")
def group_norm(site: Site) -> Opened | None:
    """Operands (x, γ, β); normalized over groups of channels."""
    node: Any = site.node
    if site.operand == 0:
        return None
    if site.operand == 2:
        return _over_channels(site, None)
    x = node._saved_input.detach()
    rows = x.reshape(node._saved_N, node._saved_group, -1)
    normalized = (rows - node._saved_result1.unsqueeze(-1)) * node._saved_result2.unsqueeze(-1)
    return _over_channels(site, normalized.reshape(x.shape))


@register("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")
def batch_norm(site: Site) -> Opened | None:
    """Operands (x, γ, β): with running statistics, or with those of each sample's own channels (instance norm)."""
    node: Any = site.node
    if site.operand == 0:
        return None
    if site.operand == 2:
        return _over_channels(site, None)
    x = node._saved_input.detach()
    shape = (1, -1, *(1,) * (x.ndim - 2))
    if node._saved_training:
        mean, scale = node._saved_result1, node._saved_result2
    else:
        mean = node._saved_running_mean
        scale = (node._saved_running_var + node._saved_eps).rsqrt()
    return _over_channels(site, (x - mean.reshape(shape)) * scale.reshape(shape))


def _over_channels(site: Site, factor: Tensor | None) -> Opened | None:
    """The operand [C] lies on axis 1; all other axes are summed over."""
    if site.axis not in (0, None):
        return None

    def term(g: Any) -> Term:
        value = g.samples_first if factor is None else site.samples_first(g.value * factor)
        value = value.movedim(3, -1)  # [K, n, r, C, *] → [K, n, r, *, C]
        return DenseTerm(value.sum(tuple(range(2, value.ndim - 1))), site.shape)

    return term
