"""Geometry by cotangents: all rows of the Jacobians of a chunk of samples, at the source and at every layer's input."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from flatkern.capture import LayerCall, graph_nodes
from flatkern.geometry_results import LayerGeometry, named_calls
from flatkern.linearize import Linearization
from flatkern.losses import identity_cotangents
from flatkern.positions import PositionGradients
from flatkern.results import PerSample
from flatkern.scattered import Scattered
from flatkern.segment import Source
from flatkern.spectra import Spectrum, squared_singular_values
from flatkern.squared_norms import parameter_squared_norms
from flatkern.structure import holds_entries_of, is_sole_consumer, joint_consumers

__all__ = ["RowsChunk", "chosen_calls", "join_layers", "measure_rows"]


@dataclass(frozen=True)
class _LayerChunk:
    """One call of a layer on one chunk of samples."""

    call: tuple[str, nn.Module]
    """Name and module; the call itself would keep the chunk's graph alive."""
    spectrum: Spectrum
    input_norm_sq: Tensor
    weight_gradient_sq: Tensor | None
    bias_gradient_sq: Tensor | None
    position_sums: tuple[Tensor, Tensor, Tensor] | None
    sole: bool
    partners: tuple[int, ...]
    """Indices of the calls that share its input, if they are all there is."""
    direct: bool
    positions: int
    input_shape: torch.Size


@dataclass(frozen=True)
class RowsChunk:
    """What one chunk of samples adds."""

    gradient_sq: Tensor
    spectrum: Spectrum
    image_sq: Tensor
    """‖J_i x_i‖², [n]."""
    layers: tuple[_LayerChunk, ...]
    outputs: int
    dtype: torch.dtype
    notes: tuple[str, ...]


def chosen_calls(calls: Sequence[LayerCall], patterns: str | Sequence[str] | None) -> tuple[LayerCall, ...]:
    """The calls of the layers that are wanted.

    Raises:
        ValueError: a pattern that matches none.
    """
    if patterns is None:
        return tuple(calls)
    wanted = [patterns] if isinstance(patterns, str) else list(patterns)
    names = [call.name for call in calls]
    for pattern in wanted:
        if not fnmatch.filter(names, pattern):
            raise ValueError(
                f"layers: {pattern!r} matches no linear or convolutional layer; there are {', '.join(names)}"
            )
    return tuple(call for call in calls if any(fnmatch.fnmatchcase(call.name, p) for p in wanted))


def projected_cotangents(output: Tensor, subspace: Tensor | None) -> Tensor:
    """The cotangents of all N output entries, or of the projection QᵀF on the columns of Q [N, r]: [r, n, *output]."""
    if subspace is None:
        return identity_cotangents(output)
    r, n = subspace.shape[1], len(output)
    columns = subspace.to(output).T.reshape(r, 1, *output.shape[1:])
    return columns.expand(r, n, *output.shape[1:])


def measure_rows(
    model: nn.Module,
    lin: Linearization,
    source: Source,
    parameters: dict[str, nn.Parameter],
    calls: Sequence[LayerCall],
    subspace: Tensor | None,
) -> RowsChunk:
    """Pull all cotangents of a chunk back once and take what they hold."""
    assert lin.output.grad_fn is not None
    _, uses = graph_nodes(lin.output.grad_fn)
    edges, index = _edges(lin, source.edge, calls, uses)
    roots = projected_cotangents(lin.output, subspace)
    watched = [(i, call) for i, call in enumerate(calls) if call.output_edge is not None]
    gradients = {i: PositionGradients(call.module, call.checked_inputs()) for i, call in watched}

    def observe(found: Sequence[Tensor | Scattered | None]) -> None:
        for (i, _), cotangent in zip(watched, found, strict=True):
            if cotangent is not None:
                gradients[i].add(cotangent)

    norms = parameter_squared_norms(
        model,
        lin,
        roots,
        parameters,
        edges,
        watched=[call.output_edge for _, call in watched if call.output_edge is not None],
        observe=observe,
    )
    n, outputs = lin.n, len(roots)
    zero = torch.zeros(n, dtype=torch.float64, device=lin.output.device)
    widths = [source.value[0].numel()] + [1] * (len(edges) - 1)
    rows = [
        lin.output.new_zeros(n, outputs, width) if found is None else found
        for found, width in zip(norms.rows, widths, strict=True)
    ]
    spectra = [squared_singular_values(r) for r in rows]
    nothing = squared_singular_values(lin.output.new_zeros(n, outputs, 1))
    names = {id(c): covered for c, covered in lin.coverage.by_call}
    layers = []
    numbers = {id(call): i for i, call in enumerate(calls)}
    for i, call in enumerate(calls):
        sole = is_sole_consumer(lin.output, call)
        partners = () if sole else joint_consumers(lin.output, call, calls)
        covered = names.get(id(call), {})
        inputs = call.checked_inputs()
        layers.append(
            _LayerChunk(
                call=(call.name, call.module),
                spectrum=spectra[index[i]] if i in index else nothing,
                input_norm_sq=inputs.reshape(n, -1).double().square().sum(1),
                weight_gradient_sq=norms.by_parameter[covered["weight"]] if "weight" in covered else None,
                bias_gradient_sq=norms.by_parameter[covered["bias"]] if "bias" in covered else None,
                position_sums=gradients[i].totals() if i in gradients else None,
                sole=sole,
                partners=tuple(numbers[id(other)] for other in partners),
                direct=i in index and index[i] == 0,
                positions=call.positions,
                input_shape=inputs.shape[1:],
            )
        )
    at_source = source.value.reshape(n, -1, 1).to(rows[0].dtype)
    return RowsChunk(
        gradient_sq=norms.total if parameters else zero,
        spectrum=spectra[0],
        image_sq=(rows[0] @ at_source).double().square().sum((1, 2)),
        layers=tuple(layers),
        outputs=outputs,
        dtype=lin.output.dtype,
        notes=(*norms.notes, *_left_out(lin, parameters)),
    )


