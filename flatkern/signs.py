"""Independent signs ±1 for sketches, drawn on the CPU so that they are the same on every device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["draw_signs"]


def draw_signs(
    shape: Sequence[int],
    generator: torch.Generator,
    device: torch.device,
    dtype: torch.dtype = torch.int8,
) -> Tensor:
    """Signs [*shape] from a CPU generator; bytes unless another ``dtype`` is given, as outputs may be large."""
    signs = torch.randint(0, 2, tuple(shape), generator=generator, dtype=torch.int8)
    return signs.to(device, dtype).mul_(2).sub_(1)
