"""Every place where a parameter enters a model's computation, and how its gradient is put together from them.

From each parameter the autograd graph is followed upwards: through operations on parameters alone (transposes, slices,
a product of two factors, weight norm) to the first ones whose output has samples. These are the parameter's sites; a
rule says what each adds to its per-sample gradient. A parameter of which one site has no rule is left to the fall-back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from flatkern.graph import (
    ISOMETRIC,
    SPLITS,
    TRANSPOSES,
    Graph,
    Layouts,
    is_complex,
    on_parameters_alone,
    shapes_of,
)
from flatkern.layers.embedding import padding_index
from flatkern.layers.outer import OuterTerm
from flatkern.layers.rule import Cotangent, Opened, Site, operation, rule_for
from flatkern.layers.term import SumTerm, Term

__all__ = ["DerivedTerm", "ParameterUse", "Uses", "find_uses"]

Step = tuple[Node, int]


@dataclass(frozen=True)
class ParameterUse:
    """One site of one parameter."""

    site: Site
    opened: Opened
    source: Step | None
    """The operand as an output of the graph; ``None`` where it is the parameter itself."""
    chain: tuple[tuple[Any, ...], ...] | None
    """The isometric operations between parameter and operand, from the parameter on; ``None``: there are others."""
    first: Step | None
    """The first of these."""


@dataclass(frozen=True)
class Uses:
    """The sites of every parameter that rules can take."""

    by_parameter: dict[str, tuple[ParameterUse, ...]]
    uncovered: tuple[str, ...]
    """Parameters of which some use has no rule."""
    unused: tuple[str, ...]
    """Parameters that the output does not depend on."""
    derived: frozenset[str]
    """Parameters whose per-sample gradients have to be formed, from those of the weights computed from them."""

    @property
    def sites(self) -> dict[Node, Site]:
        """The operations at which cotangents are needed."""
        return {use.site.node: use.site for uses in self.by_parameter.values() for use in uses}

    def terms(self, name: str, parameter: Tensor, cotangents: Mapping[Node, Cotangent]) -> list[Term]:
        """The parameter's per-sample gradients as terms that are orthogonal to one another (often just one)."""
        uses = self.by_parameter[name]
        opened = [use.opened(cotangents[use.site.node]) for use in uses]
        if name in self.derived:
            return [DerivedTerm(parameter, [(use.source, t) for use, t in zip(uses, opened, strict=True)])]
        groups = _disjoint_groups(uses)
        assert groups is not None
        return [_sum([(uses[i], opened[i]) for i in group]) for group in groups]

    def grouped(self, name: str) -> list[tuple[ParameterUse, ...]]:
        """The uses that each of :meth:`terms` sums over; one group for a derived parameter."""
        uses = self.by_parameter[name]
        groups = None if name in self.derived else _disjoint_groups(uses)
        return [uses] if groups is None else [tuple(uses[i] for i in group) for group in groups]

    def signature(self, name: str) -> tuple[Any, ...]:
        """What decides in which space the terms of a parameter live."""
        return (name in self.derived, *(use.chain for use in self.by_parameter[name]))

    def forming(self, names: frozenset[str]) -> Uses:
        """The same with the gradients of some more parameters formed in the parameter's own space."""
        return Uses(self.by_parameter, self.uncovered, self.unused, self.derived | names)


@torch.no_grad()
def find_uses(graph: Graph, parameters: Mapping[str, Tensor], layouts: Layouts | None, n: int) -> Uses:
    """Follow every parameter to its sites.

    Args:
        graph: of the output.
        parameters: the selected ones, by name.
        layouts: where the samples lie; ``None`` for a single sample, where everything belongs to it.
        n: number of samples.
    """
    by_parameter, uncovered, unused, derived = {}, [], [], set()
    for name, p in parameters.items():
        leaf = graph.leaves.get(id(p))
        if leaf is None:
            unused.append(name)
            continue
        uses = _uses_of(graph, leaf, p, layouts, n)
        if uses is None:
            uncovered.append(name)
            continue
        by_parameter[name] = uses
        if _disjoint_groups(uses) is None:
            derived.add(name)
    return Uses(by_parameter, tuple(uncovered), tuple(unused), frozenset(derived))


def _uses_of(
    graph: Graph, leaf: Node, parameter: Tensor, layouts: Layouts | None, n: int
) -> tuple[ParameterUse, ...] | None:
    found: list[ParameterUse] = []
    pending, seen = [leaf], {leaf}
    while pending:
        below = pending.pop()
        for consumer in graph.consumers.get(below, ()):
            node = consumer.node
            if on_parameters_alone(graph, node, layouts):
                if node not in seen:
                    seen.add(node)
                    pending.append(node)
                continue
            layout = None if layouts is None else layouts.of(graph.index[node])
            rule = rule_for(node)
            if rule is None or (layouts is not None and layout is None):
                return None
            if is_complex(node) or is_complex(below):  # rules are for real numbers
                return None
            source = None if below is leaf else (below, consumer.output)
            shape = parameter.shape if source is None else shapes_of(below)[consumer.output]
            site = Site(node, consumer.operand, shape, layout, n)
            opened = rule(site)
            if opened is None:
                return None
            chain, first = _chain(leaf, source)
            found.append(ParameterUse(site, opened, source, chain, first))
    return tuple(found)


