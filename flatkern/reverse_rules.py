"""How K cotangents of a sample go back through one operation of the autograd graph, for :mod:`flatkern.reverse`.

Cotangents are [n, K, ...]: the samples outside, as the norms and rows made of them are by sample. An operation's own
backward formula is used on n·K images, with what it has saved for each sample.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from flatkern.graph import VIEWS, Graph, shapes_of
from flatkern.kernels._scattered_conv import ConvShape, runs_compiled
from flatkern.layers.rule import operation
from flatkern.scattered import Scattered, kernel_pays

__all__ = ["Pulled", "conv_shape", "held_entries", "operands", "pull_through", "scatters"]

Pulled = Tensor | Scattered
"""Cotangents [n, K, ...] of one place."""
_Back = Callable[[Any, Pulled, torch.Size], Pulled]

_ELEMENTWISE = frozenset(
    {"Elu", "Gelu", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyRelu", "LogSigmoid", "Mish", "Sigmoid", "Silu",
     "Softplus", "Tanh", "Threshold"}
)  # fmt: skip


@dataclass(frozen=True)
class _Rule:
    operands: tuple[int, ...]
    """Which inputs are computed from the samples; a path to the source through another one has no rule."""
    back: _Back


def operands(node: Node, n: int) -> tuple[int, ...] | None:
    """The inputs of an operation that a rule pulls back to; ``None`` where none applies.

    A rule keeps every sample's entries together along axis 0.
    """
    rule = _RULES.get(operation(node))
    shapes = shapes_of(node)
    if rule is None or not shapes or not shapes[0] or shapes[0][0] != n or not _applies(node, n):
        return None
    return rule.operands


def pull_through(node: Node, operand: int, g: Pulled) -> Pulled:
    """Cotangents of an operation's output → those of one input."""
    below, number = node.next_functions[operand]
    assert below is not None
    return _RULES[operation(node)].back(node, g, shapes_of(below)[number])


def _applies(node: Any, n: int) -> bool:
    name = operation(node)
    inputs = [shapes_of(below)[number] for below, number in node.next_functions if below is not None]
    if name in VIEWS or name == "Clone":
        return bool(inputs) and len(inputs[0]) > 0 and inputs[0][0] == n and name != "AsStrided"
    if name == "Add":
        return getattr(node, "_saved_alpha", 1) in (1, None) and all(
            shape == shapes_of(node)[0] for shape in inputs
        )
    if name == "Mean":
        return 0 not in _axes(node, inputs[0])
    if name == "NativeBatchNorm":
        return not node._saved_training
    if name == "Convolution":
        return len(shapes_of(node)[0]) > 2
    return not (name == "MaxPool2DWithIndices" and len(shapes_of(node)[0]) != 4)


def _dense(g: Pulled) -> Tensor:
    return g.dense if isinstance(g, Scattered) else g


def _reshaped(_node: Any, g: Pulled, shape: torch.Size) -> Pulled:
    value = _dense(g)
    return value.reshape(*value.shape[:2], *shape[1:])


def _same(_node: Any, g: Pulled, _shape: torch.Size) -> Pulled:
    return g


def _addmm(node: Any, g: Pulled, _shape: torch.Size) -> Pulled:
    found = _dense(g) @ node._saved_mat2.detach().mT
    alpha = getattr(node, "_saved_alpha", 1)
    return found if alpha == 1 else found * alpha


def _elementwise(node: Any, g: Pulled, shape: torch.Size) -> Pulled:
    like = g.values if isinstance(g, Scattered) else g
    slope = node(torch.ones(shape, dtype=like.dtype, device=like.device))
    return g.times(slope) if isinstance(g, Scattered) else g * slope[:, None]


def _relu(node: Any, g: Pulled, _shape: torch.Size) -> Pulled:
    kept = node._saved_result.detach() > 0
    return g.where(kept) if isinstance(g, Scattered) else torch.where(kept[:, None], g, 0)


def _mean(node: Any, g: Pulled, shape: torch.Size) -> Pulled:
    value = _dense(g)
    axes = _axes(node, shape)
    count = torch.Size([shape[a] for a in axes]).numel()
    if not node._saved_keepdim:
        for axis in axes:
            value = value.unsqueeze(axis + 1)
    return (value / count).expand(*value.shape[:2], *shape[1:])


def _axes(node: Any, shape: torch.Size) -> list[int]:
    dims = getattr(node, "_saved_dim", None)
    if not dims:
        return list(range(len(shape)))
    signed = [d - (1 << 64) if d >= 1 << 63 else d for d in dims]  # saved as unsigned numbers
    return sorted(d % len(shape) for d in signed)


def _batch_norm(node: Any, g: Pulled, shape: torch.Size) -> Pulled:
    factor = (node._saved_running_var.detach() + node._saved_eps).rsqrt()
    if node._saved_weight is not None:
        factor = factor * node._saved_weight.detach()
    slope = factor.to(g.values.dtype if isinstance(g, Scattered) else g.dtype)
    if isinstance(g, Scattered):
        return Scattered(g.values * slope[:, None], g.index, g.plane)
    return g * slope.reshape(-1, *[1] * (len(shape) - 2))


def _max_pool(node: Any, g: Pulled, shape: torch.Size) -> Pulled:
    value = _dense(g).flatten(3)
    index = node._saved_result1.detach().flatten(2)
    found = Scattered(value, index, (shape[2], shape[3]))
    return found if _disjoint(node) else found.dense


