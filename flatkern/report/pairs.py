"""Quantities against one another, a dot a run: all pairs in one figure, and the transformers."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from flatkern.experiments.quantities import CORRELATED, QUANTITIES, final_value
from flatkern.report.style import INK, MUTED, SERIES, log_label

if TYPE_CHECKING:
    from flatkern.experiments.result import Result
    from flatkern.experiments.transformers import Transformers

__all__ = ["pair_plot", "transformer_panel"]

_MARKERS = ("o", "s", "^", "D", "v", "P")


def pair_plot(result: Result) -> Figure:
    """Below the diagonal a scatter of each pair, above it Pearson's r, in bold where its corrected p is below 0.05."""
    runs = [run for run in result.runs if not run.diverged]
    values = {key: [final_value(run, key) for run in runs] for key in CORRELATED}
    known = {(c.first, c.second): c.pearson for c in result.correlations}
    size = len(CORRELATED)
    figure = Figure(figsize=(11, 10.5), layout="constrained")
    axes = figure.subplots(size, size, squeeze=False)
    colours = {rate: SERIES[i % len(SERIES)] for i, rate in enumerate(result.config.learning_rates)}
    dots = [colours[run.setting.learning_rate] for run in runs]
    for i, below in enumerate(CORRELATED):
        for j, across in enumerate(CORRELATED):
            ax = axes[i][j]
            ax.set_xticks([])
            ax.set_yticks([])
            ax.grid(False)
            if i == j:
                ax.set_axis_off()
                name = QUANTITIES[below].title.replace(" ", "\n")
                ax.text(0.5, 0.5, name, ha="center", va="center", fontsize=8.5, fontweight="bold", color=INK)
            elif i > j:
                ax.scatter(values[across], values[below], s=14, c=dots, linewidths=0)
                ax.margins(0.12)
            else:
                ax.set_axis_off()
                r = known[below, across]
                if math.isfinite(r.value):
                    text = f"{r.value:.2f}\n({r.low:.2f} to {r.high:.2f})".replace("-", "−")
                    weight = "bold" if r.p_holm < 0.05 else "normal"
                    ax.text(
                        0.5, 0.5, text, ha="center", va="center", fontsize=8, fontweight=weight, color=INK
                    )
    return figure


def transformer_panel(ax: Axes, found: Transformers) -> None:
    """Normalized MLS against adaptive sharpness, a dot a model with one standard error, a mark an architecture."""
    names = list(dict.fromkeys(str(row["model"]) for row in found.rows))
    drawn = False
    for i, name in enumerate(names):
        rows = [row for row in found.rows if row["model"] == name and float(row["adaptive_sharpness"]) > 0]
        if not rows:
            continue
        x, y, x_error, y_error = (
            [float(row[key]) for row in rows]
            for key in (
                "adaptive_sharpness",
                "normalized_mls",
                "adaptive_sharpness_stderr",
                "normalized_mls_stderr",
            )
        )
        mark, colour = _MARKERS[i % len(_MARKERS)], SERIES[i % len(SERIES)]
        ax.errorbar(
            x,
            y,
            y_error,
            x_error,
            fmt=mark,
            color=colour,
            markersize=6,
            elinewidth=0.8,
            label=name,
            alpha=0.85,
        )
        drawn = True
    ax.set_xlabel("adaptive sharpness")
    ax.set_ylabel("normalized MLS")
    if not drawn:
        ax.annotate("not measured", (0.5, 0.5), xycoords="axes fraction", ha="center")
        return
    for axis, scale in ((ax.xaxis, ax.set_xscale), (ax.yaxis, ax.set_yscale)):
        scale("log")
        low, high = axis.get_view_interval()
        few = math.log10(high / low) < 1.5
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)) if few else LogLocator(numticks=7))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter((lambda v, _: f"{v:g}") if few else log_label))
        if few and math.log10(high / low) < 0.4:
            axis.set_major_locator(MaxNLocator(4))
    r = found.pearson
    if math.isfinite(r.value):
        text = f"r of the logarithms = {r.value:.2f} ({r.low:.2f} to {r.high:.2f})".replace("-", "−")
        ax.annotate(text, (0.03, 0.97), xycoords="axes fraction", va="top", fontsize=8.5, color=MUTED)
    ax.margins(0.12, 0.18)
    ax.legend(loc="lower right")
