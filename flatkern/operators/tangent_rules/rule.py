"""What a rule for the tangents of one operation is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from flatkern.tape import Op, UnsupportedError, Value

__all__ = ["Rule", "Tangent", "ignored_places", "lift", "register", "rule_for", "value"]

Tangent = Tensor | None
"""K tangents [K, *shape] of a value; ``None``: they are zero."""


class Rule(ABC):
    """The K tangents of an operation's outputs from those of its active inputs, the primals being constants.

    A tangent of a value of shape [*shape] is [K, *shape]. Rules are linear and have no state between calls.
    """

    ignored: tuple[int, ...] = ()
    """Places of arguments whose tangents do not matter: only their shape or their sign is used."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        self.name = op.name
        self.shape = torch.Size(()) if op.outputs[0] is None else op.outputs[0].tensor.shape
        self.inputs = [
            arg.index
            for place, arg in enumerate(op.args)
            if isinstance(arg, Value) and arg.index in active and place not in self.ignored
        ]
        self._places = {
            place: self.inputs.index(arg.index)
            for place, arg in enumerate(op.args)
            if isinstance(arg, Value) and arg.index in self.inputs and place not in self.ignored
        }
        self.outputs = [v.index for v in op.outputs if v is not None and v.index in active]

    overlaps = False
    """Whether entries of an output may share memory with one another."""

    image_source = False
    """Whether outputs are images that are best kept with their channels last in memory."""
    image_path = False
    """Whether outputs lie in memory as inputs do."""

    def channels_last(self, convert: Callable[[Tensor], Tensor]) -> None:
        """Put constants that are images into that order; only asked of image sources and paths."""
        raise NotImplementedError

    @abstractmethod
    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """Tangents of ``outputs`` from those of ``inputs``; what is ``owned`` may be overwritten."""

    def aliases(self, present: Sequence[bool]) -> bool:
        """Whether an output may share memory with an input, given which inputs have tangents."""
        return False

    def meet(self, consumers: Sequence[Rule]) -> None:
        """Told once, before the first run, which rules take the output, where nothing else does."""
        return

    takes_place = False
    """Whether :meth:`run_into` can write the one output where it is wanted."""

    def run_into(self, tangents: Sequence[Tangent], place: Tensor) -> Tangent:
        """:meth:`run` into ``place`` [K, *shape]; ``None`` where the tangent is zero and nothing was written."""
        raise NotImplementedError

    def constants(self) -> list[Tensor]:
        """All tensors that the rule keeps."""
        found: list[Tensor] = []
        for item in vars(self).values():
            items = item if isinstance(item, (list, tuple)) else (item,)
            found.extend(t for t in items if isinstance(t, Tensor))
        return found

    def at(self, tangents: Sequence[Tangent], place: int) -> Tangent:
        """The tangent of the argument at a place."""
        position = self._places.get(place)
        return None if position is None else tangents[position]

    def free(self, tangents: Sequence[Tangent], owned: Sequence[bool], place: int) -> bool:
        """Whether the tangent of the argument at a place may be overwritten."""
        position = self._places.get(place)
        return position is not None and owned[position] and tangents[position] is not None

    def has(self, place: int) -> bool:
        """Whether the argument at a place is active."""
        return place in self._places


def value(op: Op, place: int, default: Any = None) -> Any:
    """An argument; a tensor for a :class:`Value`."""
    if place >= len(op.args):
        return default
    argument = op.args[place]
    return argument.tensor if isinstance(argument, Value) else argument


def lift(t: Tensor, ndim: int) -> Tensor:
    """[K, *shape] with as many axes after K as a value of ``ndim`` axes, for broadcasting against it."""
    missing = ndim + 1 - t.ndim
    return t if missing <= 0 else t.reshape(t.shape[0], *[1] * missing, *t.shape[1:])


_RULES: dict[str, type[Rule]] = {}


def register(*names: str) -> Callable[[type[Rule]], type[Rule]]:
    """Make a class the rule of the named operations."""

    def add(kind: type[Rule]) -> type[Rule]:
        for name in names:
            _RULES[name] = kind
        return kind

    return add


def ignored_places(op: Op) -> tuple[int, ...]:
    """Places of arguments whose tangents do not matter."""
    kind = _RULES.get(op.name)
    return () if kind is None else kind.ignored


def rule_for(op: Op, active: frozenset[int]) -> Rule:
    """The rule of an operation; raises ``UnsupportedError`` where there is none."""
    kind = _RULES.get(op.name)
    if kind is None:
        raise UnsupportedError(f"no tangent rule for {op.name}")
    rule = kind(op, active)
    known = set(rule.inputs)
    known |= {op.args[i].index for i in kind.ignored if i < len(op.args) and isinstance(op.args[i], Value)}
    if any(v.index in active and v.index not in known for v in op.inputs):
        raise UnsupportedError(f"{op.name}: a tensor inside a list or keyword depends on the parameters")
    return rule
