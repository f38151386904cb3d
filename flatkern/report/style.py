"""How everything looks: colours that colour-blind readers can tell apart, in light and in dark."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.figure import Figure

__all__ = ["DASHES", "GRID", "INK", "MUTED", "SERIES", "inline_svg", "log_label", "styled", "superscript"]

# Okabe & Ito's palette; the page swaps each for a lighter sister in dark mode
SERIES = ("#0072b2", "#d55e00", "#009e73", "#b0568d")
INK, MUTED, GRID = "#1a1a1b", "#5c5f66", "#dfe1e5"
DASHES: tuple[Any, ...] = ("solid", (0, (5, 1.6)), (0, (1.2, 1.2)), "solid")
"""A second cue beside colour."""

_VARIABLES = {
    **{colour: f"--s{i + 1}" for i, colour in enumerate(SERIES)},
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--grid",
}
_RC: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": MUTED,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.minor.visible": False,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "savefig.dpi": 150,
    "svg.fonttype": "none",
    "svg.hashsalt": "flatkern",
}
_DIGITS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


@contextmanager
def styled() -> Iterator[None]:
    """Matplotlib's settings for the block; the user's own are back afterwards."""
    with matplotlib.rc_context(_RC):
        yield


def superscript(exponent: int) -> str:
    """An integer as raised digits."""
    return str(exponent).translate(_DIGITS)


def log_label(value: float, _: object = None) -> str:
    """Tick label of a power of ten; empty for what lies between powers."""
    if value <= 0:
        return ""
    exponent = round(_log10(value))
    if abs(value / 10.0**exponent - 1) > 1e-6:
        return ""
    return f"{10**exponent:,}" if 0 <= exponent <= 1 else f"10{superscript(exponent)}"


def _log10(value: float) -> float:
    return math.log10(value)


def inline_svg(figure: Figure, name: str, title: str) -> str:
    """A figure as SVG for the page: scales with its column, takes the page's colours, its ids clash with no other's."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{title}"', 1)
    svg = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', svg)
    svg = re.sub(r'href="#([^"]+)"', rf'href="#{name}-\1"', svg)
    svg = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", svg)
    svg = re.sub(r"'DejaVu Sans'(?:, [^;\"]*)?", "var(--font), sans-serif", svg)
    for colour, variable in _VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg
