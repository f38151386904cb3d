"""Random changes of dense layers and convolutions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from flatkern.residual.change import RANK, Draws, Entry
from flatkern.sample_axis import SampleAxis
from flatkern.tape import Op, UnsupportedError, Value

__all__ = ["Convolved", "Dense"]


class Dense(Entry):
    """z = W a + b on rows; ``transposed`` where the operation got Wᵀ."""

    def __init__(
        self,
        op: Op,
        axis: SampleAxis,
        weight: str | None,
        bias: str | None,
        *,
        transposed: bool,
        shared: bool,
    ) -> None:
        super().__init__(op, axis, tuple(n for n in (weight, bias) if n), shared=shared)
        self._weight, self._bias = weight, bias
        self._a = op.args[1 if op.name == "addmm" else 0]
        if axis.axis != 0:
            raise UnsupportedError("rows")
        self._outer, self._inner = (0, 1) if transposed else (1, 0)
        self._positions = len(self.output) // axis.n
        self._energy = self._a.tensor.square().sum(1, keepdim=True) if weight else None

    def keeps(self) -> Iterable[Value]:
        """See :class:`Entry`."""
        return (self._a,) if self._weight else ()

    def variance(self) -> Tensor:
        """See :class:`Entry`."""
        if self._energy is None:
            return self.like.new_ones(1, *self.output.shape[1:])
        return self._energy + 1 if self._bias else self._energy

    def _factors(self, draws: Draws, a: Tensor) -> tuple[Tensor, Tensor]:
        """Left [n, k, R] and right [n, R, C]: Δ_i a_t is their product."""
        n = self.axis.n
        u = draws.signs((self._weight, self._inner), (n, RANK, a.shape[1]))
        v = draws.signs((self._weight, self._outer), (n, RANK, self.output.shape[1]))
        rows = self.axis.rows(a)
        rows = rows if rows.ndim == 3 else rows.unsqueeze(1)
        return rows @ (u * RANK**-0.5).mT, v

    def change(self, draws: Draws, inputs: Callable[[Value], Tensor], base: Tensor | None = None) -> Tensor:
        """See :class:`Entry`."""
        n, width = self.axis.n, self.output.shape[1]
        if self._positions == 1 and not self.shared:
            v = draws.signs((*self.names, self.op.output.index), (n, width))
            if self._weight is None:
                return v if base is None else base + v
            scale = (inputs(self._a).square().sum(1, keepdim=True) + (1 if self._bias else 0)).sqrt()
            return v * scale if base is None else torch.addcmul(base, v, scale)
        shift = draws.signs((self._bias,), (n, width)).unsqueeze(1) if self._bias else None
        if self._weight is None:
            assert shift is not None
            rows = shift.expand(n, self._positions, width)
            moved = self._back(rows)
            return moved if base is None else base + moved
        left, right = self._factors(draws, inputs(self._a))
        if shift is not None:  # one more factor: ones on the left
            left = torch.cat([left, left.new_ones(n, self._positions, 1)], 2)
            right = torch.cat([right, shift], 1)
        if base is None:
            return self._back(left @ right)
        rows = self.axis.rows(base)
        return self._back(torch.baddbmm(rows if rows.ndim == 3 else rows.unsqueeze(1), left, right))

    def _back(self, rows: Tensor) -> Tensor:
        return self.axis.back(rows if self._positions > 1 else rows[:, 0], self.output.shape)

    def turn(self, draws: Draws, tangents: Mapping[int, Tensor]) -> Tensor | None:
        """See :class:`Entry`."""
        moved = tangents.get(self._a.index)
        if moved is None or self._weight is None:
            return None
        left, right = self._factors(draws, moved)
        return self._back(left @ right)


class Convolved(Entry):
    """A convolution; the same u for every group of channels."""

    def __init__(
        self, op: Op, axis: SampleAxis, weight: str | None, bias: str | None, *, shared: bool
    ) -> None:
        super().__init__(op, axis, tuple(n for n in (weight, bias) if n), shared=shared)
        self._weight, self._bias = weight, bias
        if axis.axis != 0 or len(op.output.tensor) != axis.n or op.args[6]:
            raise UnsupportedError("a transposed convolution, or samples folded into other axes")
        self._a: Value = op.args[0]
        self._kernel = op.args[1].tensor.shape
        self._groups: int = op.args[8]

    def keeps(self) -> Iterable[Value]:
        """See :class:`Entry`."""
        return (self._a,) if self._weight else ()

    def _convolve(self, a: Tensor, kernels: Tensor, groups: int) -> Tensor:
        result: Tensor = self.op.func(a, kernels, None, *self.op.args[3:8], groups)
        return result

    def variance(self) -> Tensor:
        """See :class:`Entry`."""
        shift = 1.0 if self._bias else 0.0
        if self._weight is None:
            return self.like.new_ones(1, *self.output.shape[1:])
        ones = self._a.tensor.new_ones(self._groups, *self._kernel[1:])
        energy = self._convolve(self._a.tensor.square(), ones, self._groups) + shift
        return (
            energy.repeat_interleave(self.output.shape[1] // self._groups, 1) if self._groups > 1 else energy
        )

    def _factors(self, draws: Draws, a: Tensor) -> tuple[Tensor, Tensor]:
        """Left [n, g, C/g, R] and right [n, g, R, T]: Δ_i a is their product."""
        n, g, c = self.axis.n, self._groups, self.output.shape[1]
        u = draws.signs((self._weight, 1), (n, RANK, *self._kernel[1:])) * RANK**-0.5
        v = draws.signs((self._weight, 0), (n, RANK, c))
        kernels = u.unsqueeze(1).expand(n, g, RANK, *self._kernel[1:]).flatten(0, 2)
        # samples become groups of channels, so that each has kernels of its own
        image = self._convolve(a.reshape(1, -1, *a.shape[2:]), kernels, n * g)
        return v.reshape(n, RANK, g, c // g).permute(0, 2, 3, 1), image.reshape(n, g, RANK, -1)

    def change(self, draws: Draws, inputs: Callable[[Value], Tensor], base: Tensor | None = None) -> Tensor:
        """See :class:`Entry`."""
        shape = self.output.shape
        n, c = shape[:2]
        shift = draws.signs((self._bias,), (n, c)) if self._bias else None
        if self._weight is None:
            assert shift is not None
            moved = shift.reshape(n, c, *[1] * (len(shape) - 2)).expand(shape)
            return moved if base is None else base + moved
        left, right = self._factors(draws, inputs(self._a))
        if shift is not None:  # one more factor: ones on the right
            left = torch.cat([left, shift.reshape(n, self._groups, -1, 1)], 3)
            right = torch.cat([right, right.new_ones(n, self._groups, 1, right.shape[3])], 2)
        left, right = left.flatten(0, 1), right.flatten(0, 1)
        if base is None:
            return torch.bmm(left, right).reshape(shape)
        return torch.baddbmm(base.reshape(len(left), left.shape[1], -1), left, right).reshape(shape)

    def turn(self, draws: Draws, tangents: Mapping[int, Tensor]) -> Tensor | None:
        """See :class:`Entry`."""
        moved = tangents.get(self._a.index)
        if moved is None or self._weight is None:
            return None
        left, right = self._factors(draws, moved)
        return (left @ right).reshape(self.output.shape)
