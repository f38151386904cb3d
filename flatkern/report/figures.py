"""The figures as files, and the same panels one by one for the page, where they flow with its width."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from flatkern.experiments.quantities import PANELS, QUANTITIES
from flatkern.experiments.settings import Setting
from flatkern.report.panels import (
    MLS_CHAIN,
    NMLS_CHAIN,
    bound_panel,
    scatter_panel,
    spectrum_panel,
    sweep_panel,
)
from flatkern.report.style import INK, inline_svg, styled

if TYPE_CHECKING:
    from flatkern.experiments.demo import DemoResult

__all__ = ["SCATTERS", "inline_panels", "save_figures"]

SCATTERS = ("log_volume_top3", "mls", "nmls", "local_dimensionality")
Draw = Callable[[Axes], None]


def save_figures(folder: Path, result: DemoResult) -> list[str]:
    """Write every figure as PNG and SVG; returns the names without ending."""
    figures = {
        "six-panels-learning-rate": _six(result, result.config.rate_sweep),
        "six-panels-batch-size": _six(result, result.config.batch_sweep),
        "flatness-and-volume": _scatters(result),
        "bounds": _bounds(result),
    }
    if result.spectrum is not None:
        figures["hessian-spectrum"] = _single(_spectrum(result), 6.4, 3.6)
    with styled():
        for name, make in figures.items():
            figure = make()
            figure.savefig(folder / f"{name}.png")
            figure.set_layout_engine("none")  # laid out now; doing it again takes a third of the time
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
    return list(figures)


def inline_panels(result: DemoResult) -> dict[str, list[str]]:
    """Every panel as inline SVG, by the section of the page it belongs to."""
    config = result.config
    groups: dict[str, list[tuple[str, Draw]]] = {
        "rate": [(QUANTITIES[k].title, _sweep(result, config.rate_sweep, k)) for k in PANELS],
        "batch": [(QUANTITIES[k].title, _sweep(result, config.batch_sweep, k)) for k in PANELS],
        "scatter": [(f"{QUANTITIES[k].title} against √S", _scatter(result, k)) for k in SCATTERS],
        "mls": [(f"MLS chain, {s.label}", _bound(result, s, MLS_CHAIN)) for s in config.settings],
        "nmls": [(f"NMLS chain, {s.label}", _bound(result, s, NMLS_CHAIN)) for s in config.settings],
    }
    if result.spectrum is not None:
        groups["spectrum"] = [("Hessian's spectral density", _spectrum(result))]
    page: dict[str, list[str]] = {}
    with styled():
        for group, panels in groups.items():
            size = {"spectrum": (6.4, 3.4), "scatter": (3.3, 2.7)}.get(group, (3.9, 2.9))
            page[group] = [
                inline_svg(_single(draw, *size)(), f"{group}{i}", title)
                for i, (title, draw) in enumerate(panels)
            ]
    return page


def _single(draw: Draw, width: float, height: float) -> Callable[[], Figure]:
    def make() -> Figure:
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        return figure

    return make


def _sweep(result: DemoResult, sweep: Sequence[Setting], key: str) -> Draw:
    return lambda ax: sweep_panel(ax, result, sweep, key)


def _scatter(result: DemoResult, key: str) -> Draw:
    return lambda ax: scatter_panel(ax, result, key)


def _bound(result: DemoResult, setting: Setting, chain: Sequence[tuple[str, str]]) -> Draw:
    limits = _limits(result, chain)
    return lambda ax: bound_panel(ax, result, setting, chain, limits)


def _spectrum(result: DemoResult) -> Draw:
    spectrum = result.spectrum
    assert spectrum is not None
    return lambda ax: spectrum_panel(ax, spectrum)


def _limits(result: DemoResult, chain: Sequence[tuple[str, str]]) -> tuple[float, float]:
    """One value axis for all settings, so that they can be compared."""
    values = [v for run in result.runs for key, _ in chain for v in run.column(key)[1:] if math.isfinite(v)]
    if not values:
        return 0.1, 10.0
    room = 0.05 * (max(values) - min(values)) + 0.02
    return 10 ** (min(values) - room), 10 ** (max(values) + room)


def _six(result: DemoResult, sweep: Sequence[Setting]) -> Callable[[], Figure]:
    def make() -> Figure:
        figure = Figure(figsize=(11, 6.4), layout="constrained")
        for ax, key in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
            sweep_panel(ax, result, sweep, key)
        _legend(figure, result)
        return figure

    return make


def _legend(figure: Figure, result: DemoResult) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    handles.append(Line2D([], [], linestyle="none", marker="o", color=INK, markersize=4.5))
    labels.append(f"train loss falls below {result.config.last_phase:g} (bands: lowest to highest seed)")
    figure.legend(handles, labels, loc="outside upper left", ncols=4)


def _scatters(result: DemoResult) -> Callable[[], Figure]:
    def make() -> Figure:
        figure = Figure(figsize=(14, 3.7), layout="constrained")
        for ax, key in zip(figure.subplots(1, len(SCATTERS)).flat, SCATTERS, strict=True):
            scatter_panel(ax, result, key)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper left", ncols=len(handles))
        return figure

    return make


def _bounds(result: DemoResult) -> Callable[[], Figure]:
    def make() -> Figure:
        settings = result.config.settings
        figure = Figure(figsize=(3 * len(settings), 6.2), layout="constrained")
        axes = figure.subplots(2, len(settings))
        for row, chain, name in ((0, MLS_CHAIN, "A (MLS) to D"), (1, NMLS_CHAIN, "NMLS and its bound")):
            limits = _limits(result, chain)
            for ax, setting in zip(axes[row], settings, strict=True):
                bound_panel(ax, result, setting, chain, limits)
            axes[row][0].set_ylabel(name)
        return figure

    return make
