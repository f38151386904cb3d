"""Cotangents of a convolution's output that only some places have, the same for all cotangents of a sample."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from flatkern.kernels._scattered_conv import ConvShape, densified, scattered_conv_input, scattered_conv_norms

__all__ = ["Scattered", "kernel_pays"]

_LANES = {torch.float32: 16, torch.float64: 8}
"""Cotangents that the kernel takes at a time."""
_SCRATCH_BYTES = 1 << 24
"""Beyond this the kernel's sums over one sample's input leave the cache."""


def kernel_pays(dtype: torch.dtype, k: int, entries: int, shape: ConvShape, channels: int) -> bool:
    """Whether the kernel is faster than a dense convolution: enough cotangents, and few enough places.

    Args:
        dtype, k: of the cotangents, and how many.
        entries: places a channel.
        shape, channels: of the convolution's input.
    """
    lanes = _LANES.get(dtype)
    if lanes is None:
        return False
    filled = -(-k // lanes) * lanes
    padded = (shape.inputs[0] + 2 * shape.padding[0]) * (shape.inputs[1] + 2 * shape.padding[1])
    scratch = padded * channels * lanes * dtype.itemsize
    return 2 * filled * entries <= k * shape.outputs[0] * shape.outputs[1] and scratch <= _SCRATCH_BYTES


class Scattered:
    """K cotangents a sample, zero but for P places of each channel, which differ from channel to channel.

    The gradient behind a max-pool whose windows are disjoint: one place a window.

    Args:
        values: [n, K, C, P].
        index: [n, C, P], places in the plane, none of them twice; −1 where the cotangent is zero whatever the value.
        plane: the size of the output, rows and columns.
    """

    def __init__(self, values: Tensor, index: Tensor, plane: tuple[int, int]) -> None:
        self.values, self.index, self.plane = values, index, plane
        self._norms: dict[tuple[ConvShape, tuple[int, int]], tuple[Tensor, Tensor, Tensor]] = {}

    @cached_property
    def dense(self) -> Tensor:
        """[n, K, C, *plane]."""
        return densified(self.values, self.index, self.plane)

    def times(self, slope: Tensor) -> Scattered:
        """The cotangents times a factor [n or 1, C, *plane] for all K."""
        factor = slope.expand(len(self.index), -1, -1, -1).flatten(2)
        found = factor.gather(2, self.index.clamp_min(0))
        return Scattered(self.values * found[:, None], self.index, self.plane)

    def where(self, kept: Tensor) -> Scattered:
        """Only the places of a mask [n, C, *plane]."""
        found = kept.flatten(2).gather(2, self.index.clamp_min(0))
        return Scattered(self.values, torch.where(found, self.index, -1), self.plane)

    def pays(self, shape: ConvShape, channels: int) -> bool:
        """Whether the kernel is faster than a dense convolution: enough cotangents, and few enough places."""
        _, k, _, entries = self.values.shape
        return kernel_pays(self.values.dtype, k, entries, shape, channels)

    def input(self, weight: Tensor, shape: ConvShape) -> Tensor:
        """The cotangents of the convolution's input, [n, K, C_in, ...]."""
        return scattered_conv_input(self.values, self.index, weight, shape)

    def norms(self, inputs: Tensor, kernel: tuple[int, int], shape: ConvShape) -> tuple[Tensor, Tensor]:
        """Σ_k of the squared norms of the weight's and of the bias's gradients, float64 [n]."""
        key = shape, kernel
        if key not in self._norms:
            self._norms[key] = scattered_conv_norms(self.values, self.index, inputs, kernel, shape)
        return self._norms[key][:2]

    @property
    def place_energy(self) -> Tensor:
        """Σ over cotangents and channels of the squares, float64 [n, places]."""
        for found in self._norms.values():
            return found[2]
        squares = torch.where(self.index[:, None] >= 0, self.values, 0).double().square().sum(1)  # [n, C, P]
        energy = squares.new_zeros(len(squares), self.plane[0] * self.plane[1])
        return energy.scatter_add_(1, self.index.clamp_min(0).flatten(1), squares.flatten(1))
