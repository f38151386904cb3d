"""What ``flatkern measure`` prints."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table as RichTable

from flatkern.report.measured import bounds_table, entry_table, series_table

if TYPE_CHECKING:
    from flatkern.experiments.user_model import MeasureResult
    from flatkern.report.tables import Table

__all__ = ["print_measured"]


def print_measured(result: MeasureResult) -> None:
    """The tables, and where the files are."""
    console, last = Console(soft_wrap=True), result.last.measured
    if len(result.points) > 1:
        _print(console, "Along the checkpoints", series_table(result))
    at = f" ({result.last.name})" if result.config.checkpoints else ""
    _print(console, f"Flatness of the loss{at}", entry_table(last.flatness))
    _print(console, f"Geometry of the outputs{at}", entry_table(last.geometry))
    if last.bounds is not None:
        _print(console, "Bounds", bounds_table(last.bounds))
    for note in last.notes:
        console.print(f"note: {note}", highlight=False, markup=False)
    output = result.config.output
    console.print(
        f"{result.seconds:.1f} s in all. Open {output / 'report.html'}", highlight=False, markup=False
    )


def _print(console: Console, title: str, table: Table) -> None:
    shown = RichTable(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
    for i, (heading, _) in enumerate(table.headings):
        numeric = any(row[i].sort == row[i].sort for row in table.rows)
        shown.add_column(heading, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for row in table.rows:
        shown.add_row(*(cell.text for cell in row))
    console.print(shown, markup=False)
    console.print()
