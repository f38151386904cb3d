"""One panel at a time: each function draws on the axes it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from flatkern.experiments.quantities import QUANTITIES, final_value
from flatkern.experiments.settings import Setting
from flatkern.experiments.spectrum import Spectrum
from flatkern.experiments.training import Run
from flatkern.report.style import DASHES, INK, MUTED, SERIES, log_label

if TYPE_CHECKING:
    from flatkern.experiments.result import Result

__all__ = [
    "MLS_CHAIN",
    "NMLS_CHAIN",
    "bound_panel",
    "iteration_axis",
    "label_of",
    "log_values",
    "scatter_panel",
    "spectrum_panel",
    "sweep_panel",
]

Array = NDArray[np.float64]
MARKERS = ("o", "s", "^")
MLS_CHAIN = (
    ("log10_mls_a", "A"),
    ("log10_mls_b", "B"),
    ("log10_mls_c", "C"),
    ("log10_mls_d", "D"),
    ("log10_sqrt_sharpness", "√S"),
)
NMLS_CHAIN = (
    ("log10_nmls_nmls", "NMLS"),
    ("log10_nmls_per_sample", "per sample"),
    ("log10_nmls_bound", "bound"),
)


def label_of(setting: Setting, sweep: Sequence[Setting]) -> str:
    """What distinguishes a setting within its sweep."""
    if len({s.learning_rate for s in sweep}) > 1:
        return f"lr {setting.learning_rate:g}"
    return f"batch {setting.batch_size}"


def _of(runs: Sequence[Run], setting: Setting) -> list[Run]:
    return [run for run in runs if run.setting == setting and not run.diverged]


def iteration_axis(ax: Axes) -> None:
    """A logarithmic axis of iterations."""
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(numticks=7))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(log_label))
    ax.set_xlabel("iteration")


def log_values(ax: Axes, *, decades: float = 9.0) -> None:
    """A logarithmic value axis; over few decades 2 and 5 times the powers of ten have labels as well."""
    ax.set_yscale("log")
    few = decades < 2.5
    ax.yaxis.set_major_locator(
        LogLocator(subs=(1.0, 2.0, 5.0), numticks=20) if few else LogLocator(numticks=7)
    )
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter((lambda v, _: f"{v:g}") if few else log_label))


def _table(runs: Sequence[Run], key: str) -> tuple[Array, Array]:
    """Iterations after the start (a logarithmic axis has no 0), and values [runs, points]."""
    steps = np.array(runs[0].column("step"))
    kept = steps > 0
    return steps[kept], np.array([run.column(key) for run in runs])[:, kept]


def sweep_panel(ax: Axes, result: Result, sweep: Sequence[Setting], key: str) -> None:
    """One quantity against iteration: a line a setting (mean over seeds), a band from lowest to highest seed."""
    quantity = QUANTITIES[key]
    for i, setting in enumerate(sweep):
        runs = _of(result.runs, setting)
        if not runs:
            continue
        steps, values = _table(runs, key)
        middle = np.exp(np.log(values).mean(0)) if quantity.log_axis else values.mean(0)
        ax.plot(steps, middle, color=SERIES[i], linestyle=DASHES[i], label=label_of(setting, sweep))
        ax.fill_between(steps, values.min(0), values.max(0), color=SERIES[i], alpha=0.2, linewidth=0)
        loss = np.exp(np.log(_table(runs, "train_loss")[1]).mean(0))
        below = np.flatnonzero(loss < result.config.last_phase)
        if len(below):
            ax.plot(steps[below[0]], middle[below[0]], "o", color=SERIES[i], markersize=4.5)
    iteration_axis(ax)
    low, high = ax.dataLim.intervaly
    if quantity.log_axis and 0 < low < high < math.inf:
        log_values(ax, decades=math.log10(high / low))
    else:
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ax.set_title(quantity.title)
    ax.set_ylabel(quantity.symbol)


def bound_panel(
    ax: Axes,
    result: Result,
    setting: Setting,
    chain: Sequence[tuple[str, str]],
    limits: tuple[float, float],
) -> None:
    """All sides of one chain of inequalities against iteration, for one setting; labels at the right end."""
    runs = _of(result.runs, setting)
    if runs:
        ends = []
        for i, (key, label) in enumerate(chain):
            steps, logs = _table(runs, key)
            values = 10.0**logs
            colour, dash = (SERIES[i], DASHES[i]) if i < len(SERIES) else (MUTED, (0, (3, 1.5, 1, 1.5)))
            ax.plot(steps, 10.0 ** logs.mean(0), color=colour, linestyle=dash)
            ax.fill_between(steps, values.min(0), values.max(0), color=colour, alpha=0.2, linewidth=0)
            if math.isfinite(end := float(logs.mean(0)[-1])):  # a side that does not apply has no values
                ends.append((end, label, colour))
        span = math.log10(limits[1] / limits[0])
        for y, label, colour in _spread(ends, 0.075 * span):
            ax.annotate(
                label,
                (1.02, (y - math.log10(limits[0])) / span),
                xycoords="axes fraction",
                color=colour,
                fontsize=8.5,
                va="center",
                annotation_clip=False,
            )
    iteration_axis(ax)
    log_values(ax, decades=math.log10(limits[1] / limits[0]))
    ax.set_ylim(*limits)
    ax.set_title(setting.label)


def _spread(ends: list[tuple[float, str, str]], gap: float) -> list[tuple[float, str, str]]:
    """Move labels apart, upwards, so that none covers another."""
    placed: list[tuple[float, str, str]] = []
    for y, label, colour in sorted(ends):
        placed.append((max(y, placed[-1][0] + gap) if placed else y, label, colour))
    if not placed:
        return placed
    # centre the shift: what was pushed up is brought halfway back
    shift = sum(p[0] - e[0] for p, e in zip(placed, sorted(ends), strict=True)) / len(placed)
    return [(y - shift / 2, label, colour) for y, label, colour in placed]


def scatter_panel(ax: Axes, result: Result, key: str) -> None:
    """One quantity against √S at the end of training, a dot a run; colour is the rate, shape the batch size."""
    config = result.config
    for setting in config.settings:
        runs = _of(result.runs, setting)
        ax.plot(
            [final_value(r, "sqrt_sharpness") for r in runs],
            [final_value(r, key) for r in runs],
            linestyle="none",
            marker=MARKERS[config.batch_sizes.index(setting.batch_size)],
            color=SERIES[config.learning_rates.index(setting.learning_rate)],
            markersize=6.5,
            alpha=0.85,
            markeredgewidth=0,
            label=setting.label,
        )
    found = next((c for c in result.correlations if {c.first, c.second} == {"sqrt_sharpness", key}), None)
    quantity = QUANTITIES[key]
    ax.set_title(quantity.title)
    if found is not None and math.isfinite(found.pearson.value):
        r = found.pearson
        ax.annotate(
            f"r = {r.value:.2f} ({r.low:.2f} to {r.high:.2f})",
            (0.03, 0.97),
            xycoords="axes fraction",
            va="top",
            fontsize=8.5,
            color=MUTED,
        )
    ax.margins(0.08, 0.16)
    ax.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
    ax.set_xlabel("√S at the end (flat to sharp)")
    ax.set_ylabel(quantity.symbol)


def spectrum_panel(ax: Axes, spectrum: Spectrum) -> None:
    """Eigenvalues per unit interval, band of one standard error; the outermost ones; where descent turns unstable."""
    scale = spectrum.parameters
    floor = 0.05 / (spectrum.sigma * math.sqrt(2 * math.pi))  # a twentieth of one eigenvalue's peak
    values = np.maximum(spectrum.density * scale, floor)
    low = np.maximum((spectrum.density - spectrum.stderr) * scale, floor)
    high = np.maximum((spectrum.density + spectrum.stderr) * scale, floor)
    ax.fill_between(spectrum.grid, low, high, color=SERIES[0], alpha=0.25, linewidth=0)
    ax.plot(spectrum.grid, values, color=SERIES[0], linewidth=1.3)
    log_values(ax)
    ax.set_ylim(bottom=floor)
    extremes = [*spectrum.largest, spectrum.smallest]
    ax.plot(extremes, [floor * 1.6] * len(extremes), "|", color=SERIES[1], markersize=9, markeredgewidth=1.6)
    edge = 2 / spectrum.learning_rate
    # drawn only where it does not squeeze the spectrum into a corner
    if edge < 2 * float(spectrum.largest[0]):
        ax.axvline(edge, color=INK, linewidth=0.9, linestyle=(0, (3, 2)))
        ax.annotate(
            f"2/lr = {edge:g}",
            (edge, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(-4, 0),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8.5,
            color=INK,
        )
    ax.set_xlabel("eigenvalue λ of the Hessian of the training loss")
    ax.set_ylabel("eigenvalues per unit of λ")
