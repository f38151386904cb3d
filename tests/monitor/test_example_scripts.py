"""The examples of the monitor and of ``flatkern measure`` run as they are written."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from flatkern.cli import main
from flatkern.rows import read_rows

EXAMPLES = Path(__file__).parents[2] / "examples"


def test_monitor_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "monitor_training.py"))["main"](tmp_path, steps=60)
    steps = [row["step"] for row in read_rows(tmp_path / "run.csv")]
    assert steps == sorted(set(steps))
    assert (steps[0], steps[-1]) == (0, 60)
    assert (tmp_path / "six-panels.png").stat().st_size > 10_000
    assert f"{len(steps)} measurements" in capsys.readouterr().out


def test_measure_factory(tmp_path: Path) -> None:
    example = EXAMPLES / "measure_factory.py"
    runpy.run_path(str(example))["main"](tmp_path / "checkpoints", epochs=2)
    files = [str(path) for path in sorted((tmp_path / "checkpoints").iterdir())]
    output = tmp_path / "out"
    assert (
        main(
            ["measure", f"{example}:make", "--checkpoint", *files, "--samples", "20", "--output", str(output)]
        )
        == 0
    )
    html = (output / "report.html").read_text()
    assert "not applicable: weight sharing" in html
    assert html.count("<svg") == 6
