"""Random changes δz of the places where parameters enter a run, which stand for changes of the parameters.

For a use z = W a + b whose input does not depend on W, Σ_kl over the entries of (W, b) of ∂²φ/∂θ_k² equals
Σ_ts κ_ts Σ_c ∂²φ/∂z_tc∂z_sc with κ_ts = a_t·a_s + 1[bias] (each entry of row c moves z_tc by its entry of a_t). A δz
with Cov(δz_tc, δz_sd) = [c = d] κ_ts therefore has E δzᵀ∇²φ δz equal to the trace. Every sample draws its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.func import vmap

from flatkern.sample_axis import SampleAxis
from flatkern.tape import Op, UnsupportedError, Value

__all__ = ["Convolved", "Dense", "Direct", "Draws", "Entry", "Looked", "Scaled"]

RANK = 4
"""Rank R of the change of a weight shared by positions: Δ = R^(−1/2) Σ_r v_r u_rᵀ."""


class Draws:
    """The random signs of one probe, the same ones wherever a key is asked for again."""

    def __init__(self, generator: torch.Generator, like: Tensor) -> None:
        self._generator, self._like = generator, like
        self._drawn: dict[tuple[object, ...], Tensor] = {}

    def signs(self, key: tuple[object, ...], shape: tuple[int, ...]) -> Tensor:
        """Independent ±1."""
        if key not in self._drawn:
            count = torch.Size(shape).numel()
            words = torch.empty((count + 62) // 63, dtype=torch.int64, device=self._generator.device)
            words.random_(0, (1 << 63) - 1, generator=self._generator)  # 63 signs a word
            bits = (words.unsqueeze(1) >> torch.arange(63, device=words.device)) & 1
            flat = bits.flatten()[:count].to(self._like.device, self._like.dtype)
            self._drawn[key] = flat.mul_(2).sub_(1).reshape(shape)
        return self._drawn[key]


class Entry(ABC):
    """One operation that takes selected parameters in."""

    def __init__(self, op: Op, axis: SampleAxis, names: tuple[str, ...], *, shared: bool) -> None:
        self.op, self.axis, self.names = op, axis, names
        self.shared = shared
        """Whether one of the parameters has other uses: the same change of it then goes in everywhere."""

    @abstractmethod
    def change(self, draws: Draws, inputs: Callable[[Value], Tensor]) -> Tensor:
        """δz in the shape of the output, for the given values of the inputs; linear in them but for the shift."""

    def turn(self, draws: Draws, tangents: Mapping[int, Tensor]) -> Tensor | None:
        """Δ ȧ: how the change moves with the inputs, half the second derivative; only wanted where shared."""
        return None

    @abstractmethod
    def variance(self) -> Tensor:
        """E δz², broadcastable to the output."""

    @property
    def output(self) -> Tensor:
        """The output's value."""
        return self.op.output.tensor


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


class Scaled(Entry):
    """Norm layers: y = γ x̂ + β, the statistics' part of x̂ being the operation's own."""

    def __init__(
        self, op: Op, axis: SampleAxis, gamma: str | None, beta: str | None, *, shared: bool
    ) -> None:
        super().__init__(op, axis, tuple(n for n in (gamma, beta) if n), shared=shared)
        self._gamma, self._beta = gamma, beta
        self._a: Value = op.args[0]
        first = 2 if op.name == "native_layer_norm" else 1
        self._places = (first, first + 1)
        value: Value = op.args[first] if op.args[first] is not None else op.args[first + 1]
        self._shape = tuple(value.tensor.shape)
        if first == 1 and (axis.axis != 0 or len(op.output.tensor) != axis.n):
            raise UnsupportedError("samples folded into other axes")
        self._unit = self._normalize(self._a.tensor)

    def _normalize(self, a: Tensor) -> Tensor:
        args = list(self.op.args)
        args[self._places[0]] = args[self._places[1]] = None
        args = [x.tensor if isinstance(x, Value) and x is not self._a else x for x in args]
        args[0] = a
        result: Tensor = self.op.func(*args)[0]
        return result

    def variance(self) -> Tensor:
        """See :class:`Entry`."""
        square = self._unit.square() if self._gamma else torch.zeros_like(self._unit)
        return square + 1 if self._beta else square

    def _placed(self, draws: Draws, name: str, rows: Tensor) -> Tensor:
        signs = draws.signs((name,), (self.axis.n, *self._shape))
        if self._places[0] == 1:
            return signs.reshape(*signs.shape, *[1] * (rows.ndim - 2))
        between = rows.ndim - 1 - len(self._shape)
        return signs.reshape(self.axis.n, *[1] * between, *self._shape)

    def change(self, draws: Draws, inputs: Callable[[Value], Tensor]) -> Tensor:
        """See :class:`Entry`."""
        a = inputs(self._a)
        rows = self.axis.rows(self._unit if a is self._a.tensor else self._normalize(a))
        total: Tensor | float = 0.0
        if self._gamma is not None:
            total = rows * self._placed(draws, self._gamma, rows)
        if self._beta is not None:
            total = total + self._placed(draws, self._beta, rows)
        assert isinstance(total, Tensor)
        return self.axis.back(total.expand(rows.shape), self.output.shape)


