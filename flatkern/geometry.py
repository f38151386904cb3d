"""Representation geometry from one pass: volume, sensitivity and dimensionality of the input-output Jacobians."""

from __future__ import annotations

import fnmatch
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from flatkern.capture import LayerCall, graph_nodes
from flatkern.linearize import Linearization, budget, linearizations
from flatkern.losses import identity_cotangents
from flatkern.problem import (
    ParameterSelection,
    check_input,
    check_model,
    differentiation,
    model_device,
    select_parameters,
)
from flatkern.results import Estimate, PerSample, standard_error
from flatkern.spectra import Spectrum, squared_singular_values
from flatkern.squared_norms import parameter_squared_norms
from flatkern.structure import holds_entries_of, is_sole_consumer

__all__ = ["Geometry", "LayerGeometry", "geometry"]


@dataclass(frozen=True)
class LayerGeometry:
    """One linear or convolutional layer z = W x^l + b: how the output f depends on its input x^l and its weight."""

    name: str
    max_sensitivity: PerSample
    """σ_max(∂f/∂x^l), [n]."""
    input_norm_sq: Tensor = field(repr=False)
    """‖x^l‖², float64 [n]."""
    weight_gradient_sq: Tensor | None = field(repr=False)
    """‖∂f/∂W_l‖_F², float64 [n]; ``None`` where the weight is not selected, frozen, or used elsewhere too."""
    module: nn.Module = field(repr=False)
    weight_version: int = 0
    """The weight's version counter at the measurement: tells whether it has been written to since."""
    positions: int = 1
    """Positions of a sample that share the weight; 1 for a dense layer on vectors."""
    sole_consumer: bool = True
    """Whether f depends on x^l through this layer alone."""
    takes_model_input: bool = False
    """Whether x^l is the model's input, at most reshaped."""

    @property
    def mls(self) -> float:
        """(1/n) Σ_i σ_max(∂f/∂x^l at x_i)."""
        return self.max_sensitivity.mean


@dataclass(frozen=True)
class Geometry:
    """All quantities of one pass; f has N entries a sample, x has M, J_i = ∂f/∂x at x_i is N × M."""

    sharpness: Estimate
    """S_GN = (1/n) Σ ‖∂f_i/∂θ‖_F²."""
    log_volume: PerSample
    """log dV_i = ½ log det J_i J_iᵀ, [n]."""
    max_sensitivity: PerSample
    """σ_max(J_i), [n]."""
    local_dimensionality: PerSample
    """(Tr C)²/Tr(C²) with C = J_i J_iᵀ, [n], between 1 and N."""
    mls: Estimate
    """(1/n) Σ σ_max(J_i)."""
    nmls: Estimate
    """Σ_l (1/n) Σ_i σ_max(∂f/∂x^l at x_i), over the layers measured."""
    normalized_mls: Estimate
    """(1/n) Σ ‖x_i‖² σ_max(J_i)²."""
    singular_values: Tensor = field(repr=False)
    """σ_j(J_i), descending, float64 [n, min(N, M)]."""
    layers: dict[str, LayerGeometry] = field(repr=False)
    input_norm_sq: Tensor = field(repr=False)
    """‖x_i‖², float64 [n]."""
    outputs: int = 0
    """N, the number of output entries a sample."""
    inputs: int = 0
    """M, the number of input entries a sample."""
    dtype: torch.dtype = torch.float32
    """The precision the Jacobians were computed in."""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    _spectrum: Spectrum = field(repr=False, default=None)  # type: ignore[assignment]

    def top_log_volume(self, rank: int) -> PerSample:
        """Σ_{j ≤ rank} log σ_j(J_i): the log-volume of the ``rank`` largest directions (the published curves: 3)."""
        return self._spectrum.log_volume(rank)


