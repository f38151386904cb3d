"""Random vectors as rows, the same whatever the block size they are drawn in."""

from __future__ import annotations

import torch
from torch import Tensor

from flatkern.operators.base import LinearOperator

__all__ = ["Probes"]


class Probes:
    """A stream of independent random rows for an operator.

    Every row is filled by a call of its own: PyTorch's generators fill long tensors in another order than
    short ones, so a block drawn at once would depend on its size.
    """

    def __init__(self, op: LinearOperator, generator: torch.Generator) -> None:
        self._op = op
        self._generator = generator

    def signs(self, count: int) -> Tensor:
        """Independent signs ±1, [count, P]."""
        rows = self._empty(count)
        for row in rows:
            row.bernoulli_(0.5, generator=self._generator)
        return rows.mul_(2).sub_(1).to(self._op.device)

    def normals(self, count: int) -> Tensor:
        """Independent standard normal entries, [count, P]."""
        rows = self._empty(count)
        for row in rows:
            row.normal_(generator=self._generator)
        return rows.to(self._op.device)

    def _empty(self, count: int) -> Tensor:
        return torch.empty(count, self._op.shape[1], dtype=self._op.dtype, device=self._generator.device)
