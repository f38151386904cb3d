"""The rule of attention over long sequences, which a tape has as one operation."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cached_property

from torch import Tensor

from flatkern.kernels._attention_jet import LinearizedAttention
from flatkern.residual.rule import Rule, Tangents
from flatkern.tape import Op, Value

__all__ = ["Attention"]

_PLACES = (0, 1, 2, 3)
"""query, key, value, mask"""


class Attention(Rule):
    """softmax(scale q kᵀ + mask) v: Ȯ and ⟨ḡ, D²O⟩ by query blocks, formulas in ``kernels/_attention_blocks.py``."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.curved = any(self._is_active(place) for place in (0, 1, 3))  # else it is linear in v
        self._image: tuple[tuple[Tensor | None, ...], Tensor] | None = None

    def reads(self) -> Iterable[Value]:
        """See :class:`Rule`."""
        return self.op.inputs

    def prepare(self) -> None:
        """See :class:`Rule`."""
        _ = self._linearized

    def keeps(self) -> Iterable[Value]:
        """See :class:`Rule`."""
        return ()

    @cached_property
    def _linearized(self) -> LinearizedAttention:
        q, k, v, mask = self.op.args
        return LinearizedAttention(
            q.tensor, k.tensor, v.tensor, None if mask is None else mask.tensor, **self.op.kwargs
        )

    def _along(self, tangents: Tangents) -> tuple[Tensor | None, ...]:
        return tuple(
            tangents.get(self.op.args[place].index) if self._is_active(place) else None for place in _PLACES
        )

    def push(self, tangents: Tangents) -> Tensor:
        """See :class:`Rule`."""
        along = self._along(tangents)
        known, self._image = self._image, None
        if known is not None and all(a is b for a, b in zip(known[0], along, strict=True)):
            return known[1]
        return self._linearized.tangent(*along)

    def contracted(self, tangents: Tangents, image: Callable[[], Tensor]) -> Tensor | None:
        """See :class:`Rule`; Ȯ comes of the same blocks and is kept for :meth:`push`."""
        along = self._along(tangents)
        moved, bent = self._linearized.jet(self._cotangent, *along)
        self._image = along, moved
        return bent
