"""Σ_k w_k H_kk, in all and by layer, from what is exact on a Hessian's diagonal and draws of the rest."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flatkern.estimators.group_traces import group_traces
from flatkern.estimators.rounds import in_rounds
from flatkern.hessian_parts import HessianParts
from flatkern.operators.congruence import Congruence, Scaling

__all__ = ["DiagonalTraces", "diagonal_traces", "layer_slices"]

_DRAWS = 4


@dataclass(frozen=True)
class DiagonalTraces:
    """The weighted trace with its parts."""

    value: float
    stderr: float
    method: str
    per_layer: dict[str, float] = field(repr=False)
    per_layer_stderr: dict[str, float] = field(repr=False)
    samples: Tensor | None = field(repr=False)
    """Values of the sign vectors with R or H, the Gauss-Newton part included, [k]; ``None`` where there are none."""
    dof: int | None
    matvecs: int
    passes: int
    converged: bool
    notes: tuple[str, ...]


def diagonal_traces(
    parts: HessianParts,
    scales: Tensor | None,
    *,
    rtol: float,
    samples: int | None,
    max_samples: int,
    generator: torch.Generator,
) -> DiagonalTraces:
    """Σ_k s_k² H_kk.

    Args:
        parts: the Hessian.
        scales: s [P]; ``None``: ones.
        rtol: of the standard error, where ``samples`` is not given.
        samples: number of sign vectors (and of draws of the Gauss-Newton part, where that is drawn).
        max_samples: most of them.
        generator: of all signs.
    """
    groups = layer_slices(parts.layout.slices)
    both = parts.draw is not None and bool(parts.unproven)
    goal = rtol / 2**0.5 if both else rtol
    weights = None if scales is None else scales.double().square()
    errors = dict.fromkeys(groups, 0.0)
    notes: tuple[str, ...] = ()
    if parts.draw is None:
        entries = parts.ggn if weights is None else parts.ggn * weights
        values = {layer: float(entries[place].sum()) for layer, place in groups.items()}
        total, error, passes, met = sum(values.values()), 0.0, 0, True
        how = "exact Gauss-Newton part"
    else:
        make = parts.draw
        run = in_rounds(
            lambda _, count: make(weights, groups, count, generator),
            lambda values: _stderr(values.sum(1)),
            lambda values: goal * abs(float(values.sum(1).mean())),
            first=_DRAWS, samples=samples, most=max_samples,
        )  # fmt: skip
        draws, notes = run.values, run.notes("sign draws", "max_samples")
        spread = draws.std(0) / len(draws) ** 0.5
        values = dict(zip(groups, draws.mean(0).tolist(), strict=True))
        errors = dict(zip(groups, spread.tolist(), strict=True))
        total, error = float(draws.sum(1).mean()), _stderr(draws.sum(1))
        met = not notes
        passes, how = len(draws), f"{len(draws)} sign draws of the Gauss-Newton part"
    if not parts.unproven:
        if parts.draw is None:
            how = "exact (Gauss-Newton diagonal; outputs piecewise affine in every parameter entry)"
        dof = None if parts.draw is None else passes - 1
        return DiagonalTraces(
            total, error, how, values, errors, None, dof, 0, passes, met, parts.notes + notes
        )
    op = parts.operator()
    assert op.layout is not None
    slices = layer_slices(op.layout.slices)
    scaled = op
    if scales is not None:
        scaled = Congruence(op, Scaling(scales[parts.columns].to(op.dtype)))
    rest = group_traces(
        scaled, slices,
        rtol=goal, offset=total, samples=samples, max_matvecs=max_samples, generator=generator,
    )  # fmt: skip
    part, spread_of_rest = rest.total
    for layer, (value, own) in rest.by_group.items():
        values[layer] += value
        errors[layer] = math.hypot(errors[layer], own)
    drawn = "a product an entry" if rest.exact else f"{len(rest.samples)} sign vectors"
    of = f"residual of {len(parts.unproven)} of {len(parts.parameters)} parameters"
    dofs = [d for d in (rest.dof, passes - 1 if parts.draw is not None else None) if d is not None]
    return DiagonalTraces(
        value=total + part,
        stderr=math.hypot(error, spread_of_rest),
        method=f"{how} + {of}: {drawn}" if parts.split else f"{drawn} with the Hessian",
        per_layer=values,
        per_layer_stderr=errors,
        samples=None if rest.exact else total + rest.samples.sum(1),
        dof=min(dofs, default=None),
        matvecs=rest.matvecs,
        passes=passes,
        converged=met and rest.converged,
        notes=parts.notes + notes + rest.notes,
    )


def _stderr(values: Tensor) -> float:
    return float(values.std() / len(values) ** 0.5)


def layer_slices(slices: dict[str, slice]) -> dict[str, slice]:
    """Ranges of whole layers: their parameters follow one another in a layout."""
    found: dict[str, slice] = {}
    for name, own in slices.items():
        layer = name.rpartition(".")[0]
        found[layer] = slice(found[layer].start, own.stop) if layer in found else own
    return found
