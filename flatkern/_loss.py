"""What a loss is to this package, and what its closed forms share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = [
    "Loss",
    "Reduction",
    "check_classes",
    "classes_second",
    "draw",
    "draw_classes",
    "identity_cotangents",
]

Reduction = Literal["mean", "sum"]
LossFunction = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Loss:
    """A loss split into numerator and denominator; see the module's text.

    Attributes:
        name: what it is called in results.
        reduction: ``"mean"`` (divide by Σ denominators) or ``"sum"`` (divide by 1).
        numerator: (output, target) → scalar, the sum over samples; differentiable in the output.
        weight: (output, target) → this batch's part of the mean's denominator, 0-d.
        product: (output, target, v [..., *output]) → H v of the numerator; ``None``: not known in closed form.
        root: (output, target) → cotangents S [K, *output] with Σ_k s_k s_kᵀ = H; ``None`` likewise.
    """

    name: str
    reduction: Reduction
    numerator: LossFunction
    weight: LossFunction
    product: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    root: LossFunction | None = None
    sketch: Callable[[Tensor, Tensor, Tensor], Tensor] | None = None
    """(output, target, ε [*output]) → S ε [*output] for a square root S of H; ε may be integers. ``None``: not known in
    closed form."""
    columns: Callable[[Tensor], int] = lambda output: output[0].numel()
    """output → K, how many cotangents ``root`` gives."""
    sampled: Callable[[Tensor, Tensor, torch.Generator], Tensor] | None = None
    """(output, target, generator) → r [*output], the gradient of the numerator in the output at labels drawn from the
    model's own predictive distribution; E r rᵀ is block diagonal over samples. ``None``: no such distribution."""
    callable: bool = False
    """Whether it is a user's function, whose reduction was said and not read."""
    orthogonal: LossFunction | None = None
    """Cotangents as ``root``'s that are orthogonal within a sample where that is cheap; ``None``: ``root``."""

    def denominator(self, total_weight: Tensor | float) -> float:
        """What the summed numerators are divided by, from the summed weights; raises where it is not positive."""
        if self.reduction == "sum":
            return 1.0
        value = float(total_weight)
        if not value > 0:
            raise ValueError("loss_fn: the mean's denominator is 0 (are all targets ignored?)")
        return value

    def check_reduction(self, output: Tensor, target: Tensor) -> None:
        """Compare a callable's value on a batch of two samples or more with those of its halves.

        Raises:
            ValueError: they do not add up as ``reduction`` says.
        """
        half = len(output) // 2
        with torch.no_grad():
            whole = float(self.numerator(output, target))
            parts = [
                (len(f), float(self.numerator(f, y)))
                for f, y in ((output[:half], target[:half]), (output[half:], target[half:]))
            ]
        size = abs(whole) + sum(abs(value) for _, value in parts)
        tolerance = size * (1e-9 if output.dtype == torch.float64 else 1e-4)
        if not abs(whole - sum(value for _, value in parts)) > tolerance:  # NaN has its own message
            return
        # what the numerators would be under the other reduction
        n, other = len(output), "sum" if self.reduction == "mean" else "mean"
        scale = (lambda k: 1 / k) if self.reduction == "mean" else float
        if abs(whole * scale(n) - sum(value * scale(k) for k, value in parts)) <= size * max(1.0, n) * 1e-4:
            raise ValueError(
                f"reduction: {self.reduction!r} was said, but on two halves of a batch loss_fn ({self.name}) behaves "
                f"like a {other}; pass reduction={other!r}"
            )
        raise ValueError(
            f"reduction: loss_fn ({self.name}) is neither a sum nor a mean over samples: its values on two halves of a "
            "batch do not add up to that on the batch (ignored labels, weights, or terms that mix samples?); use "
            "torch's loss module, or reduction='sum' with a function that sums over samples"
        )


def classes_second(tensor: Tensor) -> Tensor:
    """Classes from the last axis to axis 1, as a view."""
    return tensor.movedim(-1, 1)


def check_classes(output: Tensor, target: Tensor, axis: int) -> None:
    """Targets must be class indices for every position, or probabilities; says how token outputs are passed."""
    if output.ndim < 2:
        raise ValueError(f"loss_fn: cross-entropy needs outputs [n, C, ...], got {tuple(output.shape)}")
    positions = list(output.shape)
    positions.pop(axis)
    wanted = list(output.shape) if target.is_floating_point() else positions
    if list(target.shape) == wanted:
        return
    hint = ""
    if axis == 1 and list(target.shape) == list(output.shape[:-1]):
        hint = "; for outputs [B, T, V] with the classes last use flatkern.losses.TokenCrossEntropyLoss"
    raise ValueError(
        f"target: shape {tuple(target.shape)} does not fit outputs {tuple(output.shape)} with the classes on axis "
        f"{axis % output.ndim}; expected {tuple(wanted)}{hint}"
    )


def draw(kind: Callable[..., Tensor], like: Tensor, generator: torch.Generator) -> Tensor:
    """``torch.rand`` or ``torch.randn`` in the shape, dtype and device of ``like``."""
    # drawn on the generator's device (the CPU), so that a seed means the same on every device
    return kind(like.shape, generator=generator, dtype=torch.float64, device=generator.device).to(like)


def draw_classes(p: Tensor, generator: torch.Generator) -> Tensor:
    """One-hot draws from the probabilities p [n, C, ...] along axis 1."""
    cumulated = p.double().cumsum(1)
    u = draw(torch.rand, cumulated[:, :1], generator) * cumulated[:, -1:]
    drawn = (cumulated <= u).sum(1, keepdim=True).clamp(max=p.shape[1] - 1)
    return torch.zeros_like(p).scatter_(1, drawn, 1.0)


def identity_cotangents(output: Tensor) -> Tensor:
    """The unit cotangents of one sample's N output entries, for all samples: [N, n, *output.shape[1:]]."""
    n, entries = len(output), output[0].numel()
    eye = torch.eye(entries, dtype=output.dtype, device=output.device)
    return eye.reshape(entries, 1, *output.shape[1:]).expand(entries, n, *output.shape[1:])
