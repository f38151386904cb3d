"""The last dense layer of a model, read off the autograd graph of a run, and how its weight enters."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor
from torch.autograd.graph import Node

from flatkern.graph import VIEWS, shapes_of
from flatkern.layers.outer import OuterTerm
from flatkern.layers.rule import operation
from flatkern.layers.term import Term
from flatkern.linearize import Linearization

__all__ = ["is_output", "is_transposed", "last_dense"]

_DENSE = frozenset({"Addmm", "Mm", "Linear", "Bmm", "Baddbmm", "Addmv", "Mv"})
_PRODUCTS = frozenset({"Addmm", "Mm"})
_TURNS = frozenset({"T", "Transpose", "Permute"})
_RESHAPES = VIEWS - {"AsStrided"}


def last_dense(lin: Linearization, parameters: Mapping[str, Tensor]) -> str:
    """The weight that is met first on every way down from the output.

    Raises:
        ValueError: there is none, or several.
    """
    sites: dict[Node, str] = {}
    for name, uses in lin.uses.by_parameter.items():
        for use in uses:
            if parameters[name].ndim == 2 and operation(use.site.node) in _DENSE:
                sites[use.site.node] = name
    root = lin.output.grad_fn
    found: dict[str, None] = {}
    stack: list[Node] = [] if root is None else [root]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if node in sites:
            found[sites[node]] = None
            continue
        if operation(node) in _PRODUCTS and any(below is None for below, _ in node.next_functions[-2:]):
            raise ValueError(
                "layer: the model's output comes from a product that none of the chosen dense layers makes (a frozen "
                "layer, fixed weights, a mixture of branches?); name one with layer="
            )
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                stack.append(below)
    if len(found) == 1:
        return next(iter(found))
    if found:
        raise ValueError(
            f"layer: the output depends on several last dense layers ({', '.join(found)}); name one with layer="
        )
    raise ValueError("layer: no dense layer was found in the model; name the weight with layer=")


def is_transposed(lin: Linearization, name: str, term: Term) -> bool | None:
    """Whether a matrix is kept as [in, out], given its one term; ``None``: its gradients are no outer products."""
    groups = lin.uses.grouped(name)
    if len(groups) != 1 or not isinstance(term, OuterTerm) or term.sizes[0] != 1:
        return None
    chains = {use.chain for use in groups[0]}
    if len(chains) > 1:  # such uses are joined in the parameter's own orientation
        return term.transposed
    (chain,) = chains
    if chain is None or any(step[0] not in _TURNS for step in chain):
        return None
    return term.transposed != (len(chain) % 2 == 1)


def is_output(lin: Linearization, name: str) -> bool:
    """Whether the one layer that uses a weight gives the model's output, its last axis kept as it is."""
    uses = lin.uses.by_parameter.get(name, ())
    node = lin.output.grad_fn
    if len(uses) != 1:
        return False
    site = uses[0].site.node
    while node is not None and shapes_of(node)[0][-1:] == shapes_of(site)[0][-1:]:
        if node is site:
            return True
        if operation(node) not in _RESHAPES:
            return False
        node = node.next_functions[0][0]
    return False
