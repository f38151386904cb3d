"""The examples of the monitor and of ``flatkern measure`` run as they are written."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest

from flatkern.cli import main
from flatkern.rows import read_rows

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


def snippets(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / "docs" / page).read_text(encoding="utf-8"), flags=re.S)


def test_the_pages_code_runs(tmp_path: Path) -> None:
    loop, restart, *_ = snippets("monitor.md")
    names: dict[str, Any] = {}
    exec(compile(loop, "monitor.md", "exec"), names)
    assert names["m"].column("step") == [0, 100, 200, 300]
    exec(compile(restart, "monitor.md", "exec"), names)
    assert names["again"].column("step") == [0, 100, 200, 300, 301]
    (tmp_path / "made_here.py").write_text(snippets("measure.md")[0])
    arguments = ["measure", f"{tmp_path / 'made_here.py'}:make", "--output", str(tmp_path / "out")]
    assert main([*arguments, "--samples", "10"]) == 0


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
