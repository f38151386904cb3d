"""A model linearized on its samples, chunk by chunk: the forward pass, and cotangents pulled back through it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge, saved_tensors_hooks

from flatkern.capture import Coverage, LayerCall, match_parameters, record_calls
from flatkern.problem import DEFAULT_MAX_MEMORY, check_output, preserve_state

__all__ = ["Linearization", "budget", "linearizations", "pull_back"]

_CACHE_BYTES = 1 << 22
"""Several cotangents go through one batched backward pass while their traffic a layer stays about this small.

Batching saves dispatch, which matters for small work; beyond the cache it only adds memory traffic (measured: twice
slower than a loop on a convolutional network at n = 100).
"""


@dataclass(frozen=True)
class Linearization:
    """One forward pass on a chunk of samples, kept for pulling cotangents back."""

    x: Tensor
    """The chunk's inputs as the model got them, [n, ...]."""
    start: int
    """Index of the chunk's first sample."""
    output: Tensor
    calls: tuple[LayerCall, ...]
    coverage: Coverage
    input_edge: GradientEdge | None
    """Where the model's input stands in the graph; ``None`` where its Jacobian was not asked for."""
    max_memory: int
    misplaced: frozenset[str]
    """Layers whose input does not have the samples on axis 0."""

    @property
    def n(self) -> int:
        """Number of samples in the chunk."""
        return len(self.output)

    @property
    def samples(self) -> slice:
        """The chunk's place among all samples."""
        return slice(self.start, self.start + self.n)


@dataclass(frozen=True)
class _Footprint:
    """What one sample needs, from a forward pass on a few of them."""

    saved_bytes: int
    widest: int
    held: int
    outputs: int
    ambiguous: frozenset[str]
    output: Tensor


def budget(max_memory: int | None) -> int:
    """The working-set budget in bytes; the default where none is given."""
    if max_memory is None:
        return DEFAULT_MAX_MEMORY
    if not isinstance(max_memory, int) or max_memory <= 0:
        raise ValueError(f"max_memory: expected a positive number of bytes, got {max_memory!r}")
    return max_memory


def _forward(
    model: nn.Module, x: Tensor, with_input: bool
) -> tuple[Tensor, list[LayerCall], GradientEdge | None]:
    # a clone goes in, as the model may write into its input (and inference tensors cannot be differentiated)
    value = (x.clone() if x.is_inference() else x.detach()).requires_grad_(with_input).clone()
    edge = get_gradient_edge(value) if with_input else None
    with record_calls(model) as calls:
        output = model(value)
    return check_output(model, output, len(x)), calls, edge


