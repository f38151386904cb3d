"""The result of :func:`flatkern.flatness`: a table of measures, one a layer, and figures."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Flatness", "Measure"]


@dataclass(frozen=True)
class Measure:
    """One quantity of the table."""

    name: str
    definition: str
    """As a formula."""
    value: float | None = None
    """``None`` where it cannot be had; see ``reason``."""
    stderr: float = 0.0
    """The estimator's standard error; 0 where the value is exact for the data."""
    sample_stderr: float | None = None
    """Standard error of the mean over the samples; ``None`` where it is not known."""
    error_bound: float | None = None
    """A bound on the error instead of a standard error (an eigenvalue's residual norm)."""
    method: str = ""
    reason: str = ""
    """Why there is no value."""
    per_layer: Mapping[str, float] = field(default_factory=dict, repr=False)
    """Empty where the quantity has no split by layer."""
    per_layer_stderr: Mapping[str, float] = field(default_factory=dict, repr=False)
    seconds: float = 0.0
    """Beyond the pass that is shared."""
    result: Any = field(default=None, repr=False)
    """What the quantity's own function returns, where it was called."""


@dataclass(frozen=True)
class Flatness:
    """All measures by name; ``print`` shows them as tables, ``result["ggn_trace"]`` is one :class:`Measure`."""

    measures: Mapping[str, Measure]
    num_data: int
    num_parameters: int
    seconds: float
    shared_seconds: float
    """Of the pass that gives all exact first-order quantities at once; 0 where there was none."""
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> Measure:
        return self.measures[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.measures)

    def __len__(self) -> int:
        return len(self.measures)

    @property
    def layers(self) -> tuple[str, ...]:
        """Layers that some measure is split by."""
        return tuple(dict.fromkeys(layer for m in self.measures.values() for layer in m.per_layer))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings (JSON): ``{"measures": {name: {...}}, "num_data": n, ...}``."""
        shown = (
            "definition",
            "value",
            "stderr",
            "sample_stderr",
            "error_bound",
            "method",
            "reason",
            "seconds",
        )
        measures = {}
        for name, m in self.measures.items():
            measures[name] = {key: getattr(m, key) for key in shown}
            measures[name]["per_layer"] = {
                layer: {"value": value, "stderr": m.per_layer_stderr.get(layer, 0.0)}
                for layer, value in m.per_layer.items()
            }
        return {
            "measures": measures,
            "num_data": self.num_data,
            "num_parameters": self.num_parameters,
            "seconds": self.seconds,
            "shared_seconds": self.shared_seconds,
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        rows = [["quantity", "value", "error", "over samples", "how"]]
        for m in self.measures.values():
            if m.value is None:
                rows.append([m.name, "–", "", "", m.reason])
                continue
            over = "" if m.sample_stderr is None else f"± {m.sample_stderr:.2g}"
            rows.append([m.name, f"{m.value:.5g}", _error(m), over, m.method])
        head = f"{self.num_data} samples, {self.num_parameters} parameters, {self.seconds:.2g} s"
        text = [head, *_aligned(rows)]
        split = [m for m in self.measures.values() if m.per_layer]
        if split and self.layers:
            rows = [["layer", *(m.name for m in split)]]
            for layer in self.layers:
                rows.append([layer or "(model)", *(_layer_cell(m, layer) for m in split)])
            text += ["", *_aligned(rows)]
        return "\n".join([*text, *(f"note: {note}" for note in self.notes)])

    def plot(self, axes: Any = None) -> Any:
        """A bar chart by layer for every measure that is split, with error bars; returns the axes.

        Needs matplotlib. ``axes``: as many as there are such measures.
        """
        split = [m for m in self.measures.values() if m.per_layer]
        if not split:
            raise ValueError("plot: no measure here is split by layer; ask for one with quantities=")
        if axes is None:
            import matplotlib.pyplot as plt

            size = (2.6 * len(split) + 1, 0.3 * len(self.layers) + 1.4)
            axes = plt.subplots(
                1, len(split), sharey=True, figsize=size, squeeze=False, layout="constrained"
            )[1][0]
        panels = (
            list(axes.flat) if hasattr(axes, "flat") else list(axes) if hasattr(axes, "__iter__") else [axes]
        )
        if len(panels) < len(split):
            raise ValueError(f"axes: {len(split)} are needed, one a measure, got {len(panels)}")
        names = [layer or "(model)" for layer in self.layers]
        places = range(len(names))
        for ax, m in zip(panels, split, strict=False):
            values = [m.per_layer.get(layer, 0.0) for layer in self.layers]
            errors = [m.per_layer_stderr.get(layer, 0.0) for layer in self.layers]
            ax.barh(places, values, xerr=errors if any(errors) else None, height=0.7)
            ax.axvline(0.0, color="black", linewidth=0.6)
            ax.set_yticks(places, names)
            ax.set_title(m.name, fontsize="medium")
            ax.ticklabel_format(axis="x", scilimits=(-2, 3))
        panels[0].invert_yaxis()
        return axes


def _error(m: Measure) -> str:
    if m.error_bound is not None:
        return f"≤ {m.error_bound:.2g}"
    return f"± {m.stderr:.2g}" if m.stderr else "exact"


def _layer_cell(m: Measure, layer: str) -> str:
    if layer not in m.per_layer:
        return ""
    error = m.per_layer_stderr.get(layer, 0.0)
    return f"{m.per_layer[layer]:.4g}" + (f" ± {error:.1g}" if error else "")


def _aligned(rows: list[list[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]
    return [lines[0], "-" * min(100, max(len(line) for line in lines)), *lines[1:]]
