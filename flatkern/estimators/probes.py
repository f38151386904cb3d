"""Random vectors as rows, the same whatever block they are drawn in, on whatever device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flatkern.kernels import normal, rademacher, rademacher_dot
from flatkern.operators.base import LinearOperator

__all__ = ["Probes"]


class Probes:
    """A stream of independent random rows for an operator.

    The generator gives one seed, and every row is a function of it and of the row's number: nothing depends on
    blocks, devices or threads, and a dot with signs does not need the signs again.
    """

    def __init__(self, op: LinearOperator, generator: torch.Generator) -> None:
        self._op = op
        self._seed = int(torch.randint(1 << 62, (), generator=generator, device=generator.device))
        self.drawn = 0
        """Rows drawn so far: the number of the next one."""

    def state(self) -> Tensor:
        """What :meth:`resume` needs, on the host."""
        return torch.tensor([self._seed, self.drawn])

    def resume(self, state: Tensor) -> None:
        """Go on where :meth:`state` was taken."""
        self._seed, self.drawn = state.tolist()

    def signs(self, count: int) -> Tensor:
        """Independent signs ±1, [count, P]."""
        return self._rows(rademacher, count)

    def normals(self, count: int) -> Tensor:
        """Independent standard normal entries, [count, P]."""
        return self._rows(normal, count)

    def sign_dots(self, images: Tensor, first: int) -> Tensor:
        """Row by row inner products with the signs of number ``first`` and on, [k] float64."""
        return rademacher_dot(images, self._seed, first=first)

    def _rows(self, draw: Callable[..., Tensor], count: int) -> Tensor:
        op, first = self._op, self.drawn
        self.drawn += count
        return draw(self._seed, count, op.shape[1], first=first, dtype=op.dtype, device=op.device)
