"""One measurement of a model on the probe samples, as a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from flatkern.bounds import bounds
from flatkern.flatness import sharpness
from flatkern.geometry import geometry
from flatkern.measurement import bounds_row, geometry_row
from flatkern.monitor.probe import Probe
from flatkern.problem import ParameterSelection, model_device
from flatkern.rows import Row

__all__ = ["Extra", "Point", "Through"]

Extra = Callable[[nn.Module], object]
"""A quantity of the user's own: the model in eval mode → a number."""


class Through(nn.Module):
    """A model called another way: ``forward(model, x)`` in the place of ``model(x)``."""

    def __init__(self, model: nn.Module, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x: Tensor) -> Tensor:
        """The output of the call."""
        return self.call(self.model, x)


class Point:
    """What is measured, and how."""

    def __init__(
        self,
        model: nn.Module,
        probe: Probe,
        *,
        loss_fn: Callable[[Tensor, Tensor], Tensor] | None,
        forward: Callable[[nn.Module, Tensor], Tensor] | None,
        with_bounds: bool,
        layers: str | Sequence[str] | None,
        params: ParameterSelection,
        extra: Mapping[str, Extra],
        max_memory: int | None,
    ) -> None:
        self._model = model
        self._called = model if forward is None else Through(model, forward)
        inside = "" if forward is None else "model."
        self._layers, self._params = _prefixed(inside, layers), _prefixed(inside, params)
        self._probe, self._loss_fn, self._bounds = probe, loss_fn, with_bounds
        self._extra, self._max_memory = dict(extra), max_memory

    def measure(self) -> Row:
        """The row; one of NaN with the status ``"not finite"`` where training has diverged."""
        probe = self._probe.to(model_device(self._model))
        row: Row = {"status": "ok"}
        if self._loss_fn is not None:
            output = self._output(probe.x)
            if not _finite(output):
                return {"status": "not finite"}
            row["probe_loss"] = self._loss(output, probe.y)
        try:
            row |= self._geometry(probe.x) if probe.x.is_floating_point() else self._sharpness(probe.x)
        except ValueError:
            if self._loss_fn is None and not _finite(self._output(probe.x)):
                return {"status": "not finite"}
            raise
        for name, quantity in self._extra.items():
            if name in row:
                raise ValueError(f"extra: {name!r} is a column of the monitor's own; choose another name")
            row[name] = _as_number(name, quantity(self._model))
        return row

    def _output(self, x: Tensor) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            return self._called(x)

    def _loss(self, output: Tensor, target: Tensor | None) -> float:
        assert self._loss_fn is not None
        with torch.no_grad():
            value = self._loss_fn(output, target)  # type: ignore[arg-type]
        if not isinstance(value, Tensor) or value.numel() != 1:
            raise ValueError("loss_fn: it must return one scalar tensor, as with reduction='mean' or 'sum'")
        return float(value)

    def _geometry(self, x: Tensor) -> Row:
        g = geometry(self._called, x, self._layers, params=self._params, max_memory=self._max_memory)
        row = geometry_row(g)
        return row | bounds_row(bounds(self._called, x, geometry=g)) if self._bounds else row

    def _sharpness(self, x: Tensor) -> Row:
        """Token ids have no input Jacobian."""
        s = sharpness(self._called, x, params=self._params, max_memory=self._max_memory)
        row: Row = {
            "sharpness": s.value,
            "sharpness_stderr": math.nan if s.sample_stderr is None else s.sample_stderr,
            "sqrt_sharpness": math.sqrt(s.value),
        }
        return row if s.stderr == 0 else row | {"sharpness_sketch_stderr": s.stderr}


def _finite(output: object) -> bool:
    return not isinstance(output, Tensor) or bool(torch.isfinite(output).all())


def _prefixed(inside: str, names: str | Sequence[str] | None) -> list[str] | None:
    if names is None:
        return None
    return [inside + name for name in ([names] if isinstance(names, str) else names)]


def _as_number(name: str, value: object) -> float:
    kind = type(value).__name__
    if isinstance(value, Tensor):
        value = value.detach()
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        raise TypeError(f"extra: {name!r} gave a {kind}; it must give one number") from None
