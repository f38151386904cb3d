"""Operations that only move entries: the same on K tangents, one axis further right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flatkern.tape import Op, UnsupportedError, Value

from .rule import Rule, Tangent, lift, register, value

aten = torch.ops.aten


class Move(Rule):
    """One input, one output, perhaps on the same memory."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        first = op.args[0]
        self.ndim = first.tensor.ndim if isinstance(first, Value) else 0
        self.args: tuple[Any, ...] = op.args[1:]
        if any(isinstance(a, Value) for a in self.args):
            self.args = tuple(a.tensor if isinstance(a, Value) else a for a in self.args)

    def aliases(self, present: Sequence[bool]) -> bool:
        """See :class:`Rule`."""
        return True

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        t = tangents[0]
        return [None if t is None else self.move(t)]

    def move(self, t: Tensor) -> Tensor:
        """The operation on [K, *shape]."""
        raise NotImplementedError

    def back(self, place: Tensor) -> Tensor | None:
        """Where the input would have to lie for its image to lie in ``place``; ``None``: nowhere."""
        return None

    def axis(self, dim: int, extra: int = 0) -> int:
        """Of the tangents, for an axis of the value."""
        return dim % (self.ndim + extra) + 1 if self.ndim + extra else 1


@register("view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "flatten", "unflatten")
class Reshaped(Move):
    """Entries stay in their order."""

    def move(self, t: Tensor) -> Tensor:
        """See :class:`Move`."""
        return t.reshape(t.shape[0], *self.shape)


@register("alias", "detach", "clone", "contiguous", "lift_fresh", "positive")
class Same(Move):
    """Entries stay where they are."""

    def back(self, place: Tensor) -> Tensor | None:
        """See :class:`Move`."""
        return place

    def move(self, t: Tensor) -> Tensor:
        """See :class:`Move`."""
        return t


@register("_to_copy")
class Cast(Move):
    """Another dtype."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.dtype = op.output.tensor.dtype

    def move(self, t: Tensor) -> Tensor:
        """See :class:`Move`."""
        return t.to(self.dtype)


@register("copy")
class Copied(Rule):
    """The second argument's entries, broadcast and cast to the first one's kind."""

    ignored = (0,)
    overlaps = True

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.dtype = op.output.tensor.dtype

    def aliases(self, present: Sequence[bool]) -> bool:
        """See :class:`Rule`."""
        return True

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        t = self.at(tangents, 1)
        if t is None:
            return [None]
        return [lift(t, len(self.shape)).expand(-1, *self.shape).to(self.dtype)]


@register("t", "transpose", "permute", "numpy_T")
class Permuted(Move):
    """Axes in another order."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        if op.name == "permute":
            order = [d % self.ndim for d in op.args[1]]
        else:
            order = list(range(self.ndim))
            a, b = (op.args[1], op.args[2]) if op.name == "transpose" else (0, self.ndim - 1)
            if self.ndim:
                order[a], order[b] = order[b], order[a]
        self.order = [0, *(d + 1 for d in order)]

    def move(self, t: Tensor) -> Tensor:
        """See :class:`Move`."""
        return t.permute(self.order)

    def back(self, place: Tensor) -> Tensor | None:
        """See :class:`Move`."""
        return place.permute([self.order.index(axis) for axis in range(len(self.order))])


@register("expand")
class Expanded(Move):
    """One entry in many places."""

    overlaps = True

    def move(self, t: Tensor) -> Tensor:
        """See :class:`Move`."""
        return lift(t, len(self.shape)).expand(-1, *self.shape)


@register("select", "slice", "diagonal", "unfold")
class Part(Move):
    """Some of the entries."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.func = op.func
        args = list(self.args)
        if op.name == "diagonal":
            offset, first, second = args + [0, 0, 1][len(args) :]
            self.moved = [offset, self.axis(first), self.axis(second)]
        else:
            self.moved = [self.axis(args[0] if args else 0), *args[1:]]

    def move(self, t: Tensor) -> Tensor:
        """See :class:`Move`."""
        result: Tensor = self.func(t, *self.moved)
        return result


@register("split", "split_with_sizes", "unbind", "unsafe_split", "chunk", "unsafe_chunk")
class Parts(Move):
    """The entries in several pieces."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.func, self.found = op.func, [v is not None and v.index in active for v in op.outputs]
        dim = (self.args[0] if self.args else 0) if op.name == "unbind" else (*self.args, 0)[1]
        self.moved = [self.axis(dim)] if op.name == "unbind" else [self.args[0], self.axis(dim)]

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        t = tangents[0]
        if t is None:
            return [None] * len(self.outputs)
        return [part for part, here in zip(self.func(t, *self.moved), self.found, strict=True) if here]


@register("select_backward", "slice_backward", "diagonal_backward")
class Embedded(Move):
    """The entries in their place among zeros."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.func = op.func
        sizes, *rest = self.args
        axes = (1, 2) if op.name == "diagonal_backward" else (0,)
        for i in axes:
            rest[i] = rest[i] % len(sizes) + 1
        self.sizes, self.rest = list(sizes), rest

    def aliases(self, present: Sequence[bool]) -> bool:
        """See :class:`Rule`."""
        return False

    def move(self, t: Tensor) -> Tensor:
        """See :class:`Move`."""
        result: Tensor = self.func(t, [t.shape[0], *self.sizes], *self.rest)
        return result


@register("cat", "stack")
class Joined(Rule):
    """Several values in one; those without a tangent are zeros."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.func = op.func
        parts: list[Value] = list(op.args[0])
        self.inputs = list(dict.fromkeys(v.index for v in parts if v.index in active))
        self.shapes = [v.tensor.shape for v in parts]
        self.which = [self.inputs.index(v.index) if v.index in active else None for v in parts]
        dim = op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)
        ndim = op.output.tensor.ndim
        self.dim = dim % ndim + 1

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        like = next((t for t in tangents if t is not None), None)
        if like is None:
            return [None]
        parts = []
        for which, shape in zip(self.which, self.shapes, strict=True):
            t = None if which is None else tangents[which]
            parts.append(like.new_zeros(like.shape[0], *shape) if t is None else t)
        result: Tensor = self.func(parts, self.dim)
        return [result]


