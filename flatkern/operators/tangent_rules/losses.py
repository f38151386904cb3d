"""Losses whose gradient in the output does not depend on the output's values."""

from __future__ import annotations

from collections.abc import Sequence

from flatkern.tape import Op, UnsupportedError

from .rule import Rule, Tangent, register


@register("nll_loss_backward", "nll_loss2d_backward")
class Constant(Rule):
    """Linear losses: their gradient moves with its own cotangent only, which is a number."""

    ignored = (1,)

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        raise UnsupportedError(f"{op.name}: the loss is scaled by something that depends on the parameters")

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """Never reached."""
        raise NotImplementedError
