"""The derivatives of attention as autograd functions built on each other, each computed by blocks.

    _Attention: (q, k, v, mask) → O                 backward → _Gradient           jvp → _Tangent
    _Gradient:  (q, k, v, mask, g) → dq, dk, dv, …  backward → _Second, _Tangent   jvp → _Second
    _Tangent:   (q, …, q̇, …) → Ȯ                    backward → _Second, _Gradient  jvp raises
    _Second:    both tangents of the gradient       raises

The Hessian of ⟨g, O⟩ is symmetric, so that the double backward along (a, b, c) is the tangent along (a, b, c): one
routine serves both. O and the row statistics are handed on as known functions of q, k, v and mask: the formulas
account for them, and no derivative flows through them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _attention_blocks, _attention_kernels
from ._attention_batching import MASK, batched, call
from ._attention_layout import Form, Saved
from ._registration import in_graph, quick

THRICE = (
    "attention: its second derivatives cannot be differentiated again; run the model under "
    "torch.nn.attention.sdpa_kernel(SDPBackend.MATH) for third derivatives and for forward mode over forward mode"
)
Needs = tuple[bool, bool, bool, bool]


def _for(q: Tensor, v: Tensor, form: Form) -> Any:
    """The module that computes: the CUDA kernels where they take it, else plain PyTorch."""
    return _attention_kernels if _attention_kernels.takes(q, v, form) else _attention_blocks


def _operands(ctx: Any, tangents: Sequence[Any]) -> tuple[list[Any], list[Any], bool]:
    """Saved tensors and tangents of a ``jvp``, free of its own level, and whether there are outer levels.

    torch switches forward mode off while a ``jvp`` runs, for the enclosing levels of torch.func as well: forward
    over forward would be silently zero. It has to be switched on again, as ``_registration.forward_rule`` does.
    """
    saved, given = list(ctx.saved_tensors), list(tangents)
    tracked = [t is not None and torch._C._functorch.is_gradtrackingtensor(t) for t in (*saved, *given)]
    if not any(tracked):
        return saved, given, False
    with forward_ad._set_fwd_grad_enabled(True):
        plain = [
            forward_ad.unpack_dual(t, level=0).primal if flag else t
            for t, flag in zip((*saved, *given), tracked, strict=True)
        ]
    return plain[: len(saved)], plain[len(saved) :], True


def _keep(ctx: Any, form: Form, inputs: Sequence[Any], *tensors: Tensor | None) -> None:
    ctx.set_materialize_grads(False)
    ctx.tensors = [i for i, t in enumerate(inputs) if isinstance(t, Tensor)]
    ctx.form = form
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


@quick
class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, form: Form) -> tuple[Tensor, Tensor]:
        return _for(q, v, form).forward(q, k, v, mask, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        q, k, v, mask, form = inputs
        out, stats = output
        ctx.mark_non_differentiable(stats)
        _keep(ctx, form, inputs, q, k, v, mask, stats, out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        g, _ = grads
        if g is None:
            return None, None, None, None, None
        needs = _needed(ctx, (0, 1, 2, 3))
        return *_gradient(*ctx.saved_tensors, g, ctx.form, needs), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        saved, given, nested = _operands(ctx, tangents[:4])
        if all(t is None for t in given):
            return None, None
        with forward_ad._set_fwd_grad_enabled(nested):
            return _tangent(*saved, *given, ctx.form), None

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        *tensors, form = inputs
        return batched(_attention, info.batch_size, in_dims, tensors, form, (), (MASK,), mask_gradient=False)


@quick
class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, stats: Tensor, out: Tensor, g: Tensor,
        form: Form, needs: Needs,
    ) -> Any:  # fmt: skip
        return _for(q, v, form).gradient(Saved(q, k, v, mask, stats, out), g, form, needs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Any) -> None:
        *tensors, form, ctx.needs = inputs
        _keep(ctx, form, inputs, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        *saved, g = ctx.saved_tensors
        *needs, need_g = _needed(ctx, (0, 1, 2, 3, 6))
        nothing = None, None
        if all(t is None for t in grads):
            return None, None, None, None, *nothing, None, *nothing
        if not any(needs):
            return None, None, None, None, *nothing, _tangent(*saved, *grads, ctx.form), *nothing
        change, *parts = _second(*saved, g, *grads, None, ctx.form, tuple(needs))
        return *parts, *nothing, change if need_g else None, *nothing

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        given = [*tangents[:4], tangents[6]]
        (*saved, g), given, nested = _operands(ctx, given)
        if all(t is None for t in given):
            return None, None, None, None
        with forward_ad._set_fwd_grad_enabled(nested):
            return _second(*saved, g, *given, ctx.form, ctx.needs)[1:]

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        *tensors, form, needs = inputs
        return batched(
            _gradient, info.batch_size, in_dims, tensors, form, (needs,), (MASK,), mask_gradient=needs[3]
        )


@quick
class _Tangent(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, stats: Tensor, out: Tensor,
        dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, dmask: Tensor | None, form: Form,
    ) -> Tensor:  # fmt: skip
        return _for(q, v, form).tangent(Saved(q, k, v, mask, stats, out), dq, dk, dv, dmask, form)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Any) -> None:
        *tensors, form = inputs
        _keep(ctx, form, inputs, *tensors)

    @staticmethod
    def backward(ctx: Any, h: Any) -> Any:
        nothing = None, None
        if h is None:
            return (None,) * 11
        saved, along = ctx.saved_tensors[:6], ctx.saved_tensors[6:]
        needs, directions = _needed(ctx, (0, 1, 2, 3)), _needed(ctx, (6, 7, 8, 9))
        parts: Any = (None,) * 4
        if any(needs):
            _, *parts = _second(*saved, h, *along, None, ctx.form, needs)
        pulled: Any = (None,) * 4
        if any(directions):
            pulled = _gradient(*saved, h, ctx.form, directions)
        return *parts, *nothing, *pulled, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(THRICE)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        *tensors, form = inputs
        return batched(_tangent, info.batch_size, in_dims, tensors, form, (), (MASK, 9), mask_gradient=False)


@quick
class _Second(torch.autograd.Function):
    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, stats: Tensor, out: Tensor, g: Tensor,
        dq: Tensor | None, dk: Tensor | None, dv: Tensor | None, dmask: Tensor | None, dg: Tensor | None,
        form: Form, needs: Needs,
    ) -> Any:  # fmt: skip
        saved = Saved(q, k, v, mask, stats, out)
        return _for(q, v, form).second(saved, g, dq, dk, dv, dmask, dg, form, needs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], _output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(THRICE)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise NotImplementedError(THRICE)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> Any:
        *tensors, form, needs = inputs
        return batched(
            _second, info.batch_size, in_dims, tensors, form, (needs,), (MASK, 10), mask_gradient=needs[3]
        )


def _needed(ctx: Any, places: Sequence[int]) -> Any:
    """Which of the inputs at these places need a gradient in the running pass.

    ``needs_input_grad`` says what could need one; ``autograd.grad(inputs=...)`` may ask for less, which is what
    makes J v through a graph of Jᵀ w cheap.
    """
    edges = dict(zip(ctx.tensors, ctx.next_functions, strict=True))
    return tuple(ctx.needs_input_grad[i] and _runs(edges[i][0]) for i in places)


def _runs(node: Any) -> bool:
    if node is None:
        return False
    try:
        return bool(torch._C._will_engine_execute_node(node))
    except RuntimeError:  # a leaf that is asked for
        return True


@in_graph
def _attention(*inputs: Any) -> tuple[Tensor, Tensor]:
    return call(_Attention, inputs)


@in_graph
def _gradient(*inputs: Any) -> Any:
    return call(_Gradient, inputs)


@in_graph
def _tangent(*inputs: Any) -> Tensor:
    return call(_Tangent, inputs)


@in_graph
def _second(*inputs: Any) -> Any:
    return call(_Second, inputs)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, form: Form) -> Tensor:
    """O [B, Lq, e] of q [B, Lq, d], k [B, Lk, d], v [B, Lk, e] and a mask [M, Lq or 1, Lk or 1]."""
    return _attention(q, k, v, mask, form)[0]


def is_attention(node: Any) -> bool:
    """Whether a node of the autograd graph is that of :func:`attention`, its inputs q, k, v and mask."""
    return getattr(node, "_forward_cls", None) is _Attention