class Looked(Entry):
    """An embedding: one random row a sample and distinct token, none at ``padding_idx``."""

    def __init__(self, op: Op, axis: SampleAxis, name: str, *, shared: bool) -> None:
        super().__init__(op, axis, (name,), shared=shared)
        if len(op.args) > 4 and op.args[4]:
            raise UnsupportedError("a sparse embedding")
        self._name = name
        self._tokens: Tensor = op.args[1].tensor
        self._vocabulary, self._width = op.args[0].tensor.shape
        padding = op.args[2] if len(op.args) > 2 else -1
        self._kept = (self._tokens != padding).unsqueeze(-1).to(self.output.dtype)
        rows = axis.rows(self._tokens)
        sample = torch.arange(axis.n, device=rows.device).reshape(-1, *[1] * (rows.ndim - 1))
        pairs, where = torch.unique(rows + sample * self._vocabulary, return_inverse=True)
        self._count, self._where, self._rows = len(pairs), where, rows

    def variance(self) -> Tensor:
        """See :class:`Entry`."""
        return self._kept

    def change(self, draws: Draws, inputs: Callable[[Value], Tensor]) -> Tensor:
        """See :class:`Entry`."""
        n = self.axis.n
        if not self.shared:
            rows = draws.signs((self._name, id(self.op)), (self._count, self._width))[self._where]
        else:  # the factors of the other uses: Δ = R^(−1/2) Σ_r v_r u_rᵀ, rows by token
            v = draws.signs((self._name, 0), (n, RANK, self._vocabulary)).mT
            u = draws.signs((self._name, 1), (n, RANK, self._width))
            flat = self._rows.reshape(n, -1, 1).expand(-1, -1, RANK)
            rows = (v.gather(1, flat) @ u * RANK**-0.5).reshape(*self._rows.shape, self._width)
        return self.axis.back(rows, self.output.shape) * self._kept


class Direct(Entry):
    """A parameter used by itself: added, multiplied, or spread over the samples; one sign an entry and sample."""

    def __init__(
        self,
        op: Op,
        axis: SampleAxis,
        name: str,
        value: Value,
        views: list[Op],
        source: Value,
        *,
        shared: bool,
    ) -> None:
        super().__init__(op, axis, (name,), shared=shared)
        shape = self.output.shape
        self._name, self._value, self._views, self._source = name, value, views, source
        self._spread = op.name in ("expand", "repeat")
        others = [v for v in op.inputs if v is not value]
        self._other = others[0] if others else None
        place = axis.axis - (len(shape) - value.tensor.ndim)
        if shape[axis.axis] != axis.n or (place >= 0 and value.tensor.shape[place] != 1):
            raise UnsupportedError("a parameter that is not the same for all samples")
        self._place = place
        if op.name in ("sub", "rsub") or op.kwargs.get("alpha", 1) != 1:
            raise UnsupportedError("a parameter that is subtracted")

    def variance(self) -> Tensor:
        """See :class:`Entry`."""
        if self.op.name == "mul" and self._other is not None:
            return self._other.tensor.square()
        return torch.ones_like(self.output)

    def _placed(self, draws: Draws) -> Tensor:
        signs = draws.signs((self._name,), (self.axis.n, *self._source.tensor.shape))
        for view in self._views:
            signs = vmap(lambda d, view=view: view.run(lambda _: d)[0])(signs)
        if self._place >= 0:
            signs = signs.squeeze(self._place + 1)
        shape = self.output.shape
        left = [size for i, size in enumerate(shape) if i != self.axis.axis]
        signs = signs.reshape(self.axis.n, *[1] * (len(left) - signs.ndim + 1), *signs.shape[1:])
        return signs.movedim(0, self.axis.axis)

    def change(self, draws: Draws, inputs: Callable[[Value], Tensor]) -> Tensor:
        """See :class:`Entry`."""
        placed = self._placed(draws)
        if self.op.name == "mul" and self._other is not None:
            placed = placed * inputs(self._other)
        return placed.expand(self.output.shape)

    def turn(self, draws: Draws, tangents: Mapping[int, Tensor]) -> Tensor | None:
        """See :class:`Entry`."""
        moved = None if self._other is None else tangents.get(self._other.index)
        if moved is None or self.op.name != "mul":
            return None
        return (self._placed(draws) * moved).expand(self.output.shape)
