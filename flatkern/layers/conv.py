"""Convolutions and transposed convolutions of any dimension, as one dense map applied to every patch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flatkern.kernels._ghost_norm import windows
from flatkern.kernels._scattered_conv import ConvShape
from flatkern.layers.outer import Features, OuterTerm
from flatkern.layers.rule import Cotangent, Opened, Site, register
from flatkern.layers.term import DenseTerm, Term
from flatkern.scattered import Scattered

__all__ = ["patches", "shifted"]


def patches(
    inputs: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The patches a convolution multiplies its weight with: [n, C, *size] → [n, groups, T, C/groups · prod(kernel)].

    Zero padding on both sides; positions T are in the order of the convolution's output.
    """
    n, channels, dims = inputs.shape[0], inputs.shape[1], len(kernel)
    view = windows(inputs, kernel, stride, padding, dilation, groups)
    # [n, groups, C/groups, *kernel, *positions]: a strided copy, several times faster than im2col
    order = (0, 1, *range(2 + dims, 3 + 2 * dims), *range(2, 2 + dims))
    width = channels // groups * torch.Size(kernel).numel()
    return view.permute(order).reshape(n, groups, width, -1).mT


def shifted(
    inputs: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> list[Tensor]:
    """The transposed patches, one [n · groups, d, T] an index of the kernel along its first axis (stride 1 there).

    Their rows together are those of the patches. Only the other axes are unfolded: along the first one a patch is a
    shift of the next, so all are views of one copy, smaller than the patches by that axis of the kernel.
    """
    n, channels, dims = inputs.shape[0], inputs.shape[1], len(kernel)
    view = F.pad(inputs, [p for size in reversed(padding) for p in (size, size)])
    for d in range(1, dims):
        span = dilation[d] * (kernel[d] - 1) + 1
        view = view.unfold(d + 2, span, stride[d])[..., :: dilation[d]]
    # [n, C, *positions, *kernel] → [n, C, *kernel, *positions]
    view = view.permute(0, 1, *range(2 + dims, 1 + 2 * dims), *range(2, 2 + dims))
    row = torch.Size(view.shape[2 * dims + 1 - (dims - 1) :]).numel()  # positions a step along the first axis
    count = row * (view.shape[dims + 1] - dilation[0] * (kernel[0] - 1))
    flat = view.reshape(n * groups, channels // groups * torch.Size(kernel[1:]).numel(), -1)
    return [flat[:, :, d * dilation[0] * row :][:, :, :count] for d in range(kernel[0])]


@register("Convolution")
def convolution(site: Site) -> Opened | None:
    """The weight: Σ_t g_t a_tᵀ over patches a_t in each group; the bias: Σ_t g_t."""
    if site.axis not in (0, None) or (site.layout is not None and site.layout.outer != 1):
        return None
    if site.operand == 2:
        return lambda g: _bias(g, site)
    if site.operand != 1:
        return None
    node: Any = site.node
    return _transposed(site, node) if node._saved_transposed else _plain(site, node)


def _bias(g: Cotangent, site: Site) -> Term:
    if g.scattered is not None:
        node: Any = site.node
        found = _kernel_norms(g.scattered, node, node._saved_input, node._saved_weight.shape, site.n)
        if found is not None:
            return ScatteredTerm(g, site.shape, found[1], lambda: _dense_bias(g, site))
    return _dense_bias(g, site)


def _dense_bias(g: Cotangent, site: Site) -> Term:
    value = g.samples_first.flatten(4)  # [K, n, frames, C, T]
    return DenseTerm(value.sum((2, 4)), site.shape)


class ScatteredTerm(Term):
    """Gradients of which the norms are known from scattered cotangents; all else from the dense ones."""

    def __init__(
        self, g: Cotangent, shape: torch.Size, squared_norms: Tensor, dense: Callable[[], Term]
    ) -> None:
        assert g.scattered is not None
        values = g.scattered.values
        self.n, self.k = values.shape[:2]
        self.shape, self.dtype, self.device = shape, values.dtype, values.device
        self._norms, self._dense = squared_norms, dense

    def explicit(self, samples: slice, cotangents: slice) -> Tensor:
        """See :class:`Term`."""
        return self._dense().explicit(samples, cotangents)

    def squared_norms(self, max_memory: int) -> Tensor:
        """See :class:`Term`."""
        return self._norms


def _kernel_norms(
    g: Scattered, node: Any, inputs: Tensor, kernel: torch.Size, n: int
) -> tuple[Tensor, Tensor] | None:
    """Norms of the gradients of weight and bias from scattered cotangents, where that is the faster way."""
    if inputs.ndim != 4 or len(inputs) != n or node._saved_groups != 1 or node._saved_transposed:
        return None
    stride, padding, dilation = (_pair(v) for v in _geometry(node, kernel[2:])[1:])
    shape = ConvShape(_pair(inputs.shape[2:]), g.plane, stride, padding, dilation)
    if not g.pays(shape, inputs.shape[1]):
        return None
    return g.norms(inputs.detach(), _pair(kernel[2:]), shape)


def _pair(values: Sequence[int]) -> tuple[int, int]:
    return int(values[0]), int(values[1])


def _geometry(
    node: Any, kernel: Sequence[int]
) -> tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]]:
    dims = len(kernel)
    stride, padding, dilation = (
        tuple(v) * (dims if len(v) == 1 else 1)
        for v in (node._saved_stride, node._saved_padding, node._saved_dilation)
    )
    return kernel, stride, padding, dilation


