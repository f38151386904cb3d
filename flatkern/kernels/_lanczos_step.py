"""The three-term step of Lanczos for several runs in lockstep."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._checks import check_dtype
from ._registration import forward_rule, in_graph, quick
from ._select import compiled_available, runs_compiled_rows


class LanczosStep(NamedTuple):
    """What :func:`lanczos_step` returns."""

    residual: Tensor
    """[..., k, size]: image − alpha current − beta previous."""
    alpha: Tensor
    """[..., k] float64: ⟨current, image⟩."""
    norm: Tensor
    """[..., k] float64: ‖residual‖, the next beta."""


def lanczos_step(
    image: Tensor, current: Tensor, previous: Tensor, beta: Tensor, *, out: Tensor | None = None
) -> LanczosStep:
    r"""One step of k Lanczos runs: α = ⟨v, w⟩, r = w − α v − β u, ‖r‖, with w = A v the image of ``current``.

    Args:
        image, current, previous: w, v, u: [..., k, size], one dtype, float32 or float64. For w and v rounding
            is that of their dtype; sums are in float64, in an order that depends on ``size`` alone.
        beta: [..., k]: the previous step's norm, 0 at the first.
        out: where to write the residual, [k, size]; it may be ``previous`` (or ``image``) itself, whose memory
            is then reused. Not differentiable.

    Returns:
        A :class:`LanczosStep`. Differentiable (any number of times, in reverse and forward mode) without ``out``.

    Cost: two readings of w and v, one of u, one writing; nothing waits for a device.

    Raises:
        TypeError: not tensors of one supported dtype; ``out`` where derivatives are asked for.
        ValueError: shapes that do not go together.

    Source: Lanczos, J. Res. Nat. Bur. Standards 45 (1950); Paige, J. Inst. Math. Appl. 10 (1972), variant (2, 7).

    Example:
        >>> import torch
        >>> v = torch.eye(4)[:1]
        >>> step = lanczos_step(torch.ones(1, 4), v, torch.zeros(1, 4), torch.zeros(1))
        >>> step.alpha.item(), step.residual.tolist()
        (1.0, [[0.0, 1.0, 1.0, 1.0]])
    """
    _check(image, current, previous, beta)
    if out is None:
        return LanczosStep(*_apply(image, current, previous, beta.to(torch.float64)))
    if any(t.requires_grad for t in (image, current, previous, beta)) and torch.is_grad_enabled():
        raise TypeError("lanczos_step: out: it cannot be differentiated through; leave it out")
    if image.dim() != 2 or out.shape != image.shape or out.dtype != image.dtype or out.device != image.device:
        raise ValueError(
            f"lanczos_step: out: expected [k, size] as image is, {tuple(image.shape)} of {image.dtype}, got "
            f"{tuple(out.shape)} of {out.dtype}"
        )
    return LanczosStep(*_raw(image, current, previous, beta.to(torch.float64), out))


def reference(image: Tensor, current: Tensor, previous: Tensor, beta: Tensor) -> LanczosStep:
    """In plain PyTorch."""
    alpha = (image.double() * current.double()).sum(-1)
    residual = image - alpha[..., None].to(image.dtype) * current - beta[..., None].to(image.dtype) * previous
    return LanczosStep(residual, alpha, torch.linalg.vector_norm(residual.double(), dim=-1))


def _check(image: Tensor, current: Tensor, previous: Tensor, beta: Tensor) -> None:
    named = {"image": image, "current": current, "previous": previous, "beta": beta}
    for name, t in named.items():
        if not isinstance(t, Tensor):
            raise TypeError(f"lanczos_step: {name}: expected a torch.Tensor, got {type(t).__name__}")
    check_dtype("lanczos_step", image.dtype)
    if image.dim() < 2:
        raise ValueError(f"lanczos_step: image: expected [..., k, size], got shape {tuple(image.shape)}")
    for name in ("current", "previous"):
        if named[name].dtype != image.dtype:
            raise TypeError(f"lanczos_step: {name}: expected {image.dtype} as image, got {named[name].dtype}")
        if named[name].shape != image.shape:
            raise ValueError(
                f"lanczos_step: {name}: expected shape {tuple(image.shape)} as image, got "
                f"{tuple(named[name].shape)}"
            )
    if beta.shape != image.shape[:-1]:
        raise ValueError(
            f"lanczos_step: beta: expected shape {tuple(image.shape[:-1])}, got {tuple(beta.shape)}"
        )


def _unit_rows(x: Tensor) -> Tensor:
    """As [rows, size] with unit strides inside rows, where that is not so already copied."""
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    return flat if flat.shape[1] <= 1 or flat.stride(1) == 1 else flat.contiguous()


def _raw(
    image: Tensor, current: Tensor, previous: Tensor, beta: Tensor, out: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    if not runs_compiled_rows(image.device):
        step = reference(image, current, previous, beta)
        return (step.residual if out is None else out.copy_(step.residual)), step.alpha, step.norm
    lead = image.shape[:-1]
    direct = out is not None and (out.shape[1] <= 1 or out.stride(1) == 1)
    target = torch.empty(lead.numel(), image.shape[-1], dtype=image.dtype, device=image.device)
    if out is not None and direct:
        target = out
    alpha, norm = torch.ops.flatkern.lanczos_step(
        _unit_rows(image), _unit_rows(current), _unit_rows(previous), beta.reshape(-1).contiguous(), target
    )
    residual = target.reshape(image.shape)
    if out is not None:
        residual = out if direct else out.copy_(residual)
    return residual, alpha.reshape(lead), norm.reshape(lead)


def _over(total: Tensor, part: Tensor) -> Tensor:
    """total / part, and 0 where part is 0: the norm has no derivative there."""
    return torch.where(part > 0, total / torch.where(part > 0, part, 1.0), 0.0)


@quick
class _Step(torch.autograd.Function):
    @staticmethod
    def forward(
        image: Tensor, current: Tensor, previous: Tensor, beta: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _raw(image, current, previous, beta, None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.save_for_backward(*inputs, *output)
        ctx.save_for_forward(*inputs, *output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, ...]:
        w, v, u, beta, r, alpha, norm = ctx.saved_tensors
        to_r, to_alpha, to_norm = grads
        to_r = to_r + _over(to_norm, norm)[..., None].to(r.dtype) * r
        to_alpha = to_alpha - (to_r.double() * v.double()).sum(-1)
        share = to_alpha[..., None].to(r.dtype)
        return (
            to_r + share * v,
            share * w - alpha[..., None].to(r.dtype) * to_r,
            -beta[..., None].to(r.dtype) * to_r,
            -(to_r.double() * u.double()).sum(-1),
        )

    @staticmethod
    @forward_rule
    def jvp(
        w: Tensor,
        v: Tensor,
        u: Tensor,
        beta: Tensor,
        r: Tensor,
        alpha: Tensor,
        norm: Tensor,
        *tangents: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        dw, dv, du, db = tangents
        da = (dw.double() * v.double() + w.double() * dv.double()).sum(-1)
        a, b, da_r, db_r = (t[..., None].to(r.dtype) for t in (alpha, beta, da, db))
        dr = dw - da_r * v - a * dv - db_r * u - b * du
        return dr, da, _over((r.double() * dr.double()).sum(-1), norm)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, int, int]]:
        moved = [
            t.expand(info.batch_size, *t.shape) if dim is None else t.movedim(dim, 0)
            for t, dim in zip(inputs, in_dims, strict=True)
        ]
        return _apply(*moved), (0, 0, 0)


@in_graph
def _apply(image: Tensor, current: Tensor, previous: Tensor, beta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    step: tuple[Tensor, Tensor, Tensor] = _Step.apply(image, current, previous, beta)
    return step


def _fake(
    image: Tensor, current: Tensor, previous: Tensor, beta: Tensor, residual: Tensor
) -> tuple[Tensor, Tensor]:
    shape = image.shape[:-1]
    return image.new_empty(shape, dtype=torch.float64), image.new_empty(shape, dtype=torch.float64)


if compiled_available():
    torch.library.register_fake("flatkern::lanczos_step", _fake)
