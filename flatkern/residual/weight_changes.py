"""Random changes of dense layers and convolutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping

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

    def variance(self) -> Tensor:
        """See :class:`Entry`."""
        if self._energy is None:
            return torch.ones_like(self.output[:1])
        return self._energy + 1 if self._bias else self._energy

    def _factored(self, draws: Draws, a: Tensor) -> Tensor:
        n = self.axis.n
        u = draws.signs((self._weight, self._inner), (n, RANK, a.shape[1]))
        v = draws.signs((self._weight, self._outer), (n, RANK, self.output.shape[1]))
        rows = self.axis.rows(a)
        rows = rows if rows.ndim == 3 else rows.unsqueeze(1)
        return (rows @ u.mT) @ v * RANK**-0.5  # [n, k, C]

    def change(self, draws: Draws, inputs: Callable[[Value], Tensor]) -> Tensor:
        """See :class:`Entry`."""
        n, width = self.axis.n, self.output.shape[1]
        if self._positions == 1 and not self.shared:
            v = draws.signs((*self.names, id(self.op)), (n, width))
            a = inputs(self._a)
            if self._weight is None:
                return v
            return v * (a.square().sum(1, keepdim=True) + (1 if self._bias else 0)).sqrt()
        total: Tensor | float = 0.0
        if self._weight is not None:
            total = self._factored(draws, inputs(self._a))
        if self._bias is not None:
            total = total + draws.signs((self._bias,), (n, width)).unsqueeze(1)
        assert isinstance(total, Tensor)
        total = total.expand(n, self._positions, width)
        return self.axis.back(total if self._positions > 1 else total[:, 0], self.output.shape)

    def turn(self, draws: Draws, tangents: Mapping[int, Tensor]) -> Tensor | None:
        """See :class:`Entry`."""
        moved = tangents.get(self._a.index)
        if moved is None or self._weight is None:
            return None
        rows = self._factored(draws, moved)
        return self.axis.back(rows if self._positions > 1 else rows[:, 0], self.output.shape)


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

    def _convolve(self, a: Tensor, kernels: Tensor, groups: int) -> Tensor:
        result: Tensor = self.op.func(a, kernels, None, *self.op.args[3:8], groups)
        return result

    def variance(self) -> Tensor:
        """See :class:`Entry`."""
        shift = 1.0 if self._bias else 0.0
        if self._weight is None:
            return torch.ones_like(self.output[:1])
        ones = self._a.tensor.new_ones(self._groups, *self._kernel[1:])
        energy = self._convolve(self._a.tensor.square(), ones, self._groups) + shift
        return (
            energy.repeat_interleave(self.output.shape[1] // self._groups, 1) if self._groups > 1 else energy
        )

    def _factored(self, draws: Draws, a: Tensor) -> Tensor:
        n, g, c = self.axis.n, self._groups, self.output.shape[1]
        u = draws.signs((self._weight, 1), (n, RANK, *self._kernel[1:]))
        v = draws.signs((self._weight, 0), (n, RANK, c))
        kernels = (
            u.unsqueeze(1).expand(n, g, RANK, *self._kernel[1:]).reshape(n * g * RANK, *self._kernel[1:])
        )
        # samples become groups of channels, so that each has kernels of its own
        image = self._convolve(a.reshape(1, -1, *a.shape[2:]), kernels, n * g)
        image = image.reshape(n, g, RANK, -1)
        mixed = v.reshape(n, RANK, g, c // g).permute(0, 2, 3, 1) @ image  # [n, g, C/g, T]
        return mixed.reshape(self.output.shape) * RANK**-0.5

    def change(self, draws: Draws, inputs: Callable[[Value], Tensor]) -> Tensor:
        """See :class:`Entry`."""
        shape = self.output.shape
        total: Tensor | float = 0.0
        if self._weight is not None:
            total = self._factored(draws, inputs(self._a))
        if self._bias is not None:
            shift = draws.signs((self._bias,), (self.axis.n, shape[1]))
            total = total + shift.reshape(*shift.shape, *[1] * (len(shape) - 2))
        assert isinstance(total, Tensor)
        return total.expand(shape)

    def turn(self, draws: Draws, tangents: Mapping[int, Tensor]) -> Tensor | None:
        """See :class:`Entry`."""
        moved = tangents.get(self._a.index)
        return None if moved is None or self._weight is None else self._factored(draws, moved)