def _count(size: Sequence[int], kernel: Sequence[int], stride: Any, padding: Any, dilation: Any) -> int:
    count = 1
    for d, entries in enumerate(size):
        count *= (entries + 2 * padding[d] - dilation[d] * (kernel[d] - 1) - 1) // stride[d] + 1
    return count


def _samples(site: Site, images: int) -> tuple[int, int]:
    """Samples, and images of one sample (frames folded into the batch axis are positions like any other)."""
    return site.n, images // site.n


def _plain(site: Site, node: Any) -> Opened:
    inputs, groups = node._saved_input.detach(), node._saved_groups
    geometry = _geometry(node, site.shape[2:])
    n, frames = _samples(site, len(inputs))
    width = site.shape[1:].numel()
    positions = _count(inputs.shape[2:], *geometry)

    def make(part: slice) -> Tensor:
        images = inputs[part.start * frames : part.stop * frames]
        found = patches(images, *geometry, groups)  # [images, G, T, width]
        return _frames_as_positions(found, frames)

    pieces: Callable[[slice], list[Tensor]] | None = None
    if frames == 1 and geometry[1][0] == 1:

        def pieces(part: slice) -> list[Tensor]:
            return shifted(inputs[part], *geometry, groups)

    def view(part: slice) -> Tensor:
        images = inputs[part.start * frames : part.stop * frames]
        found = windows(images, *geometry, groups)  # [images, G, *positions, C / G, *kernel]
        return found if frames == 1 else found.unflatten(0, (-1, frames)).transpose(1, 2)

    shape = n, groups, frames * positions, width
    dims = len(geometry[0]) + int(frames > 1)
    features = Features(make, shape, inputs.element_size(), pieces, (view, dims))
    c_out = site.shape[0] // groups

    def term(g: Cotangent) -> Term:
        if g.scattered is not None:
            found = _kernel_norms(g.scattered, node, inputs, site.shape, n)
            if found is not None:
                return ScatteredTerm(g, site.shape, found[0], lambda: dense(g))
        return dense(g)

    def dense(g: Cotangent) -> Term:
        value = g.value.flatten(3)  # [K, images, C_out, T]
        k = len(value)
        value = value.reshape(k * n * frames, groups, c_out, positions).mT
        value = _frames_as_positions(value, frames)
        return OuterTerm(features, value.reshape(k, n, groups, -1, c_out), site.shape)

    return term


def _transposed(site: Site, node: Any) -> Opened:
    """y = Cᵀ x with C the convolution of the same weight: its inputs are rows, and patches are taken of g."""
    inputs, groups = node._saved_input.detach(), node._saved_groups
    geometry = _geometry(node, site.shape[2:])
    n, frames = _samples(site, len(inputs))
    c_in = site.shape[0] // groups
    rows = inputs.flatten(2).reshape(n * frames, groups, c_in, -1).mT
    features = Features.of(_frames_as_positions(rows, frames))
    positions = rows.shape[2]

    def term(g: Cotangent) -> Term:
        k = len(g.value)
        found = patches(g.value.flatten(0, 1), *geometry, groups)[:, :, :positions]
        found = _frames_as_positions(found, frames)
        return OuterTerm(features, found.reshape(k, n, *found.shape[1:]), site.shape, transposed=True)

    return term


def _frames_as_positions(value: Tensor, frames: int) -> Tensor:
    """[n · frames, G, T, d] → [n, G, frames · T, d]."""
    if frames == 1:
        return value
    images, groups, t, d = value.shape
    return value.reshape(images // frames, frames, groups, t, d).transpose(1, 2).flatten(2, 3)
