"""Which operator is this? A digest of everything that determines its products, to recognise it in another process."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["describe_loss", "digest"]


def digest(*parts: Any) -> str:
    """A hexadecimal digest of text, numbers, tensors, arrays, and nested lists or mappings of these."""
    state = hashlib.blake2b(digest_size=16)
    for part in parts:
        _feed(state, part)
    return state.hexdigest()


def _feed(state: hashlib.blake2b, part: Any) -> None:
    if isinstance(part, Tensor):
        dense = part.detach().to_dense() if part.layout != torch.strided else part.detach()
        dense = dense.cpu().contiguous()
        state.update(f"tensor {dense.dtype} {tuple(dense.shape)}".encode())
        if dense.numel():
            state.update(dense.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(part, np.ndarray):
        state.update(f"array {part.dtype} {part.shape}".encode())
        state.update(np.ascontiguousarray(part).tobytes())
    elif isinstance(part, Mapping):
        for key, value in part.items():
            _feed(state, (key, value))
    elif isinstance(part, (list, tuple)):
        state.update(f"{len(part)} parts".encode())
        for item in part:
            _feed(state, item)
    else:
        state.update(f"{type(part).__name__} {part!r};".encode())


def describe_loss(loss_fn: object) -> list[Any]:
    """What can be told of a loss function from outside: its text and tensors, or a function's name."""
    if isinstance(loss_fn, nn.Module):
        return [
            repr(loss_fn),
            getattr(loss_fn, "reduction", ""),
            _numbers(loss_fn),
            *loss_fn.state_dict().values(),
        ]
    kind = type(loss_fn)
    return [
        getattr(loss_fn, "__module__", kind.__module__),
        getattr(loss_fn, "__qualname__", kind.__qualname__),
    ]


def _numbers(module: nn.Module) -> dict[str, Any]:
    """Plain settings such as ``label_smoothing``, which a loss's text leaves out."""
    return {k: v for k, v in sorted(vars(module).items()) if isinstance(v, (int, float, str)) and k[0] != "_"}
