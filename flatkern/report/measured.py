"""The page and tables of ``flatkern measure``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from flatkern.experiments.quantities import QUANTITIES
from flatkern.report.curves import inline_curves, panels_of, six_panels
from flatkern.report.html import page
from flatkern.report.style import styled
from flatkern.report.tables import Cell, Table, number

if TYPE_CHECKING:
    import flatkern as fk
    from flatkern.experiments.user_model import MeasureResult
    from flatkern.experiments.user_quantities import Entry

__all__ = ["bounds_table", "entry_table", "render_measured", "series_table", "write_measured"]

SERIES_KEYS = (
    "loss",
    "ggn_trace",
    "hessian_trace",
    "max_eigenvalue",
    "sqrt_sharpness",
    "log_volume",
    "mls",
    "nmls",
    "local_dimensionality",
)


def write_measured(folder: Path, result: MeasureResult) -> None:
    """Write ``report.html`` and, of a series of checkpoints, the six panels into a folder that exists."""
    if len(result.points) > 1:
        figure: Figure = six_panels(result.rows)
        with styled():
            figure.savefig(folder / "six-panels.png")
            figure.savefig(folder / "six-panels.svg", metadata={"Date": None})
    (folder / "report.html").write_text(render_measured(result), encoding="utf-8")


def render_measured(result: MeasureResult) -> str:
    """The page as text."""
    last, series = result.last, len(result.points) > 1
    keys = ["loss", *(e.key for e in (*last.measured.flatness[1:], *last.measured.geometry))]
    drawn = [*(q for q in panels_of(result.rows)[1:] if q.key not in keys)] if series else []
    return page(
        "measured.html.j2",
        result=result,
        last=last,
        flatness=entry_table(last.measured.flatness),
        geometry=entry_table(last.measured.geometry),
        bounds=None if last.measured.bounds is None else bounds_table(last.measured.bounds),
        series=series_table(result) if series else None,
        panels=inline_curves(result.rows, "curve") if series else [],
        definitions=[*(QUANTITIES[k] for k in dict.fromkeys(keys)), *drawn],
        facts=_facts(result),
    )


def entry_table(entries: list[Entry]) -> Table:
    """A line a quantity: value, both errors, how it was obtained."""
    rows = []
    for e in entries:
        quantity = QUANTITIES[e.key]
        name = Cell(f"{quantity.title} ({quantity.symbol})" if quantity.symbol else quantity.title)
        if e.problem:
            rows.append([name, Cell("–"), Cell(""), Cell(""), Cell(f"not measured: {e.problem}"), Cell("")])
            continue
        across = e.sample_stderr
        rows.append(
            [
                name,
                Cell(number(e.value, 4), e.value),
                Cell(_own_error(e), e.stderr),
                Cell(
                    "" if across is None else f"± {number(across, 2)}", math.nan if across is None else across
                ),
                Cell(e.method),
                Cell(f"{e.seconds:.2g}", e.seconds),
            ]
        )
    return Table(
        [
            ("quantity", ""),
            ("value", ""),
            (
                "own error",
                "Standard error of the estimate for these data; ≤: a bound instead.",
            ),
            (
                "over samples",
                "Standard error of the mean over the samples: how far others of the kind may lie.",
            ),
            ("how", ""),
            ("seconds", "Wall time. The geometry is one pass for all of its lines."),
        ],
        rows,
    )


def bounds_table(bounds: fk.Bounds) -> Table:
    """A line an inequality: all sides, and whether it applies."""
    rows = []
    for name, i in bounds.inequalities.items():
        sides = [f"{side} = {_side(value)}" for side, value in i.sides.items()]
        apart = i.looseness / math.log(10)
        rows.append(
            [
                Cell(name),
                Cell(i.status + (f": {i.reason}" if i.reason else "")),
                Cell((" ≤ " if i.applicable else ", ").join(sides)),
                Cell(number(apart), apart),
            ]
        )
    return Table(
        [
            ("inequality", ""),
            ("status", ""),
            ("sides", "From left to right; fk.bounds has the formulas."),
            ("decades apart", "The outer sides."),
        ],
        rows,
    )


def series_table(result: MeasureResult) -> Table:
    """A line a checkpoint."""
    keys = [k for k in SERIES_KEYS if any(k in row for row in result.rows)]
    rows = [
        [
            Cell(str(point.step), point.step),
            Cell(Path(point.name).name),
            *(Cell(number(v), v) for v in (float(point.row.get(k, math.nan)) for k in keys)),
        ]
        for point in result.points
    ]
    headings = [("step", ""), ("checkpoint", "")]
    headings += [
        (QUANTITIES[k].symbol if k == "sqrt_sharpness" else QUANTITIES[k].title, QUANTITIES[k].definition)
        for k in keys
    ]
    return Table(headings, rows)


def _own_error(e: Entry) -> str:
    if e.error_bound is not None:
        return f"≤ {number(e.error_bound, 2)}"
    return f"± {number(e.stderr, 2)}" if e.stderr else "exact"


def _side(log: float) -> str:
    """A side from its logarithm, which may be too large for a number."""
    if -600 < log < 600:
        return number(math.exp(log))
    return "0" if log < 0 else f"10^{log / math.log(10):.0f}"


def _facts(result: MeasureResult) -> list[tuple[str, str]]:
    config = result.config
    return [
        ("factory", config.source),
        ("model", f"{result.model}, {result.parameters:,} parameters that train, in eval mode"),
        ("loss", result.loss),
        ("quantities of the loss", "on all samples the factory gave"),
        ("geometry and bounds", f"on {config.samples} samples drawn from them, or all where there are fewer"),
        ("seed", str(config.seed)),
        ("started", result.started),
        ("time", f"{result.seconds:.1f} s"),
        *((str(k).replace("_", " "), str(v)) for k, v in result.environment.items()),
    ]
