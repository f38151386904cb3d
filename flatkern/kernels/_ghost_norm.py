"""Squared norms of gradients of shared weights, Σ_t g_t a_tᵀ, that store neither the gradient nor T × T products."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._checks import MAX_BATCH_DIMS, check_matrices
from ._ghost_reference import reference, reference_pullback, reference_tangent
from ._ghost_shapes import Form, check_form, geometry, leading, take_formed
from ._registration import differentiated, forward_rule, front, in_graph, quick
from ._select import compiled_available, runs_compiled_rows


def ghost_norm(a: Tensor, g: Tensor, *, form: Form = "auto") -> Tensor:
    r"""‖Σ_t g_t a_tᵀ‖_F² = Σ_{t,s} (g_t·g_s)(a_t·a_s): the squared gradient norm of a weight shared over T positions.

    For a dense layer z_t = W a_t and cotangents g_t at z_t, the gradient in W of one sample is Σ_t g_t a_tᵀ. Its
    norm is summed tile by tile: neither the d_out × d_in gradient nor a T × T matrix is stored.

    Args:
        a: [..., T, d_in], float32 or float64, any strides.
        g: [..., T, d_out], of a's dtype. Leading dimensions broadcast; those that only g has are cotangents of the
            same samples, which share the products of a.
        form: ``"explicit"`` sums the squares of tiles of the gradient (T d_in d_out multiply-adds), ``"gram"`` the
            products of tiles of A Aᵀ and G Gᵀ on and above the diagonal (T² (d_in + d_out) / 2); ``"auto"`` takes the
            cheaper.

    Returns:
        [...], float64: products in the dtype of the inputs, the sum over them in float64. Zero for T = 0.

    Cost: the multiply-adds above. Workspace of the compiled kernel: at most 1 MiB a thread, whatever the sizes; of
        the reference 0.5 MiB (float32) a sample and cotangent. Derivatives form the gradient or the T × T products.

    Raises:
        TypeError: another dtype or layout, or two dtypes.
        ValueError: shapes that do not go together, or an unknown form.

    Source: Goodfellow, arXiv:1510.01799 (T = 1); Li et al., arXiv:2110.05679, section 4 (sequences).

    Example:
        >>> import torch
        >>> a, g = torch.ones(2, 3, 5), torch.ones(2, 3, 4)  # the gradient's 4 · 5 entries are all 3
        >>> ghost_norm(a, g)
        tensor([180., 180.], dtype=torch.float64)
    """
    _check("ghost_norm", a, g, form)
    lead, absent = leading("ghost_norm", a.shape, g.shape)
    samples = lead[absent:]
    shared = a.reshape(a.shape[a.dim() - 2 - len(samples) :]).expand(*samples, *a.shape[-2:])
    stacked = g.expand(*lead, *g.shape[-2:]).reshape(math.prod(lead[:absent]), *samples, *g.shape[-2:])
    if len(samples) > MAX_BATCH_DIMS:
        shared, stacked = shared.reshape(-1, *a.shape[-2:]), stacked.flatten(1, len(samples))
    return ghost_norms(shared, stacked, 1, form).reshape(lead)


def conv_ghost_norm(
    x: Tensor,
    g: Tensor,
    kernel_size: Sequence[int],
    *,
    stride: Sequence[int] | int = 1,
    padding: Sequence[int] | int = 0,
    dilation: Sequence[int] | int = 1,
    groups: int = 1,
    form: Form = "auto",
) -> Tensor:
    """:func:`ghost_norm` of a convolution's weight: a_t are the patches of x, which are never formed.

    Args:
        x: the layer's input, [n, C_in, *size], float32 or float64.
        g: cotangents of its output, [..., n, C_out, *positions], of x's dtype.
        kernel_size: one number a spatial dimension; there may be one to three.
        stride, padding (zeros, on both sides), dilation, groups: as of ``torch.nn.functional.conv2d``.
        form: as of :func:`ghost_norm`, with d_in = C_in / groups · prod(kernel_size), in each group.

    Returns:
        [..., n], float64.

    Cost: as :func:`ghost_norm`, and one padded copy of x. The reference forms the patches, and so do derivatives.

    Raises:
        TypeError: another dtype or layout, or two dtypes.
        ValueError: shapes or numbers that do not go together, or an unknown form.

    Source: Rochette, Manoel, Tramel, arXiv:1912.06015 (patches as positions).

    Example:
        >>> import torch
        >>> x, g = torch.ones(2, 1, 4, 4), torch.ones(2, 3, 3, 3)
        >>> conv_ghost_norm(x, g, (2, 2))  # 3 · 4 entries, each a sum over 9 positions
        tensor([972., 972.], dtype=torch.float64)
    """
    name = "conv_ghost_norm"
    _check(name, x, g, form)
    shape = geometry(name, x.shape, g.shape, kernel_size, stride, padding, dilation, groups)
    patches = windows(x, shape.kernel, shape.stride, shape.padding, shape.dilation, groups)
    rows = g.reshape(shape.cotangents).movedim(3, -1)
    return ghost_norms(patches, rows, len(shape.kernel), form).sum(-1).reshape(*shape.lead, x.shape[0])


def windows(
    inputs: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    """The patches of a convolution as a view of its padded input: [n, groups, *positions, C / groups, *kernel]."""
    n, channels, dims = inputs.shape[0], inputs.shape[1], len(kernel)
    view = inputs
    if any(padding):
        view = torch.nn.functional.pad(inputs, [p for size in reversed(padding) for p in (size, size)])
    for d in range(dims):
        span = dilation[d] * (kernel[d] - 1) + 1
        view = view.unfold(d + 2, span, stride[d])[..., :: dilation[d]]
    view = view.reshape(n, groups, channels // groups, *view.shape[2:])
    return view.movedim(2, 2 + dims)


def ghost_norms(a: Tensor, g: Tensor, position_dims: int, form: Form = "auto") -> Tensor:
    """[K, *samples] of a [*samples, *positions, *features] and g [K, *samples, *positions, d_out], not checked."""
    samples = g.dim() - 2 - position_dims
    positions, d_in = g.shape[1 + samples : -1].numel(), a.shape[samples + position_dims :].numel()
    return _apply(a, g, position_dims, take_formed(form, positions, d_in, g.shape[-1], g.shape[0]))


def _check(name: str, a: Tensor, g: Tensor, form: str) -> None:
    check_matrices(name, a, square=False)
    check_matrices(name, g, square=False)
    if a.dtype != g.dtype:
        raise TypeError(f"{name}: g: expected {a.dtype} as the input, got {g.dtype}")
    check_form(name, form)


def _raw(a: Tensor, g: Tensor, position_dims: int, formed: bool) -> Tensor:
    if not runs_compiled_rows(g.device):
        return reference(a, g, position_dims, formed)
    value: Tensor = torch.ops.flatkern.ghost_norm(a, g, position_dims, formed)
    return value


def _batched(
    info: Any, in_dims: Sequence[int | None], a: Tensor, g: Tensor, *sizes: Any
) -> tuple[Tensor, int]:
    """A batch of cotangents alone is more cotangents; else the batch is one of samples."""
    dim = in_dims[1]
    if in_dims[0] is None and dim is not None:
        stacked = g.movedim(dim, 0)
        value = _apply(a, stacked.flatten(0, 1), *sizes)
        return value.unflatten(0, stacked.shape[:2]), 0
    a, g = front(info, in_dims[:2], (a, g))
    return _apply(a, g.transpose(0, 1), *sizes), 1


@quick
class _GhostNorm(torch.autograd.Function):
    @staticmethod
    def forward(a: Tensor, g: Tensor, position_dims: int, formed: bool) -> Tensor:
        return _raw(a, g, position_dims, formed)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, int, bool], _output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.save_for_forward(*inputs[:2])
        ctx.sizes = inputs[2:]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None, None, None]:
        wanted = ctx.needs_input_grad[:2]
        a, g = ctx.saved_tensors
        position_dims, formed = ctx.sizes
        return *reference_pullback(a, g, grads[0], position_dims, formed, wanted), None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        rule = forward_rule(partial(reference_tangent, *ctx.sizes))
        value: Tensor = rule(ctx, *tangents[:2])
        return value

    @staticmethod
    def vmap(info: Any, in_dims: Any, *operands: Any) -> tuple[Tensor, int]:
        return _batched(info, in_dims, *operands)


@in_graph
def _apply(a: Tensor, g: Tensor, position_dims: int, formed: bool) -> Tensor:
    tracked = differentiated(a) or differentiated(g)
    value: Tensor = (
        _GhostNorm.apply(a, g, position_dims, formed) if tracked else _raw(a, g, position_dims, formed)
    )
    return value


def _fake(_a: Tensor, g: Tensor, position_dims: int, _formed: bool) -> Tensor:
    return g.new_empty(g.shape[: -1 - position_dims], dtype=torch.float64)


if compiled_available():
    torch.library.register_fake("flatkern::ghost_norm", _fake)
    torch.library.register_vmap("flatkern::ghost_norm", _batched)