def _probe(
    model: nn.Module, x: Tensor, few: int, parameters: Mapping[str, Tensor], with_input: bool
) -> _Footprint:
    """Measure a forward pass on ``few`` samples: bytes it saves, sizes of layers, and where samples lie."""
    saved: dict[int, int] = {}
    owned = {p.untyped_storage().data_ptr() for p in parameters.values()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would keep its own graph alive

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output, calls, _ = _forward(model, x[:few], with_input)
    held = sum(c.output_shape.numel() + (c.inputs.numel() if with_input else 0) for c in calls)
    widest = max((max(c.output_shape.numel(), c.inputs.numel()) for c in calls), default=0)
    misplaced = frozenset(c.name for c in calls if c.inputs.shape[0] != few or c.output_shape[0] != few)
    misplaced |= _touched_by_others(output, calls)
    return _Footprint(
        sum(saved.values()) // few,
        max(widest, x[:few].numel()) // few,
        held // few,
        output[0].numel(),
        misplaced,
        output.detach(),
    )


def _touched_by_others(output: Tensor, calls: Sequence[LayerCall]) -> frozenset[str]:
    """Layers where the cotangent of one sample alone shows in another sample's row of axis 0.

    Shapes cannot tell a sequence axis of the same length, or samples in another order, from the samples' axis. Each
    sample is tried: one that reads only the matching position would pass alone.
    """
    reached = [(c.name, c.output_edge) for c in calls if c.output_edge is not None]
    strays: list[tuple[str, Tensor]] = []
    if output.grad_fn is None or not reached:
        return frozenset()
    weights = torch.arange(1, output[0].numel() + 1, dtype=torch.float32, device=output.device).cos()
    for sample in range(len(output)):
        root = torch.zeros_like(output)
        root[sample] = weights.reshape(root[sample].shape)  # uneven, so that nothing cancels
        edges = [edge for _, edge in reached]
        found = torch.autograd.grad(output, edges, root, retain_graph=True, allow_unused=True)
        for (name, _), g in zip(reached, found, strict=True):
            if g is not None:
                strays += [(name, part.abs().sum()) for part in (g[:sample], g[sample + 1 :])]
    if not strays:
        return frozenset()
    flags = (torch.stack([stray for _, stray in strays]) != 0).tolist()  # one synchronization for all layers
    return frozenset(name for (name, _), flag in zip(strays, flags, strict=True) if flag)


def _misplaced(calls: Sequence[LayerCall], n: int) -> frozenset[str]:
    """Layers whose input or output does not have the samples on axis 0, or is not batched as the layer has it."""
    names = set()
    for call in calls:
        convolution_dims = len(getattr(call.module, "kernel_size", ()))
        batched = convolution_dims == 0 or call.inputs.ndim == convolution_dims + 2
        if (
            call.inputs.shape[:1] != (n,)
            or call.output_shape[:1] != (n,)
            or not batched
            or call.inputs.ndim < 2
        ):
            names.add(call.name)
    return frozenset(names)


def _check_independence(few: Tensor, among_others: Tensor) -> None:
    """Refuse a model whose output for a sample depends on the rest of its batch."""
    common = min(len(few), len(among_others))
    few, among_others = few[:common], among_others[:common]
    if few.shape == among_others.shape:
        # products of another shape round otherwise; mixing samples changes far more than this
        tolerance = min(100 * torch.finfo(few.dtype).eps ** 0.75, 0.05) * among_others.abs().max()
        if bool(((few - among_others).abs() <= tolerance).all()):
            return
    raise ValueError(
        "model: a sample's output changes with the other samples of its batch, so it has no Jacobian a sample; axis 0 "
        "must be the samples (batch_first=True for attention and recurrent layers), and nothing may mix them"
    )


def linearizations(
    model: nn.Module,
    x: Tensor,
    parameters: Mapping[str, Tensor],
    *,
    with_input: bool,
    max_memory: int,
    cotangents: int | None = None,
    own_roots: bool = False,
) -> Iterator[Linearization]:
    """Forward passes over all samples, in chunks whose pull-back of ``cotangents`` vectors fits ``max_memory``.

    Args:
        model: in eval mode as far as it matters (:func:`flatkern.problem.check_model` has passed).
        x: [n, ...], checked; never written to.
        parameters: the selected ones, by name.
        with_input: also make the input's (and each layer input's) cotangents available.
        max_memory: bytes of the working set beside model and data.
        cotangents: vectors pulled back a sample; ``None``: as many as a sample's output has entries.
        own_roots: whether every sample has cotangents of its own (the identity is shared).

    Raises:
        ValueError: one sample's input rows alone exceed ``max_memory``; non-finite or random outputs.
    """
    n = len(x)
    ambiguous: frozenset[str] = frozenset()
    chunk = n
    foot = None
    if n > 1:
        with preserve_state(model):
            foot = _probe(model, x, 2, parameters, with_input)
            alone = _forward(model, x[:1], False)[0] if n == 2 else foot.output
        ambiguous = foot.ambiguous
        count = foot.outputs if cotangents is None else cotangents
        size = x.element_size() if x.is_floating_point() else 4
        kept = count * foot.held if with_input else foot.held
        rooted = 3 * count * foot.outputs if own_roots else 0
        per_sample = foot.saved_bytes + size * (2 * kept + 4 * foot.widest + rooted)
        chunk = max(1, min(n, max_memory // max(per_sample, 1)))
    for start in range(0, n, chunk):
        part = x[start : start + chunk]
        with preserve_state(model):
            output, calls, edge = _forward(model, part, with_input)
        if foot is not None and start == 0:
            _check_independence(alone.detach(), output.detach())
            if len(part) > 2:  # what only flows forward along the batch never reaches its first samples
                with preserve_state(model):
                    last = _forward(model, part[-1:], False)[0]
                _check_independence(last.detach(), output.detach()[-1:])
        doubtful = ambiguous | _misplaced(calls, len(part))
        coverage = match_parameters(output, calls, parameters, doubtful)
        yield Linearization(part, start, output, tuple(calls), coverage, edge, max_memory, doubtful)
        del output, calls, coverage  # before the next chunk is linearized


def pull_back(
    lin: Linearization, roots: Tensor, edges: Sequence[GradientEdge]
) -> Iterator[tuple[slice, tuple[Tensor | None, ...]]]:
    """Pull cotangents of the output back to places in the graph.

    Args:
        lin: the linearization (its graph is kept).
        roots: cotangents [K, n, *output].
        edges: where to.

    Yields:
        A range of k, and for each edge the cotangents [k, n, ...] (``None`` where the output does not depend on it).
        Blocks are batched (one vectorized backward pass) while the work is small, single otherwise.
    """
    k = len(roots)
    widest = max((c.output_shape.numel() for c in lin.calls), default=lin.output.numel())
    cache = _CACHE_BYTES if roots.device.type == "cpu" else lin.max_memory // 16
    block = max(1, min(k, cache // max(1, widest * roots.element_size())))
    for start in range(0, k, block):
        part = roots[start : start + block]
        found: tuple[Tensor | None, ...] | None = None
        if len(part) > 1:
            found = _batched_gradient(lin.output, edges, part)
            if found is None:  # an operation of this model cannot be batched: one at a time from here on
                yield from (
                    (slice(j, j + 1), _single_gradient(lin.output, edges, roots[j])) for j in range(start, k)
                )
                return
        else:
            found = _single_gradient(lin.output, edges, part[0])
        yield slice(start, start + len(part)), found


def _single_gradient(
    output: Tensor, edges: Sequence[GradientEdge], root: Tensor
) -> tuple[Tensor | None, ...]:
    grads = torch.autograd.grad(output, edges, root, retain_graph=True, allow_unused=True)
    return tuple(None if g is None else g.unsqueeze(0) for g in grads)


def _batched_gradient(
    output: Tensor, edges: Sequence[GradientEdge], roots: Tensor
) -> tuple[Tensor | None, ...] | None:
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*performance drop.*")  # slower, still right
            return torch.autograd.grad(
                output, edges, roots, retain_graph=True, allow_unused=True, is_grads_batched=True
            )
    except RuntimeError:
        return None
