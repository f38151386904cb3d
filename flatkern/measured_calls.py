"""What a call over a model and data would cost, from runs of the call itself on a few samples.

How the code would chunk all samples is asked of its own chunk plans, which the runs note down
(:mod:`flatkern.chunk_plan`); peak bytes and seconds are measured on the few and carried over.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from flatkern.chunk_plan import ChunkModel, observed
from flatkern.flatness import ggn_trace, gradient_norms, sharpness
from flatkern.geometry import geometry
from flatkern.kronecker import kfac
from flatkern.operators.batches import OperatorData, reading
from flatkern.problem import model_device
from flatkern.samples import count_samples, take
from flatkern.traces import hessian_trace

__all__ = ["MEASURED", "Measured", "measured"]

MEASURED: tuple[Callable[..., Any], ...] = (
    sharpness, ggn_trace, gradient_norms, hessian_trace, geometry, kfac,
)  # fmt: skip

_FEWEST = 4
"""Samples of the first run; enough for every check that a run on many makes."""
_MOST = 32
"""Samples of the second run."""


@dataclass(frozen=True)
class Measured:
    """The cost of a call."""

    passes: int
    matvecs: int
    bytes: int
    seconds: float
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Data:
    """Where a function's samples are, and how many."""

    name: str
    first: Any
    batch: int
    batches: int
    total: int

    @classmethod
    def of(cls, arguments: dict[str, Any]) -> _Data:
        name = "data" if "data" in arguments else "x"
        value, forward = arguments[name], arguments.get("forward")
        if name == "x" and forward is None:
            n = count_samples(value)
            return cls(name, value, n, 1, n)
        source = OperatorData(value, model_device(arguments["model"]), forward)
        with reading(value):
            first = next(iter(islice(source, 1)))
        n = count_samples(first)
        if isinstance(value, (list, tuple)) and not source.single:
            counts = [count_samples(batch) for batch in value]
            return cls(name, first, max(counts), len(counts), sum(counts))
        batches = 1 if source.single or not hasattr(value, "__len__") else len(value)
        return cls(name, first, n, batches, n * batches)

    def few(self, m: int) -> Any:
        """The first samples."""
        return take(self.first, slice(0, m))


@dataclass(frozen=True)
class _Run:
    samples: int
    result: Any
    peaks: dict[ChunkModel, int]
    """Bytes by pass."""


def measured(fn: Callable[..., Any], arguments: dict[str, Any]) -> Measured:
    """Passes, bytes and seconds of ``fn`` with these arguments, from runs on a few of the samples."""
    data = _Data.of(arguments)

    def call(m: int) -> Callable[[], Any]:
        options = {**arguments, data.name: data.few(m)}
        for tolerance in ("rtol", "atol"):  # as many draws as all samples would take
            wanted = options.get(tolerance)
            if wanted is None and tolerance == "rtol" and fn is hessian_trace and _no_goal(options):
                wanted = 0.01
            if wanted is not None:
                options[tolerance] = wanted * (data.total / m) ** 0.5
                if tolerance == "rtol":
                    options[tolerance] = min(options[tolerance], 0.99)
        return lambda: fn(**options)

    small = large = _run(call, min(data.batch, _FEWEST))
    chunk = _chunk(small, data.batch)
    if chunk > small.samples:
        large = _run(call, min(data.batch, _MOST, chunk))
    return Measured(
        passes=_passes(large),
        matvecs=getattr(large.result, "matvecs", 0),
        bytes=_bytes(small, large, data.batch),
        seconds=_seconds(call, small, large, data.total),
        notes=_notes(data, large, chunk),
    )


def _no_goal(options: dict[str, Any]) -> bool:
    return options.get("atol") is None and options.get("samples") is None


def _run(call: Callable[[int], Callable[[], Any]], m: int) -> _Run:
    with observed() as observer:
        result = call(m)()
    return _Run(m, result, observer.peaks)


def _chunk(run: _Run, n: int) -> int:
    """Samples at a time of the pass that takes most at once."""
    return max((model.samples(n) for model in run.peaks), default=n)


def _bytes(small: _Run, large: _Run, n: int) -> int:
    """For each pass the larger run's peak, and what its plan says comes with more samples, at the measured slope."""
    most = 0
    for (model, before), after in zip(small.peaks.items(), large.peaks.values(), strict=True):
        said, first, second = (model.bytes(k) for k in (n, small.samples, large.samples))
        slope = (after - before) / (second - first) if second > first else 1.0
        slope = min(1.25, max(0.8, slope))  # small runs have fixed parts, and other blocks
        most = max(most, after + int(slope * max(0, said - second)))
    return most


def _seconds(call: Callable[[int], Callable[[], Any]], small: _Run, large: _Run, total: int) -> float:
    first = _timed(call(small.samples))
    if large.samples == small.samples:
        return first * total / small.samples if total > small.samples else first
    second = _timed(call(large.samples))
    each = max(second - first, 0.0) / (large.samples - small.samples)
    return second + each * (total - large.samples)


def _timed(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _passes(run: _Run) -> int:
    passes = getattr(run.result, "passes", 0)
    return passes or max((getattr(model, "cotangents", 1) for model in run.peaks), default=1)


def _notes(data: _Data, run: _Run, chunk: int) -> tuple[str, ...]:
    notes = [f"measured on {run.samples} of {data.total} samples; {chunk} at a time"]
    if data.batches > 1:
        notes.append(f"{data.batches} batches; the largest has {data.batch} samples")
    if getattr(run.result, "samples", None) is not None:
        notes.append("the number of draws is an estimate")
    return tuple(notes)