@register("flip", "roll", "tril", "triu", "repeat", "constant_pad_nd")
class Rearranged(Move):
    """Linear, and onto fresh memory."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.func = op.func
        args = list(self.args)
        if op.name == "flip":
            args[0] = [self.axis(d) for d in args[0]]
        elif op.name == "roll":
            if len(args) < 2 or not args[1]:
                raise UnsupportedError("no tangent rule for roll over all axes")
            args[1] = [self.axis(d) for d in args[1]]
        elif op.name == "repeat":
            args[0] = [1, *args[0]]
        elif op.name == "constant_pad_nd":
            args = [args[0], 0.0]
        self.moved = args

    def aliases(self, present: Sequence[bool]) -> bool:
        """See :class:`Rule`."""
        return False

    def move(self, t: Tensor) -> Tensor:
        """See :class:`Move`."""
        t = lift(t, len(self.shape)) if self.name == "repeat" else t
        result: Tensor = self.func(t, *self.moved)
        return result


@register("masked_fill")
class Masked(Move):
    """A constant put in places."""

    def aliases(self, present: Sequence[bool]) -> bool:
        """See :class:`Rule`."""
        return False

    def move(self, t: Tensor) -> Tensor:
        """See :class:`Move`."""
        return lift(t, len(self.shape)).masked_fill(self.args[0], 0.0)


@register("where")
class Chosen(Rule):
    """One or the other, by a mask."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.mask = value(op, 0)

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        a, b = self.at(tangents, 1), self.at(tangents, 2)
        if a is None and b is None:
            return [None]
        zero = (a if a is not None else b).new_zeros(())  # type: ignore[union-attr]
        a, b = (zero if t is None else lift(t, len(self.shape)) for t in (a, b))
        return [torch.where(self.mask, a, b)]
