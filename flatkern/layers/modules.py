"""Which modules count as layers with an input Jacobian of their own (for NMLS and the bounds), and their positions."""

from __future__ import annotations

from torch import Tensor, nn

__all__ = ["is_layer", "positions"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, *_CONVOLUTIONS)


def is_layer(module: nn.Module) -> bool:
    """Whether it is a linear or convolutional layer whose ``forward`` is torch's own."""
    if "forward" in vars(module):  # replaced on the instance
        return False
    for kind in type(module).__mro__:
        if kind in _KINDS:
            return type(module).forward is kind.forward
    return False


def positions(module: nn.Module, inputs: Tensor) -> int:
    """How many positions of one sample share the weight (1 for a dense layer on vectors)."""
    if not isinstance(module, _CONVOLUTIONS):
        return inputs.shape[1:-1].numel() if inputs.ndim > 2 else 1
    count = 1
    pads = module._reversed_padding_repeated_twice[::-1]
    for dim, size in enumerate(inputs.shape[2:]):
        padded = size + pads[2 * dim] + pads[2 * dim + 1]
        span = module.dilation[dim] * (module.kernel_size[dim] - 1) + 1
        count *= (padded - span) // module.stride[dim] + 1
    return count
