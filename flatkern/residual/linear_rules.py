"""Tangent rules of operations that are linear in their active inputs, or piecewise so."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from flatkern.residual.rule import Rule, Tangents
from flatkern.tape import Op, Value

__all__ = ["Choose", "Fill", "FixedStatistics", "Linear", "Pick", "Sum"]


class Linear(Rule):
    """Operations linear in all their active inputs together: the operation itself, constants replaced by 0."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self._device = op.output.tensor.device

    def keeps(self) -> Iterable[Value]:
        """See :class:`Rule`."""
        return (v for v in self.op.inputs if v.index not in self.active)

    def push(self, tangents: Tangents) -> Tensor:
        """See :class:`Rule`."""
        return self.push_all(tangents)[0]

    def push_all(self, tangents: Tangents) -> tuple[Tensor, ...]:
        """See :class:`Rule`."""
        return self.op.run(lambda v: tangents[v.index] if v.index in tangents else self._constant(v))

    def _constant(self, value: Value) -> Tensor:
        if value.tensor.is_floating_point() and self.op.name in ("cat", "stack", "where"):
            return torch.zeros_like(value.tensor, device=self._device)
        return value.tensor


class Sum(Rule):
    """add and sub with their factor α."""

    def keeps(self) -> Iterable[Value]:
        """See :class:`Rule`."""
        return ()

    def push(self, tangents: Tangents) -> Tensor:
        """See :class:`Rule`."""
        alpha = self.op.kwargs.get("alpha", 1) * (-1 if self.op.name == "sub" else 1)
        a = self._tangent(tangents, 0)
        b = self._tangent(tangents, 1)
        if b is not None and alpha != 1:
            b = b * alpha
        total = a if b is None else b if a is None else a + b
        assert total is not None
        return total.expand(self.op.output.tensor.shape)


class Fill(Rule):
    """Padding and masks put a constant in places."""

    def keeps(self) -> Iterable[Value]:
        """See :class:`Rule`."""
        return self.op.inputs[1:]

    def push(self, tangents: Tangents) -> Tensor:
        """See :class:`Rule`."""
        if self.op.name == "constant_pad_nd":
            return torch.constant_pad_nd(self._need(tangents), self.op.args[1], 0.0)
        return self._need(tangents).masked_fill(self._primal(1), 0.0)

    def _need(self, tangents: Tangents) -> Tensor:
        t = self._tangent(tangents, 0)
        assert t is not None
        return t


class Pick(Rule):
    """Maxima: the entries at the indices found."""

    def keeps(self) -> Iterable[Value]:
        """See :class:`Rule`."""
        return (v for v in self.op.outputs[1:] if v is not None)

    def push(self, tangents: Tangents) -> Tensor:
        """See :class:`Rule`."""
        t = self._tangent(tangents, 0)
        chosen = self.op.outputs[1]
        assert t is not None
        assert chosen is not None
        index = chosen.tensor
        if self.op.name.startswith("max_pool"):
            dims = 2 if self.op.name == "max_pool2d_with_indices" else 3
            flat = t.flatten(-dims).gather(-1, index.flatten(-dims))
            return flat.reshape(index.shape)
        dim = self.op.args[1]
        keep = self.op.args[2] if len(self.op.args) > 2 else self.op.kwargs.get("keepdim", False)
        picked = t.gather(dim, index if keep else index.unsqueeze(dim))
        return picked if keep else picked.squeeze(dim)


class Choose(Rule):
    """maximum and minimum of two."""

    def push(self, tangents: Tangents) -> Tensor:
        """See :class:`Rule`."""
        first = self._primal(0) > self._primal(1)
        if self.op.name == "minimum":
            first = ~first
        parts = [self._tangent(tangents, place) for place in (0, 1)]
        zero = torch.zeros((), dtype=self.op.output.tensor.dtype, device=first.device)
        left, right = (zero if p is None else p for p in parts)
        return torch.where(first, left, right)


class FixedStatistics(Rule):
    """Batch norm in eval mode: a factor a channel."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        gamma, variance, eps = op.args[1], op.args[4].tensor, op.args[7]
        self.factor = (variance + eps).rsqrt() * (1 if gamma is None else gamma.tensor)
        self.factor = self.factor.reshape(-1, *[1] * (self._primal(0).ndim - 2))

    def keeps(self) -> Iterable[Value]:
        """See :class:`Rule`."""
        return ()

    def push(self, tangents: Tangents) -> Tensor:
        """See :class:`Rule`."""
        t = self._tangent(tangents, 0)
        assert t is not None
        return t * self.factor
