"""A recorded run of some samples: what is proven of it, and where the other parameters enter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from flatkern.affine import Degree, custom_function, degrees, hidden_parameters
from flatkern.problem import check_output, preserve_state
from flatkern.residual.change import Entry
from flatkern.residual.entries import find_entries
from flatkern.sample_axis import SampleAxis, check_alike
from flatkern.samples import count_samples
from flatkern.tape import Op, Tape, UnsupportedError, record

__all__ = ["Chunk", "linearize"]


@dataclass
class Chunk:
    """One recorded run."""

    tape: Tape
    output: Tensor
    axes: dict[int, SampleAxis]
    verdicts: dict[str, Degree]
    entries: list[Entry]
    refused: dict[str, str]
    """Parameters that are neither proven nor understood."""

    @property
    def active_ops(self) -> tuple[list[Op], set[int]]:
        """The operations a change reaches as far as autograd follows, and the values it reaches."""
        entering = {id(e.op) for e in self.entries}
        reached: set[int] = set()
        ops = []
        for op in self.tape.ops:
            if id(op) in entering or any(v.index in reached for v in op.inputs):
                live = [o.index for o in op.outputs if o is not None and o.differentiable]
                if live:
                    reached.update(live)
                    ops.append(op)
        return ops, reached


def linearize(
    model: nn.Module,
    x: Any,
    parameters: Mapping[str, Tensor],
    small: Tape,
    places: Mapping[int, tuple[int, bool]],
    forward: Callable[[nn.Module, Any], tuple[Tensor, Any]] | None = None,
) -> Chunk:
    """Run the model on a chunk and find out what is proven and where the rest enters.

    Raises:
        UnsupportedError: the run cannot be represented, or differs from the small one.
    """
    n = count_samples(x)
    with preserve_state(model):
        tape, output = record(model, x, parameters, forward)
    check_output(model, output, n)
    check_alike(small, tape)
    axes = {}
    for index, (axis, innermost) in places.items():
        shape = tape.values[index].tensor.shape
        if axis < len(shape) and shape[axis] % n == 0:
            axes[index] = SampleAxis(axis, innermost, n)
    verdicts = degrees(output, parameters, hidden_parameters(tape))
    wanted = frozenset(name for name, degree in verdicts.items() if not degree.proven)
    if custom := custom_function(output):
        raise UnsupportedError(custom)
    entries, refused = find_entries(tape, wanted, axes)
    return Chunk(tape, output, axes, verdicts, entries, refused)
