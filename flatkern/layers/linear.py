"""Matrix products with a weight, however they are called: z_t = W a_t (+ b) at every position t."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flatkern.layers.elementwise import reduced
from flatkern.layers.outer import Features, OuterTerm
from flatkern.layers.rule import Cotangent, Opened, Site, register
from flatkern.layers.term import Term

__all__ = ["matrix_product"]


@register("Addmm")
def addmm(site: Site) -> Opened | None:
    """β C + α A B: C is a bias, A or B the weight."""
    node: Any = site.node
    if site.operand == 0:
        return lambda g: reduced(g, site, node._saved_beta)
    other = node._saved_mat1 if site.operand == 2 else node._saved_mat2
    return matrix_product(site, other.detach()[None], weight_first=site.operand == 1, scale=node._saved_alpha)


@register("Mm")
def mm(site: Site) -> Opened | None:
    """A B with one of them the weight."""
    node: Any = site.node
    other = node._saved_self if site.operand == 1 else node._saved_mat2
    return matrix_product(site, other.detach()[None], weight_first=site.operand == 0)


@register("Bmm")
def bmm(site: Site) -> Opened | None:
    """A_g B_g for several weights g at once, none of which depends on the sample."""
    node: Any = site.node
    other = node._saved_self if site.operand == 1 else node._saved_mat2
    return matrix_product(site, other.detach(), weight_first=site.operand == 0, batched=True)


@register("Mv")
def mv(site: Site) -> Opened | None:
    """X w: a dense layer with one output."""
    node: Any = site.node
    if site.operand != 1 or site.axis not in (0, None):
        return None
    features = Features.of(site.samples_first(node._saved_self.detach()[None])[0].unsqueeze(1))
    return lambda g: OuterTerm(features, g.samples_first[:, :, None, :, None], site.shape)


def matrix_product(
    site: Site, other: Tensor, *, weight_first: bool, scale: float = 1.0, batched: bool = False
) -> Opened | None:
    """A weight times the samples' rows, or their columns where the weight comes first.

    Args:
        site: the product.
        other: the factor that depends on the samples, [G, rows, d_in] or (``weight_first``) [G, d_in, columns].
        weight_first: whether the weight is the left factor.
        scale: of the product.
        batched: whether the operation's own output has the axis G in front.
    """
    if weight_first:
        other = other.mT
    rows_axis = int(batched) + int(weight_first)
    if site.axis not in (rows_axis, None):
        return None

    def by_sample(value: Tensor) -> Tensor:
        """[K, G, rows, d] → [K, n, G, T, d]."""
        if site.layout is None:
            return value.unsqueeze(1)
        return type(site.layout)(1, site.layout.outer).samples_first(value, site.n)

    features = Features.of(by_sample(other[None])[0])

    def term(g: Cotangent) -> Term:
        value = g.value if batched else g.value.unsqueeze(1)
        value = by_sample(value.mT if weight_first else value)
        if scale != 1:
            return OuterTerm(features, scale * value, site.shape, transposed=not weight_first)
        return OuterTerm(features, value, site.shape, transposed=not weight_first, energy=lambda: g.energy)

    return term
