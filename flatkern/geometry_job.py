"""One call of :func:`flatkern.geometry`, chunk by chunk of samples, in the way that was chosen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from flatkern.capture import LayerCall
from flatkern.geometry_assembly import Measured
from flatkern.geometry_krylov import KrylovSettings
from flatkern.geometry_products import ProductsChunk, measure_products
from flatkern.geometry_rows import RowsChunk, chosen_calls, measure_rows
from flatkern.jacobian_trace import Roots, Settings, estimate_trace
from flatkern.linearize import Linearization, linearizations
from flatkern.operators.forms import twice_differentiable
from flatkern.problem import preserve_state
from flatkern.rank_bound import rank_bound, reaches
from flatkern.results import Estimate
from flatkern.sample_map import frozen
from flatkern.segment import Segment, Source
from flatkern.subspace import orthonormal_columns

__all__ = ["Job", "Size", "size_of"]

_GRAPHS = 3
"""What two graphs with their vectors take, in units of the first."""


@dataclass(frozen=True)
class Size:
    """What is known before the choice of a way."""

    outputs: int
    inputs: int
    entry_bytes: int
    subspace: Tensor | None


def size_of(model: nn.Module, x: Tensor, part: Segment, subspace: Tensor | Sequence[int] | None) -> Size:
    """N, M and the columns Q, from one sample."""
    # a source's place in the graph is found in a run with one
    with preserve_state(model), torch.set_grad_enabled(part.source is not None):
        point = x[:1].detach().clone().requires_grad_(x.is_floating_point())
        output = model(point.clone())
    if isinstance(output, Tensor) and output.ndim == 0:
        raise ValueError(
            "model: its output has shape (), without an axis of samples; axis 0 must be the samples"
        )
    if not isinstance(output, Tensor):
        raise TypeError(f"model: its output must be one tensor, got {type(output).__name__}; wrap the model")
    entries = output[0].numel()
    columns = None if subspace is None else orthonormal_columns(subspace, entries)
    inputs = x[0].numel() if part.source is None else part.source_of(output).value[0].numel()
    return Size(entries if columns is None else columns.shape[1], inputs, output.element_size(), columns)


@dataclass(frozen=True)
class Job:
    """One call."""

    model: nn.Module
    x: Tensor
    part: Segment
    size: Size
    layers: str | Sequence[str] | None
    settings: KrylovSettings
    limit: int
    seed: int

    def by_cotangents(self, parameters: dict[str, nn.Parameter]) -> tuple[Measured, list[RowsChunk]]:
        """Exact, all layers."""
        measured = Measured()
        chunks: list[RowsChunk] = []
        for lin in self._chunks(parameters, self.size.outputs, self.limit):
            source = self._source(lin, measured)
            calls = chosen_calls(self._between(lin, source), self.layers)
            chunks.append(measure_rows(self.model, lin, source, parameters, calls, self.size.subspace))
            del lin, source, calls
        return measured, chunks

    def by_products(self, *, tangents: bool) -> tuple[Measured, list[ProductsChunk]]:
        """By products with J and Jᵀ."""
        measured = Measured()
        chunks: list[ProductsChunk] = []
        generator = torch.Generator().manual_seed(self.seed)
        with ExitStack() as stack:
            stack.enter_context(twice_differentiable(self.model))
            stack.enter_context(frozen(self.model))
            count = self.size.inputs if tangents else 1
            most = max(1, self.limit // _GRAPHS // self._vector_bytes(tangents))
            for lin in self._chunks({}, count, self.limit // _GRAPHS, most):
                source = self._source(lin, measured)
                calls = () if self.layers is None else chosen_calls(self._between(lin, source), self.layers)
                chunks.append(
                    measure_products(
                        lin, source, calls, self.size.subspace, self.settings, generator, tangents=tangents
                    )
                )
                del lin, source, calls
        return measured, chunks

    def sketched_sharpness(self, parameters: dict[str, nn.Parameter]) -> Estimate | None:
        """S_GN by signs, as many draws as probes."""
        if self.settings.probes == 0:
            return None
        q = self.size.subspace

        def project(signs: Tensor) -> Tensor:
            if q is None:
                return signs
            columns = q.to(signs)
            return (signs.flatten(1)[:, : columns.shape[1]] @ columns.T).reshape(signs.shape)

        roots = Roots(
            exact=lambda _output, _target: torch.empty(0),
            sketch=lambda output, _target, signs: project(signs.to(output.dtype)),
            columns=lambda _: self.size.outputs,
            weight=lambda output, _: float(len(output)),
            denominator=lambda total: total,
            shared=True,
        )
        how = Settings("sketch", samples=self.settings.probes, seed=self.seed, max_memory=self.limit)
        return estimate_trace(self.model, [(self.x, None)], parameters, roots, how)

    def _vector_bytes(self, tangents: bool) -> int:
        """What is kept of a sample beside the graphs: its Jacobian twice, or bases and running vectors."""
        small, large = sorted((self.size.outputs, self.size.inputs))
        if tangents:
            return 2 * small * large * self.size.entry_bytes
        how = self.settings
        kept = min(how.max_steps, small) + how.probes * min(how.volume_steps, small)
        return (kept * small + 3 * (1 + how.probes) * (small + large)) * self.size.entry_bytes

    def _chunks(
        self, parameters: dict[str, nn.Parameter], cotangents: int, limit: int, most: int | None = None
    ) -> Iterator[Linearization]:
        floating, n = self.x.is_floating_point(), len(self.x)
        step = n if most is None else min(most, n)
        for start in range(0, n, step):
            yield from linearizations(
                self.model,
                self.x[start : start + step],
                parameters,
                with_input=floating,
                max_memory=limit,
                cotangents=cotangents,
                keep_cotangents=not floating,
            )

    def _source(self, lin: Linearization, measured: Measured) -> Source:
        """Where the derivative is taken in, checked; what is known of every chunk is noted."""
        if self.part.source is not None:
            source = self.part.source_of(lin.output)
        else:
            if lin.output.grad_fn is None or lin.input_edge is None:
                raise ValueError("model: its output does not depend differentiably on x")
            source = Source(lin.x, lin.input_edge)
        if source.value.shape[:1] != (lin.n,):
            raise ValueError(
                f"source: what goes into {self.part.source!r} has shape {tuple(source.value.shape)}, without the "
                f"{lin.n} samples on axis 0"
            )
        if not reaches(lin.output, source.edge):
            what = "x" if self.part.source is None else self.part.source
            where = "model: its output" if self.part.target is None else f"target: {self.part.target!r}"
            raise ValueError(f"{where} does not depend differentiably on {what}")
        value = source.value.reshape(lin.n, -1).double()
        bound = rank_bound(lin.output, source.edge)
        measured.add(value.square().sum(1), bound, lin.output.dtype, value.shape[1])
        return source

    def _between(self, lin: Linearization, source: Source) -> list[LayerCall]:
        """The calls of layers between source and target; all calls of the whole model."""
        if self.part.whole:
            return list(lin.calls)
        return [
            call
            for call in lin.calls
            if call.input_edge is not None
            and call.output_edge is not None
            and reaches(lin.output, call.output_edge)
            and _leads_to(call.input_edge.node, source)
        ]


def _leads_to(start: Node, source: Source) -> bool:
    seen, stack = {start}, [start]
    while stack:
        node = stack.pop()
        if node is source.edge.node:
            return True
        for below, _ in node.next_functions:
            if below is not None and below not in seen:
                seen.add(below)
                stack.append(below)
    return False
