"""The figures as files, and the same panels one by one for the page, where they flow with its width."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flatkern.experiments.quantities import PANELS, QUANTITIES
from flatkern.experiments.settings import DemoConfig, Setting
from flatkern.report.pairs import pair_plot, transformer_panel
from flatkern.report.panels import (
    MLS_CHAIN,
    NMLS_CHAIN,
    bound_panel,
    scatter_panel,
    spectrum_panel,
    sweep_panel,
)
from flatkern.report.style import INK, MUTED, inline_svg, styled

if TYPE_CHECKING:
    from flatkern.experiments.result import Result

__all__ = ["SCATTERS", "inline_panels", "save_figures"]

SCATTERS = ("log_volume_top3", "mls", "nmls", "local_dimensionality")
Draw = Callable[[Axes], None]


def save_figures(folder: Path, result: Result) -> list[str]:
    """Write every figure as PNG and SVG; returns the names without ending."""
    config, sections = result.config, result.config.sections
    figures: dict[str, Callable[[], Figure]] = {}
    if "rate" in sections:
        figures["six-panels-learning-rate"] = _six(result, config.rate_sweep)
    if "batch" in sections:
        figures["six-panels-batch-size"] = _six(result, config.batch_sweep)
    if "elsewhere" in sections:
        for where, seen in _elsewhere(result).items():
            figures[f"six-panels-{where}-learning-rate"] = _six(seen, config.rate_sweep)
            figures[f"six-panels-{where}-batch-size"] = _six(seen, config.batch_sweep)
    if "scatter" in sections:
        figures["flatness-and-volume"] = _scatters(result)
    if "pairs" in sections:
        figures["pairs"] = _pairs(result)
    if "bounds" in sections:
        figures["bounds"] = _bounds(result)
    if (found := result.transformers) is not None:
        figures["transformers"] = _single(lambda ax: transformer_panel(ax, found), 5.2, 4.0)
    if result.spectrum is not None:
        figures["hessian-spectrum"] = _single(_spectrum(result), 6.4, 3.6)
    with styled():
        for name, make in figures.items():
            figure = _stamped(make(), config)
            figure.savefig(folder / f"{name}.png")
            figure.set_layout_engine("none")  # laid out now; doing it again takes a third of the time
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return list(figures)


def inline_panels(result: Result) -> dict[str, list[str]]:
    """Every panel as inline SVG, by the section of the page it belongs to."""
    config, sections = result.config, result.config.sections
    groups: dict[str, list[tuple[str, Draw]]] = {}
    if "rate" in sections:
        groups["rate"] = _panels(result, config.rate_sweep)
    if "batch" in sections:
        groups["batch"] = _panels(result, config.batch_sweep)
    if "elsewhere" in sections:
        for where, seen in _elsewhere(result).items():
            groups[f"{where}-rate"] = _panels(seen, config.rate_sweep)
            groups[f"{where}-batch"] = _panels(seen, config.batch_sweep)
    if "scatter" in sections:
        groups["scatter"] = [(f"{QUANTITIES[k].title} against √S", _scatter(result, k)) for k in SCATTERS]
    if "bounds" in sections:
        groups["mls"] = [(f"MLS chain, {s.label}", _bound(result, s, MLS_CHAIN)) for s in config.settings]
        groups["nmls"] = [(f"NMLS chain, {s.label}", _bound(result, s, NMLS_CHAIN)) for s in config.settings]
    if (found := result.transformers) is not None:
        groups["transformers"] = [
            ("normalized MLS against adaptive sharpness", lambda ax: transformer_panel(ax, found))
        ]
    if result.spectrum is not None:
        groups["spectrum"] = [("Hessian's spectral density", _spectrum(result))]
    page: dict[str, list[str]] = {}
    with styled():
        for group, panels in groups.items():
            wide = {"spectrum": (6.4, 3.4), "scatter": (3.3, 2.7), "transformers": (5.2, 3.8)}
            size = wide.get(group, (3.9, 2.9))
            page[group] = [
                inline_svg(_stamped(_single(draw, *size)(), config), f"{group}{i}", title)
                for i, (title, draw) in enumerate(panels)
            ]
        if "pairs" in sections:
            page["pairs"] = [
                inline_svg(_stamped(_pairs(result)(), config), "pairs0", "every pair of quantities")
            ]
    return page


def _stamped(figure: Figure, config: DemoConfig) -> Figure:
    """The figure with a line that says how far its runs were cut down."""
    if config.scale:
        small = figure.get_size_inches()[0] < 6
        figure.supxlabel(config.scale, fontsize=6.5 if small else 8.5, color=MUTED)
    return figure


def _elsewhere(result: Result) -> dict[str, Result]:
    """The result as measured on other samples, by what they are."""
    return {
        where: replace(result, runs=[run.on(where) for run in result.runs])
        for where in result.config.elsewhere
    }


def _panels(result: Result, sweep: Sequence[Setting]) -> list[tuple[str, Draw]]:
    return [(QUANTITIES[k].title, _sweep(result, sweep, k)) for k in _six_keys(result)]


def _six_keys(result: Result) -> tuple[str, ...]:
    """The six panels; on samples that were not trained on the first is their own loss."""
    known = any("loss" in row for run in result.runs for row in run.rows)
    return ("loss", *PANELS[1:]) if known else PANELS


def _single(draw: Draw, width: float, height: float) -> Callable[[], Figure]:
    def make() -> Figure:
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        return figure

    return make


def _sweep(result: Result, sweep: Sequence[Setting], key: str) -> Draw:
    return lambda ax: sweep_panel(ax, result, sweep, key)


def _scatter(result: Result, key: str) -> Draw:
    return lambda ax: scatter_panel(ax, result, key)


def _bound(result: Result, setting: Setting, chain: Sequence[tuple[str, str]]) -> Draw:
    limits = _limits(result, chain)
    return lambda ax: bound_panel(ax, result, setting, chain, limits)


def _spectrum(result: Result) -> Draw:
    spectrum = result.spectrum
    assert spectrum is not None
    return lambda ax: spectrum_panel(ax, spectrum)


def _limits(result: Result, chain: Sequence[tuple[str, str]]) -> tuple[float, float]:
    """One value axis for all settings, so that they can be compared."""
    values = [v for run in result.runs for key, _ in chain for v in run.column(key)[1:] if math.isfinite(v)]
    if not values:
        return 0.1, 10.0
    room = 0.05 * (max(values) - min(values)) + 0.02
    return 10 ** (min(values) - room), 10 ** (max(values) + room)


def _six(result: Result, sweep: Sequence[Setting]) -> Callable[[], Figure]:
    def make() -> Figure:
        figure = Figure(figsize=(11, 6.4), layout="constrained")
        for ax, key in zip(figure.subplots(2, 3).flat, _six_keys(result), strict=True):
            sweep_panel(ax, result, sweep, key)
        _legend(figure, result)
        return figure

    return make


def _legend(figure: Figure, result: Result) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    handles.append(Line2D([], [], linestyle="none", marker="o", color=INK, markersize=4.5))
    labels.append(f"train loss falls below {result.config.last_phase:g} (bands: lowest to highest seed)")
    figure.legend(handles, labels, loc="outside upper left", ncols=4)


def _scatters(result: Result) -> Callable[[], Figure]:
    def make() -> Figure:
        figure = Figure(figsize=(14, 3.7), layout="constrained")
        for ax, key in zip(figure.subplots(1, len(SCATTERS)).flat, SCATTERS, strict=True):
            scatter_panel(ax, result, key)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(handles))
        return figure

    return make


def _pairs(result: Result) -> Callable[[], Figure]:
    def make() -> Figure:
        return pair_plot(result)

    return make


def _bounds(result: Result) -> Callable[[], Figure]:
    def make() -> Figure:
        settings = result.config.settings
        figure = Figure(figsize=(max(4.5, 3 * len(settings)), 6.2), layout="constrained")
        axes = figure.subplots(2, len(settings), squeeze=False)
        for row, chain, name in ((0, MLS_CHAIN, "A (MLS) to D"), (1, NMLS_CHAIN, "NMLS and its bound")):
            limits = _limits(result, chain)
            for ax, setting in zip(axes[row], settings, strict=True):
                bound_panel(ax, result, setting, chain, limits)
            axes[row][0].set_ylabel(name)
        return figure

    return make
