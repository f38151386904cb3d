"""Convolutions pulled back from cotangents that few of their outputs have: behind a max-pool, say.

Not differentiable, and for the package's own use: :mod:`flatkern.reverse` calls them on values without a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ._select import compiled_available, runs_compiled_rows

__all__ = ["ConvShape", "densified", "runs_compiled", "scattered_conv_input", "scattered_conv_norms"]

_Pair = tuple[int, int]


@dataclass(frozen=True)
class ConvShape:
    """A convolution of one group over two axes."""

    inputs: _Pair
    """Rows and columns that go in,"""
    outputs: _Pair
    """and come out."""
    stride: _Pair
    padding: _Pair
    dilation: _Pair

    @property
    def settings(self) -> list[int]:
        """As the compiled kernels take it."""
        return [*self.inputs, *self.outputs, *self.stride, *self.padding, *self.dilation]


def densified(values: Tensor, index: Tensor, plane: Sequence[int]) -> Tensor:
    """Scattered values [n, K, C, P] as [n, K, C, *plane], zero elsewhere; those of one place add up."""
    n, k, channels, entries = values.shape
    known = index >= 0
    dense = values.new_zeros(n, k, channels, torch.Size(plane).numel())
    places = torch.where(known, index, 0)[:, None].expand(n, k, channels, entries)
    # not a product with the mask: what has no place may be anything, NaN as well
    dense.scatter_add_(3, places, torch.where(known[:, None], values, 0))
    return dense.reshape(n, k, channels, *plane)


def scattered_conv_input(values: Tensor, index: Tensor, weight: Tensor, shape: ConvShape) -> Tensor:
    """The cotangents of a convolution's input: Σ_{c,p} values[c, p] · weight[c] put where place index[c, p] looks.

    Args:
        values: cotangents of the output, [n, K, C, P], float32 or float64.
        index: [n, C, P], int64: the places in the output's plane, the same for all K cotangents; negative: none.
        weight: [C, C_in, rows, columns].
        shape: of the convolution.

    Returns:
        [n, K, C_in, *inputs].

    Cost: n · C · P · rows · columns · C_in vector operations for every 16 cotangents (float32, AVX-512); as much memory
    as one sample's padded input times 16 beside the result.
    """
    if not runs_compiled(values):
        n, k = values.shape[:2]
        dense = densified(values, index, shape.outputs).flatten(0, 1)
        like = values.new_empty(1).expand(n * k, weight.shape[1], *shape.inputs)
        found: Tensor = torch.ops.aten.convolution_backward(
            dense, like, weight, None, shape.stride, shape.padding, shape.dilation, False, (0, 0), 1,
            (True, False, False),
        )[0]  # fmt: skip
        return found.reshape(n, k, *found.shape[1:])
    channels_last = weight.permute(0, 2, 3, 1).contiguous()
    result: Tensor = torch.ops.flatkern.scattered_conv_input(
        values.contiguous(), index.contiguous(), channels_last, shape.settings
    )
    return result


def scattered_conv_norms(
    values: Tensor, index: Tensor, inputs: Tensor, kernel: _Pair, shape: ConvShape
) -> tuple[Tensor, Tensor, Tensor]:
    """Squared norms over the K cotangents of each sample: of the gradients of weight and bias, and place by place.

    Args:
        values, index, shape: as for :func:`scattered_conv_input`.
        inputs: of the convolution, [n, C_in, *inputs].
        kernel: its rows and columns.

    Returns:
        Σ_k ‖∂/∂weight‖² [n], Σ_k ‖∂/∂bias‖² [n] and Σ_{k,c} values² by place [n, places], float64.

    Cost: as for :func:`scattered_conv_input`; no gradient is kept.
    """
    if not runs_compiled(values):
        n, k, channels, _ = values.shape
        dense = densified(values, index, shape.outputs).flatten(3)  # [n, K, C, T]
        windows = F.unfold(
            inputs, kernel, dilation=shape.dilation, padding=shape.padding, stride=shape.stride
        )
        formed = dense.reshape(n, k * channels, -1) @ windows.mT
        return (
            formed.double().square().sum((1, 2)),
            dense.sum(3).double().square().sum((1, 2)),
            dense.double().square().sum((1, 2)),
        )
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.flatkern.scattered_conv_norms(
        values.contiguous(), index.contiguous(), inputs.contiguous(), *kernel, shape.settings
    )
    return found


def _available() -> bool:
    # a library of an earlier build in a source tree lacks what was added since
    return compiled_available() and hasattr(torch.ops.flatkern, "scattered_conv_input")


def runs_compiled(values: Tensor) -> bool:
    """Whether the compiled kernels take these values."""
    on_cpu = values.device.type == "cpu" and runs_compiled_rows(values.device)
    return on_cpu and _available() and values.dtype in (torch.float32, torch.float64)


def _fake_input(values: Tensor, index: Tensor, weight: Tensor, settings: list[int]) -> Tensor:
    return values.new_empty(*values.shape[:2], weight.shape[3], *settings[:2])


def _fake_norms(
    values: Tensor, index: Tensor, inputs: Tensor, kernel_rows: int, kernel_cols: int, settings: list[int]
) -> tuple[Tensor, Tensor, Tensor]:
    n = len(values)
    wide = torch.float64
    return (
        values.new_empty(n, dtype=wide),
        values.new_empty(n, dtype=wide),
        values.new_empty(n, settings[2] * settings[3], dtype=wide),
    )


if _available():
    torch.library.register_fake("flatkern::scattered_conv_input", _fake_input)
    torch.library.register_fake("flatkern::scattered_conv_norms", _fake_norms)
