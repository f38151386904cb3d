"""What all jets share: one autograd function for every one of them, its derivatives taken from the reference.

A jet has outputs that contain φ''; whoever differentiates it wants φ''' and φ''''. Instead of a closed family of
kernels the derivatives are those of the reference, which is plain PyTorch: right to any order and under every
transform, at the speed of PyTorch. Calls that ask for no derivative go straight to the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import vjp

from ._registration import in_graph, quick
from ._select import runs_elementwise

Setting = tuple[float, ...]
Operands = Sequence[Tensor | None]
Rule = Callable[[Setting, Operands], tuple[Tensor, ...]]


@dataclass(frozen=True)
class JetOperator:
    """One jet.

    Attributes:
        compiled: (setting, operands) → outputs by the compiled kernel.
        reference: the same in differentiable PyTorch.
        leads: how many axes of each operand stand before those that a new batch axis goes to: 0 for a primal, 1 for
            the k tangents [k, ...]; -1: one tensor for all rows, which has no batch axis.
        out_leads: likewise for the outputs.
        unbatch: setting and operands of a call in which an operand with lead -1 has a batch axis in front → its
            outputs, batch axes placed by ``out_leads``; made of calls of jets and plain PyTorch.
    """

    compiled: Rule
    reference: Rule
    leads: tuple[int, ...]
    out_leads: tuple[int, ...]
    unbatch: Rule | None = None


_operators: dict[str, JetOperator] = {}


def define(name: str, operator: JetOperator) -> None:
    """Makes a jet known to :func:`call`."""
    _operators[name] = operator


def call(name: str, setting: Setting, *operands: Tensor | None) -> tuple[Tensor, ...]:
    """The outputs of a jet: differentiable, batchable, traceable."""
    if _plain(operands):
        return run(name, setting, operands)
    return _apply(name, setting, *operands)


def _plain(operands: Operands) -> bool:
    """Whether nothing watches: no gradient, no transform, no tangent level, no tracing."""
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0:
        return False
    if torch._C._functorch.maybe_current_level() is not None:
        return False
    if any(t is not None and t.requires_grad for t in operands) and torch.is_grad_enabled():
        return False
    return all(t is None or type(t) in (Tensor, torch.nn.Parameter) for t in operands)


def run(name: str, setting: Setting, operands: Operands) -> tuple[Tensor, ...]:
    """The outputs of a jet, operands not checked and nothing watched: half the overhead of the public functions."""
    operator = _operators[name]
    first = operands[0]
    assert first is not None
    if runs_elementwise(first):
        return operator.compiled(setting, operands)
    with torch.no_grad():
        return operator.reference(setting, operands)


def _primal(t: Tensor | None) -> Tensor | None:
    if t is None or not torch._C._functorch.is_gradtrackingtensor(t):
        return t
    return forward_ad.unpack_dual(t, level=0).primal


def _moving(
    ctx: Any, saved: Operands, which: Sequence[int]
) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """The reference as a function of some of its operands alone, and those."""

    def function(*some: Tensor) -> tuple[Tensor, ...]:
        operands = list(saved)
        for i, t in zip(which, some, strict=True):
            operands[i] = t
        return _operators[ctx.name].reference(ctx.setting, operands)

    return function, [t for i in which if (t := saved[i]) is not None]


@quick
class _Jet(torch.autograd.Function):
    @staticmethod
    def forward(name: str, setting: Setting, *operands: Tensor | None) -> tuple[Tensor, ...]:
        return run(name, setting, operands)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.name, ctx.setting, *operands = inputs
        ctx.save_for_backward(*operands)
        ctx.save_for_forward(*operands)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        saved = ctx.saved_tensors
        which = [i for i, needed in enumerate(ctx.needs_input_grad[2:]) if needed]
        function, inputs = _moving(ctx, saved, which)
        pull: Callable[..., Any] = vjp(function, *inputs)[1]
        found = dict(zip(which, pull(tuple(grads)), strict=True))
        return None, None, *(found.get(i) for i in range(len(saved)))

    @staticmethod
    def jvp(ctx: Any, _name: None, _setting: None, *tangents: Any) -> Any:
        saved, given = list(ctx.saved_tensors), list(tangents)
        nested = any(t is not None and torch._C._functorch.is_gradtrackingtensor(t) for t in (*saved, *given))
        # torch switches forward mode off while a jvp runs, for enclosing levels as well: see forward_rule
        with forward_ad._set_fwd_grad_enabled(nested):
            if nested:
                saved, given = [_primal(t) for t in saved], [_primal(t) for t in given]
            which = [i for i, t in enumerate(given) if t is not None]
            function, inputs = _moving(ctx, saved, which)
            # J ṫ as the derivative of the linear map w ↦ Jᵀ w, which every mode allows
            outputs: tuple[Tensor, ...]
            pull: Callable[..., Any]
            outputs, pull = vjp(function, *inputs)[:2]
            push: Callable[..., Any] = vjp(pull, tuple(torch.zeros_like(o) for o in outputs))[1]
            (result,) = push(tuple(given[i] for i in which))
            return result

    @staticmethod
    def vmap(info: Any, in_dims: Any, name: str, setting: Setting, *operands: Any) -> Any:
        operator = _operators[name]
        placed: list[Tensor | None] = []
        special = False
        for t, dim, lead in zip(operands, in_dims[2:], operator.leads, strict=True):
            if t is None or (lead < 0 and dim is None):
                placed.append(t)
            elif lead < 0:
                special = True
                placed.append(t.movedim(dim, 0))
            elif dim is None:
                shape = (*t.shape[:lead], info.batch_size, *t.shape[lead:])
                placed.append(t.unsqueeze(lead).expand(shape))
            else:
                placed.append(t.movedim(dim, lead))
        if special:
            assert operator.unbatch is not None
            outputs = operator.unbatch(setting, placed)
        else:
            outputs = call(name, setting, *placed)
        return outputs, operator.out_leads[: len(outputs)]


@in_graph
def _apply(name: str, setting: Setting, *operands: Tensor | None) -> tuple[Tensor, ...]:
    outputs: tuple[Tensor, ...] = _Jet.apply(name, setting, *operands)
    return outputs


# -- what the public functions check ---------------------------------------------------------------------------

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
"""What the jets compute with; bfloat16 is accumulated in float32."""


def wide_dtype(z: Tensor) -> torch.dtype:
    """What z is computed in."""
    return torch.float32 if z.dtype == torch.bfloat16 else z.dtype


def wide(t: Tensor | None) -> Tensor:
    """An operand in the dtype that it is computed in."""
    assert t is not None
    return t.float() if t.dtype == torch.bfloat16 else t


def check_primal(name: str, argument: str, z: Tensor, *, axes: int = 0) -> None:
    """Raises TypeError for anything but a dense tensor of a supported dtype, ValueError for too few axes."""
    if not isinstance(z, Tensor):
        raise TypeError(f"{name}: {argument} must be a torch.Tensor, got {type(z).__name__}")
    if z.dtype not in DTYPES:
        raise TypeError(
            f"{name}: {argument} has dtype {z.dtype}; supported are torch.float32, torch.float64 and torch.bfloat16"
        )
    if z.layout != torch.strided:
        raise TypeError(f"{name}: {argument} has layout {z.layout}; use a dense tensor")
    if z.dim() < axes:
        raise ValueError(
            f"{name}: {argument} needs at least {axes} axis, got shape {tuple(z.shape)}; the last one is the row"
        )


def check_like(
    name: str,
    argument: str,
    t: Tensor,
    shape: tuple[int, ...],
    z: Tensor,
    *,
    dtype: torch.dtype | None = None,
) -> None:
    """Raises where a tensor has not the shape, dtype (the primal's, unless given) and device that belong to z."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{name}: {argument} must be a torch.Tensor, got {type(t).__name__}")
    if t.device != z.device or t.dtype != (dtype or z.dtype):
        wanted = f"; use {dtype} there" if dtype not in (None, z.dtype) else "; convert one of them"
        raise TypeError(
            f"{name}: {argument} is {t.dtype} on {t.device}, the primal {z.dtype} on {z.device}{wanted}"
        )
    if tuple(t.shape) != shape:
        raise ValueError(f"{name}: {argument} must have shape {shape}, got {tuple(t.shape)}")


def check_tangents(name: str, argument: str, t: Tensor, z: Tensor) -> None:
    """Tangents have the primal's shape after one leading axis."""
    if isinstance(t, Tensor) and t.dim() != z.dim() + 1:
        raise ValueError(
            f"{name}: {argument} must have shape [k, *{tuple(z.shape)}], got {tuple(t.shape)}; for a single tangent "
            f"pass {argument}.unsqueeze(0)"
        )
    check_like(name, argument, t, (t.shape[0], *z.shape) if isinstance(t, Tensor) else (), z)
