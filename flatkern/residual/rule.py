"""First derivatives along a direction, and second ones contracted with a cotangent, operation by operation.

uᵀ ∇²(r·f) u = Σ_ops ⟨ḡ_op, D²op[ẋ, ẋ]⟩, with ḡ_op the cotangent of the operation's output and ẋ the tangents of its
inputs: one backward pass for all ḡ, then every direction u takes a tangent forward pass and no second backward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property

from torch import Tensor

from flatkern.tape import Op, Value

__all__ = ["Rule", "Spread", "Tangents"]

Tangents = Mapping[int, Tensor]
"""Tangents of inputs by index of their value; those that are absent are 0."""


class Spread:
    """Second moments of a tangent that comes from one change alone."""

    def __init__(self, variance: Callable[[], Tensor], axis: int | None, *, mixed: bool = False) -> None:
        self._variance = variance
        self.mixed = mixed
        """Whether it came through a dense layer."""
        self.axis = axis
        """Entries along this axis are uncorrelated, the other indices fixed; ``None``: not known of any."""

    @cached_property
    def variance(self) -> Tensor:
        """E ẋ² in the value's shape, formed when it is asked for."""
        return self._variance()


class Rule(ABC):
    """The derivatives of one operation; ``active`` are the inputs with a tangent."""

    curved = False
    """Whether D² can be other than 0."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        self.op, self.active = op, active

    @abstractmethod
    def push(self, tangents: Tangents) -> Tensor:
        """The tangent of the (first) output."""

    def push_all(self, tangents: Tangents) -> tuple[Tensor, ...]:
        """The tangents of all outputs, where there are several."""
        return (self.push(tangents),)

    def reads(self) -> Iterable[Value]:
        """Values whose tensors :meth:`fold` and :meth:`prepare` read, beside those of :meth:`keeps`."""
        return ()

    def prepare(self) -> None:  # noqa: B027 (most have nothing to form)
        """Form what the products need of the values, so that only those of :meth:`keeps` need stay."""

    def keeps(self) -> Iterable[Value]:
        """Values whose tensors are still read after :meth:`prepare`; of the others the shapes."""
        return (*self.op.inputs, *(o for o in self.op.outputs if o is not None))

    def fold(self, cotangent: Tensor) -> None:
        """Take ḡ, once, before :meth:`contracted` and :meth:`expected`."""
        self._cotangent = cotangent

    def contracted(self, tangents: Tangents, image: Callable[[], Tensor]) -> Tensor | None:
        """Summands of ⟨ḡ, D²op[ẋ, ẋ]⟩ with the samples where they are in the output; ``None`` for 0.

        ``image`` gives :meth:`push` where it is wanted.
        """
        raise NotImplementedError

    def expected(self, spread: Spread) -> Tensor | None:
        """E of :meth:`contracted` for a tangent of the first input; ``None`` where its variances do not tell."""
        return None

    def _is_active(self, place: int) -> bool:
        value = self.op.args[place] if place < len(self.op.args) else None
        return isinstance(value, Value) and value.index in self.active

    def _primal(self, place: int) -> Tensor:
        value: Value = self.op.args[place]
        return value.tensor

    def _tangent(self, tangents: Tangents, place: int) -> Tensor | None:
        value = self.op.args[place]
        return tangents.get(value.index) if isinstance(value, Value) else None
