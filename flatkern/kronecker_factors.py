"""Sums over the data that Kronecker factors, exact small blocks and diagonals are made of."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import Node

from flatkern.ggn_entries import squares_summed
from flatkern.gradient_rows import Chunk
from flatkern.graph import TRANSPOSES, VIEWS
from flatkern.kronecker_blocks import CurvatureBlock, DenseBlock, DiagonalBlock, KroneckerBlock, Places
from flatkern.layers.outer import OuterTerm
from flatkern.layers.rule import operation
from flatkern.layers.term import DenseTerm, Term, chunks
from flatkern.parameter_space import entries_of, own_term, spread
from flatkern.problem import Layout
from flatkern.uses import ParameterUse

__all__ = ["Approximation", "Block", "DenseSum", "DiagonalSum", "KroneckerSum", "groups_of", "plan"]

Approximation = Literal["expand", "reduce"]
Group = tuple[tuple[ParameterUse, ...], Term]


class KroneckerSum:
    """Σ a aᵀ and Σ g gᵀ of one part of a weight (usually all of it), and of its bias."""

    def __init__(
        self, weight: str, part: int, bias: str | None, approx: Approximation, places: Places
    ) -> None:
        self._weight, self._part, self._bias = weight, part, bias
        self._approx, self._places = approx, places
        self._inputs: Tensor | None = None
        self._outputs: Tensor | None = None
        self._count = 0

    def add(self, groups: Mapping[str, list[Group]], max_memory: int) -> None:
        """A chunk's share."""
        if self._weight not in groups:
            return
        found = groups[self._weight]
        term = found[self._part][1] if self._part < len(found) else None
        if not isinstance(term, OuterTerm):
            raise ValueError(
                f"data: parameter {self._weight!r} is used in another way in some batches, so it has no Kronecker "
                "factors; leave it out with params="
            )
        size, positions, d_a, d_g = term.sizes
        step = max_memory // (32 * size * positions * (d_a + term.k * d_g + 1))
        for part in chunks(term.n, step):
            a, g = term.features(part).double(), term.cotangents[:, part].double()
            if self._approx == "reduce":
                a, g = a.mean(2, keepdim=True), g.sum(3, keepdim=True)
            if self._bias is not None:
                a = torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1)
            self._count += a.shape[0] * a.shape[2]
            a = a.transpose(0, 1).flatten(1, 2)  # [G, n T, d_a]
            g = g.movedim(2, 0).flatten(1, 3)  # [G, K n T, d_g]
            inputs, outputs = a.mT @ a, g.mT @ g
            self._inputs = inputs if self._inputs is None else self._inputs.add_(inputs)
            self._outputs = outputs if self._outputs is None else self._outputs.add_(outputs)

    def block(self, denominator: float) -> CurvatureBlock:
        """(Σ a aᵀ / number of inputs) and (Σ g gᵀ / denominator)."""
        assert self._inputs is not None
        assert self._outputs is not None
        names = (self._weight,) if self._bias is None else (self._weight, self._bias)
        return KroneckerBlock(names, self._places, self._inputs / self._count, self._outputs / denominator)