def _disjoint(node: Any) -> bool:
    kernel = node._saved_kernel_size
    stride = node._saved_stride or kernel
    steps = zip(stride, kernel, node._saved_dilation, strict=True)
    return all(s >= k and d == 1 for s, k, d in steps)


def held_entries(graph: Graph, node: Any, k: int) -> int:
    """Entries of what is held of one cotangent at an operation's output, where K go together."""
    shape = shapes_of(node)[0]
    above: Any = node
    while operation(node) == "Convolution" and len(shape) == 4:
        users = graph.consumers.get(above, ())
        if len(users) != 1:
            break
        above = users[0].node
        if operation(above) == "MaxPool2DWithIndices" and _disjoint(above):
            inputs = node._saved_input
            known, pooled = conv_shape(node, inputs.shape), shapes_of(above)[0]
            if known is None or not runs_compiled(inputs) or not _pays(k, pooled, known, inputs):
                break
            return pooled.numel()
        if operation(above) not in _ELEMENTWISE | {"Relu", "NativeBatchNorm"}:
            break
    return shape.numel()


def scatters(node: Any, k: int) -> bool:
    """Whether an operation is a pool behind a convolution that the kernels take, with K cotangents together."""
    if operation(node) != "MaxPool2DWithIndices" or not _disjoint(node):
        return False
    below: Any = node.next_functions[0][0]
    while below is not None and operation(below) in _ELEMENTWISE | {"Relu", "NativeBatchNorm"}:
        below = below.next_functions[0][0]
    if below is None or operation(below) != "Convolution" or len(shapes_of(below)[0]) != 4:
        return False
    inputs = below._saved_input
    known = conv_shape(below, inputs.shape)
    return known is not None and runs_compiled(inputs) and _pays(k, shapes_of(node)[0], known, inputs)


def _pays(k: int, pooled: torch.Size, shape: ConvShape, inputs: Tensor) -> bool:
    return kernel_pays(inputs.dtype, k, pooled[2] * pooled[3], shape, inputs.shape[1])


def _average_pool(node: Any, g: Pulled, shape: torch.Size) -> Pulled:
    value = _dense(g)
    n, k = value.shape[:2]
    found: Tensor = torch.ops.aten.avg_pool2d_backward(
        value.flatten(0, 1), _nothing(value, n * k, shape), node._saved_kernel_size, node._saved_stride,
        node._saved_padding, node._saved_ceil_mode, node._saved_count_include_pad, node._saved_divisor_override,
    )  # fmt: skip
    return found.reshape(n, k, *shape[1:])


def _adaptive_pool(_node: Any, g: Pulled, shape: torch.Size) -> Pulled:
    value = _dense(g)
    n, k = value.shape[:2]
    found: Tensor = torch.ops.aten._adaptive_avg_pool2d_backward(
        value.flatten(0, 1), _nothing(value, n * k, shape)
    )
    return found.reshape(n, k, *shape[1:])


def _nothing(like: Tensor, images: int, shape: torch.Size) -> Tensor:
    """A tensor for its shape alone, without memory."""
    return like.new_empty(1).expand(images, *shape[1:])


def conv_shape(node: Any, inputs: torch.Size) -> ConvShape | None:
    """Of a convolution node that the kernels for scattered cotangents take."""
    if len(inputs) != 4 or node._saved_groups != 1 or node._saved_transposed:
        return None
    out = shapes_of(node)[0]

    def pair(values: Any) -> tuple[int, int]:
        found = tuple(values) * (2 if len(values) == 1 else 1)
        return int(found[0]), int(found[1])

    return ConvShape(
        (inputs[2], inputs[3]),
        (out[2], out[3]),
        pair(node._saved_stride),
        pair(node._saved_padding),
        pair(node._saved_dilation),
    )


def _convolution(node: Any, g: Pulled, shape: torch.Size) -> Pulled:
    weight = node._saved_weight.detach()
    if isinstance(g, Scattered):
        known = conv_shape(node, shape)
        if known is not None and g.pays(known, shape[1]):
            return g.input(weight, known)
    value = _dense(g)
    n, k = value.shape[:2]
    images, like = value.flatten(0, 1), _nothing(value, n * k, shape)
    if images.ndim == 4 and images.device.type == "cpu":
        # the layout that oneDNN's backward pass is fastest in, by up to a half
        images = images.contiguous(memory_format=torch.channels_last)
        like = value.new_empty(n * k, *shape[1:]).contiguous(memory_format=torch.channels_last)
    found: Tensor = torch.ops.aten.convolution_backward(
        images, like, weight, None, node._saved_stride, node._saved_padding, node._saved_dilation,
        node._saved_transposed, node._saved_output_padding, node._saved_groups, (True, False, False),
    )[0]  # fmt: skip
    return found.contiguous().reshape(n, k, *shape[1:])


_RULES: dict[str, _Rule] = {
    "AdaptiveAvgPool2D": _Rule((0,), _adaptive_pool),
    "Add": _Rule((0, 1), _same),
    "Addmm": _Rule((1,), _addmm),
    "AvgPool2D": _Rule((0,), _average_pool),
    "Clone": _Rule((0,), _same),
    "Convolution": _Rule((0,), _convolution),
    "MaxPool2DWithIndices": _Rule((0,), _max_pool),
    "Mean": _Rule((0,), _mean),
    "Mm": _Rule((0,), _addmm),
    "NativeBatchNorm": _Rule((0,), _batch_norm),
    "Relu": _Rule((0,), _relu),
    **{name: _Rule((0,), _elementwise) for name in _ELEMENTWISE},
    **{name: _Rule((0,), _reshaped) for name in VIEWS},
}
