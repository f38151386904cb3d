"""What has been measured: in memory, and line by line in a file that a killed process leaves readable."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from flatkern.rows import Row, read_rows, row_line, write_rows

__all__ = ["Record"]


class Record:
    """Rows in ascending order of their ``step``, each there once; with a path also a ``.csv`` or ``.jsonl`` file."""

    def __init__(self, path: str | os.PathLike[str] | None, resume: bool) -> None:
        self.rows: list[Row] = []
        self.path = None if path is None else Path(path)
        self._columns: list[str] = []
        if self.path is None:
            return
        if self.path.suffix not in (".csv", ".jsonl"):
            raise ValueError(f"path: {self.path.name!r} must end in .csv or .jsonl")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(f"path: the folder {self.path.parent} does not exist")
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        if not resume:
            raise FileExistsError(
                f"path: {self.path} holds an earlier run; pass resume=True to continue it, or another path"
            )
        self.rows = read_rows(self.path)
        steps = [row.get("step") for row in self.rows]
        if any(not isinstance(step, int) for step in steps):
            raise ValueError(f"path: {self.path} was not written by a monitor (a row has no step)")
        self._rewrite()  # without a line that was cut off

    @property
    def last_step(self) -> int | None:
        """The step of the last row."""
        return int(self.rows[-1]["step"]) if self.rows else None

    def append(self, row: Row) -> None:
        """Add a row, in the file too; columns that are new give the CSV file a new heading."""
        self.rows.append(row)
        if self.path is None:
            return
        csv = self.path.suffix == ".csv"
        if csv and not set(row) <= set(self._columns):
            self._rewrite()
            return
        with self.path.open("a", encoding="utf-8", newline="") as file:
            file.write(row_line(row, self._columns if csv else None))

    def replace(self, rows: Sequence[Row]) -> None:
        """Put other rows in the place of all; where that loses any, the old file is kept as ``NAME.bak.csv``."""
        lost = [row for row in self.rows if row not in rows]
        self.rows = list(rows)
        if self.path is None:
            return
        if lost and self.path.exists():
            os.replace(self.path, self.path.with_name(f"{self.path.stem}.bak{self.path.suffix}"))
        self._rewrite()

    def rewind(self, step: int) -> bool:
        """Drop what lies after ``step``; with 0, everything: a run that starts anew. Tells whether there was any."""
        kept = [row for row in self.rows if step and int(row["step"]) <= step]
        dropped = len(kept) < len(self.rows)
        if dropped:
            self.replace(kept)
        return dropped

    def _rewrite(self) -> None:
        assert self.path is not None
        self._columns = list(dict.fromkeys(key for row in self.rows for key in row))
        part = self.path.with_name(f".{self.path.name}.part{self.path.suffix}")
        write_rows(part, self.rows)
        os.replace(part, self.path)
