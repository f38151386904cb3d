"""The matrix products and convolutions that a Hessian-vector product cannot do without, timed on the same shapes.

A layer z = W a with output cotangent g needs, for a tangent Ẇ (and ȧ from below, ġ from above):

    ż = W ȧ + Ẇ a        tangent forward
    Wᵀ ġ + Ẇᵀ g          tangent backward, to the layer below
    ġ aᵀ + g ȧᵀ          tangent backward, to the weight

six products where a gradient needs three; the first layer needs Ẇ a and ġ aᵀ only. An attention head needs twelve
where a gradient needs six. Nothing elementwise is counted, nor any flattening. Several vectors: the products that
share a factor over the vectors (W ȧ, Ẇ a, Wᵀ ġ, ġ aᵀ, g ȧᵀ) are one product of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.operator_problems import Attention

Product = Callable[[], object]


def linear(layer: nn.Linear, a: Tensor, first: bool, k: int) -> list[Product]:
    """Products of a linear layer for k vectors."""
    a = a.reshape(-1, a.shape[-1])
    n, width = len(a), layer.out_features
    w = layer.weight.detach()
    g, many_g = torch.randn(n, width), torch.randn(k * n, width)
    ws = torch.randn(k * width, layer.in_features)
    columns = torch.randn(n, k * width)
    products: list[Product] = [lambda: a @ ws.mT, lambda: columns.mT @ a]
    if not first:
        many_a, wide_a = torch.randn(k * n, layer.in_features), torch.randn(n, k * layer.in_features)
        each = ws.view(k, width, layer.in_features)
        products += [
            lambda: many_a @ w.mT,
            lambda: many_g @ w,
            lambda: g @ each if k > 1 else g @ ws,
            lambda: g.mT @ wide_a,
        ]
    return products


def convolution(layer: nn.Conv2d, a: Tensor, first: bool, k: int) -> list[Product]:
    """Products of a convolution; several vectors one by one."""
    w = layer.weight.detach()
    assert isinstance(layer.padding, tuple)
    arguments = (list(layer.stride), list(layer.padding), list(layer.dilation))
    g = torch.randn_like(F.conv2d(a, w, None, *arguments))

    def forward() -> object:
        return F.conv2d(a, w, None, *arguments)

    def backward(to_input: bool, to_weight: bool) -> object:
        return torch.ops.aten.convolution_backward(
            g, a, w, None, *arguments, False, [0, 0], layer.groups, [to_input, to_weight, False]
        )

    products: list[Product] = [forward, lambda: backward(False, True)]
    if not first:
        # both parts asked for at once, as a library may share work between them
        products = [forward, forward, lambda: backward(True, True), lambda: backward(True, True)]
    return products * k


def attention(layer: Attention, x: Tensor, k: int) -> list[Product]:
    """Products of the scores and the mixing; several vectors one by one."""
    n, positions, width = x.shape
    q = torch.randn(n * layer.heads, positions, width // layer.heads)
    s = torch.randn(n * layer.heads, positions, positions)
    # scores and the cotangent of the weights: [T, d] × [d, T]; the rest [T, T] × [T, d]
    return (
        [lambda: torch.bmm(q, q.mT)] * 4 * k
        + [lambda: torch.bmm(s, q)] * 4 * k
        + [lambda: torch.bmm(s.mT, q)] * 4 * k
    )


def floor(model: nn.Module, x: Tensor, vectors: int = 1) -> Callable[[], None]:
    """A function that does exactly these products for one batch of inputs x."""
    products: list[Product] = []
    seen = 0

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], _: object) -> None:
        nonlocal seen
        a = inputs[0].detach()
        if isinstance(layer, nn.Linear):
            products.extend(linear(layer, a, seen == 0, vectors))
        elif isinstance(layer, nn.Conv2d):
            products.extend(convolution(layer, a, seen == 0, vectors))
        elif isinstance(layer, Attention):
            products.extend(attention(layer, a, vectors))
        seen += 1

    kinds = (nn.Linear, nn.Conv2d, Attention)
    handles = [m.register_forward_hook(record) for m in model.modules() if isinstance(m, kinds)]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()

    def run() -> None:
        with torch.no_grad():
            for product in products:
                product()

    return run
