"""A batch's curvature by its own tangent programs (Pearlmutter's R-operator): no autograd between products."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flatkern.operators.gradient_tape import GradientTape
from flatkern.operators.tangent_program import TangentProgram
from flatkern.tape import Value

__all__ = ["LinearizedGradient", "LinearizedOutput"]


def _rows(tangents: Sequence[Tensor | None], batched: bool) -> list[Tensor | None]:
    return [t if t is None or batched else t.unsqueeze(0) for t in tangents]


def _run(
    program: TangentProgram,
    tangents: Sequence[Tensor | None],
    wanted: Sequence[int],
    batched: bool,
    places: Sequence[Tensor] | None,
) -> list[Tensor | None]:
    """The program on K tangents, or on a single one without the leading axis."""
    if batched:
        return program.apply(tangents, wanted, places)
    rows = None if places is None else [p.unsqueeze(0) for p in places]
    images = program.apply(_rows(tangents, batched), wanted, rows)
    return [
        None if t is None else places[j] if places is not None and rows is not None and t is rows[j] else t[0]
        for j, t in enumerate(images)
    ]


class LinearizedGradient:
    """The tangent of a gradient that a tape has noted: H V for K vectors in one sweep."""

    def __init__(self, tape: GradientTape, gradients: Sequence[Value | None]) -> None:
        self._program = TangentProgram(tape, tape.parameters, gradients)

    @property
    def roots(self) -> Sequence[Tensor]:
        """The tensors that are kept."""
        return self._program.constants()

    def apply(
        self,
        tangents: Sequence[Tensor | None],
        wanted: Sequence[int],
        *,
        batched: bool = False,
        places: Sequence[Tensor] | None = None,
    ) -> Sequence[Tensor | None]:
        """H v in the wanted parameters; see :class:`Linearization`."""
        return _run(self._program, tangents, wanted, batched, places)


class LinearizedOutput:
    """Jᵀ C J by the tangent programs of the output and of its pulled-back cotangent."""

    def __init__(
        self,
        tape: GradientTape,
        output: Tensor,
        parameters: Sequence[Tensor],
        product: Callable[[Tensor], Tensor | None],
        *,
        several: bool = False,
    ) -> None:
        self._product, self._several = product, several
        self._push: TangentProgram | None = None  # an output without gradients has none
        self._pull: TangentProgram | None = None
        if not output.requires_grad:
            return
        result = tape.value_of(output)
        cotangent, gradients = tape.backward(output, parameters, torch.ones_like(output).detach())
        self._push = TangentProgram(tape, tape.parameters, [result])
        self._pull = TangentProgram(tape, [cotangent], gradients)

    @property
    def roots(self) -> Sequence[Tensor]:
        """The tensors that are kept."""
        programs = [p for p in (self._push, self._pull) if p is not None]
        return [t for program in programs for t in program.constants()]

    def apply(
        self,
        tangents: Sequence[Tensor | None],
        wanted: Sequence[int],
        *,
        batched: bool = False,
        places: Sequence[Tensor] | None = None,
    ) -> Sequence[Tensor | None]:
        """J v, C, Jᵀ; see :class:`Linearization`."""
        nothing: list[Tensor | None] = [None] * len(wanted)
        if self._push is None or self._pull is None:
            return nothing
        (change,) = self._push.apply(_rows(tangents, batched), [0])
        if change is None:
            return nothing
        if self._several:
            curved = self._product(change)
        else:
            rows = [row for c in change if (row := self._product(c)) is not None]
            curved = torch.stack(rows) if rows else None
        if curved is None:
            return nothing
        return _run(self._pull, [curved if batched else curved[0]], wanted, batched, places)
