"""Hessian-vector products without a graph of the gradient: the tangent of the gradient (forward over reverse)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.losses import Loss
from flatkern.operators.forms import Autocast, twice_differentiable
from flatkern.operators.train_mode import TrainMode
from flatkern.problem import call_with, pairs_aligned

__all__ = ["ForwardOverReverse"]


class ForwardOverReverse:
    """A batch's Hessian as the derivative of its gradient along v; every product runs the model anew.

    Its memory is that of one training step and its tangents; no graph is kept between products.
    """

    def __init__(
        self,
        model: nn.Module,
        named: dict[str, nn.Parameter],
        batch: Any,
        loss: Loss,
        autocast: Autocast,
        train: TrainMode,
        index: int,
    ) -> None:
        self._model, self._loss, self._autocast = model, loss, autocast
        self._train, self._index = train, index
        self._x, self._y = batch
        self._names, self._values = list(named), [p.detach() for p in named.values()]

    @property
    def roots(self) -> Sequence[Tensor]:
        """Nothing is kept."""
        return []

    def apply(
        self,
        tangents: Sequence[Tensor | None],
        wanted: Sequence[int],
        *,
        batched: bool = False,
        places: Sequence[Tensor] | None = None,
    ) -> Sequence[Tensor | None]:
        """The tangent of the gradient in the wanted parameters, along tangents of the same ones."""
        if batched:
            count = next(len(t) for t in tangents if t is not None)
            rows = [self.apply([None if t is None else t[i] for t in tangents], wanted) for i in range(count)]
            return [torch.stack([t for row in rows if (t := row[j]) is not None]) for j in range(len(wanted))]
        names = [self._names[i] for i in wanted]
        values = tuple(self._values[i] for i in wanted)
        directions = tuple(
            torch.zeros_like(self._values[i]) if (t := tangents[i]) is None else pairs_aligned(t)
            for i in wanted
        )

        def value(*theta: Tensor) -> Tensor:
            with self._autocast.region(), self._train.region(self._model, self._index):
                output = call_with(self._model, dict(zip(names, theta, strict=True)), self._x.clone())
            if output.dtype in (torch.bfloat16, torch.float16):
                output = output.float()
            return self._loss.numerator(output, self._y) / len(output)

        gradient = torch.func.grad(value, argnums=tuple(range(len(values))))
        with self._train.preserved(self._model), twice_differentiable(self._model, tangents=True):
            images: tuple[Tensor, ...] = torch.func.jvp(gradient, values, directions)[1]
        return [image.detach() for image in images]