@differentiation()
def geometry(
    model: nn.Module,
    x: Tensor,
    layers: str | Sequence[str] | None = None,
    *,
    params: ParameterSelection = None,
    max_memory: int | None = None,
) -> Geometry:
    """Sharpness, volume, sensitivity and dimensionality of a network, all from one pass.

    N cotangents a sample are pulled back once. At the layers' outputs they give the sharpness by ghost norms, at the
    layers' inputs their N × N Gram matrices (float64) give σ_max(∂f/∂x^l), and at the model's input the singular values
    of J_i, hence log-volume, MLS and participation ratio. Cost: about N + 1 backward passes to the activations (3 to 5
    gradients of the same batch for the paper's MLP at N = 10), whatever the number of layers.

    Args:
        model: any module [n, ...] → [n, ...] whose samples do not interact; left exactly as found.
        x: inputs with the samples on axis 0, floating point.
        layers: names or globs of the linear and convolutional layers for which σ_max(∂f/∂x^l) is wanted (and NMLS
            summed); default all. A layer called again counts again, as ``name#2``.
        params: names or globs of the parameters of the sharpness; default all with ``requires_grad``.
        max_memory: bytes of the working set; default 1 GiB.

    Returns:
        A :class:`Geometry`; every value exact for the given samples, with standard errors over samples. N > M or
        rank-deficient Jacobians give a log-volume of −inf, counted in ``log_volume.rank_deficient``.

    Raises:
        TypeError, ValueError: bad arguments, integer inputs, NaN or Inf, train-mode batch norm or dropout, a random
            forward pass, samples that influence one another, a layer name that matches nothing.

    Source:
        Chen, Recanatesi & Shea-Brown, arXiv 2310.01770.

    Example:
        >>> import torch, flatkern as fk
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> g = fk.geometry(model, torch.randn(16, 6))
        >>> list(g.layers), g.singular_values.shape
        (['0', '2'], torch.Size([16, 3]))
    """
    started = time.perf_counter()
    check_model(model)
    check_input(x, differentiable=True)
    # the parameters' gradients are one quantity among several: a wholly frozen model still has a geometry
    trainable = params is not None or any(p.requires_grad for p in model.parameters())
    parameters = select_parameters(model, params) if trainable else {}
    x = x.to(model_device(model))
    chunks = [
        _measure(model, lin, parameters, layers)
        for lin in linearizations(model, x, parameters, with_input=True, max_memory=budget(max_memory))
    ]
    return _assemble(x, chunks, bool(parameters), time.perf_counter() - started)


@dataclass(frozen=True)
class _Chunk:
    """What one chunk of samples adds."""

    gradient_sq: Tensor
    spectrum: Spectrum
    layer_sigma: Tensor
    """σ_max(∂f/∂x^l), [L, n]."""
    layers: tuple[tuple[str, nn.Module], ...]
    """Names and modules of the calls; the calls themselves would keep the chunk's graph alive."""
    input_norms: tuple[Tensor, ...]
    weight_gradients: tuple[Tensor | None, ...]
    sole: tuple[bool, ...]
    direct: tuple[bool, ...]
    positions: tuple[int, ...]
    outputs: int
    dtype: torch.dtype
    notes: tuple[str, ...]


def _chosen(calls: Sequence[LayerCall], patterns: str | Sequence[str] | None) -> tuple[LayerCall, ...]:
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


def _measure(
    model: nn.Module,
    lin: Linearization,
    parameters: dict[str, nn.Parameter],
    layers: str | Sequence[str] | None,
) -> _Chunk:
    if lin.output.grad_fn is None or lin.input_edge is None:
        raise ValueError("model: its output does not depend differentiably on x")
    _, uses = graph_nodes(lin.output.grad_fn)
    calls = _chosen(lin.calls, layers)
    edges, index = _edges(lin, calls, uses)
    roots = identity_cotangents(lin.output)
    norms = parameter_squared_norms(model, lin, roots, parameters, edges)
    n, outputs = lin.n, len(roots)
    spectra: list[Spectrum] = []
    for row, edge_calls in zip(norms.rows, _group(index, len(edges)), strict=True):
        rows = lin.output.new_zeros(n, outputs, 1) if row is None else row
        only_top = -1 not in edge_calls  # full spectrum for the model's input only
        spectra.append(squared_singular_values(rows, only_top=only_top))
    zero = torch.zeros(n, dtype=torch.float64, device=lin.output.device)
    weight_names = {id(c): names.get("weight") for c, names in lin.coverage.by_call}
    weights = tuple(
        norms.by_parameter[name] if (name := weight_names.get(id(call))) is not None else None
        for call in calls
    )
    top = [spectra[index[i]].top if i in index else zero for i in range(len(calls))]
    return _Chunk(
        gradient_sq=norms.total if parameters else zero,
        spectrum=spectra[index[-1]],
        layer_sigma=torch.stack(top) if top else zero.new_zeros(0, n),
        layers=tuple((call.name, call.module) for call in calls),
        input_norms=tuple(
            call.checked_inputs().reshape(lin.n, -1).double().square().sum(1) for call in calls
        ),
        weight_gradients=weights,
        sole=tuple(is_sole_consumer(lin.output, call) for call in calls),
        direct=tuple(i in index and index[i] == index[-1] for i in range(len(calls))),
        positions=tuple(call.positions for call in calls),
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
    lin: Linearization, calls: Sequence[LayerCall], uses: Counter[Node]
) -> tuple[list[GradientEdge], dict[int, int]]:
    """The places to pull back to, each once: {call (−1: the model's input): place}."""
    assert lin.input_edge is not None
    edges = [lin.input_edge]
    known: dict[tuple[Node, int], int] = {}
    index = {-1: 0}
    for i, call in enumerate(calls):
        if call.name in lin.misplaced:
            raise ValueError(
                f"layers: the samples are not on axis 0 of layer {call.name!r}, so it has no Jacobian a sample; leave "
                "it out by naming the layers wanted"
            )
        edge = call.input_edge
        if edge is None:
            continue
        if holds_entries_of(edge, lin.input_edge, uses):
            index[i] = 0
            continue
        key = (edge.node, edge.output_nr)
        if key not in known:
            known[key] = len(edges)
            edges.append(edge)
        index[i] = known[key]
    return edges, index


