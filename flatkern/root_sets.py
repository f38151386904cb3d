"""Gradients for several sets of cotangents of one run, from one pull-back: all are combinations of unit cotangents."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from flatkern.gradient_gram import Gradients, parameter_gradients
from flatkern.layers.rule import Cotangent, Site
from flatkern.linearize import Linearization, pull_back
from flatkern.losses import identity_cotangents

__all__ = ["gradients_for"]


def gradients_for(
    model: nn.Module,
    lin: Linearization,
    root_sets: Sequence[Tensor | None],
    parameters: Mapping[str, nn.Parameter],
) -> Iterator[Gradients]:
    """The gradients for each set of cotangents [K_s, n, *output] in turn; ``None``: the unit cotangents.

    With N output entries a sample, N unit cotangents are pulled back and combined where the parameters enter, if the
    sets have more than N in all: a combination takes K N numbers a place, a pull-back as many a weight. Parameters
    without a rule, whose gradients are formed, make each set be pulled back by itself.
    """
    if lin.uses.uncovered:
        for roots in root_sets:
            given = identity_cotangents(lin.output.detach()) if roots is None else roots
            yield parameter_gradients(model, lin, given, parameters)
        return
    outputs = lin.output[0].numel()
    given_sets = [roots for roots in root_sets if roots is not None]
    units = len(given_sets) < len(root_sets) or sum(len(roots) for roots in given_sets) > outputs
    values = _pulled(lin, identity_cotangents(lin.output.detach()) if units else torch.cat(given_sets))
    start = 0
    for roots in root_sets:
        cotangents = {}
        count = outputs if roots is None else len(roots)
        with torch.no_grad():
            for (node, site), value in zip(lin.uses.sites.items(), values, strict=True):
                if roots is None:
                    own = value
                elif units:
                    own = _combined(value, site, roots.reshape(count, lin.n, outputs))
                else:
                    own = value[start : start + count]
                cotangents[node] = Cotangent(own, site)
            terms = {
                name: lin.uses.terms(name, parameters[name], cotangents) for name in lin.uses.by_parameter
            }
        start += count
        yield Gradients(lin.n, count, terms, ())


def _pulled(lin: Linearization, roots: Tensor) -> list[Tensor]:
    """At every site, [K, *shape of its output]."""
    edges = [GradientEdge(node, 0) for node in lin.uses.sites]
    blocks: list[list[Tensor]] = [[] for _ in edges]
    if edges:
        for _, found in pull_back(lin, roots, edges):
            for place, g in enumerate(found):
                assert g is not None  # sites are read off the output's own graph
                blocks[place].append(g)
    return [torch.cat(found) for found in blocks]


def _combined(value: Tensor, site: Site, weights: Tensor) -> Tensor:
    """Σ_c weights_kic g_c at sample i's entries: [N, *shape] → [K, *shape]."""
    k, n, units = weights.shape
    shape = value.shape[1:]
    if site.layout is None:  # one sample, to which everything belongs
        return (weights[:, 0] @ value.reshape(units, -1)).reshape(k, *shape)
    axis, outer = site.layout.axis, site.layout.outer
    apart = (*shape[:axis], outer, n, shape[axis] // (outer * n), *shape[axis + 1 :])
    samples_first = value.reshape(units, *apart).movedim(axis + 2, 0)
    rest = samples_first.shape[2:]
    mixed = weights.transpose(0, 1) @ samples_first.reshape(n, units, -1)
    return mixed.reshape(n, k, *rest).movedim(0, axis + 2).reshape(k, *shape)
