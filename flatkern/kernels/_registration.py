"""What every operator registers besides its derivative: shapes for tracing, batching, the graph entry."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
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

    def tracked(t: Tensor | None) -> bool:
        return t is not None and torch._C._functorch.is_gradtrackingtensor(t)

    def primal(t: Tensor | None) -> Tensor | None:
        return forward_ad.unpack_dual(t, level=0).primal if t is not None and tracked(t) else t

    @wraps(rule)
    def jvp(ctx: Any, *tangents: Tensor | None) -> Any:
        operands = (*ctx.saved_tensors, *tangents)
        if not any(map(tracked, operands)):
            return rule(*operands)  # plain forward mode: it has one level only
        with forward_ad._set_fwd_grad_enabled(True):
            return rule(*map(primal, operands))

    return jvp


def differentiated(x: Tensor) -> bool:
    """Whether a derivative of what is computed from ``x`` may be asked for; False only where that is certain.

    Then the compiled operator may be called as it is, without the 30 µs of an `autograd.Function`, and nothing need be
    kept for derivatives.
    """
    if forward_ad._current_level >= 0:
        return True
    stack = torch._C._functorch.get_interpreter_stack()
    if stack is None:
        return torch.is_grad_enabled() and x.requires_grad
    if any(level.key() != torch._C._functorch.TransformType.Vmap for level in stack):
        return True
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        if x.requires_grad:
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return x.requires_grad


def concrete(x: Tensor) -> bool:
    """Whether values of ``x`` may be looked at: no GPU is waited for, no transform or trace broken."""
    plain = type(x) in (Tensor, torch.nn.Parameter) and not torch._C._functorch.is_functorch_wrapped_tensor(x)
    return plain and x.device.type == "cpu"


def front(info: Any, in_dims: Sequence[int | None], tensors: Sequence[Any]) -> list[Any]:
    """Each tensor with the dimension that vmap adds in front, expanded there where it has none; the rest as it is."""
    return [
        t
        if not isinstance(t, Tensor)
        else t.expand(info.batch_size, *t.shape)
        if dim is None
        else t.movedim(dim, 0)
        for t, dim in zip(tensors, in_dims, strict=True)
    ]


def register(name: str, fake: Callable[..., Any], outputs: int = 1) -> None:
    """Shapes and batching of the compiled operator `flatkern::name`, which takes tensors with leading batch dimensions.

    The batching rule only moves the new dimension to the front of each, or expands it there.
    """
    if not compiled_available():
        return

    def batched(info: Any, in_dims: tuple[int | None, ...], *args: Tensor) -> tuple[Any, Any]:
        result = getattr(torch.ops.flatkern, name)(*front(info, in_dims, args))
        return result, 0 if outputs == 1 else (0,) * outputs

    torch.library.register_fake(f"flatkern::{name}", fake)
    torch.library.register_vmap(f"flatkern::{name}", batched)