def _left_out(lin: Linearization, parameters: dict[str, nn.Parameter]) -> tuple[str, ...]:
    measured = {id(p) for call in lin.calls for p in call.module.parameters(recurse=False)}
    hidden = [
        n for n in lin.coverage.uncovered if parameters[n].ndim > 1 and id(parameters[n]) not in measured
    ]
    return (
        (f"NMLS leaves out what is not called as a linear or conv layer: {', '.join(hidden)}",)
        if hidden
        else ()
    )


def _edges(
    lin: Linearization, origin: GradientEdge, calls: Sequence[LayerCall], uses: Counter[Node]
) -> tuple[list[GradientEdge], dict[int, int]]:
    """The places to pull back to, each once, the source first: {call: place}."""
    edges = [origin]
    known: dict[tuple[Node, int], int] = {}
    index: dict[int, int] = {}
    for i, call in enumerate(calls):
        if call.name in lin.misplaced:
            raise ValueError(
                f"layers: the samples are not on axis 0 of layer {call.name!r}, so it has no Jacobian a sample; leave "
                "it out by naming the layers wanted"
            )
        edge = call.input_edge
        if edge is None:
            continue
        if holds_entries_of(edge, origin, uses):
            index[i] = 0
            continue
        key = (edge.node, edge.output_nr)
        if key not in known:
            known[key] = len(edges)
            edges.append(edge)
        index[i] = known[key]
    return edges, index


def join_layers(chunks: Sequence[RowsChunk]) -> dict[str, LayerGeometry]:
    """The layers of all chunks of samples together.

    Raises:
        ValueError: other samples call other layers.
    """
    first = chunks[0].layers
    called = [layer.call for layer in first]
    if any([layer.call for layer in c.layers] != called for c in chunks):
        raise ValueError(
            "model: it calls its layers in another order for other samples, so layers cannot be told apart across the "
            "chunks; raise max_memory, or leave those layers out by naming the ones wanted"
        )
    layers = {}
    names = named_calls([layer_name for layer_name, _ in called])
    for i, name in enumerate(names):
        parts = [c.layers[i] for c in chunks]
        module = parts[0].call[1]
        spectrum = Spectrum.concatenate([p.spectrum for p in parts])
        sums = [p.position_sums for p in parts]
        known = [s for s in sums if s is not None]
        energy, weighted, least = (
            (torch.cat([s[j] for s in known]) for j in range(3)) if len(known) == len(sums) else (None,) * 3
        )
        layers[name] = LayerGeometry(
            name=name,
            max_sensitivity=PerSample(spectrum.top),
            input_norm_sq=torch.cat([p.input_norm_sq for p in parts]),
            weight_gradient_sq=_joined([p.weight_gradient_sq for p in parts]),
            module=module,
            positions=parts[0].positions,
            sole_consumer=all(p.sole for p in parts),
            takes_model_input=all(p.direct for p in parts),
            partners=tuple(names[j] for j in parts[0].partners)
            if all(p.partners == parts[0].partners for p in parts)
            else (),
            log_volume=spectrum.log_volume(None),
            frobenius_sq=spectrum.energy,
            bias_gradient_sq=_joined([p.bias_gradient_sq for p in parts]),
            output_gradient_sq=energy,
            position_gradient_sq=weighted,
            least_position_norm_sq=least,
            input_shape=parts[0].input_shape,
        )
    return layers


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    known = [p for p in parts if p is not None]
    return torch.cat(known) if len(known) == len(parts) else None
