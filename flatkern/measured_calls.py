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
from torch import Tensor

from flatkern.chunk_plan import ChunkModel, observed
from flatkern.flatness import ggn_trace, gradient_norms, sharpness
from flatkern.geometry import geometry
from flatkern.ggn_eigenvalues import ggn_spectrum
from flatkern.kronecker import kfac
from flatkern.operators.batches import OperatorData, reading
from flatkern.problem import model_device
from flatkern.results import HessianTrace
from flatkern.samples import count_samples, take
from flatkern.tangent_kernel import ntk
from flatkern.trace_allotted import LEAST_SAMPLES
from flatkern.traces import hessian_trace

__all__ = ["MEASURED", "Measured", "measured"]

_GRAMS: tuple[Callable[..., Any], ...] = (ntk, ggn_spectrum)
MEASURED: tuple[Callable[..., Any], ...] = (
    sharpness, ggn_trace, gradient_norms, hessian_trace, geometry, kfac, *_GRAMS,
)  # fmt: skip

_FEWEST = 4
"""Samples of the first run; enough for every check that a run on many makes."""
_MOST = 32
"""Samples of the second run."""
_STEEPEST = 1.25
"""Measured bytes over those of the chunk plan, for what comes with more samples, at most."""
_STEEPEST_GRAM = 4.0
"""Gram matrices of shared weights have temporaries of their own."""


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
    peak: int
    """Bytes."""
    peaks: dict[ChunkModel, int]
    """Bytes by pass; none where there is a single sample."""


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
    seconds = _seconds(call, small, large, data.total)
    if fn in _GRAMS:
        gram = _Matrix.of(arguments, data, large, chunk)
        taken = gram.bytes(data.total) + _bytes(small, large, data.batch, gram.bytes, _STEEPEST_GRAM)
        seconds += gram.seconds
    else:
        taken = _bytes(small, large, data.batch)
    return Measured(
        passes=_passes(large),
        matvecs=getattr(large.result, "matvecs", 0),
        bytes=taken,
        seconds=seconds,
        notes=_notes(data, large, chunk, arguments),
    )


@dataclass(frozen=True)
class _Matrix:
    """A matrix of all rows in float64, and the blocks it is put together of."""

    rows: float
    """A sample."""
    columns: float | None
    """Of the other side, in all; ``None``: the same as the rows."""
    most: int
    """Rows at most: the Gauss-Newton matrix itself is formed where there are fewer parameters."""
    chunk: int
    copies: int
    """Of the matrix: eigenvectors and their order make three."""
    seconds: float

    @classmethod
    def of(cls, arguments: dict[str, Any], data: _Data, run: _Run, chunk: int) -> _Matrix:
        result = run.result
        if isinstance(result, Tensor):
            rows, other = result.shape[0] / run.samples, arguments["x2"]
            columns = None if other is None else rows * count_samples(other)
            entries = rows * data.total * (rows * data.total if columns is None else columns)
            return cls(rows, columns, 1 << 62, chunk, 1, entries * _each_entry())
        rows, most = result.num_rows / run.samples, result.num_parameters
        size = int(min(rows * data.total, most))
        if size > arguments["max_size"]:
            raise ValueError(
                f"max_size: a matrix of {size} by {size} is beyond it, so that Lanczos is used; plan fk.eigsh with "
                "fk.ggn(...)"
            )
        vectors = bool(arguments["vectors"])
        seconds = size**2 * _each_entry() + _decomposition(size, vectors=vectors)
        return cls(rows, None, most, chunk, 3 if vectors else 1, seconds)

    def bytes(self, n: int) -> int:
        """With ``n`` samples: the matrix, and the block of a chunk with itself."""
        size = min(self.rows * n, self.most)
        width = size if self.columns is None else self.columns
        block = min(size, self.rows * self.chunk)
        return int(8 * (self.copies * size * width + block * min(block, width)))


def _each_entry() -> float:
    """Seconds for an entry of a Gram matrix of some hundred features, measured."""
    rows = torch.ones(512, 256, dtype=torch.float64)
    return _timed(lambda: rows @ rows.T) / 512**2


def _decomposition(size: int, *, vectors: bool) -> float:
    """Seconds for all eigenvalues of a symmetric matrix, from those of a small one."""
    small = min(size, 384)
    matrix = torch.eye(small, dtype=torch.float64) + 1 / small
    solve = torch.linalg.eigh if vectors else torch.linalg.eigvalsh
    return _timed(lambda: solve(matrix)) * (size / small) ** 3


def _no_goal(options: dict[str, Any]) -> bool:
    return options.get("atol") is None and options.get("samples") is None


def _run(call: Callable[[int], Callable[[], Any]], m: int) -> _Run:
    with observed() as observer:
        result = call(m)()
    return _Run(m, result, observer.peak, observer.peaks)


def _chunk(run: _Run, n: int) -> int:
    """Samples at a time of the pass that takes most at once."""
    return max((model.samples(n) for model in run.peaks), default=n)


def _bytes(
    small: _Run,
    large: _Run,
    n: int,
    known: Callable[[int], int] = lambda _: 0,
    steepest: float = _STEEPEST,
) -> int:
    """For each pass the larger run's peak, and what its plan says comes with more samples, at the measured slope.

    ``known`` bytes for a number of samples are left out.
    """
    most = large.peak - known(large.samples)
    for model, after in large.peaks.items():
        said, first, second = (model.bytes(k) for k in (n, small.samples, large.samples))
        slope, before = 1.0, small.peaks.get(model)
        after -= known(large.samples)
        if before is not None and second > first:
            slope = (after - before + known(small.samples)) / (second - first)
        slope = min(steepest, max(0.8, slope))  # small runs have fixed parts, and other blocks
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


def _notes(data: _Data, run: _Run, chunk: int, arguments: dict[str, Any]) -> tuple[str, ...]:
    notes = [f"measured on {run.samples} of {data.total} samples; {chunk} at a time"]
    if data.batches > 1:
        notes.append(f"{data.batches} batches; the largest has {data.batch} samples")
    if arguments.get("samples", 0) is None and getattr(run.result, "samples", None) is not None:
        notes.append("the number of draws is an estimate")
        if isinstance(run.result, HessianTrace) and data.batch >= LEAST_SAMPLES:
            notes.append(
                "on all samples the Gauss-Newton part may be sketched as well, which takes less time"
            )
    return tuple(notes)