def _group(index: dict[int, int], places: int) -> list[set[int]]:
    groups: list[set[int]] = [set() for _ in range(places)]
    for call, place in index.items():
        groups[place].add(call)
    return groups


def _mean(values: Tensor, seconds: float) -> Estimate:
    return Estimate(
        float(values.mean()),
        sample_stderr=standard_error(values),
        num_data=len(values),
        passes=1,
        seconds=seconds,
        per_sample=values,
    )


def _assemble(x: Tensor, chunks: list[_Chunk], has_parameters: bool, seconds: float) -> Geometry:
    first = chunks[0]
    spectrum = Spectrum.concatenate([c.spectrum for c in chunks], min(first.outputs, x[0].numel()))
    sigma = torch.cat([c.layer_sigma for c in chunks], 1)
    seen: Counter[str] = Counter()
    layers: dict[str, LayerGeometry] = {}
    if any(c.layers != first.layers for c in chunks):
        raise ValueError(
            "model: it calls its layers in another order for other samples, so layers cannot be told apart across the "
            "chunks; raise max_memory, or leave those layers out by naming the ones wanted"
        )
    for i, (called, module) in enumerate(first.layers):
        seen[called] += 1
        name = called if seen[called] == 1 else f"{called}#{seen[called]}"
        gradients = [c.weight_gradients[i] for c in chunks]
        layers[name] = LayerGeometry(
            name=name,
            max_sensitivity=PerSample(sigma[i]),
            input_norm_sq=torch.cat([c.input_norms[i] for c in chunks]),
            weight_gradient_sq=None if any(g is None for g in gradients) else torch.cat(gradients),  # type: ignore[arg-type]
            module=module,
            weight_version=module.weight._version if isinstance(module.weight, Tensor) else 0,
            positions=first.positions[i],
            sole_consumer=all(c.sole[i] for c in chunks),
            takes_model_input=all(c.direct[i] for c in chunks),
        )
    input_norm_sq = x.reshape(len(x), -1).double().square().sum(1)
    notes = list(dict.fromkeys(note for c in chunks for note in c.notes))
    if first.outputs > x[0].numel():
        notes.append(
            f"N = {first.outputs} outputs exceed M = {x[0].numel()} inputs: det J Jᵀ = 0, log-volume −inf"
        )
    if not has_parameters:
        notes.append("all parameters are frozen: sharpness is 0 by definition")
    return Geometry(
        sharpness=_mean(torch.cat([c.gradient_sq for c in chunks]), seconds),
        log_volume=spectrum.log_volume(None),
        max_sensitivity=PerSample(spectrum.top),
        local_dimensionality=spectrum.participation_ratio(),
        mls=_mean(spectrum.top, seconds),
        nmls=_mean(sigma.sum(0), seconds),
        normalized_mls=_mean(input_norm_sq * spectrum.top.square(), seconds),
        singular_values=spectrum.singular_values,
        layers=layers,
        input_norm_sq=input_norm_sq,
        outputs=first.outputs,
        inputs=x[0].numel(),
        dtype=first.dtype,
        seconds=seconds,
        notes=tuple(notes),
        _spectrum=spectrum,
    )
