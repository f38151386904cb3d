"""The loss side of rows s_ik·∂f_i/∂θ: roots of the output Hessian, drawn or own gradients; a first look at the data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flatkern._loss_roots import with_roots
from flatkern.gradient_rows import Chunk, GradientRows
from flatkern.linearize import Forward
from flatkern.loss_data import LossData, check_target, output_gradient, separate_loss
from flatkern.losses import Reduction
from flatkern.operators.batches import batch_seed, fingerprint, reading, same_fingerprint
from flatkern.operators.determinism import CHANGED_DATA
from flatkern.problem import (
    ParameterSelection,
    check_model,
    check_output,
    preserve_state,
    select_parameters,
)
from flatkern.samples import count_samples, take

__all__ = ["CurvatureRows", "Kind", "Survey"]

Kind = Literal["ggn", "mc", "empirical"]

_SURVEYED = 256
"""Samples a forward pass without a graph takes at once,"""
_SURVEYED_BYTES = 1 << 26
"""and bytes of their outputs."""


@dataclass(frozen=True)
class Survey:
    """What one pass of forward evaluations over the data tells."""

    num_data: int
    rows: int
    """Over all samples and cotangents."""
    denominator: float
    loss: float
    """Σ numerators / Σ denominators."""
    batches: tuple[list[Tensor], ...]
    """Fingerprints."""
    outputs: int
    """Entries of the first sample's output."""


class CurvatureRows:
    """Rows whose Σ over samples and cotangents of γ γᵀ / denominator is the GGN, or a Fisher matrix.

    Args:
        model, loss_fn, data, params, reduction, forward: as for :func:`flatkern.ggn_trace`.
        kind: cotangents: ``"ggn"`` columns of a root of the output Hessian, ``"mc"`` the numerator's gradients at
            ``draws`` labels drawn from the model's own distribution (over √draws), ``"empirical"`` those at the labels
            of the data.
        draws, seed: for ``"mc"``.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: object,
        data: Any,
        *,
        params: ParameterSelection = None,
        reduction: Reduction | None = None,
        forward: Forward | None = None,
        kind: Kind = "ggn",
        draws: int = 1,
        seed: int = 0,
    ) -> None:
        check_model(model)
        loss = separate_loss(loss_fn, reduction)
        if kind == "ggn":
            if loss.name == "NLLLoss":
                raise ValueError(
                    "loss_fn: NLLLoss is linear in the model's output, so the Gauss-Newton matrix split there is 0; "
                    "end the model at the logits and use CrossEntropyLoss"
                )
            loss = with_roots(loss)
        if kind == "mc" and loss.sampled is None:
            raise ValueError(
                f"loss_fn: {loss.name} has no predictive distribution to draw labels from; use fisher='empirical' or "
                "'ggn', or CrossEntropyLoss, BCEWithLogitsLoss or MSELoss"
            )
        self.model, self.loss, self.kind, self._draws, self._seed = model, loss, kind, draws, seed
        self.parameters = select_parameters(model, params)
        self._data, self._source = LossData(model, data, forward), data
        self._unchecked = [loss.callable]
        self._seen: tuple[list[Tensor], ...] | None = None
        self.rows = GradientRows(
            model,
            self,
            self.parameters,
            self.roots,
            forward=self._data.forward,
            cotangents=None if kind == "ggn" else draws,
        )

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        """Batches, compared with those of the survey."""
        with reading(self._source):
            seen, count = self._seen, 0
            for inputs, target in self._data:
                if seen is not None:
                    prints = fingerprint((inputs, target))
                    if count >= len(seen) or not same_fingerprint(seen[count], prints):
                        raise ValueError(CHANGED_DATA.format(f"batch {count} differs"))
                count += 1
                yield inputs, target
            if seen is not None and count != len(seen):
                raise ValueError(CHANGED_DATA.format("the number of batches differs"))

    @property
    def forward(self) -> Forward | None:
        """(model, batch) → (output, target), checked; ``None`` where the model is simply called."""
        return self._data.forward

    def survey(self) -> Survey:
        """Forward passes without graphs: sizes, the loss, its denominator. Later passes must give the same data."""
        n, rows, outputs, sample_bytes = 0, 0, 0, 0
        weight: Tensor | float = 0.0
        value = 0.0
        prints: list[list[Tensor]] = []
        self._seen = None
        for inputs, target in self:
            prints.append(fingerprint((inputs, target)))
            count = count_samples(inputs)
            start = 0
            while start < count:
                step = max(1, min(_SURVEYED, _SURVEYED_BYTES // sample_bytes)) if sample_bytes else 1
                part = slice(start, min(start + step, count))
                start = part.stop
                output, y = self.evaluate(inputs, target, part)
                sample_bytes = output[0].numel() * output.element_size()
                check_target(self.loss, output, y, self._unchecked)
                weight = weight + self.loss.weight(output, y)
                value += float(self.loss.numerator(output, y))
                n += len(output)
                rows += len(output) * self._columns(output)
                outputs = outputs or output[0].numel()
        denominator = self.loss.denominator(weight)
        self._seen = tuple(prints)
        return Survey(n, rows, denominator, value / denominator, self._seen, outputs)

    def evaluate(self, inputs: Any, target: Any, part: slice) -> tuple[Tensor, Any]:
        """Output and target of some samples of a batch, without a graph."""
        samples = take(inputs, part)
        with preserve_state(self.model), torch.no_grad():
            if self.forward is not None:
                return self.forward(self.model, samples)
            return check_output(self.model, self.model(samples.clone()), len(samples)), target[part]

    def _columns(self, output: Tensor) -> int:
        return self.loss.columns(output) if self.kind == "ggn" else self._draws

    def roots(self, output: Tensor, target: Any, start: int) -> Tensor:
        """Cotangents [K, n, *output] of a chunk that begins with sample ``start``; without the loss's denominator."""
        if self.kind == "empirical":
            return output_gradient(self.loss, output, target).unsqueeze(0)
        if self.kind == "mc":
            assert self.loss.sampled is not None
            seed = batch_seed(self._seed, start)
            generator = torch.Generator().manual_seed(seed)
            drawn = [self.loss.sampled(output, target, generator) for _ in range(self._draws)]
            return torch.stack(drawn) / self._draws**0.5
        assert self.loss.root is not None
        return self.loss.root(output, target)

    def chunks(self, max_memory: int, formed: tuple[str, ...] = ()) -> Iterator[Chunk]:
        """See :class:`flatkern.gradient_rows.GradientRows`."""
        return self.rows.chunks(max_memory, formed)
