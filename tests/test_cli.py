"""The command line as a user meets it: exit codes, one-line errors, files, Ctrl-C."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import flatkern as fk
from flatkern.cli import main
from flatkern.experiments.demo import run_demo
from flatkern.experiments.settings import paper

COMMAND = [sys.executable, "-m", "flatkern.cli"]


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("flatkern: ")
    return captured.err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.split()[0] == "flatkern"


def test_help_and_version_do_not_import_torch() -> None:
    code = (
        "import sys, importlib.util as u\n"
        "spec = u.spec_from_file_location('cli', sys.argv[1]); m = u.module_from_spec(spec)\n"
        "spec.loader.exec_module(m)\n"
        "try: m.main(['demo', '--help'])\n"
        "except SystemExit: pass\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    path = Path(fk.__file__).parent / "cli.py"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert "--quick" in done.stdout
    assert "--output" in done.stdout


@pytest.mark.parametrize(
    "arguments", [[], ["dance"], ["demo", "--seeds", "0"], ["demo", "--quick", "--paper"]]
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    active = fk.kernels.active()
    for word in ("flatkern", "torch", "python", "kernels", "instruction set", "CUDA", "threads"):
        assert word in out
    assert active.kernels in out
    assert active.reason in out
    assert active.isa in out


def test_impossible_output_is_one_line_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("")
    assert "must be a folder" in fails(capsys, "demo", "--quick", "--output", str(file))
    assert "does not exist" in fails(capsys, "demo", "--quick", "--output", str(tmp_path / "no" / "out"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_output(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tmp_path.chmod(0o500)
    assert "cannot be written" in fails(capsys, "demo", "--quick", "--output", str(tmp_path / "out"))


def test_bad_data_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--output", str(tmp_path / "out")]
    nowhere = str(tmp_path / "nowhere")
    assert "no such folder" in fails(capsys, "demo", "--data", "fashion-mnist", "--root", nowhere, *out)
    assert "reads no folder" in fails(capsys, "demo", "--root", str(tmp_path), *out)
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(b"\x1f\x8bnonsense")
    (tmp_path / "train-labels-idx1-ubyte").write_bytes(b"")
    message = fails(capsys, "demo", "--data", "fashion-mnist", "--root", str(tmp_path), *out)
    assert "train-images-idx3-ubyte.gz" in message
    assert "damaged gzip" in message
    assert not (tmp_path / "out").exists()
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_missing_extras_are_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import importlib.util

    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n in ("rich", "mlxtend") else found(n, *a)
    )
    message = fails(capsys, "demo")
    assert "mlxtend, rich" in message or "rich, mlxtend" in message
    assert "pip install flatkern[demo]" in message


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "out"
    process = subprocess.Popen(
        [*COMMAND, "demo", "--output", str(output), "--jobs", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(4)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all processes of the group
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "nothing was written" in err
    assert list(tmp_path.iterdir()) == []


def test_the_papers_network_takes_a_few_steps(tmp_path: Path) -> None:
    config = replace(
        paper(), steps=3, seeds=1, jobs=1, num_probe=20, spectrum_samples=20, spectrum_probes=2, spectrum_steps=4,
        output=tmp_path / "out",
    )  # fmt: skip
    run_demo(config, progress=False)
    found = json.loads((tmp_path / "out" / "results.json").read_text(encoding="utf-8"))
    assert found["network"] == [784, 500, 500, 500, 10]
    assert found["data"]["train"] == 4000
    assert found["spectrum"]["parameters"] == 898_510
    assert [r["measurements"][-1]["step"] for r in found["runs"]] == [3] * 5


def test_quick_end_to_end(tmp_path: Path) -> None:
    """The real thing: the last phase is reached, and flatter goes with compressed."""
    output = tmp_path / "quick"
    done = subprocess.run(
        [*COMMAND, "demo", "--quick", "--output", str(output)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(output / "report.html") in done.stdout.replace("\n", "")
    found = json.loads((output / "results.json").read_text(encoding="utf-8"))
    verdicts = {c["statement"]: c["verdict"] for c in found["claims"]}
    assert next(v for k, v in verdicts.items() if k.startswith("Every run")) == "held"
    assert verdicts["At the end, a higher learning rate gives a lower sharpness"] == "held"
    assert verdicts["At the end, a higher learning rate gives a lower log volume (top 3)"] == "held"
    assert all(c["violated"] == 0 for c in found["inequalities"])
    final = {r["name"]: r["measurements"][-1] for r in found["runs"]}
    sharp, flat = final["lr 0.5, batch 20, seed 0"], final["lr 2, batch 20, seed 0"]
    assert 15 < sharp["sqrt_sharpness"] < 25
    assert 10 < flat["sqrt_sharpness"] < 15
    assert sharp["mls"] > 1.3 * flat["mls"]
    assert all(row["train_loss"] < 1e-4 for row in final.values())
