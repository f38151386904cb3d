"""Runs go on after a kill at any moment, to the same numbers as without one."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from flatkern.experiments import run_files
from flatkern.experiments.data import Dataset, load
from flatkern.experiments.errors import Cancelled
from flatkern.experiments.parallel import run_file
from flatkern.experiments.reproduce import ReproduceConfig, reproduction
from flatkern.experiments.run_files import RunFile
from flatkern.experiments.settings import Group
from flatkern.experiments.training import Run, train_group
from tests.experiments.killed import TINY


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load("digits", num_train=60, num_test=40)


def config_of(steps: int) -> ReproduceConfig:
    return reproduction("test-samples", **TINY, steps=steps)


def same(a: list[Run], b: list[Run]) -> None:
    for first, second in zip(a, b, strict=True):
        assert repr(first.rows) == repr(second.rows)  # NaN equals NaN
        assert repr(first.elsewhere) == repr(second.elsewhere)
        assert all(torch.equal(v, second.weights[k]) for k, v in first.weights.items())


def test_a_killed_process_is_gone_on_from(tmp_path: Path, data: Dataset) -> None:
    config, group = config_of(8_000), config_of(8_000).groups[0]
    file = run_file(tmp_path, group)
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.experiments.killed", str(tmp_path), "8000"],
        env=os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 120
        # the first save is of step 0
        while child.poll() is None and time.monotonic() < deadline and not (file.load() or {}).get("step"):
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    held = file.load()
    assert held is not None
    assert 0 < held["step"] < 8_000
    told: list[int] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        resumed = train_group(config, group, data, told.append, file)
        assert told[0] == held["step"]
        same(resumed, train_group(config, group, data))
    finally:
        torch.set_num_threads(threads)
    assert [p.name for p in tmp_path.iterdir()] == [file.path.name]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("broken", ["torch.save", "os.fsync", "os.replace"])
@pytest.mark.parametrize("call", [1, 2, 4])
def test_any_moment_of_a_save_may_be_the_last(
    broken: str, call: int, tmp_path: Path, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(600)
    group, calls = config.groups[0], 0
    module, name = broken.split(".")
    holder = getattr(run_files, module)
    real: Callable[..., object] = getattr(holder, name)

    def dies(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == call:
            if broken == "torch.save":  # half a file
                arguments[1].write(b"PK\x03\x04")  # type: ignore[attr-defined]
            raise Killed
        return real(*arguments)

    file = run_file(tmp_path, group)
    with monkeypatch.context() as patch:
        patch.setattr(holder, name, dies)
        patch.setattr(Path, "unlink", lambda *_: None)  # the dead do not tidy up
        with pytest.raises(Killed):
            train_group(config, group, data, file=file, save_every=0.0)
    assert (file.load() is not None) == (call > 1)
    assert any(p.suffix == ".part" for p in tmp_path.iterdir())
    same(train_group(config, group, data, file=file), train_group(config, group, data))
    assert [p.name for p in tmp_path.iterdir()] == [file.path.name]


def test_a_stopped_run_is_saved_where_it_stands(tmp_path: Path, data: Dataset) -> None:
    config = config_of(600)
    group, told = config.groups[0], 0

    def stop(steps: int) -> None:
        nonlocal told
        told += steps
        if told >= 300:
            raise Cancelled

    file = run_file(tmp_path, group)
    with pytest.raises(Cancelled):
        train_group(config, group, data, stop, file)
    held = file.load()
    assert held is not None
    assert held["step"] == told < 600
    same(train_group(config, group, data, file=file), train_group(config, group, data))


def test_a_finished_run_is_not_trained_again(tmp_path: Path, data: Dataset) -> None:
    config = config_of(200)
    group = Group(config.middle, (0, 1))
    file = run_file(tmp_path, group)
    first = train_group(config, group, data, file=file)
    before = file.path.stat().st_mtime_ns
    second = train_group(config, group, data, file=file)
    assert file.path.stat().st_mtime_ns == before
    same(first, second)


def test_diverged_runs_go_round(tmp_path: Path, data: Dataset) -> None:
    config = reproduction("fig1", **TINY, steps=200, learning_rates=(1e10, 1e15, 1e20))
    group = config.groups[0]
    file = run_file(tmp_path, group)
    first, second = (train_group(config, group, data, file=file) for _ in range(2))
    assert first[0].diverged
    assert second[0].diverged
    same(first, second)


def test_a_damaged_file_is_as_none(tmp_path: Path) -> None:
    file = RunFile(tmp_path, "run")
    file.save({"step": 3})
    assert file.load() == {"step": 3}
    file.path.write_bytes(file.path.read_bytes()[:50])
    assert file.load() is None
    file.path.write_bytes(b"")
    assert file.load() is None
