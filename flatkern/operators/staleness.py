"""Noticing that what an operator was built from has changed since."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["StaleOperatorError", "WeightsWatch", "modes_of"]

ENTRIES = 4096
"""At most this many entries a tensor are compared."""


class StaleOperatorError(RuntimeError):
    """An operator was used after the weights it was linearized at had changed."""


def modes_of(model: nn.Module) -> list[bool]:
    """Each module's train (True) or eval (False) mode."""
    return [module.training for module in model.modules()]


def _strided(tensor: Tensor) -> Tensor:
    """At most ENTRIES entries at equal distances in memory, as a view of the tensor's own storage.

    It must be a view, so that a later look sees later values: ``reshape`` would copy a channels-last weight.
    A tensor whose entries overlap or lie apart in memory is viewed in full.
    """
    detached = tensor.detach()
    if not _is_dense(detached):
        return detached
    size = detached.numel()
    step = max(1, -(-size // ENTRIES))
    return detached.as_strided((-(-size // step),), (step,))


def _is_dense(tensor: Tensor) -> bool:
    """Whether the entries fill one stretch of memory without gaps or overlaps, in whatever order."""
    expected = 1
    for stride, size in sorted(
        (st, sz) for st, sz in zip(tensor.stride(), tensor.shape, strict=True) if sz > 1
    ):
        if stride != expected:
            return False
        expected *= size
    return True


def _gather(views: Sequence[Tensor]) -> Tensor:
    return torch.cat([v if v.ndim == 1 else v.reshape(-1) for v in views])


class WeightsWatch:
    """Remembers a model's parameters and buffers, and tells whether they are still the same.

    Three looks, as each misses something: identity and storage pointer (a parameter or its ``.data``
    replaced), ``_version`` (in-place changes), and up to 4,096 strided entries a tensor (``p.data.mul_()``
    changes neither of the others). Buffers are compared by entries only, since restoring one counts as an
    in-place change.
    """

    def __init__(self, model: nn.Module) -> None:
        seen: set[int] = set()
        # where a tensor hangs: replacing it there is noticed without walking the modules again
        self._places: list[tuple[dict[str, nn.Parameter | None], str, Tensor, int, int, bool]] = []
        groups: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
        for module in model.modules():
            for key, p in module._parameters.items():
                if p is None:
                    continue
                self._places.append((module._parameters, key, p, p.data_ptr(), p._version, p.requires_grad))
                if id(p) not in seen and p.numel():
                    seen.add(id(p))
                    groups.setdefault((p.dtype, p.device), []).append(_strided(p))
        for b in model.buffers():
            if b.numel() and not b.is_sparse:
                groups.setdefault((b.dtype, b.device), []).append(_strided(b))
        self._views = list(groups.values())
        self._entries = [_gather(views) for views in self._views]

    def changed(self) -> bool:
        """Whether anything differs; one comparison (and host synchronization) a dtype."""
        for home, key, p, pointer, version, needs_grad in self._places:
            if home.get(key) is not p or p.data_ptr() != pointer or p._version != version:
                return True
            if p.requires_grad != needs_grad:
                return True
        return not all(
            torch.equal(_gather(views), old) for views, old in zip(self._views, self._entries, strict=True)
        )

    def check(self) -> None:
        """Raise :class:`StaleOperatorError` where anything has changed."""
        if self.changed():
            raise StaleOperatorError(
                "the model's weights (or buffers, or a requires_grad) changed since this operator was "
                "linearized; call H.refresh() on it to linearize at the present weights"
            )
