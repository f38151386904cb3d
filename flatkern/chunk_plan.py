"""How many samples a linearization takes at a time, and the bytes that takes; told to whoever plans a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from flatkern.allocation import AllocationMeter

__all__ = ["ChunkModel", "ChunkPlan", "Observer", "frugal_limit", "note", "observed"]

_GRADIENTS = 1.7
"""A chunk's bytes over those of one gradient of the whole batch, at most,"""
_LEAST_BYTES = 12 << 20
"""but up to this size another chunk is not worth it (measured: chunks of a few samples run at half the speed)."""


class ChunkModel(Protocol):
    """Chunk sizes of one kind of pass."""

    def samples(self, n: int) -> int:
        """Samples at a time, of a batch of ``n``."""

    def bytes(self, chunk: int) -> int:
        """About what a chunk of so many samples takes at its peak."""


def frugal_limit(gradient: int, max_memory: int) -> int:
    """Bytes for a chunk where a gradient of the whole batch takes so many."""
    return min(max_memory, max(_LEAST_BYTES, int(_GRADIENTS * gradient)))


@dataclass(frozen=True)
class ChunkPlan:
    """Bytes of a chunk, from what a run on a few samples showed."""

    max_memory: int
    saved: int
    """Bytes that autograd keeps a sample."""
    entry: int
    """Bytes of an entry."""
    outputs: int
    """Entries of a sample's output."""
    sites: int
    """Entries a sample of all places where parameters enter: cotangents are taken there."""
    widest: int
    """Entries a sample of the largest of them."""
    cotangents: int
    at_once: int
    """Bytes of the widest place up to which several cotangents go through one pass."""
    roots: int
    """Copies of the cotangents at the output: 0 where all samples share them."""
    kept: int
    """Entries a sample of places where all cotangents are kept at once (layer inputs; everything for a Gram matrix)."""
    parameters: int
    """Bytes of the parameters: what a gradient takes."""
    frugal: bool
    """Whether a chunk should take less than two gradients of the whole batch do."""

    def bytes(self, chunk: int) -> int:
        """Graph, output, cotangents at the output, those of one block at all sites, and those that are kept."""
        block = max(1, min(self.cotangents, self.at_once // max(1, chunk * self.widest * self.entry)))
        entries = self.outputs * (1 + self.roots * self.cotangents) + block * (self.sites + 2 * self.widest)
        entries += self.cotangents * self.kept
        return chunk * (self.saved + self.entry * entries)

    def limit(self, n: int) -> int:
        """Bytes for a chunk of a batch of ``n``: the budget, or less where two gradients take less."""
        if not self.frugal:
            return self.max_memory
        return frugal_limit(
            n * (self.saved + 2 * self.entry * self.outputs) + self.parameters, self.max_memory
        )

    def samples(self, n: int) -> int:
        """The most that fit, and at least one."""
        limit, low, high = self.limit(n), 1, n
        while low < high:  # bytes() does not fall with the chunk
            middle = (low + high + 1) // 2
            if self.bytes(middle) <= limit:
                low = middle
            else:
                high = middle - 1
        chunks = -(-n // low)
        return -(-n // chunks)  # equal ones


class Observer:
    """The passes of a call, and what each had at its peak."""

    def __init__(self, meter: AllocationMeter) -> None:
        self.peaks: dict[ChunkModel, int] = {}
        """Bytes by pass; what came before the first one counts to it."""
        self._meter, self._current = meter, None

    _current: ChunkModel | None

    def begin(self, model: ChunkModel) -> None:
        """A pass begins."""
        if self._current is not None and model != self._current:
            self.close()
        self._current = model

    def close(self) -> None:
        """The current pass is over."""
        if self._current is not None:
            self.peaks[self._current] = max(self.peaks.get(self._current, 0), self._meter.peak)
            self._meter.peak = self._meter.live


_observer: ContextVar[Observer | None] = ContextVar("flatkern_chunk_observer", default=None)


def note(model: ChunkModel) -> None:
    """Tell whoever observes how the pass that begins is chunked."""
    observer = _observer.get()
    if observer is not None:
        observer.begin(model)


@contextmanager
def observed() -> Iterator[Observer]:
    """Observe the passes in the block, and count the bytes of tensors."""
    with AllocationMeter() as meter:
        observer = Observer(meter)
        token = _observer.set(observer)
        try:
            yield observer
            observer.close()
        finally:
            _observer.reset(token)