class DenseSum:
    """Σ γ γᵀ of one small parameter."""

    def __init__(self, name: str, place: slice, parameter: Tensor) -> None:
        self._name, self._place, self._parameter = name, place, parameter
        size = parameter.numel()
        self._matrix = torch.zeros(size, size, dtype=torch.float64, device=parameter.device)

    def add(self, groups: Mapping[str, list[Group]], max_memory: int) -> None:
        """A chunk's share."""
        if self._name not in groups:
            return
        term = own_term(self._parameter, groups[self._name])
        for part in chunks(term.n, max_memory // (4 * term.k * term.gradient_bytes)):
            formed = term.explicit(part, slice(0, term.k)).reshape(-1, self._parameter.numel()).double()
            self._matrix.addmm_(formed.detach().mT, formed.detach())

    def block(self, denominator: float) -> CurvatureBlock:
        """The block."""
        return DenseBlock(self._name, self._place, self._matrix / denominator)


class DiagonalSum:
    """Σ γ² of one parameter."""

    def __init__(self, name: str, place: slice, parameter: Tensor) -> None:
        self._name, self._place, self._parameter = name, place, parameter
        self._values = torch.zeros(parameter.numel(), dtype=torch.float64, device=parameter.device)

    def add(self, groups: Mapping[str, list[Group]], max_memory: int) -> None:
        """A chunk's share."""
        for uses, term in groups.get(self._name, ()):
            squares = squares_summed(term, max_memory).detach()
            own = spread(uses, self._parameter, squares.reshape(term.shape)) if uses else squares
            self._values += own.flatten()

    def block(self, denominator: float) -> CurvatureBlock:
        """The block."""
        return DiagonalBlock(self._name, self._place, self._values / denominator)


Block = KroneckerSum | DenseSum | DiagonalSum


def groups_of(chunk: Chunk) -> dict[str, list[Group]]:
    """Each parameter's terms with the uses that they sum over (none for a parameter without a rule)."""
    uses = chunk.lin.uses
    return {
        name: list(zip(uses.grouped(name) if name in uses.by_parameter else [()], terms, strict=True))
        for name, terms in chunk.gradients.terms.items()
    }


def plan(
    groups: Mapping[str, list[Group]],
    parameters: Mapping[str, Tensor],
    approx: Approximation,
    max_block: int,
    max_factor: int,
) -> tuple[list[Block], dict[str, str]]:
    """How each parameter is dealt with, and what those without Kronecker factors have instead."""
    layout = Layout(parameters)
    blocks: list[Block] = []
    taken: set[str] = set()
    for name, found in groups.items():
        if not _is_weight(found, parameters[name]) or _largest_side(found) > max_factor:
            continue
        paired = _bias_of(found, groups, taken)
        taken |= {name} if paired is None else {name, paired[0]}
        for part, (uses, term) in enumerate(found):
            assert isinstance(term, OuterTerm)
            places = [_weight_entries(layout.slices[name], uses, parameters[name], term)]
            if paired is not None:
                bias, order = paired
                bias_uses, bias_term = groups[bias][order[part]]
                index = entries_of(bias_uses, parameters[bias], bias_term.shape)
                whole = layout.slices[bias]
                places.append(whole if index is None else index + whole.start)
            blocks.append(
                KroneckerSum(name, part, None if paired is None else paired[0], approx, Places(places))
            )
    others: dict[str, str] = {}
    for name, p in parameters.items():
        if name in taken:
            continue
        small = p.numel() <= max_block
        others[name] = "exact block" if small else "exact diagonal"
        blocks.append((DenseSum if small else DiagonalSum)(name, layout.slices[name], p))
    return blocks, others


def _is_weight(found: list[Group], parameter: Tensor) -> bool:
    """Whether all of a parameter is the weight of dense layers or convolutions."""
    for uses, term in found:
        if not isinstance(term, OuterTerm) or not uses:
            return False
        for use in uses:
            node: Any = use.site.node
            if operation(node) == "Convolution" and node._saved_transposed:
                return False
    # a weight of which a slice is never used has entries that no part covers
    return sum(term.shape.numel() for _, term in found) == parameter.numel()


def _largest_side(found: list[Group]) -> int:
    return max(max(term.sizes[2:]) for _, term in found if isinstance(term, OuterTerm))


def _bias_of(
    found: list[Group], groups: Mapping[str, list[Group]], taken: set[str]
) -> tuple[str, list[int]] | None:
    """The bias that is added to the very same products, and which of its parts goes with each of the weight's."""
    wanted: list[set[Node | None]] = [{use.site.node for use in uses} for uses, _ in found]
    for name, candidates in groups.items():
        if name in taken or len(candidates) != len(found):
            continue
        if not all(isinstance(t, DenseTerm) and uses for uses, t in candidates):
            continue
        nodes = [{_product_of(use) for use in uses} for uses, _ in candidates]
        if not all(n in nodes for n in wanted):
            continue
        order = [nodes.index(n) for n in wanted]
        if all(_sums(candidates[i][1], term) for i, (_, term) in zip(order, found, strict=True)):
            return name, order
    return None


def _product_of(use: ParameterUse) -> Node | None:
    """The product that a parameter is added to: in one operation, or by an addition after reshaping."""
    node = use.site.node
    kind, operand = operation(node), use.site.operand
    if (kind, operand) in (("Addmm", 0), ("Convolution", 2)):
        return node
    if kind != "Add":
        return None
    below = node.next_functions[1 - operand][0]
    while below is not None and operation(below) in VIEWS | TRANSPOSES:
        below = below.next_functions[0][0]
    return below


def _sums(bias: Term, weight: Term) -> bool:
    """Whether the bias's gradient is Σ_t g_t with the weight's cotangents (nothing else sees the bare product)."""
    assert isinstance(bias, DenseTerm)
    assert isinstance(weight, OuterTerm)
    total = weight.cotangents.sum(3).flatten(2)
    given = bias.gradients.flatten(2)
    if total.shape != given.shape:
        return False
    tolerance = 1e4 * torch.finfo(total.dtype).eps * float(total.abs().max())
    return float((total - given).abs().max()) <= tolerance


def _weight_entries(
    place: slice, uses: tuple[ParameterUse, ...], parameter: Tensor, term: OuterTerm
) -> slice | Tensor:
    """Entries of the flat vector in the order (group, output, input)."""
    groups, _, d_a, d_g = term.sizes
    index = entries_of(uses, parameter, term.shape)
    if index is None:
        if not term.transposed:
            return place
        index = torch.arange(parameter.numel(), device=parameter.device)
    if term.transposed:
        index = index.reshape(groups, d_a, d_g).mT.flatten()
    if bool((index.diff() == 1).all()):  # most often: a weight [d_out, d_in] that enters as its transpose
        first = place.start + int(index[0])
        return slice(first, first + len(index))
    return index + place.start
