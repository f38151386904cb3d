"""How many groups, draws and probes each chunk of samples gets, so that a variance is met at the least cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flatkern.freedom import LEAST

__all__ = ["Outlook", "Scatter", "Share", "Way", "allot"]

RESERVE = 1.3
"""What is planned stays this much below the variance that is allowed: the outlook is from a few samples."""
_STEPS = 80
_FLOORS = (1, 2, 3, 4, 6, 8, 11)
"""Probes that every chunk gets at least, tried in turn where the error would else be too uncertain."""


@dataclass(frozen=True)
class Scatter:
    """Variances of samples as they will be estimated, from a single degree of freedom each."""

    variance: float
    """Their sum,"""
    squares: float
    """and that of their squares."""

    def __add__(self, other: Scatter) -> Scatter:
        return Scatter(self.variance + other.variance, self.squares + other.squares)

    def mean_of(self, count: int) -> Scatter:
        """For means of ``count`` values, whose spread has ``count`` − 1 degrees of freedom."""
        return Scatter(self.variance / count, self.squares / (count**2 * (count - 1)))

    @property
    def known(self) -> bool:
        """Whether the estimate of the sum has as many degrees of freedom as are asked for."""
        return self.variance**2 >= LEAST * self.squares


@dataclass(frozen=True)
class Way:
    """A way to the Gauss-Newton part of a chunk."""

    alone: int
    """Columns pulled back by themselves; all of them: the exact trace."""
    groups: int
    """Of the others;"""
    draws: int
    """of signs for these."""

    @property
    def cotangents(self) -> int:
        """A sample."""
        return self.alone + self.groups * self.draws


@dataclass(frozen=True)
class Outlook:
    """What is expected of a chunk: variances as they will be stated, by what is done."""

    samples: int
    sketches: Mapping[Way, Scatter]
    """Of the Gauss-Newton part."""
    probe: Scatter
    """Of one probe of the residual, from the probes' own spread (two probes at least);"""
    single: Scatter
    """that of a single one, from its spread over the samples."""


@dataclass(frozen=True)
class Share:
    """What is done on a chunk."""

    way: Way
    probes: int


def allot(chunks: Sequence[Outlook], allowed: float, probe_cost: float, most: int) -> list[Share] | None:
    """The cheapest shares whose variances add up to ``allowed``, with a reserve; ``None`` where there are none.

    Cost is counted in cotangents of a sample; one multiplier for all chunks weighs variance against cost (samples
    are independent, so variances add). Where few samples hold most of the variance, its estimate would be uncertain:
    chunks then get more probes, until it has :data:`flatkern.freedom.LEAST` degrees of freedom, if that can be.

    Args:
        chunks: what is expected of each.
        allowed: variance of the sum.
        probe_cost: of a probe, in cotangents.
        most: probes a chunk.
    """
    scale = sum(
        max(c.probe.variance, c.single.variance, *(s.variance for s in c.sketches.values())) for c in chunks
    )
    if not allowed > 0 or not math.isfinite(scale):
        return None
    samples = sum(c.samples for c in chunks)
    low, high = samples / max(scale, allowed), 1e3 * most * samples / allowed
    if not high > low:
        return None
    best: tuple[bool, float, list[Share]] | None = None
    for least in _FLOORS:
        for step in range(_STEPS + 1):
            weight = low * (high / low) ** (step / _STEPS)
            chosen = [_cheapest(c, weight, probe_cost, min(least, most), most) for c in chunks]
            total = sum((c.scatter for c in chosen), Scatter(0.0, 0.0))
            if RESERVE * total.variance > allowed:
                continue
            found = not total.known, sum(c.cost for c in chosen), [c.share for c in chosen]
            if best is None and total.known:
                return found[2]
            if best is None or found[:2] < best[:2]:
                best = found
            if total.known:
                break  # with more weight it costs more
    return None if best is None else best[2]


@dataclass(frozen=True)
class _Choice:
    cost: float
    scatter: Scatter
    share: Share


def _cheapest(chunk: Outlook, weight: float, probe_cost: float, least: int, most: int) -> _Choice:
    """What makes cost + weight · variance smallest, of at least so many probes."""
    way, seen = min(
        chunk.sketches.items(),
        key=lambda item: chunk.samples * item[0].cotangents + weight * item[1].variance,
    )
    a_probe = chunk.samples * probe_cost
    ideal = (weight * chunk.probe.variance / a_probe) ** 0.5
    counts = {
        min(most, max(2, least, k)) for k in (math.floor(min(ideal, most)), math.ceil(min(ideal, most)))
    }
    choices = [(k, chunk.probe.mean_of(k)) for k in sorted(counts)]
    if chunk.samples > 3 and least == 1:
        choices.append((1, chunk.single))
    probes, spread = min(choices, key=lambda choice: a_probe * choice[0] + weight * choice[1].variance)
    cost = a_probe * probes + chunk.samples * way.cotangents
    return _Choice(cost, spread + seen, Share(way, probes))
