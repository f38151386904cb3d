"""Files, checkpoints and restarts: no row twice, none lost, steps and times that go on."""

from __future__ import annotations

import csv
import json
import math
import multiprocessing
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import flatkern as fk
from flatkern.monitor.record import Record
from flatkern.rows import read_rows
from tests.monitor.training import LOSS, X, Y, mlp, seeded, train

VALUES = ("step", "sharpness", "mls", "nmls", "log_volume_top3", "probe_loss", "train_loss")


def values(rows: list[dict[str, Any]]) -> list[list[float]]:
    return [[float(row.get(key, math.nan)) for key in VALUES] for row in rows]


def descend(model: nn.Module, m: fk.Monitor, first: int, last: int) -> None:
    """Plain SGD whose batches depend on the step alone, so that it can begin anywhere."""
    for step in range(first, last):
        batch = torch.randint(len(X), (16,), generator=torch.Generator().manual_seed(step))
        loss = LOSS(model(X[batch]), Y[batch])
        for p, g in zip(model.parameters(), torch.autograd.grad(loss, list(model.parameters())), strict=True):
            p.data.sub_(g, alpha=0.1)
        m.step(loss)


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_the_file_has_every_row_as_soon_as_it_is_measured(ending: str, tmp_path: Path) -> None:
    path, model = tmp_path / f"run{ending}", mlp()
    with fk.Monitor(model, X, Y, LOSS, every=5, path=path) as m:
        assert len(read_rows(path)) == 1
        train(model, 12, m.step)
        assert [row["step"] for row in read_rows(path)] == [0, 5, 10]
    rows = read_rows(path)
    assert values(rows) == [pytest.approx(row, nan_ok=True, rel=0) for row in values(m.history)]
    assert [row["probe"] for row in rows] == [row["probe"] for row in m.history]
    if ending == ".csv":
        with path.open() as file:
            assert float(next(iter(csv.DictReader(file)))["sharpness"]) == m.history[0]["sharpness"]
    else:
        assert json.loads(path.read_text().splitlines()[1])["step"] == 5


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
def test_continuing_a_file(ending: str, tmp_path: Path) -> None:
    path, model = tmp_path / f"run{ending}", seeded(mlp)
    with fk.Monitor(model, X, Y, LOSS, every=5, path=path) as m:
        train(model, 10, m.step)
    with pytest.raises(FileExistsError, match="holds an earlier run; pass resume=True"):
        fk.Monitor(model, X, Y, LOSS, every=5, path=path)
    with path.open("a") as file:  # killed in the middle of a line
        file.write('{"step": 15, "sharp' if ending == ".jsonl" else "15,0.1")
    with fk.Monitor(model, X, Y, LOSS, every=5, path=path, resume=True) as again:
        assert len(again.history) == 3
        train(model, 13, again.step)
    steps = [row["step"] for row in read_rows(path)]
    assert steps == [row["step"] for row in again.history] == [0, 5, 10, 15, 20, 23]
    seconds = again.column("seconds")
    assert seconds == sorted(seconds)
    assert not list(tmp_path.glob("*.bak*"))


@pytest.mark.parametrize("with_file", [False, True])
def test_a_restart_from_a_checkpoint_gives_the_rows_of_the_run_without(
    tmp_path: Path, with_file: bool
) -> None:
    model = seeded(mlp)
    with fk.Monitor(model, X, Y, LOSS, every=5) as alone:
        descend(model, alone, 0, 23)

    path = tmp_path / "run.jsonl" if with_file else None
    model = seeded(mlp)
    first = fk.Monitor(model, X, Y, LOSS, every=5, path=path).start()
    descend(model, first, 0, 13)
    torch.save({"monitor": first.state_dict(), "model": model.state_dict()}, tmp_path / "checkpoint.pt")
    descend(model, first, 13, 17)  # goes on beyond the checkpoint, then dies
    assert first.column("step") == [0, 5, 10, 15]

    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    model = mlp()
    model.load_state_dict(state["model"])
    second = fk.Monitor(model, X, Y, LOSS, every=5, path=path, resume=True)
    second.load_state_dict(state["monitor"])
    with second:
        assert second.column("step") == [0, 5, 10]
        descend(model, second, 13, 23)
    assert second.column("step") == [0, 5, 10, 15, 20, 23]
    found, expected = values(second.history), values(alone.history)
    for a, b in zip(found, expected, strict=True):
        assert a == pytest.approx(b, rel=1e-6, nan_ok=True)
    if path is not None:
        assert values(read_rows(path)) == [pytest.approx(row, nan_ok=True, rel=0) for row in found]
        assert [row["step"] for row in read_rows(tmp_path / "run.bak.jsonl")] == [0, 5, 10, 15]


def test_going_back_to_a_step_drops_what_lay_beyond(tmp_path: Path) -> None:
    path, model = tmp_path / "run.csv", mlp()
    m = fk.Monitor(model, X, Y, LOSS, every=5, path=path).start()
    train(model, 22, m.step)
    m.start(12)
    assert m.column("step") == [0, 5, 10]
    with pytest.raises(ValueError, match="at: step 5 lies before the last row's, 10"):
        m.step(at=5)
    m.start(12)
    train(model, 3, m.step)
    assert [row["step"] for row in read_rows(path)] == [0, 5, 10, 15]
    # step 0: another run altogether, whose beginning is measured anew
    other = fk.Monitor(seeded(mlp), X, Y, LOSS, path=path, resume=True).start(0)
    assert other.column("step") == [0]
    assert other.history[0]["sharpness"] != m.history[0]["sharpness"]
    assert len(read_rows(tmp_path / "run.bak.csv")) == 4


