"""Where the samples lie in each intermediate value of a run, found by scaling cotangents sample by sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.problem import preserve_state
from flatkern.samples import count_samples, take
from flatkern.tape import Tape, UnsupportedError, Value, record

__all__ = ["FEW", "SampleAxis", "footprint", "sample_axes"]

FEW = 3
"""Samples of the small run."""


@dataclass(frozen=True)
class SampleAxis:
    """The axis over which the samples run, alone or folded together with positions."""

    axis: int
    innermost: bool
    """Whether the sample is the faster of two folded indices (rows t·n + i instead of i·k + t)."""
    n: int

    def rows(self, tensor: Tensor) -> Tensor:
        """[..., n·k, ...] → [n, ..., k, ...], the axis k left out where it is 1; a view."""
        size = tensor.shape[self.axis]
        if size == self.n:
            return tensor.movedim(self.axis, 0)
        k = size // self.n
        if self.innermost:
            return tensor.unflatten(self.axis, (k, self.n)).movedim(self.axis + 1, 0)
        return tensor.unflatten(self.axis, (self.n, k)).movedim(self.axis, 0)

    def back(self, rows: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of :meth:`rows` for a tensor of that shape."""
        if shape[self.axis] == self.n:
            return rows.movedim(0, self.axis)
        return rows.movedim(0, self.axis + int(self.innermost)).flatten(self.axis, self.axis + 1)

    def total(self, tensor: Tensor) -> Tensor:
        """Sums over everything but the samples, float64 [n]."""
        return self.rows(tensor).reshape(self.n, -1).sum(1).double()

    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        """:meth:`total` of the product of two tensors, which is not formed."""
        rows = (self.rows(t).reshape(self.n, -1) for t in (left, right))
        return torch.linalg.vecdot(*rows).double()


def footprint(tape: Tape) -> int:
    """Bytes of all values of a run but parameters; views are no bytes of their own."""
    if tape.bytes is not None:
        return tape.bytes
    owned = {v.tensor.untyped_storage().data_ptr() for v in tape.values if v.parameter is not None}
    storages = {(s := v.tensor.untyped_storage()).data_ptr(): s.nbytes() for v in tape.values}
    return sum(size for place, size in storages.items() if place not in owned)


def sample_axes(
    model: nn.Module,
    x: Any,
    parameters: Mapping[str, Tensor],
    forward: Callable[[nn.Module, Any], tuple[Tensor, Any]] | None = None,
    few: int = FEW,
    wanted: Callable[[Tape], bool] = lambda _: True,
) -> tuple[Tape, dict[int, tuple[int, bool]]]:
    """Find the samples' axis in every differentiable value, on the first few samples.

    The cotangents of values that belong to sample i are scaled by 2^i, exactly, when the output's are. With ``few`` 1
    there is nothing to find; nothing is looked for either where ``wanted`` says no of the run's tape.

    Returns:
        The small run's tape, its values let go, and (axis, innermost) by index of the value; those that no axis fits
        are absent.
    """
    m = min(few, count_samples(x))
    with preserve_state(model):
        tape, output = record(model, take(x, slice(0, m)), parameters, forward)
    found = _places(tape, output, m) if wanted(tape) else {}
    tape.bytes = footprint(tape)
    for value in tape.values:
        value.let_go()
        value.edge = None
    return tape, found


def _places(tape: Tape, output: Tensor, m: int) -> dict[int, tuple[int, bool]]:
    values = [v for v in tape.values if v.edge is not None]
    if output.grad_fn is None or not values:
        return {}
    if m == 1:  # everything is its own
        return {v.index: (0, False) for v in values if v.tensor.ndim}
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output)
    weights = 2.0 ** torch.arange(m, dtype=output.dtype, device=output.device)
    scaled = root * weights.reshape(m, *[1] * (output.ndim - 1))
    plain, other = (_cotangents(output, values, r) for r in (root, scaled))
    found: dict[int, tuple[int, bool]] = {}
    for value, g, h in zip(values, plain, other, strict=True):
        if g is not None and h is not None:
            place = _axis(g, h, weights)
            if place is not None:
                found[value.index] = place
    return found


def _cotangents(output: Tensor, values: Sequence[Value], root: Tensor) -> tuple[Tensor | None, ...]:
    edges = [v.edge for v in values if v.edge is not None]
    return torch.autograd.grad(output, edges, root, retain_graph=True, allow_unused=True)


def _axis(g: Tensor, h: Tensor, weights: Tensor) -> tuple[int, bool] | None:
    m = len(weights)
    for axis, size in enumerate(g.shape):
        if size % m:
            continue
        for innermost in (False, True) if size > m else (False,):
            shape = [1] * g.ndim
            shape[axis] = size
            factors = weights.repeat(size // m) if innermost else weights.repeat_interleave(size // m)
            if torch.equal(h, g * factors.reshape(shape)):
                return axis, innermost
    return None


def check_alike(small: Tape, tape: Tape) -> None:
    """Refuse a run whose operations differ from those of the small run."""
    if len(small.values) != len(tape.values) or any(
        a.func is not b.func for a, b in zip(small.ops, tape.ops, strict=False)
    ):
        raise UnsupportedError("the model's operations depend on the number of samples or on the data")
