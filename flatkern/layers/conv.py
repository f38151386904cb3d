"""nn.Conv1d, Conv2d and Conv3d as one dense map applied to every patch: z_t = W a_t + b, a_t the patch at t."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatkern.layers.rule import LayerRule, register
from flatkern.layers.shared_weight import bias_squared_norms, weight_squared_norms

__all__ = ["ConvRule", "patches"]


def patches(module: nn.Module, inputs: Tensor) -> Tensor:
    """The patches a convolution multiplies its weight with: [n, C_in, *size] → [n, groups, T, C_in/groups · k].

    Stride, dilation, groups and every padding mode are the module's. Positions T are in the order of its output.
    """
    assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    padded = F.pad(inputs, module._reversed_padding_repeated_twice, mode=mode)
    size, step, gap = module.kernel_size, module.stride, module.dilation
    n, dims = len(inputs), len(size)
    if dims == 3:
        for dim in range(3):
            padded = padded.unfold(dim + 2, gap[dim] * (size[dim] - 1) + 1, step[dim])[..., :: gap[dim]]
        columns = padded.permute(0, 1, 5, 6, 7, 2, 3, 4)  # [n, C, *kernel, *positions]
    elif dims == 1:
        columns = F.unfold(padded.unsqueeze(2), (1, size[0]), (1, gap[0]), 0, (1, step[0]))
    else:
        columns = F.unfold(padded, size, gap, 0, step)
    width = module.in_channels // module.groups * torch.Size(size).numel()
    return columns.reshape(n, module.groups, width, -1).mT


class ConvRule(LayerRule):
    """‖∂(s·f)/∂W‖² = Σ_groups ‖Σ_t g_t a_tᵀ‖² over patches a_t, ‖∂(s·f)/∂b‖² = ‖Σ_t g_t‖²."""

    parameters = ("weight", "bias")

    def prepare(self, module: nn.Module, inputs: Tensor, max_memory: int) -> Tensor | None:
        """The patches of all samples."""
        return patches(module, inputs) if self._patch_bytes(module, inputs) <= max_memory else None

    def squared_norms(
        self,
        module: nn.Module,
        inputs: Tensor,
        cotangents: Tensor,
        wanted: tuple[str, ...],
        max_memory: int,
        prepared: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """See :class:`LayerRule`. Patches not given are formed for as many samples as ``max_memory`` allows."""
        k, n, c_out = cotangents.shape[:3]
        g = cotangents.reshape(k, n, c_out, -1).mT  # [K, n, T, C_out]
        norms = {}
        if "bias" in wanted:
            norms["bias"] = bias_squared_norms(g)
        if "weight" in wanted and prepared is not None:
            norms["weight"] = self._weight_norms(prepared, g, max_memory)
        elif "weight" in wanted:
            step = max(1, n * max_memory // (4 * self._patch_bytes(module, inputs)))
            norms["weight"] = torch.cat(
                [
                    self._weight_norms(
                        patches(module, inputs[i : i + step]), g[:, i : i + step], max_memory // 2
                    )
                    for i in range(0, n, step)
                ]
            )
        return norms

    def _patch_bytes(self, module: nn.Module, inputs: Tensor) -> int:
        assert isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d))
        width = module.in_channels * torch.Size(module.kernel_size).numel()
        return len(inputs) * self.positions(module, inputs) * width * inputs.element_size()

    @staticmethod
    def _weight_norms(a: Tensor, g: Tensor, max_memory: int) -> Tensor:
        k, n, positions, _ = g.shape
        groups = a.shape[1]
        # each group is a dense map of its own: fold the groups into the samples
        g = g.mT.reshape(k, n * groups, -1, positions).mT
        norms = weight_squared_norms(a.flatten(0, 1), g, max_memory)
        return norms.reshape(n, groups).sum(1)

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
