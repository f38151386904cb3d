"""A loss over the whole data set at other parameter values, without ever changing those of the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from flatkern.linearize import Forward
from flatkern.loss_data import LossData, check_target, separate_loss
from flatkern.losses import Reduction
from flatkern.operators.batches import batch_seed, fingerprint, reading
from flatkern.operators.determinism import CHANGED_DATA
from flatkern.problem import (
    Layout,
    ParameterSelection,
    call_with,
    check_model,
    check_output,
    pairs_aligned,
    preserve_state,
    select_parameters,
)
from flatkern.samples import count_samples, take
from flatkern.verdicts import loss_uses_parameters

__all__ = ["PerturbedLoss"]

_PILOT = 2
"""Samples of the run that tells how many fit."""


class _Called(nn.Module):
    """A model and the way it is called, as one module: its parameters can then be replaced for a call."""

    def __init__(self, model: nn.Module, forward: Forward | None) -> None:
        super().__init__()
        self.model, self._run = model, forward

    def forward(self, batch: Any) -> tuple[Tensor, Any]:
        if self._run is None:
            return self.model(batch.clone()), None
        return self._run(self.model, batch)


class PerturbedLoss:
    """L(θ + δ) = Σ numerators / Σ denominators over all batches, and its gradient.

    Args:
        model, loss_fn, data, params, reduction, forward: as for :func:`flatkern.ggn_trace`; any loss.
        max_memory: bytes for the graph of a gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: object,
        data: Any,
        *,
        params: ParameterSelection,
        reduction: Reduction | None,
        forward: Forward | None,
        max_memory: int,
    ) -> None:
        check_model(model)
        self._model = model
        self._loss = separate_loss(loss_fn, reduction)
        self.parameters = select_parameters(model, params)
        self.layout = Layout(self.parameters)
        self._source, self._batches = data, LossData(model, data, forward)
        self._called = _Called(model, self._batches.forward)
        self._max_memory = max_memory
        self._size: int | None = None
        self._unchecked = [self._loss.callable]
        self._seen: Tensor | None = None
        self.num_data = 0
        self.denominator = 1.0
        """What summed numerators are divided by."""
        self.theta = self.layout.flatten({n: p.detach() for n, p in self.parameters.items()})
        """θ, [P]."""
        self.value, _ = self._pass(None, with_gradient=False)
        """L(θ)."""

    def normal(self, seed: int, index: int) -> Tensor:
        """Standard normal numbers [P] that depend on (seed, index) and P alone: the same at every θ and ρ."""
        generator = torch.Generator().manual_seed(batch_seed(seed, index))
        drawn = torch.randn(self.layout.size, generator=generator)
        return drawn.to(self.theta)

    def at(self, delta: Tensor) -> float:
        """L(θ + δ)."""
        return self._pass(delta, with_gradient=False)[0]

    def gradient_at(self, delta: Tensor) -> tuple[float, Tensor]:
        """L(θ + δ) and ∇L(θ + δ) [P]."""
        value, gradient = self._pass(delta, with_gradient=True)
        assert gradient is not None
        return value, gradient

    def _pass(self, delta: Tensor | None, *, with_gradient: bool) -> tuple[float, Tensor | None]:
        leaf = self.theta.clone() if delta is None else self.theta + delta.to(self.theta)
        leaf.requires_grad_(with_gradient)
        tensors = {
            f"model.{name}": pairs_aligned(value).to(self.parameters[name].dtype)
            for name, value in self.layout.unflatten(leaf).items()
        }
        total: Tensor | float = 0.0  # read once a pass
        weight: Tensor | float = 0.0
        n = 0
        sums: Tensor | None = None
        gradient = torch.zeros_like(self.theta) if with_gradient else None
        with reading(self._source), torch.set_grad_enabled(with_gradient):
            for inputs, target in self._batches:
                prints = torch.stack(
                    [torch.stack([s.sum(), s.abs().sum()]) for s in fingerprint((inputs, target))]
                )
                sums = prints if sums is None else sums + prints
                for part, y in self._chunks(inputs, target):
                    output, own = self._output(tensors, part)
                    y = own if target is None else y
                    numerator = self._loss.numerator(output, y)
                    if self._seen is None:
                        self._check_loss(output.detach(), y)
                    total = total + numerator.detach().double()
                    weight = weight + self._loss.weight(output.detach(), y)
                    n += len(output)
                    if gradient is not None:
                        gradient += torch.autograd.grad(numerator, leaf, retain_graph=False)[0]
                    del output, numerator
        assert sums is not None
        self._same_data(sums)
        self.num_data = n
        self.denominator = self._loss.denominator(weight)
        return float(total) / self.denominator, None if gradient is None else gradient / self.denominator

    def _output(self, tensors: Mapping[str, Tensor], part: Any) -> tuple[Tensor, Any]:
        with preserve_state(self._model):
            output, target = cast("tuple[Tensor, Any]", call_with(self._called, tensors, part))
        if not isinstance(output, Tensor) or output.ndim == 0 or len(output) != count_samples(part):
            check_output(self._model, output, count_samples(part))
        return output, target

    def _chunks(self, inputs: Any, target: Any) -> Iterator[tuple[Any, Any]]:
        n = count_samples(inputs)
        if self._size is None:
            self._size = max(1, self._max_memory // self._bytes_a_sample(take(inputs, slice(0, _PILOT))))
        for start in range(0, n, self._size):
            part = slice(start, min(start + self._size, n))
            yield (
                (inputs if n <= self._size else take(inputs, part)),
                None if target is None else target[part],
            )

    def _bytes_a_sample(self, few: Any) -> int:
        saved: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor.detach()

        with (
            torch.enable_grad(),
            preserve_state(self._model),
            saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            output, _ = self._called(few)
        for p in self._model.parameters():
            saved.pop(p.untyped_storage().data_ptr(), None)
        check_output(self._model, output, count_samples(few))
        return max(1, 2 * sum(saved.values()) // len(output))

    def _check_loss(self, output: Tensor, target: Any) -> None:
        check_target(self._loss, output, target, self._unchecked)
        if loss_uses_parameters(self._loss, output, target, self._model):
            raise ValueError(
                f"loss_fn: {self._loss.name} itself uses parameters of the model, which cannot be replaced there; let "
                "the model's output carry them, or leave the term out"
            )

    def _same_data(self, sums: Tensor) -> None:
        # sums over all samples: a loader may shuffle, but not augment
        if self._seen is None:
            self._seen = sums
        elif sums.shape != self._seen.shape or bool(
            ((sums - self._seen).abs() > 1e-9 * self._seen[:, 1:]).any()
        ):
            raise ValueError(CHANGED_DATA.format("the sums over all samples differ"))
