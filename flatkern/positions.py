"""Gradients at a layer's output position by position, and the norms of what the layer multiplies its weight with."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatkern.layers.shared_weight import row_energy
from flatkern.scattered import Scattered

__all__ = ["PositionGradients", "position_norms_sq"]


def position_norms_sq(module: nn.Module, inputs: Tensor) -> Tensor:
    """‖x_t‖² of the vectors x_t (patches, for a convolution, by group) that the weight multiplies.

    [n, *positions] for a dense layer on [n, *positions, d], [n, G, *positions] for a convolution; float64.
    """
    inputs = inputs.detach()
    if isinstance(module, nn.Linear):
        return row_energy(inputs)
    layer: Any = module
    dims = len(layer.kernel_size)
    squares = inputs.double().square().unflatten(1, (layer.groups, -1)).sum(2)  # [n, G, *positions]
    ones = squares.new_ones(layer.groups, 1, *layer.kernel_size)
    padding: Any = layer.padding
    if layer.padding_mode != "zeros":
        squares = F.pad(squares, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
        padding = 0
    convolve: Any = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    found: Tensor = convolve(
        squares, ones, stride=layer.stride, padding=padding, dilation=layer.dilation, groups=layer.groups
    )
    return found.clamp_min_(0)


class PositionGradients:
    """Σ_k ‖∂f_k/∂z_t‖² of one layer, block by block of cotangents.

    Args:
        module: the layer.
        inputs: x^l, [n, ...].
    """

    def __init__(self, module: nn.Module, inputs: Tensor) -> None:
        self._module, self._inputs = module, inputs
        self._energy: Tensor | None = None

    def add(self, cotangent: Tensor | Scattered) -> None:
        """Cotangents [k, n, *output] of the layer's output."""
        if isinstance(cotangent, Scattered):
            groups: Any = self._module.groups
            if groups == 1:
                found = cotangent.place_energy.unsqueeze(1)
                self._energy = found if self._energy is None else self._energy + found
                return
            cotangent = cotangent.dense.transpose(0, 1)
        wide = cotangent.float() if cotangent.dtype in (torch.float16, torch.bfloat16) else cotangent
        if isinstance(self._module, nn.Linear):
            energy = wide.square().sum(-1)
        else:
            groups = self._module.groups
            # one axis at a time: reducing two that are not neighbours is many times slower
            energy = wide.unflatten(2, (groups, -1)).flatten(4).square().sum(3)  # [k, n, G, T]
        energy = energy.double().sum(0)
        self._energy = energy if self._energy is None else self._energy + energy

    def totals(self) -> tuple[Tensor, Tensor, Tensor]:
        """(Σ_t ‖g_t‖², Σ_t ‖g_t‖² ‖x_t‖², min_t ‖x_t‖²), float64 [n] each; zeros for g where none was added."""
        norms = position_norms_sq(self._module, self._inputs).reshape(len(self._inputs), -1)
        energy = torch.zeros_like(norms) if self._energy is None else self._energy.reshape(norms.shape)
        return energy.sum(1), (energy * norms).sum(1), norms.min(1).values