def test_rows_of_other_probe_samples_are_not_continued(tmp_path: Path) -> None:
    path, model = tmp_path / "run.csv", mlp()
    m = fk.Monitor(model, X, Y, path=path).start()
    with pytest.raises(ValueError, match=r"path: .*measured on other probe samples"):
        fk.Monitor(model, X, Y, path=path, resume=True, seed=1)
    with pytest.raises(ValueError, match="state: measured on other probe samples"):
        fk.Monitor(model, X, Y, seed=1).load_state_dict(m.state_dict())
    with pytest.raises(ValueError, match=r"state: not a monitor's state_dict; .*probe.* missing"):
        m.load_state_dict({"step": 3})


def train_for_ever(path: Path) -> None:
    model = mlp()
    m = fk.Monitor(model, X, Y, LOSS, every=1, path=path).start()
    train(model, 10**6, m.step)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="needs fork")
def test_a_killed_process_leaves_a_file_that_can_be_continued(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    process = multiprocessing.get_context("fork").Process(target=train_for_ever, args=(path,))
    process.start()
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not path.exists() or path.read_text().count("\n") < 12):
        time.sleep(0.01)
    process.kill()
    process.join()
    m = fk.Monitor(mlp(), X, Y, LOSS, path=path, resume=True)
    steps = m.column("step")
    assert len(steps) >= 10
    assert steps == list(range(len(steps)))


def test_new_columns_enlarge_a_csv(tmp_path: Path) -> None:
    path, model = tmp_path / "run.csv", mlp()
    with fk.Monitor(model, X, every=5, path=path) as m:
        train(model, 5, lambda _: m.step())
    with fk.Monitor(model, X, every=5, path=path, resume=True, extra={"norm": lambda _: 2}) as m:
        train(model, 5, lambda _: m.step())
    rows = read_rows(path)
    assert [row["step"] for row in rows] == [0, 5, 10]
    assert math.isnan(float(rows[0]["norm"]))
    assert rows[2]["norm"] == 2


@pytest.mark.parametrize("data", [(X, Y, LOSS), (X,)])
def test_divergence_is_recorded_and_training_goes_on(tmp_path: Path, data: tuple[Any, ...]) -> None:
    path, model = tmp_path / "run.csv", mlp()
    m = fk.Monitor(model, *data, every=1, path=path).start()
    for scale in (1e10, float("nan"), float("inf")):
        with torch.no_grad():
            model[2].weight.fill_(scale)
        m.step()
    m.finish()
    assert [row["status"] for row in m.history] == ["ok", "ok", "not finite", "not finite"]
    assert math.isnan(m.column("sharpness")[-1])
    assert [row["step"] for row in read_rows(path)] == list(range(4))


def test_a_measurement_that_fails_is_told_at_the_start_and_recorded_later(tmp_path: Path) -> None:
    broken = [True]

    def fails_at_times(_: nn.Module) -> float:
        if broken[0]:
            raise RuntimeError("out of\nmemory")
        return 1.0

    path, model = tmp_path / "run.jsonl", mlp()
    m = fk.Monitor(model, X, every=1, extra={"q": fails_at_times}, path=path)
    with pytest.raises(RuntimeError, match="out of"):
        m.start()
    broken[0] = False
    m.start()
    broken[0] = True
    with pytest.warns(UserWarning, match="at step 1 failed: RuntimeError: out of memory"):
        m.step()
    with pytest.raises(ValueError, match="at: step 0 lies before"):
        m.step(at=0)
    m.start(1)
    broken[0] = False
    m.step()
    assert [row["status"] for row in read_rows(path)] == ["ok", "RuntimeError: out of memory", "ok"]


def test_an_error_in_the_loop_ends_without_a_measurement() -> None:
    model = mlp()
    m = fk.Monitor(model, X)

    def fails() -> None:
        with m:
            m.step()
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert m.column("step") == [0]
    with pytest.raises(RuntimeError, match="has not been started"):
        m.step()


def test_only_the_first_process_measures_and_writes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank in (1, 0):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        path, model = tmp_path / f"{rank}.csv", mlp()
        with fk.Monitor(model, X, every=2, path=path) as m:
            train(model, 4, lambda _, m=m: m.step())
        assert len(m.history) == (3 if rank == 0 else 0)
        assert path.exists() == (rank == 0)
        assert m.state_dict()["step"] == 4


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'a\.txt' must end in \.csv or \.jsonl"):
        fk.Monitor(mlp(), X, path=tmp_path / "a.txt")
    with pytest.raises(FileNotFoundError, match=r"the folder .* does not exist"):
        fk.Monitor(mlp(), X, path=tmp_path / "none" / "a.csv")
    for name, text, message in (
        ("a.csv", "a,b\n1,2\n", "was not written by a monitor"),
        ("b.csv", "step,b\n1,2,3\n", "line 2 has 3 cells for 2 columns"),
        ("a.jsonl", "step\n", "line 1 is not JSON"),
        ("b.jsonl", "[1]\n", "line 1 is not a JSON object"),
    ):
        (tmp_path / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            Record(tmp_path / name, resume=True)
        assert (tmp_path / name).read_text() == text
