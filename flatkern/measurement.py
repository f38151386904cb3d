"""One measurement point as a flat row of numbers: the columns of every table, curve and file."""

from __future__ import annotations

import math
import re

from flatkern.bounds import Bounds
from flatkern.geometry import Geometry
from flatkern.results import PerSample
from flatkern.rows import Row

__all__ = ["bounds_row", "geometry_row", "side_column", "top_volume"]

_LN10 = math.log(10.0)
_TOP = 3
"""Directions of the published log-volume; all where a Jacobian has fewer."""


def geometry_row(g: Geometry) -> Row:
    """Sharpness, volume, sensitivity and dimensionality; ``*_stderr`` is that of the mean over the samples.

    ``log_volume*`` are means over the samples that are not rank deficient, ``rank_deficient`` counts the others.
    """
    top = top_volume(g)
    dimension = g.local_dimensionality
    return {
        "sharpness": g.sharpness.value,
        "sharpness_stderr": _number(g.sharpness.sample_stderr),
        "sqrt_sharpness": math.sqrt(g.sharpness.value),
        "log_volume_top3": math.nan if top is None else top.mean,
        "log_volume_top3_stderr": math.nan if top is None else _number(top.sample_stderr),
        "log_volume": g.log_volume.mean,
        "log_volume_stderr": _number(g.log_volume.sample_stderr),
        "rank_deficient": float(g.log_volume.rank_deficient),
        "mls": g.mls.value,
        "mls_stderr": _number(g.mls.sample_stderr),
        "nmls": g.nmls.value,
        "nmls_stderr": _number(g.nmls.sample_stderr),
        "normalized_mls": g.normalized_mls.value,
        "local_dimensionality": dimension.mean,
        "local_dimensionality_stderr": _number(dimension.sample_stderr),
        "log_local_dimensionality": math.log(dimension.mean) if dimension.mean > 0 else math.nan,
    }


def top_volume(g: Geometry) -> PerSample | None:
    """Log-volume of the three largest directions (all where there are fewer); ``None`` where they are not known."""
    wanted = min(_TOP, g.outputs, g.inputs)
    return g.top_log_volume(wanted) if g.singular_values.shape[1] >= wanted else None


def bounds_row(bounds: Bounds) -> Row:
    """All sides of all inequalities as decimal logarithms, with status and looseness (in decades)."""
    row: Row = {}
    for name, inequality in bounds.inequalities.items():
        for side, value in inequality.sides.items():
            row[side_column(name, side)] = value / _LN10
        row[f"status_{_slug(name)}"] = inequality.status
        row[f"looseness_{_slug(name)}"] = inequality.looseness / _LN10
    return row


def side_column(inequality: str, side: str) -> str:
    """The column of one side of one inequality, e.g. ``log10_mls_d``: its decimal logarithm."""
    return "log10_" + _slug(f"{inequality} {side}")


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def _number(value: float | None) -> float:
    return math.nan if value is None else value