def _chain(leaf: Node, source: Step | None) -> tuple[tuple[tuple[Any, ...], ...] | None, Step | None]:
    steps: list[tuple[Any, ...]] = []
    first = None
    while source is not None:
        node, output = source
        if len(node.next_functions) != 1 or not (operation(node) in ISOMETRIC or _looks_up_once(node)):
            return None, None
        steps.append((operation(node), output, tuple(shapes_of(node)[output]), *_settings(node)))
        below, below_output = node.next_functions[0]
        assert below is not None
        first = source
        source = None if below is leaf else (below, below_output)
    return tuple(reversed(steps)), first


def _looks_up_once(node: Any) -> bool:
    """Whether it is the rows of a table for positions that are the same in every sample, each row once."""
    if operation(node) != "Embedding" or node._saved_scale_grad_by_freq:
        return False
    indices = node._saved_indices.flatten()
    return len(indices.unique()) == len(indices) and not bool((indices == padding_index(node)).any())


def _settings(node: Any) -> tuple[Any, ...]:
    values = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    return tuple(repr(v.tolist() if isinstance(v, Tensor) else v) for v in values)


def _disjoint_groups(uses: tuple[ParameterUse, ...]) -> list[list[int]] | None:
    """Uses by the part of the parameter they see, where these parts are equal or disjoint; else ``None``."""
    if any(use.chain is None for use in uses):
        return None
    splits = {id(use.first[0]) for use in uses if use.first is not None and _is_split(use.first[0])}
    groups: dict[Any, list[int]] = {}
    for i, use in enumerate(uses):
        split = use.first is not None and _is_split(use.first[0])
        if len(splits) > 1 or (splits and not split):
            return None
        groups.setdefault(use.first[1] if split and use.first is not None else None, []).append(i)
    for group in groups.values():
        chains = [_turns(uses[i].chain or ()) for i in group]
        if len(group) > 1 and len({uses[i].chain for i in group}) > 1 and any(c is None for c in chains):
            return None
    return list(groups.values())


def _is_split(node: Node) -> bool:
    return operation(node) in SPLITS


def _turns(chain: tuple[tuple[Any, ...], ...]) -> int | None:
    """How often a matrix is transposed on its way, mod 2; ``None`` where something else happens to it."""
    for step in chain:
        if step[0] not in TRANSPOSES or len(step[2]) != 2 or "(0, 1)" in step[3:]:
            return None
    return len(chain) % 2


def _sum(parts: list[tuple[ParameterUse, Term]]) -> Term:
    terms = [term for _, term in parts]
    if len(terms) == 1:
        return terms[0]
    if len({use.chain for use, _ in parts}) > 1:  # bring them to the parameter's own orientation
        turned = []
        for use, term in parts:
            flipped = term.flipped() if _turns(use.chain or ()) else term
            turned.append(_Turned(term) if flipped is None else flipped)
        terms = turned
    terms.sort(key=lambda term: isinstance(term, OuterTerm))  # a table knows how to join a head
    return terms[0].joined(terms[1:]) or SumTerm(terms)


class _Turned(Term):
    """A matrix's gradients, transposed."""

    def __init__(self, term: Term) -> None:
        self._term = term
        self._like(term)
        self.shape = torch.Size(reversed(term.shape))

    def explicit(self, samples: slice, cotangents: slice) -> Tensor:
        return self._term.explicit(samples, cotangents).mT


class DerivedTerm(Term):
    """The gradient of a parameter through weights computed from it (weight norm, products of factors).

    The weights' per-sample gradients are formed and pulled back through that computation.
    """

    def __init__(self, parameter: Tensor, parts: list[tuple[Step | None, Term]]) -> None:
        self._parameter, self._parts = parameter, parts
        self._like(parts[0][1])
        self.shape = parameter.shape

    @property
    def gradient_bytes(self) -> int:
        """See :class:`Term`."""
        return super().gradient_bytes + sum(term.gradient_bytes for _, term in self._parts)

    def explicit(self, samples: slice, cotangents: slice) -> Tensor:
        """See :class:`Term`."""
        total: Tensor | None = None
        edges: dict[Step, Tensor] = {}
        for source, term in self._parts:
            formed = term.explicit(samples, cotangents).flatten(0, 1)
            if source is None:
                total = formed if total is None else total + formed
            else:
                edges[source] = edges[source] + formed if source in edges else formed
        if edges:
            pulled = _pull(edges, self._parameter)
            total = pulled if total is None else total + pulled
        assert total is not None
        return total.reshape(-1, samples.stop - samples.start, *self.shape)


def _pull(edges: Mapping[Step, Tensor], parameter: Tensor) -> Tensor:
    outputs = [GradientEdge(node, output) for node, output in edges]

    def back(grads: list[Tensor], batched: bool) -> Tensor:
        (found,) = torch.autograd.grad(
            outputs, [parameter], grads, retain_graph=True, allow_unused=True, is_grads_batched=batched
        )
        if found is None:
            return torch.zeros(len(grads[0]), *parameter.shape, dtype=grads[0].dtype, device=grads[0].device)
        return found

    grads = list(edges.values())
    try:
        return back(grads, True)
    except RuntimeError:  # an operation that cannot be batched
        return torch.stack([back([g[i] for g in grads], False) for i in range(len(grads[0]))])
