"""What every operator registers besides its derivative: shapes for tracing, batching, the graph entry."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ._select import compiled_available

F = TypeVar("F", bound=Callable[..., Any])


def quick(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Caches the signature that torch inspects at every call of an `autograd.Function`: a third of the call."""
    forward: Any = function.forward
    forward.__signature__ = inspect.signature(forward)
    return function


def in_graph(function: F) -> F:
    """Lets `torch.compile` put the call of an `autograd.Function` into its graph as it is.

    The derivatives belong to such functions because `torch.library.register_autograd` breaks the reverse-mode
    transforms and gives silently zero forward-mode tangents.
    """
    return cast(F, torch.compiler.allow_in_graph(function))


def forward_rule(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The `jvp` of an `autograd.Function` from a function of the saved tensors and the tangents.

    torch switches forward mode off while a `jvp` runs, for the enclosing levels of torch.func as well: forward
    over forward would be silently zero. It is switched on again here, once this level's own tangents are off.
    """

    def primal(t: Tensor) -> Tensor:
        tracked = torch._C._functorch.is_gradtrackingtensor(t)
        return forward_ad.unpack_dual(t, level=0).primal if tracked else t

    @wraps(rule)
    def jvp(ctx: Any, *tangents: Tensor) -> Any:
        operands = (*ctx.saved_tensors, *tangents)
        if not any(torch._C._functorch.is_gradtrackingtensor(t) for t in operands):
            return rule(*operands)  # plain forward mode: it has one level only
        with forward_ad._set_fwd_grad_enabled(True):
            return rule(*map(primal, operands))

    return jvp


def register(name: str, fake: Callable[[Tensor], Any], outputs: int = 1) -> None:
    """Shapes and batching of the compiled operator `flatkern::name`, which takes one tensor of matrices.

    Batch dimensions lead everywhere, so the batching rule only moves the new one to the front.
    """
    if not compiled_available():
        return

    def batched(_info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Any, Any]:
        result = getattr(torch.ops.flatkern, name)(x.movedim(in_dims[0], 0))
        return result, 0 if outputs == 1 else (0,) * outputs

    torch.library.register_fake(f"flatkern::{name}", fake)
    torch.library.register_vmap(f"flatkern::{name}", batched)
