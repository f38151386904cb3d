"""Running a model in a form that can be differentiated twice, and restoring torch's settings afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatkern.operators.substitutes import Substitutes

__all__ = ["Autocast", "twice_differentiable"]


@contextmanager
def twice_differentiable(model: nn.Module, *, tangents: bool = False) -> Iterator[None]:
    """Gradients on, attention by query blocks or decomposed, no cuDNN recurrences, :class:`Substitutes` in force.

    The fused forms of ``F.scaled_dot_product_attention`` have no double backward; the decomposed one
    (``SDPBackend.MATH``) has, and so has :func:`flatkern.kernels.attention`, which takes longer sequences.
    Neither have cuDNN's recurrent layers. Which form runs is decided in the forward pass, so this surrounds the
    building of a graph and not its later use.

    Args:
        model: what will run.
        tangents: forward-mode derivatives are wanted as well; oneDNN's LSTM has none.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(Substitutes())
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            if tangents:
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
        yield


class Autocast:
    """The autocast region an operator was made in, to be entered again whenever its graphs are built.

    Products then do not depend on where they are asked for: forward passes run in the region of the operator's
    making, and derivatives outside any, as torch recommends for backward passes.
    """

    def __init__(self, device: torch.device) -> None:
        self._kind = device.type
        self.enabled: bool = torch.is_autocast_enabled(self._kind)
        self.dtype: torch.dtype = torch.get_autocast_dtype(self._kind)

    def region(self) -> torch.autocast:
        """For forward passes."""
        # without its cache, which would tie a graph to casts made elsewhere
        return torch.autocast(self._kind, dtype=self.dtype, enabled=self.enabled, cache_enabled=False)

    def outside(self) -> torch.autocast | nullcontext[None]:
        """For derivatives."""
        if not torch.is_autocast_enabled(self._kind):  # entering a region costs as much as a small operation
            return nullcontext()
        return torch.autocast(self._kind, dtype=self.dtype, enabled=False)
