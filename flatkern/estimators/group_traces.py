"""Traces of several diagonal blocks of one operator from shared sign vectors, each with its standard error."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flatkern.estimators.common import require_finite, rows_per_block
from flatkern.estimators.probes import Probes
from flatkern.estimators.rounds import in_rounds
from flatkern.operators.base import LinearOperator

__all__ = ["GroupTraces", "group_traces"]

_PILOT = 8
_SMALL = 32


@dataclass(frozen=True)
class GroupTraces:
    """Σ_{k in group} A_kk of every group, from k sign vectors (or from all entries)."""

    samples: Tensor = field(repr=False)
    """float64 [k, groups]; one row where it is exact."""
    names: tuple[str, ...]
    exact: bool
    matvecs: int
    converged: bool
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> tuple[float, float]:
        """The trace over all groups and its standard error."""
        return _mean(self.samples.sum(1), self.exact)

    @property
    def by_group(self) -> dict[str, tuple[float, float]]:
        """The same for each group."""
        return {name: _mean(self.samples[:, i], self.exact) for i, name in enumerate(self.names)}

    @property
    def dof(self) -> int | None:
        """Degrees of freedom of the standard errors."""
        return None if self.exact else len(self.samples) - 1


def _mean(values: Tensor, exact: bool) -> tuple[float, float]:
    return float(values.mean()), 0.0 if exact else float(values.std() / len(values) ** 0.5)


def group_traces(
    op: LinearOperator,
    groups: Mapping[str, slice],
    *,
    rtol: float,
    offset: float = 0.0,
    samples: int | None = None,
    max_matvecs: int = 1000,
    generator: torch.Generator,
) -> GroupTraces:
    """Hutchinson's estimate Σ_{k in group} v_k (A v)_k with the same signs v for all groups.

    Unbiased for each, with variance Σ_{k in group} Σ_{j ≠ k} A_kj (A_kj + [j in group] A_jk).

    Args:
        op: square.
        groups: entries by name; together all of them, each once.
        rtol: aim at stderr ≤ rtol · |offset + trace|; 8 vectors tell how many are needed, and count;
            the spread is looked at again up to three times.
        offset: something exact that the trace is to be added to.
        samples: number of vectors instead, at least 2.
        max_matvecs: never more products.
        generator: to draw signs from.

    Returns:
        A :class:`GroupTraces`; exact where that takes no more products.
    """
    size = op.shape[0]
    if size <= min(samples or _SMALL, max_matvecs):
        return _outright(op, groups, 0)
    probes = Probes(op, generator)
    run = in_rounds(
        lambda _, count: _forms(op, groups, count, probes),
        lambda values: _mean(values.sum(1), False)[1],
        lambda values: rtol * abs(offset + float(values.sum(1).mean())),
        first=_PILOT,
        samples=samples,
        most=max_matvecs,
        instead=size if size <= max_matvecs else None,
    )
    if run.dear:
        return _outright(op, groups, len(run.values))
    require_finite(run.values.sum().cpu(), "trace")
    notes = run.notes("sign vectors", "max_samples")
    return GroupTraces(run.values, tuple(groups), False, len(run.values), not notes, notes)


def _forms(op: LinearOperator, groups: Mapping[str, slice], count: int, probes: Probes) -> Tensor:
    parts = []
    step = rows_per_block(op)
    for start in range(0, count, step):
        rows = probes.signs(min(step, count - start))
        entries = rows * (op @ rows.mT).mT
        parts.append(torch.stack([entries[:, s].sum(1, dtype=torch.float64) for s in groups.values()], 1))
    return torch.cat(parts)


def _outright(op: LinearOperator, groups: Mapping[str, slice], spent: int) -> GroupTraces:
    diagonal = op.to_dense(max_size=op.shape[0]).diagonal().double()
    require_finite(diagonal.sum().cpu(), "trace")
    values = torch.stack([diagonal[s].sum() for s in groups.values()]).unsqueeze(0)
    return GroupTraces(values, tuple(groups), True, spent + op.shape[0], True)
