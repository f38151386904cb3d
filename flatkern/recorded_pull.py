"""Cotangents pulled back through the recorded runs of the residual, so that one forward pass serves both parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from flatkern.capture import match_parameters
from flatkern.graph import Graph, Layouts, compare_batches, shapes_of
from flatkern.linearize import Forward, Linearization, check_independence, outline
from flatkern.placement import check_layouts
from flatkern.problem import preserve_state
from flatkern.residual import Chunk
from flatkern.sample_axis import footprint
from flatkern.samples import count_samples, take
from flatkern.tape import UnsupportedError, record
from flatkern.uses import find_uses

__all__ = ["RecordedPull"]

_FEW = 2
_ROOM = 3
"""A chunk has room for cotangents of so many times its values."""


class RecordedPull:
    """Linearizations of recorded runs of one model; where the samples lie is found from the first run."""

    def __init__(
        self,
        model: nn.Module,
        parameters: Mapping[str, Tensor],
        forward: Forward | None,
        max_memory: int,
        first: Chunk,
        x: Any,
    ) -> None:
        """``first`` is the run on ``x``.

        Raises:
            UnsupportedError: a parameter has a use without a rule, or ``x`` has too few samples to tell their axis.
            ValueError: samples influence one another.
        """
        self._model, self._parameters, self._forward = model, parameters, forward
        self._max_memory = max_memory
        n, output = count_samples(x), first.output.detach()
        if n <= _FEW:
            raise UnsupportedError("too few samples to tell their axis from others")
        with preserve_state(model):
            _, few = record(model, take(x, slice(0, _FEW)), parameters, forward)
        with preserve_state(model):
            last = outline(model, take(x, slice(n - 1, n)), forward).output
        check_independence(few.detach(), output)
        check_independence(last.detach(), output[-1:])
        graph = Graph(few)
        self._layouts: Layouts | None = compare_batches(graph, _FEW, Graph(first.output), n)
        check_layouts(few, graph, self._layouts, parameters)
        self(first, x)

    def __call__(self, chunk: Chunk, x: Any) -> Linearization:
        """The recorded run on ``x`` as a linearization."""
        n, graph = len(chunk.output), Graph(chunk.output)
        if self._layouts is None or not self._layouts.match(graph):
            raise UnsupportedError("the model's operations depend on the number of samples or on the data")
        uses = find_uses(graph, self._parameters, None if n == 1 else self._layouts, n)
        if uses.uncovered:
            raise UnsupportedError(f"uses without a rule of {', '.join(uses.uncovered)}")
        widths = [shapes_of(node)[0].numel() for node in uses.sites]
        taken = (sum(widths) + 2 * max(widths, default=0)) * chunk.output.element_size()
        return Linearization(
            x=x,
            start=0,
            output=chunk.output,
            target=chunk.tape.target,
            forward=self._forward,
            calls=(),
            coverage=match_parameters(chunk.output, [], self._parameters, frozenset()),
            uses=uses,
            input_edge=None,
            max_memory=self._max_memory,
            misplaced=frozenset(),
            widest=max([chunk.output.numel(), *widths]),
            together=max(1, _ROOM * footprint(chunk.tape) // max(1, taken)),
        )
