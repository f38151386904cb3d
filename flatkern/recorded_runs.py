"""A model's runs on chunks of samples, recorded for the residual of the Hessian and for pulling cotangents back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.chunk_plan import frugal_limit, note
from flatkern.linearize import Forward
from flatkern.loss_data import LossData, check_target, output_gradient
from flatkern.losses import Loss
from flatkern.problem import preserve_state
from flatkern.residual import Chunk, Sites, Twice, linearize
from flatkern.sample_axis import FEW, footprint, sample_axes
from flatkern.samples import count_samples, take
from flatkern.tape import Tape, UnsupportedError

__all__ = ["RecordedRuns"]

COPIES = 4
"""Memory of a chunk over that of its intermediate values: graph, cotangents, tangents and temporaries."""

_SmallRuns = dict[bool, tuple[Tape, dict[int, tuple[int, bool]]]]
"""Tapes of a few samples, and of one (``True``), with the samples' axes."""


@dataclass
class RecordedRuns:
    """The chunks of a call of :func:`flatkern.hessian_trace`, and what is found about parameters on the way."""

    model: nn.Module
    loss: Loss
    data: Any
    parameters: dict[str, nn.Parameter]
    forward: Forward | None
    max_memory: int
    verdicts: dict[str, str] = field(default_factory=dict)
    """Parameters not proven, with the reason."""
    _axes: dict[Any, _SmallRuns] = field(default_factory=dict)
    _batch: tuple[Any, _SmallRuns] | None = None
    """The last batch that is not one tensor, with its small runs."""

    def batches(self) -> LossData:
        """The data, to be gone through once."""
        return LossData(self.model, self.data, self.forward)

    def step(self, x: Any) -> int:
        """Samples of a batch that a chunk takes."""
        n, chunks = count_samples(x), self._recorded(x)
        note(chunks)
        return chunks.samples(n)

    def work(self, x: Any) -> int:
        """Entries of parameters and ten times those of the values, times samples: how dear a gradient is, roughly."""
        chunks = self._recorded(x)
        entry = next(iter(self.parameters.values())).element_size()
        return count_samples(x) * (chunks.gradient_bytes + 10 * chunks.sample_bytes) // entry

    def _recorded(self, x: Any) -> _Recorded:
        """From the small runs, which are made with the batch's first samples where there are none."""
        n = count_samples(x)
        own = sum(p.numel() * p.element_size() for p in self.parameters.values())

        def plan(tape: Tape) -> _Recorded:
            return _Recorded(self.max_memory, footprint(tape) // max(1, len(tape.final.tensor)), own)

        runs = self._runs_of(x)
        if False not in runs:
            # where one sample is a chunk, its cotangents for several at once would be the peak
            forward = self.batches().forward
            runs[False] = sample_axes(
                self.model, x, self.parameters, forward, wanted=lambda tape: plan(tape).samples(n) > 1
            )
        return plan(runs[False][0])

    def _runs_of(self, x: Any) -> _SmallRuns:
        # batches of one kind share the small runs (of each chunk it is checked that the operations are the same)
        if not isinstance(x, Tensor):
            if self._batch is None or self._batch[0] is not x:
                self._batch = x, {}
            return self._batch[1]
        return self._axes.setdefault((x.shape[1:], x.dtype, min(len(x), FEW)), {})

    def chunks(
        self, x: Any, y: Tensor | None, parts: Iterable[slice | Sequence[int]] | None = None
    ) -> Iterator[tuple[Any, Chunk, Tensor]]:
        """Inputs, recorded run and target of each part; by default of equal parts in order."""
        forward = self.batches().forward
        n, step = count_samples(x), self.step(x)
        runs = self._runs_of(x)
        if step == 1:
            del runs[False]
        if parts is None:
            parts = (slice(start, min(start + step, n)) for start in range(0, n, step))
        for part in parts:
            inputs = take(x, part)
            # a batch of one may take other operations (expand does nothing)
            alone = count_samples(inputs) == 1
            if alone not in runs:
                runs[alone] = sample_axes(self.model, x, self.parameters, forward, few=1 if alone else FEW)
            chunk = linearize(self.model, inputs, self.parameters, *runs[alone], forward)
            for name, degree in chunk.verdicts.items():
                if not degree.proven:
                    self.verdicts.setdefault(name, degree.reason)
            yield inputs, chunk, chunk.tape.target if y is None else y[part]
            del inputs, chunk  # before the next is run

    def evaluator(
        self, chunk: Chunk, y: Tensor, method: str, *, per_layer: bool = False
    ) -> tuple[Sites | Twice | None, float]:
        """The residual on a chunk, ``None`` where all is proven, and its part of the denominator."""
        output = chunk.output.detach()
        weight = float(self.loss.weight(output, y))
        if not chunk.entries:
            return None, weight
        residual = output_gradient(self.loss, output, y)
        del output  # Sites lets go of it
        if method != "double-backward" and not per_layer:
            try:
                return Sites(chunk, residual), weight
            except UnsupportedError:
                if method == "sites":
                    raise
        return Twice(chunk, residual), weight

    def outputs(self, x: Any, y: Tensor | None, part: slice) -> tuple[Tensor, Tensor]:
        """Output and target of some samples, by a plain forward pass; a wrong target gets the loss's own message."""
        forward, inputs = self.batches().forward, take(x, part)
        with preserve_state(self.model), torch.no_grad():
            if forward is not None:
                output, target = forward(self.model, inputs)
            else:
                assert y is not None
                output, target = self.model(inputs.clone()), y[part]
        check_target(self.loss, output, target, [False])
        return output, target


@dataclass(frozen=True)
class _Recorded:
    """Chunks of recorded runs: a model of :mod:`flatkern.chunk_plan`."""

    max_memory: int
    sample_bytes: int
    gradient_bytes: int
    """What one gradient takes: parameters, and half of a sample's values is saved for it."""

    def bytes(self, n: int) -> int:
        """Values, graph, cotangents, tangents and temporaries."""
        return COPIES * self.sample_bytes * self.samples(n)

    def samples(self, n: int) -> int:
        """The most that fit into less than two gradients' memory, and at least one."""
        gradient = self.gradient_bytes // 2 + n * self.sample_bytes // 2
        limit = frugal_limit(gradient, self.max_memory)
        most = max(1, min(n, limit // max(1, COPIES * self.sample_bytes)))
        return -(-n // -(-n // most))
