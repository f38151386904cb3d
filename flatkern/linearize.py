"""A model linearized on its samples, chunk by chunk: the forward pass, and cotangents pulled back through it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge, saved_tensors_hooks

from flatkern.capture import Coverage, LayerCall, match_parameters, record_calls
from flatkern.chunk_plan import ChunkPlan, note
from flatkern.graph import Graph, Layouts, compare_batches, first_with_samples, shapes_of
from flatkern.placement import check_layouts
from flatkern.problem import DEFAULT_MAX_MEMORY, check_output, preserve_state
from flatkern.reverse import TOGETHER_BYTES, reverse_pays
from flatkern.reverse_rules import held_entries
from flatkern.samples import count_samples, take, tensors_in
from flatkern.uses import Uses, find_uses

__all__ = [
    "Forward",
    "Linearization",
    "budget",
    "check_independence",
    "linearizations",
    "outline",
    "pull_back",
]

Forward = Callable[[nn.Module, Any], tuple[Tensor, Any]]
"""(model, batch) → (output, target)."""

_CACHE_BYTES = 1 << 22
"""Several cotangents go through one batched backward pass while their traffic a layer stays about this small.

Batching saves dispatch, which matters for small work; beyond the cache it only adds memory traffic (measured: twice
slower than a loop on a convolutional network at n = 100).
"""


_SCRATCH_BYTES = 1 << 23


@dataclass(frozen=True)
class Linearization:
    """One forward pass on a chunk of samples, kept for pulling cotangents back."""

    x: Any
    """The chunk's inputs as the model got them: [n, ...], or a batch that ``forward`` understands."""
    start: int
    """Index of the chunk's first sample."""
    output: Tensor
    target: Any
    """What ``forward`` gave beside the output; ``None`` without it."""
    forward: Forward | None
    calls: tuple[LayerCall, ...]
    coverage: Coverage
    uses: Uses
    """Where each parameter enters."""
    input_edge: GradientEdge | None
    """Where the model's input stands in the graph; ``None`` where its Jacobian was not asked for."""
    max_memory: int
    misplaced: frozenset[str]
    """Layers whose input does not have the samples on axis 0."""
    widest: int
    """Entries of the largest output that cotangents are taken at."""
    together: int | None
    """Cotangents that fit into one pass; ``None``: not known."""

    @property
    def n(self) -> int:
        """Number of samples in the chunk."""
        return len(self.output)

    @property
    def scratch(self) -> int:
        """Bytes for temporaries of norms: on a CPU few, as chunks that stay in the cache are no slower."""
        quarter = max(1, self.max_memory // 4)
        return min(quarter, _SCRATCH_BYTES) if self.output.device.type == "cpu" else quarter

    @property
    def samples(self) -> slice:
        """The chunk's place among all samples."""
        return slice(self.start, self.start + self.n)


@dataclass(frozen=True)
class _Run:
    """One forward pass with its graph."""

    output: Tensor
    target: Any
    calls: list[LayerCall]
    input_edge: GradientEdge | None
    graph: Graph
    saved_bytes: int = 0


def budget(max_memory: int | None) -> int:
    """The working-set budget in bytes; the default where none is given."""
    if max_memory is None:
        return DEFAULT_MAX_MEMORY
    if not isinstance(max_memory, int) or max_memory <= 0:
        raise ValueError(f"max_memory: expected a positive number of bytes, got {max_memory!r}")
    return max_memory


def _run(model: nn.Module, x: Any, with_input: bool, forward: Forward | None) -> _Run:
    edge, target = None, None
    with ExitStack() as stack:
        calls = stack.enter_context(record_calls(model))
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(_stepwise())
        if forward is not None:
            output, target = forward(model, x)
        else:
            # a clone goes in, as the model may write into its input (and inference tensors cannot be differentiated)
            value = (x.clone() if x.is_inference() else x.detach()).requires_grad_(with_input).clone()
            edge = get_gradient_edge(value) if with_input else None
            output = model(value)
    output = check_output(model, output, count_samples(x))
    return _Run(output, target, calls, edge, Graph(output))


@contextmanager
def _stepwise() -> Iterator[None]:
    """Recurrences step by step: the fused ones hide the uses of their weights."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*TF32.*")  # told by the mere setting of flags
        with torch.backends.cudnn.flags(enabled=False), torch.backends.mkldnn.flags(enabled=False):
            yield


def _probe(
    model: nn.Module, x: Any, parameters: Mapping[str, Tensor], with_input: bool, forward: Forward | None
) -> _Run:
    """A forward pass on a few samples, with the bytes it saves."""
    saved: dict[int, int] = {}
    owned = {p.untyped_storage().data_ptr() for p in parameters.values()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself would keep its own graph alive

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        run = _run(model, x, with_input, forward)
    return _Run(run.output, run.target, run.calls, run.input_edge, run.graph, sum(saved.values()))


def outline(model: nn.Module, x: Any, forward: Forward | None) -> _Run:
    """A forward pass whose graph keeps no tensors: for its operations, their shapes, and the output's values."""
    nothing: Any = None
    with saved_tensors_hooks(lambda _: nothing, lambda _: nothing):
        run = _run(model, x, False, forward)
    run.calls.clear()  # they hold the layers' inputs
    return run


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


def check_independence(few: Tensor, among_others: Tensor) -> None:
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


def _bytes_of(batch: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(batch))


def _widths(nodes: Iterable[Node]) -> list[int]:
    """Entries of the outputs at which cotangents are taken."""
    return [shapes_of(node)[0].numel() for node in nodes]


class _Chunks:
    """What is known about a model from a few samples: how many fit at a time, and where they lie."""

    def __init__(
        self,
        model: nn.Module,
        x: Any,
        parameters: Mapping[str, Tensor],
        with_input: bool,
        max_memory: int,
        forward: Forward | None,
    ) -> None:
        self._model, self._x, self._parameters = model, x, parameters
        self._with_input, self._max_memory, self._forward = with_input, max_memory, forward
        self.n = count_samples(x)
        self.ambiguous: frozenset[str] = frozenset()
        self._layouts: Layouts | None = None
        self._few: _Run | None = None
        if self.n > 1:
            with preserve_state(model):
                self._few = _probe(model, take(x, slice(0, 2)), parameters, with_input, forward)

    def plan(self, cotangents: int | None, own_roots: bool, keep_cotangents: bool) -> ChunkPlan | None:
        """How samples are chunked; ``None`` for a single one."""
        if self._few is None:
            return None
        few = self._few
        inputs = [call.inputs.numel() for call in few.calls]
        sites = first_with_samples(few.graph, self._parameters, None)
        widths = _widths(sites) or [0]
        outputs = few.output[0].numel()
        kept = sum(widths) if keep_cotangents else 0
        count = outputs if cotangents is None else cotangents
        reverse = not keep_cotangents and reverse_pays(few.output, count)
        if reverse:
            widths = [held_entries(few.graph, node, count) for node in sites]
        together = _together(few.output.device, self._max_memory)
        if self._with_input:
            kept += sum(inputs)
        return ChunkPlan(
            max_memory=self._max_memory,
            saved=few.saved_bytes // 2,
            given=min(few.saved_bytes // 2, _bytes_of(take(self._x, slice(0, 1)))),
            entry=few.output.element_size(),
            outputs=outputs,
            sites=sum(widths) // 2,
            widest=max([*widths, few.output.numel()]) // 2,
            cotangents=count,
            at_once=max(together, TOGETHER_BYTES) if reverse else together,
            reverse=reverse,
            roots=3 if own_roots else 0,
            kept=kept // 2,
            parameters=sum(p.numel() * p.element_size() for p in self._parameters.values()),
            frugal=not (self._with_input or keep_cotangents),
        )

    def linearize(self, start: int, stop: int, together: int | None) -> Linearization:
        """The chunk of these samples."""
        part = self._x if (start, stop) == (0, self.n) else take(self._x, slice(start, stop))
        with preserve_state(self._model):
            run = _run(self._model, part, self._with_input, self._forward)
        n = stop - start
        if self._few is not None:
            self._inspect(part, run, n)
        layouts = self._layouts
        doubtful = self.ambiguous | _misplaced(run.calls, n)
        if n > 1 and (layouts is None or not layouts.match(run.graph)):
            # other operations than in the runs that were compared: nothing is known
            used = [name for name, p in self._parameters.items() if id(p) in run.graph.leaves]
            uses = Uses({}, tuple(used), tuple(self._parameters.keys() - used), frozenset())
        else:
            known = None if n == 1 else layouts
            uses = find_uses(run.graph, self._parameters, known, n)
        return Linearization(
            x=part,
            start=start,
            output=run.output,
            target=run.target,
            forward=self._forward,
            calls=tuple(run.calls),
            coverage=match_parameters(run.output, run.calls, self._parameters, doubtful),
            uses=uses,
            input_edge=run.input_edge,
            max_memory=self._max_memory,
            misplaced=doubtful,
            widest=max([run.output.numel(), *_widths(uses.sites)]),
            together=together,
        )

    def _inspect(self, part: Any, run: _Run, n: int) -> None:
        """With the first chunk: whether samples influence one another, and where they lie."""
        assert self._few is not None
        few, self._few = self._few, None
        model, output = self._model, run.output.detach()
        with preserve_state(model):
            if n <= 2:  # another number of samples, to tell their axis from others
                other = outline(model, take(self._x, [0, 1, 0]), self._forward)
                first = outline(model, take(self._x, slice(0, 1)), self._forward).output
            else:
                other, first = run, few.output
        check_independence(first.detach(), output)
        if n > 2:  # what only flows forward along the batch never reaches its first samples
            with preserve_state(model):
                last = outline(model, take(part, slice(n - 1, n)), self._forward).output
            check_independence(last.detach(), output[-1:])
        self._layouts = compare_batches(few.graph, 2, other.graph, len(other.output))
        # Shapes cannot tell a sequence axis of the same length, or samples in another order, from the samples' axis.
        # Each sample is tried: one that reads only the matching position would pass alone.
        reached = [(c.name, c.output_edge) for c in few.calls if c.output_edge is not None]
        edges = [edge for _, edge in reached]
        found = check_layouts(few.output, few.graph, self._layouts, self._parameters, edges)
        self.ambiguous = frozenset(reached[index][0] for index in found)


def linearizations(
    model: nn.Module,
    x: Any,
    parameters: Mapping[str, Tensor],
    *,
    with_input: bool,
    max_memory: int,
    cotangents: int | None = None,
    own_roots: bool = False,
    keep_cotangents: bool = False,
    forward: Forward | None = None,
) -> Iterator[Linearization]:
    """Forward passes over all samples, in chunks whose pull-back of ``cotangents`` vectors fits ``max_memory``.

    Args:
        model: in eval mode as far as it matters (:func:`flatkern.problem.check_model` has passed).
        x: [n, ...], checked; never written to. With ``forward`` any batch that it understands.
        parameters: the selected ones, by name.
        with_input: also make the input's (and each layer input's) cotangents available.
        max_memory: bytes of the working set beside model and data.
        cotangents: vectors pulled back a sample; ``None``: as many as a sample's output has entries.
        own_roots: whether every sample has cotangents of its own (the identity is shared).
        keep_cotangents: whether those at all sites are held at once.
        forward: (model, batch) → (output, target), instead of calling the model.

    Raises:
        ValueError: one sample's input rows alone exceed ``max_memory``; non-finite or random outputs.
    """
    chunks = _Chunks(model, x, parameters, with_input, max_memory, forward)
    plan = chunks.plan(cotangents, own_roots, keep_cotangents)
    size, together = 1, None
    if plan is not None:
        size, together = plan.samples(chunks.n), plan.block(chunks.n)
        note(plan)
    for start in range(0, chunks.n, size):
        lin = chunks.linearize(start, min(start + size, chunks.n), together)
        yield lin
        del lin  # before the next chunk is linearized


def _together(device: torch.device, max_memory: int) -> int:
    """Bytes of the widest place up to which several cotangents go through one pass."""
    return _CACHE_BYTES if device.type == "cpu" else max_memory // 16


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
    cache = _together(roots.device, lin.max_memory)
    block = max(1, min(k, lin.together or k, cache // max(1, lin.widest * roots.element_size())))
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
