"""Curves of one run: the six panels of rows that a monitor or a series of checkpoints gave."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flatkern.experiments.quantities import PANELS, QUANTITIES, Quantity
from flatkern.report.panels import iteration_axis, log_values
from flatkern.report.style import SERIES, inline_svg, styled

__all__ = ["curve_panel", "inline_curves", "panels_of", "six_panels"]

Rows = Sequence[Mapping[str, Any]]

_LOSSES = (
    Quantity(
        "train_loss",
        "train loss",
        "L",
        "Mean of the losses of the training steps since the measurement before.",
        log_axis=True,
    ),
    Quantity("probe_loss", "loss on the probe", "L", "The loss on the measured samples.", log_axis=True),
    Quantity("loss", "loss", "L", "The loss on all samples given.", log_axis=True),
)
_ERRORS = {"sqrt_sharpness": ("sharpness_stderr", "sharpness")}
"""Where the standard error belongs to another column, of which the one drawn is the root."""


def panels_of(rows: Rows) -> list[Quantity]:
    """What the six panels of these rows show: the paper's six, the loss being the one that was recorded."""
    known = {key for row in rows for key in row if not math.isnan(_number(row, key))}
    loss = next((q for q in _LOSSES if q.key in known), _LOSSES[0])
    return [loss, *(QUANTITIES[key] for key in PANELS[1:])]


def six_panels(rows: Rows) -> Figure:
    """All six as one figure; an empty one says so."""
    with styled():
        figure = Figure(figsize=(11, 6.2), layout="constrained")
        for ax, quantity in zip(figure.subplots(2, 3).flat, panels_of(rows), strict=True):
            curve_panel(ax, rows, quantity)
    return figure


def inline_curves(rows: Rows, name: str, axis: str = "step") -> list[str]:
    """The same panels one by one as SVG for a page."""
    found = []
    with styled():
        for i, quantity in enumerate(panels_of(rows)):
            figure = Figure(figsize=(3.9, 2.9), layout="constrained")
            curve_panel(figure.add_subplot(), rows, quantity, axis)
            found.append(inline_svg(figure, f"{name}{i}", quantity.title))
    return found


def curve_panel(ax: Axes, rows: Rows, quantity: Quantity, axis: str = "step") -> None:
    """One quantity against ``step``, with a band of one standard error of the mean over the samples."""
    steps = np.array([_number(row, "step") for row in rows])
    values = np.array([_number(row, quantity.key) for row in rows])
    logarithmic = _grows(steps)
    shown = np.isfinite(values) & ((steps > 0) | (not logarithmic))
    ax.set_title(quantity.title)
    ax.set_ylabel(quantity.symbol)
    if not shown.any():
        ax.annotate("not measured", (0.5, 0.5), xycoords="axes fraction", ha="center", va="center")
        ax.set_xticks([])
        ax.set_yticks([])
        return
    few = int(shown.sum()) < 40
    ax.plot(steps[shown], values[shown], color=SERIES[0], marker="o" if few else "", markersize=3)
    low, high = _band(rows, quantity.key, values)
    ax.fill_between(steps[shown], low[shown], high[shown], color=SERIES[0], alpha=0.2, linewidth=0)
    if logarithmic:
        iteration_axis(ax)
    else:
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set_xlabel(axis)
    if quantity.log_axis and (values[shown] > 0).all():
        log_values(ax, decades=float(np.ptp(np.log10(values[shown]))))
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))


def _grows(steps: np.ndarray) -> bool:
    """Whether the gaps between steps grow as on a logarithmic schedule."""
    later = steps[steps > 0]
    gaps = np.diff(later)
    return (
        len(gaps) > 4 and float(later[0]) > 0 and float(np.median(gaps[-3:])) > 8 * float(np.median(gaps[:3]))
    )


def _band(rows: Rows, key: str, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    column, squared = _ERRORS.get(key, (f"{key}_stderr", ""))
    errors = np.array([_number(row, column) for row in rows])
    errors = np.where(np.isfinite(errors), errors, 0.0)
    if squared:
        square = np.array([_number(row, squared) for row in rows])
        return np.sqrt(np.maximum(square - errors, 0.0)), np.sqrt(square + errors)
    if key == "log_local_dimensionality":
        mean = np.array([_number(row, "local_dimensionality") for row in rows])
        errors = np.array([_number(row, "local_dimensionality_stderr") for row in rows]) / mean
        errors = np.where(np.isfinite(errors), errors, 0.0)
    return values - errors, values + errors


def _number(row: Mapping[str, Any], key: str) -> float:
    value = row.get(key, math.nan)
    return math.nan if isinstance(value, str) or value is None else float(value)
