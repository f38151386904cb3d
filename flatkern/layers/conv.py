"""nn.Conv1d, Conv2d and Conv3d as one dense map applied to every patch: z_t = W a_t + b, a_t the patch at t."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatkern.layers.rule import LayerRule, register
from flatkern.layers.shared_weight import bias_squared_norms, weight_squared_norms

__all__ = ["ConvRule", "patches"]

_Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d


def patches(module: nn.Module, inputs: Tensor) -> Tensor:
    """The patches a convolution multiplies its weight with: [n, C_in, *size] → [n, T, groups, C_in/groups · k].

    Stride, dilation, groups and every padding mode are the module's. Positions T are in the order of its output.
    """
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    dims = len(module.kernel_size)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    for dim, (size, step, gap) in enumerate(
        zip(module.kernel_size, module.stride, module.dilation, strict=True)
    ):
        padded = padded.unfold(dim + 2, gap * (size - 1) + 1, step)[..., ::gap]
    # [n, C, *positions, *kernel] → [n, T, groups, C/groups * kernel]
    n, channels = padded.shape[:2]
    positions = padded.shape[2 : 2 + dims]
    order = [0, *range(2, 2 + dims), 1, *range(2 + dims, 2 + 2 * dims)]
    width = channels // module.groups * torch.Size(module.kernel_size).numel()
    return padded.permute(order).reshape(n, positions.numel(), module.groups, width)


class ConvRule(LayerRule):
    """‖∂(s·f)/∂W‖² = Σ_groups ‖Σ_t g_t a_tᵀ‖² over patches a_t, ‖∂(s·f)/∂b‖² = ‖Σ_t g_t‖²."""

    parameters = ("weight", "bias")

    def squared_norms(
        self, module: nn.Module, inputs: Tensor, cotangents: Tensor, wanted: tuple[str, ...], max_memory: int
    ) -> dict[str, Tensor]:
        """See :class:`LayerRule`. Patches are formed for as many samples at a time as ``max_memory`` allows."""
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        k, n, c_out = cotangents.shape[:3]
        g = cotangents.reshape(k, n, c_out, -1).transpose(2, 3)  # [K, n, T, C_out]
        norms = {}
        if "bias" in wanted:
            norms["bias"] = bias_squared_norms(g)
        if "weight" in wanted:
            size = (
                g.shape[2]
                * module.in_channels
                * torch.Size(module.kernel_size).numel()
                * inputs.element_size()
            )
            step = max(1, max_memory // (4 * size))  # patches exist twice for a moment
            norms["weight"] = torch.cat(
                [
                    self._weight_norms(module, inputs[i : i + step], g[:, i : i + step], max_memory // 2)
                    for i in range(0, n, step)
                ]
            )
        return norms

    @staticmethod
    def _weight_norms(module: _Conv, inputs: Tensor, g: Tensor, max_memory: int) -> Tensor:
        a = patches(module, inputs)  # [n, T, groups, d_in]
        k, n, positions, _ = g.shape
        # each group is a dense map of its own: fold the groups into the samples
        a = a.transpose(1, 2).reshape(n * module.groups, positions, -1)
        g = (
            g.reshape(k, n, positions, module.groups, -1)
            .transpose(2, 3)
            .reshape(k, n * module.groups, positions, -1)
        )
        return weight_squared_norms(a, g, max_memory).reshape(n, module.groups).sum(1)

    def positions(self, module: nn.Module, inputs: Tensor) -> int:
        """The number of output positions (1 where the kernel covers the whole padded input)."""
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        count = 1
        pads = module._reversed_padding_repeated_twice[::-1]
        for dim, size in enumerate(inputs.shape[2:]):
            padded = size + pads[2 * dim] + pads[2 * dim + 1]
            span = module.dilation[dim] * (module.kernel_size[dim] - 1) + 1
            count *= (padded - span) // module.stride[dim] + 1
        return count


for _kind in (nn.Conv1d, nn.Conv2d, nn.Conv3d):
    register(_kind, ConvRule())
