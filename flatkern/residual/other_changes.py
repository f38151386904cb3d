"""Random changes of norm layers, embeddings and parameters that are used by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.func import vmap

from flatkern.residual.change import RANK, Draws, Entry
from flatkern.sample_axis import SampleAxis
from flatkern.tape import Op, UnsupportedError, Value

__all__ = ["Direct", "Looked", "Scaled"]


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

    def keeps(self) -> Iterable[Value]:
        """See :class:`Entry`."""
        return ()  # it holds x̂

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

    @property
    def channels(self) -> int | None:
        """See :class:`Entry`."""
        return 1 if self._places[0] == 1 else self.output.ndim - 1

    def _placed(self, draws: Draws, name: str, rows: Tensor) -> Tensor:
        signs = draws.signs((name,), (self.axis.n, *self._shape))
        if self._places[0] == 1:
            return signs.reshape(*signs.shape, *[1] * (rows.ndim - 2))
        between = rows.ndim - 1 - len(self._shape)
        return signs.reshape(self.axis.n, *[1] * between, *self._shape)

    def change(self, draws: Draws, inputs: Callable[[Value], Tensor], base: Tensor | None = None) -> Tensor:
        """See :class:`Entry`."""
        a = inputs(self._a)
        rows = self.axis.rows(self._unit if a is self._a.tensor else self._normalize(a))
        total = None if base is None else self.axis.rows(base)
        if self._beta is not None:
            shift = self._placed(draws, self._beta, rows)
            total = shift if total is None else total + shift
        if self._gamma is not None:
            factor = self._placed(draws, self._gamma, rows)
            total = rows * factor if total is None else torch.addcmul(total, rows, factor)
        assert total is not None
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

    def keeps(self) -> Iterable[Value]:
        """See :class:`Entry`."""
        return ()

    def variance(self) -> Tensor:
        """See :class:`Entry`."""
        return self._kept

    @property
    def channels(self) -> int | None:
        """See :class:`Entry`."""
        return self.output.ndim - 1

    def change(self, draws: Draws, inputs: Callable[[Value], Tensor], base: Tensor | None = None) -> Tensor:
        """See :class:`Entry`."""
        n = self.axis.n
        if not self.shared:
            rows = draws.signs((self._name, self.op.output.index), (self._count, self._width))[self._where]
        else:  # the factors of the other uses: Δ = R^(−1/2) Σ_r v_r u_rᵀ, rows by token
            v = draws.signs((self._name, 0), (n, RANK, self._vocabulary)).mT
            u = draws.signs((self._name, 1), (n, RANK, self._width))
            flat = self._rows.reshape(n, -1, 1).expand(-1, -1, RANK)
            rows = (v.gather(1, flat) @ u * RANK**-0.5).reshape(*self._rows.shape, self._width)
        moved = self.axis.back(rows, self.output.shape) * self._kept
        return moved if base is None else base + moved


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

    def keeps(self) -> Iterable[Value]:
        """See :class:`Entry`."""
        fixed = [v for view in self._views for v in view.inputs if v is not view.args[0]]
        return fixed if self.op.name != "mul" or self._other is None else (*fixed, self._other)

    def variance(self) -> Tensor:
        """See :class:`Entry`."""
        if self.op.name == "mul" and self._other is not None:
            return self._other.tensor.square()
        return self.like.new_ones(self.output.shape)

    @property
    def channels(self) -> int | None:
        """See :class:`Entry`."""
        shape, own = self.output.shape, self._source.tensor.shape
        last = len(shape) - 1
        return last if last != self.axis.axis and own[-1:] == shape[-1:] and not self._views else None

    def _placed(self, draws: Draws) -> Tensor:
        signs = draws.signs((self._name,), (self.axis.n, *self._source.tensor.shape))
        for view in self._views:
            signs = vmap(lambda d, view=view: view.run(lambda v: d if v is view.args[0] else v.tensor)[0])(
                signs
            )
        if self._place >= 0:
            signs = signs.squeeze(self._place + 1)
        shape = self.output.shape
        left = [size for i, size in enumerate(shape) if i != self.axis.axis]
        signs = signs.reshape(self.axis.n, *[1] * (len(left) - signs.ndim + 1), *signs.shape[1:])
        return signs.movedim(0, self.axis.axis)

    def change(self, draws: Draws, inputs: Callable[[Value], Tensor], base: Tensor | None = None) -> Tensor:
        """See :class:`Entry`."""
        placed = self._placed(draws)
        if self.op.name == "mul" and self._other is not None:
            placed = placed * inputs(self._other)
        placed = placed.expand(self.output.shape)
        return placed if base is None else base + placed

    def turn(self, draws: Draws, tangents: Mapping[int, Tensor]) -> Tensor | None:
        """See :class:`Entry`."""
        moved = None if self._other is None else tangents.get(self._other.index)
        if moved is None or self.op.name != "mul":
            return None
        return (self._placed(draws) * moved).expand(self.output.shape)
