"""How many samples a linearization takes at a time, and the bytes that takes; told to whoever plans a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Protocol

from flatkern.allocation import AllocationMeter

__all__ = ["ChunkModel", "ChunkPlan", "Observer", "frugal_limit", "note", "observed"]

_GRADIENTS = 2
"""A chunk's bytes over those of one gradient of the whole batch, at most,"""
_LEAST_BYTES = 8 << 20
"""but up to this size another chunk is not worth it (measured: chunks of a few samples run at half the speed)."""


_LANES, _FEW = 16, 8
"""Cotangents that a reverse pass wants together, and the samples that they are not worth going below."""


class ChunkModel(Protocol):
    """Chunk sizes of one kind of pass."""

    def samples(self, n: int) -> int:
        """Samples at a time, of a batch of ``n``."""

    def bytes(self, n: int) -> int:
        """About what such a chunk of a batch of ``n`` takes at its peak."""


def frugal_limit(gradient: int, max_memory: int) -> int:
    """Bytes for a chunk where a gradient of the whole batch takes so many."""
    return min(max_memory, max(_LEAST_BYTES, int(_GRADIENTS * gradient)))


@dataclass(frozen=True)
class ChunkPlan:
    """Bytes of a chunk, from what a run on a few samples showed."""

    max_memory: int
    saved: int
    """Bytes that autograd keeps a sample,"""
    given: int
    """of which the data's own copy."""
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
    """Bytes of the parameters."""
    frugal: bool
    """Whether a chunk should take no more than two gradients of the whole batch do."""
    reverse: bool = False
    """Whether all cotangents of a few samples should go through a pass together, rather than few of many samples."""

    def limit(self, n: int) -> int:
        """Bytes for a chunk of a batch of ``n``: the budget, or less where two gradients take less."""
        if not self.frugal:
            return self.max_memory
        # parameter gradients come while the graph is freed; many cotangents of their own are what exactness needs
        outputs = self.outputs * (2 + self.roots * (self.cotangents - 1))
        gradient = n * (self.saved - self.given + self.entry * outputs) + self.parameters // 2
        return frugal_limit(gradient, self.max_memory)

    def samples(self, n: int) -> int:
        """The most that fit with one cotangent at a time, and at least one."""
        most = max(1, min(n, self.limit(n) // max(1, self._fixed + self._cotangent)))
        if self.reverse:
            lanes = min(self.cotangents, _LANES)
            fitting = self.limit(n) // max(1, self._fixed + lanes * self._cotangent)
            cached = self.at_once // max(1, lanes * self.widest * self.entry)
            most = min(most, max(_FEW, min(fitting, cached)))
        return -(-n // -(-n // most))  # chunks of equal size

    def block(self, n: int) -> int:
        """Cotangents that go through one pass: dispatch is saved as long as they stay in the cache, and fit."""
        chunk = self.samples(n)
        cached = self.at_once // max(1, chunk * self.widest * self.entry)
        fitting = (self.limit(n) - chunk * self._fixed) // max(1, chunk * self._cotangent)
        return max(1, min(self.cotangents, cached, fitting))

    def bytes(self, n: int) -> int:
        """Graph, output, cotangents at the output, those of one block at all sites, and those that are kept."""
        return self.samples(n) * (self._fixed + self.block(n) * self._cotangent)

    @property
    def _fixed(self) -> int:
        entries = self.outputs * (1 + self.roots * self.cotangents) + self.cotangents * self.kept
        return self.saved + self.entry * entries

    @property
    def _cotangent(self) -> int:
        return self.entry * (self.sites + 2 * self.widest)


class Observer:
    """The passes of a call, and what each had at its peak."""

    def __init__(self, meter: AllocationMeter) -> None:
        self.peaks: dict[ChunkModel, int] = {}
        """Bytes by pass; what came before the first one counts to it."""
        self.peak = 0
        """Bytes of the whole call."""
        self._meter = meter
        self._current: ChunkModel | None = None

    def begin(self, model: ChunkModel) -> None:
        """A pass begins."""
        if self._current is not None and model != self._current:
            self.close()
        self._current = model

    def close(self) -> None:
        """The current pass is over."""
        self.peak = max(self.peak, self._meter.peak)
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
