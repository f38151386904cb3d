"""Calls of torch's attention, seen and answered: by query blocks where that is better, else as torch does it.

The blocks do not take dropout, short sequences, tensor subclasses, and what torch refuses; torch then does what
``sdpa_kernel`` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["FunctionForms", "attention_forms"]

LEAST_WEIGHTS = 320 * 320
"""Queries times keys from which a product with blocks is faster than one with stored weights (on a CPU)."""
LEAST_CAUSAL_WEIGHTS = 256 * 256
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_torch_attention: Callable[..., Tensor] = F.scaled_dot_product_attention


class FunctionForms(TorchFunctionMode):
    """While it is in force, calls of the functions it was given go to other forms of them."""

    def __init__(self, forms: Mapping[Any, Callable[..., Any]]) -> None:
        super().__init__()
        self._forms = forms

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """The other form where there is one, else the function itself."""
        return self._forms.get(func, func)(*args, **(kwargs or {}))


def attention_forms(
    blocked: Callable[..., Tensor], *, cpu_only: bool = False
) -> dict[Any, Callable[..., Any]]:
    """Functions of torch that compute attention, and what to call instead of each in a ``TorchFunctionMode``.

    Args:
        blocked: takes long sequences, with the arguments of :func:`flatkern.kernels.attention`.
        cpu_only: leave other devices to torch.
    """

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        tensors = (query, key, value) if attn_mask is None else (query, key, value, attn_mask)
        if dropout_p == 0.0 and _by_blocks(tensors, is_causal, cpu_only):
            return blocked(
                query, key, value, attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
            )
        return _torch_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )

    return {_torch_attention: attention, F.multi_head_attention_forward: _multi_head(attention)}


def _by_blocks(tensors: tuple[Any, ...], causal: bool, cpu_only: bool) -> bool:
    query, key, value = tensors[:3]
    if any(type(t) not in (Tensor, nn.Parameter) or t.dim() < 2 for t in tensors):
        return False
    if cpu_only and any(t.device.type != "cpu" for t in tensors):
        return False
    if len(tensors) == 4 and (causal or tensors[3].dtype not in (torch.bool, query.dtype)):
        return False
    if query.dtype not in _DTYPES or not query.dtype == key.dtype == value.dtype:
        return False
    weights: int = query.shape[-2] * key.shape[-2]
    return weights >= (LEAST_CAUSAL_WEIGHTS if causal else LEAST_WEIGHTS)


def _multi_head(attention: Callable[..., Tensor]) -> Callable[..., Any]:
    """``F.multi_head_attention_forward`` with that attention.

    A function mode is off while it handles this function, and so would not see the attention inside; torch's own
    code is run with that one name exchanged.
    """
    original: Any = F.multi_head_attention_forward
    if not isinstance(original, FunctionType):
        return original
    names = {**original.__globals__, "scaled_dot_product_attention": attention}
    copy = FunctionType(
        original.__code__, names, original.__name__, original.__defaults__, original.__closure__
    )
    copy.__kwdefaults__ = original.__kwdefaults__
    return copy
