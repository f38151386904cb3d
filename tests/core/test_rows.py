"""Rows of numbers survive files, with NaN, infinities and lines that were cut off."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from flatkern.rows import read_rows, write_csv, write_json, write_rows


def test_csv_survives_nan_and_infinity(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    write_csv(path, [{"a": 0.1, "b": math.nan}, {"a": -math.inf, "c": "x,y"}])
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"a": "0.1", "b": "", "c": ""}, {"a": "-inf", "b": "", "c": "x,y"}]
    assert float(rows[1]["a"]) == -math.inf


def test_json_is_valid_with_nan_and_infinity(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(
        path,
        {"a": math.nan, "b": [math.inf, -math.inf], "c": np.array([0.1, 2.0]), "d": Path("x"), "e": True},
    )

    def refuse(text: str) -> None:
        pytest.fail(f"{text} is not JSON")

    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found == {"a": None, "b": ["Infinity", "-Infinity"], "c": [0.1, 2.0], "d": "x", "e": True}


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_what_is_written_is_read(ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{ending}"
    rows = [
        {"step": 0, "a": 0.1 + 0.2, "b": math.nan, "status": 'ok, "well"'},
        {"step": 7, "a": -math.inf, "b": 1e-300, "status": "a ≤ b"},
    ]
    write_rows(path, rows)
    found = read_rows(path)
    assert [list(row) for row in found] == [list(row) for row in rows]
    assert math.isnan(found[0]["b"])  # type: ignore[arg-type]
    assert found[1] == rows[1]
    assert {k: v for k, v in found[0].items() if k != "b"} == {k: v for k, v in rows[0].items() if k != "b"}
    assert [type(row["step"]) for row in found] == [int, int]
    with path.open("a", encoding="utf-8") as file:
        file.write(path.read_text(encoding="utf-8").splitlines()[-1][:-2])
    assert len(read_rows(path)) == 2


def test_other_endings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'a\.txt' ends in neither"):
        write_rows(tmp_path / "a.txt", [])
