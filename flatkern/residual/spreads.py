"""Changes whose second moments are known at a value further on, so that they need not be drawn there.

An entry's own change δz has uncorrelated channels of known variance. It keeps them through elementwise functions and
operations that only move values; a dense layer after that mixes them, and the variance of what comes out is
(W∘W) var: one level more, of which only the variances are known. A change is followed while it reaches a value on one
way alone: on two ways (a skip connection) it is correlated with itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from flatkern.residual.change import Entry
from flatkern.residual.curved_rules import Product
from flatkern.residual.elementwise import Elementwise
from flatkern.residual.linear_rules import Fill, FixedStatistics, Linear, Pick, Sum
from flatkern.residual.rule import Rule, Spread
from flatkern.tape import Op, Value

__all__ = ["Spreads"]

# every entry of the result is one entry of the input, or 0
_MOVES = frozenset(
    """
    _reshape_alias _to_copy _unsafe_view alias cat clone detach expand flip gather index index_select movedim permute
    repeat reshape roll select slice split split_with_sizes squeeze stack t transpose tril triu unbind unsafe_split
    unsqueeze view where neg
    """.split()  # noqa: SIM905
)
_RESHAPES = frozenset(
    {
        "view",
        "_unsafe_view",
        "reshape",
        "_reshape_alias",
        "unsqueeze",
        "squeeze",
        "clone",
        "alias",
        "_to_copy",
    }
    | {"detach", "neg", "flip", "roll", "tril", "triu"}
)


class Spreads:
    """Which changes reach each value, and the spreads of those that are known there."""

    def __init__(self) -> None:
        self.reach: dict[int, int] = {}
        """By index of the value: the changes that reach it, as bits."""
        self._known: dict[int, dict[int, Spread]] = {}

    def at(self, index: int) -> Mapping[int, Spread]:
        """The known spreads at a value, by the change's bit."""
        return self._known.get(index, {})

    def forget(self, index: int) -> None:
        """Of a value that nothing reads any more, what is known of its spreads."""
        self._known.pop(index, None)

    def advance(self, op: Op, rule: Rule | None, entry: Entry | None, bit: int) -> None:
        """Follow all changes through an operation, at which ``entry`` comes in as ``bit`` (0 where there is none)."""
        reach = bit
        for value in op.inputs:
            reach |= self.reach.get(value.index, 0)
        outputs = [(i, o.index) for i, o in enumerate(op.outputs) if o is not None]
        known: dict[int, dict[int, Spread]] = {index: {} for _, index in outputs}
        if rule is not None:
            for value in op.inputs:
                others = 0
                for other in op.inputs:
                    if other is not value:
                        others |= self.reach.get(other.index, 0)
                if sum(v is value for v in op.inputs) > 1:
                    continue
                for change, spread in self.at(value.index).items():
                    if change & others:
                        continue
                    for (_, index), after in zip(outputs, _through(op, rule, value, spread), strict=False):
                        if after is not None:
                            known[index][change] = after
        if entry is not None and not entry.shared:
            shape = entry.output.shape
            known[op.output.index][bit] = Spread(lambda: entry.variance().expand(shape), entry.channels)
        for _, index in outputs:
            self.reach[index] = reach
            if known[index]:
                self._known[index] = known[index]


def _through(op: Op, rule: Rule, value: Value, spread: Spread) -> tuple[Spread | None, ...]:
    """The spreads of the outputs."""
    axis = spread.axis
    shape = op.output.tensor.shape
    if isinstance(rule, Elementwise):
        slope = rule.slope
        return (Spread(lambda: spread.variance * slope.square(), axis, mixed=spread.mixed),)
    if isinstance(rule, FixedStatistics):
        factor = rule.factor
        return (Spread(lambda: spread.variance * factor.square(), axis, mixed=spread.mixed),)
    if isinstance(rule, Sum):
        plain = op.kwargs.get("alpha", 1) == 1 and value.tensor.shape == shape
        return (spread if plain else None,)
    if isinstance(rule, Product):
        return (_multiplied(rule, value, spread),)
    moves = isinstance(rule, Linear) and op.name in _MOVES
    pools = isinstance(rule, Pick) and op.name.startswith("max_pool")
    if not (moves or pools or isinstance(rule, Fill)):
        return (None,)
    images: list[tuple[Tensor, ...]] = []

    def moved(place: int) -> Tensor:
        if not images:
            images.append(rule.push_all({value.index: spread.variance}))
        image = images[0][place]
        return image.abs() if op.name == "neg" else image

    found: list[Spread | None] = []
    for place, out in enumerate(op.outputs if moves else op.outputs[:1]):
        after = None if out is None else _axis_after(op, value, out.tensor.shape, axis)
        found.append(Spread(partial(moved, place), after, mixed=spread.mixed))
    return tuple(found)


def _multiplied(rule: Product, value: Value, spread: Spread) -> Spread | None:
    factor = rule.constant_beside(value)
    if factor is None:
        return None
    if rule.op.name == "mul":
        same = rule.op.output.tensor.shape == value.tensor.shape
        return Spread(lambda: spread.variance * factor**2, spread.axis, mixed=spread.mixed) if same else None
    if spread.axis != 1 or not isinstance(factor, Tensor):
        return None
    return Spread(lambda: spread.variance @ factor.square(), None, mixed=True)


def _axis_after(op: Op, value: Value, after: torch.Size, axis: int | None) -> int | None:
    before = value.tensor.shape
    if axis is None:
        return None
    if op.name == "masked_fill" or op.name.startswith("max_pool"):
        return axis if axis == 1 or op.name == "masked_fill" else None
    if op.name in _RESHAPES:
        ahead = math.prod(before[:axis])
        for place, size in enumerate(after):
            if size == before[axis] and math.prod(after[:place]) == ahead:
                return place
        return None
    if op.name == "t":
        return 1 - axis
    if op.name == "transpose":
        a, b = (d % len(before) for d in op.args[1:3])
        return {a: b, b: a}.get(axis, axis)
    if op.name == "permute":
        return [d % len(before) for d in op.args[1]].index(axis)
    if op.name in ("select", "cat"):
        dim = (op.args[1] if len(op.args) > 1 else 0) % len(before)
        if dim == axis:
            return None
        return axis - 1 if op.name == "select" and dim < axis else axis
    if op.name in ("slice", "split", "split_with_sizes", "expand") and len(after) == len(before):
        kept = after[axis] == before[axis] or op.name != "expand"
        return axis if kept else None
    return None
