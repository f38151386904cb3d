"""First derivatives along a direction, and second ones contracted with a cotangent, operation by operation.

uᵀ ∇²(r·f) u = Σ_ops ⟨ḡ_op, D²op[ẋ, ẋ]⟩, with ḡ_op the cotangent of the operation's output and ẋ the tangents of its
inputs: one backward pass for all ḡ, then every direction u takes a tangent forward pass and no second backward pass.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

from torch import Tensor

from flatkern.tape import Op, Value

__all__ = ["Rule", "Tangents"]

Tangents = Mapping[int, Tensor]
"""Tangents of the active inputs by index of their value."""


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

    def second(self, tangents: Tangents, image: Callable[[], Tensor]) -> Tensor:
        """D²op[ẋ, ẋ], in the output's shape; ``image`` gives :meth:`push` where it is wanted."""
        raise NotImplementedError

    def _primal(self, place: int) -> Tensor:
        value: Value = self.op.args[place]
        return value.tensor

    def _tangent(self, tangents: Tangents, place: int) -> Tensor | None:
        value = self.op.args[place]
        return tangents[value.index] if isinstance(value, Value) and value.index in self.active else None
