"""Running a model in a form that can be differentiated twice, and restoring torch's settings afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["twice_differentiable"]


@contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """Gradients on, attention decomposed, and no cuDNN recurrences.

    The fused forms of ``F.scaled_dot_product_attention`` have no double backward; the decomposed one
    (``SDPBackend.MATH``) has. Neither have cuDNN's recurrent layers. Which form runs is decided in the
    forward pass, so this surrounds the building of a graph and not its later use.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if any(isinstance(m, nn.RNNBase) for m in model.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        yield
