"""How many bytes of tensors a piece of work holds at its peak, as seen below autograd."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

__all__ = ["AllocationMeter"]


class AllocationMeter(TorchDispatchMode):
    """Counts the storages that are made while it is in force, and those still alive.

    What an operation allocates inside itself and frees before it returns (a workspace) is not seen.

    Attributes:
        live: bytes made and not freed.
        peak: the most there were at a time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The operation itself, with the storages of its results counted that are not those of its arguments."""
        out = func(*args, **(kwargs or {}))
        given: set[int] | None = None
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or tensor.layout != torch.strided or tensor.is_meta:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self._sizes or not storage.nbytes():
                continue
            if given is None:
                inputs = tree_leaves((args, kwargs))
                given = {
                    t.untyped_storage()._cdata
                    for t in inputs
                    if isinstance(t, Tensor) and t.layout == torch.strided
                }
            if key in given:
                continue
            self._sizes[key] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._freed, key)
        return out

    def _freed(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)
