"""Rows of named numbers as CSV, JSON lines and JSON, written so that every reader gets NaN and infinity right."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Row", "plain", "read_rows", "row_line", "write_csv", "write_json", "write_rows"]

Row = dict[str, float | int | str]
"""Numbers and short texts by column."""


def plain(value: Any) -> Any:
    """A value in terms of JSON: NaN is null, infinities are the strings "Infinity" and "-Infinity"."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Sequence):
        return [plain(v) for v in value]
    number = float(value)
    if math.isnan(number):
        return None
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    return number


def write_json(path: Path, value: Any) -> None:
    """Write valid JSON (see :func:`plain`)."""
    path.write_text(
        json.dumps(plain(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one line a row; columns in order of first appearance, NaN and missing values empty, infinities ``inf``."""
    columns = _columns(rows)
    lines = [_csv_line(columns), *(row_line(row, columns) for row in rows)]
    path.write_text("".join(lines), encoding="utf-8", newline="")


def row_line(row: Mapping[str, Any], columns: Sequence[str] | None) -> str:
    """One row with its line end: as CSV in the order of ``columns``, or (``None``) as a JSON object."""
    if columns is None:
        return json.dumps(plain(row), allow_nan=False, ensure_ascii=False) + "\n"
    return _csv_line([_cell(row.get(column)) for column in columns])


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as ``.csv``, ``.jsonl`` (an object a line) or ``.json`` (a list), by the ending of the name."""
    if path.suffix == ".csv":
        write_csv(path, rows)
    elif path.suffix == ".jsonl":
        path.write_text("".join(row_line(row, None) for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        write_json(path, rows)
    else:
        raise ValueError(f"path: {path.name!r} ends in neither .csv, .jsonl nor .json")


def read_rows(path: Path) -> list[Row]:
    """What :func:`write_rows` wrote to a ``.csv`` or ``.jsonl`` file, without a last line that was cut off.

    Raises:
        ValueError: a line is not a row; the message names it.
    """
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]  # a line without its end was being written when the process died
    if path.suffix == ".csv":
        return _read_csv(path, whole)
    rows: list[Row] = []
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            found = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON: {error.msg}") from None
        if not isinstance(found, dict):
            raise ValueError(f"{path}: line {number} is not a JSON object")
        rows.append({key: _from_json(value) for key, value in found.items()})
    return rows


def _read_csv(path: Path, text: str) -> list[Row]:
    lines = csv.reader(io.StringIO(text))
    columns = next(lines, [])
    rows: list[Row] = []
    for number, cells in enumerate(lines, start=2):
        if len(cells) != len(columns):
            raise ValueError(f"{path}: line {number} has {len(cells)} cells for {len(columns)} columns")
        rows.append({k: _from_cell(cell) for k, cell in zip(columns, cells, strict=True)})
    return rows


def _columns(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key in row))


def _csv_line(cells: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return repr(value) if isinstance(value, float) else value


def _from_cell(cell: str) -> float | int | str:
    if cell == "":
        return math.nan
    for kind in (int, float):
        try:
            return kind(cell)
        except ValueError:
            continue
    return cell


def _from_json(value: Any) -> float | int | str:
    if value is None:
        return math.nan
    if value in ("Infinity", "-Infinity"):
        return float(value)
    return value if isinstance(value, str | int | float) else str(value)
