"""One forward pass over a model, with the input and output of every linear and convolutional layer.

Layers are found by forward hooks, removed on exit whatever happens. What hooks do not see (a functional call, a layer
used twice, a parameter used directly) is found by comparing the recorded calls with the autograd graph of the run
itself (:func:`match_parameters`), so that no parameter is left out in silence.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from flatkern.layers.modules import is_layer, positions

__all__ = ["Coverage", "LayerCall", "graph_nodes", "match_parameters", "record_calls"]


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer: what went in, and where its input and output stand in the autograd graph."""

    name: str
    module: nn.Module
    inputs: Tensor
    """The input's value, detached (sharing its storage)."""
    version: int
    input_edge: GradientEdge | None
    """``None`` where the input needs no gradient."""
    output_edge: GradientEdge | None
    output_shape: torch.Size

    def checked_inputs(self) -> Tensor:
        """The input, unless somebody has written into it since the call."""
        if self.inputs._version != self.version:
            raise RuntimeError(
                f"model: the input of layer {self.name!r} was changed in place after the layer used it; its gradient "
                "cannot be computed (make that operation out of place)"
            )
        return self.inputs

    @property
    def positions(self) -> int:
        """How many positions of a sample share the layer's weight."""
        return positions(self.module, self.inputs)


def _edge(tensor: Tensor) -> GradientEdge | None:
    return get_gradient_edge(tensor) if tensor.requires_grad else None


def _first_input(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    value = args[0] if args else kwargs.get("input")
    return value if isinstance(value, Tensor) else None


@contextmanager
def record_calls(model: nn.Module) -> Iterator[list[LayerCall]]:
    """Record every call of a linear or convolutional layer, in order, while the block runs.

    Edges are taken at the call itself: an in-place activation behind the layer changes neither.
    """
    calls: list[LayerCall] = []
    pending: dict[int, list[tuple[Tensor, int, GradientEdge | None]]] = {}

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = _first_input(args, kwargs)
        if inputs is not None:
            pending.setdefault(id(module), []).append((inputs.detach(), inputs._version, _edge(inputs)))

    def make_after(name: str) -> Any:
        def after(module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and pending.get(id(module)):
                inputs, version, edge = pending[id(module)].pop()
                calls.append(LayerCall(name, module, inputs, version, edge, _edge(output), output.shape))

        return after

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if is_layer(module):
                # after the user's own pre-hooks and before their forward hooks: what the layer itself sees
                stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
                after = make_after(name)
                stack.callback(module.register_forward_hook(after, with_kwargs=True, prepend=True).remove)
        yield calls


def graph_nodes(root: Node, without: frozenset[Node] = frozenset()) -> tuple[set[Node], Counter[Node]]:
    """Every node of the autograd graph below ``root``, and how many edges lead to each.

    Args:
        root: where to start.
        without: nodes to treat as absent, which shows what is reached on other ways only.
    """
    if root in without:
        return set(), Counter()
    seen, edges, stack = {root}, Counter[Node](), [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is None or node in without:
                continue
            edges[node] += 1
            if node not in seen:
                seen.add(node)
                stack.append(node)
    return seen, edges


# what a layer's own forward puts between its output and its parameters
_OWN = frozenset(
    {
        "Add",
        "Addmm",
        "Alias",
        "Bmm",
        "Convolution",
        "CudnnConvolution",
        "Expand",
        "Linear",
        "MkldnnConvolution",
        "Mm",
        "Permute",
        "ReshapeAlias",
        "Squeeze",
        "T",
        "ToCopy",
        "Transpose",
        "Unsqueeze",
        "UnsafeView",
        "View",
    }
)


def _own_leaves(call: LayerCall, edges: Counter[Node]) -> set[int]:
    """ids of the leaves that the call's output reaches through its own operations, each used for it alone.

    A weight that is scaled, cast for several calls, or otherwise computed on its way into the layer is not among them.
    """
    assert call.output_edge is not None
    stop = None if call.input_edge is None else call.input_edge.node
    found: set[int] = set()
    stack = [call.output_edge.node]
    while stack:
        node = stack.pop()
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        elif node.name().rstrip("0123456789").removesuffix("Backward") in _OWN:
            stack += [n for n, _ in node.next_functions if n is not None and n is not stop and edges[n] == 1]
    return found


@dataclass(frozen=True)
class Coverage:
    """Which parameter is covered by which recorded call, and which ones no rule can take."""

    by_call: tuple[tuple[LayerCall, dict[str, str]], ...]
    """Calls to apply the rule to, each with {name of the parameter in the module: name in the model}."""
    uncovered: tuple[str, ...]
    """Parameters in the graph that need the exact fall-back: functional, repeated or direct uses, no rule."""
    unused: tuple[str, ...]
    """Parameters that the output does not depend on."""


def match_parameters(
    output: Tensor, calls: list[LayerCall], parameters: Mapping[str, Tensor], ambiguous: frozenset[str]
) -> Coverage:
    """Compare the recorded calls with the autograd graph of ``output``.

    A rule takes a parameter only where the graph uses it exactly once, in exactly one recorded call, whose samples
    lie on axis 0 of its input. ``ambiguous`` names layers for which the last is not so.
    """
    if output.grad_fn is None:
        return Coverage((), (), tuple(parameters))
    nodes, edges = graph_nodes(output.grad_fn)
    for node in nodes:
        if "CheckpointFunctionBackward" in node.name():
            raise ValueError(
                "model: re-entrant activation checkpointing hides its parameters from the graph; pass "
                "use_reentrant=False to torch.utils.checkpoint"
            )
    uses = {id(node.variable): edges[node] for node in nodes if hasattr(node, "variable")}
    reached = [c for c in calls if c.output_edge is not None and c.output_edge.node in nodes]
    owners: dict[int, list[tuple[int, str]]] = {}
    for index, call in enumerate(reached):
        for local in ("weight", "bias"):
            p = getattr(call.module, local, None)
            if isinstance(p, Tensor):
                owners.setdefault(id(p), []).append((index, local))
    own = [_own_leaves(call, edges) for call in reached]
    covered: dict[int, dict[str, str]] = {}
    uncovered, unused = [], []
    for name, p in parameters.items():
        count, owner = uses.get(id(p), 0), owners.get(id(p), [])
        if count == 0:
            unused.append(name)
        elif (
            count == 1
            and len(owner) == 1
            and id(p) in own[owner[0][0]]
            and reached[owner[0][0]].name not in ambiguous
        ):
            index, local = owner[0]
            covered.setdefault(index, {})[local] = name
        else:
            uncovered.append(name)
    return Coverage(
        tuple((reached[index], names) for index, names in covered.items()), tuple(uncovered), tuple(unused)
    )
