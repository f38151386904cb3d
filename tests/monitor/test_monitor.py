"""What a row holds, and what becomes of the rows: scalars, figures, files."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import flatkern as fk
from flatkern.monitor import running_loss
from flatkern.report.curves import panels_of, six_panels
from flatkern.rows import read_rows
from tests.monitor.training import LOSS, X, Y, mlp, train


@pytest.fixture(scope="module")
def monitor() -> fk.Monitor:
    torch.manual_seed(0)
    model = mlp()
    with fk.Monitor(model, X, Y, LOSS, every=5) as m:
        train(model, 40, m.step)
    return m


def test_values_are_those_of_geometry_and_bounds() -> None:
    model = mlp()
    m = fk.Monitor(model, X[:20], Y[:20], LOSS, bounds=True, layers="0").start()
    train(model, 3, m.step)
    row = m.measure()
    assert row is not None
    g = fk.geometry(model, X[:20], layers="0")
    assert row["step"] == 3
    assert row["sharpness"] == pytest.approx(g.sharpness.value, rel=1e-6)
    assert row["sqrt_sharpness"] == pytest.approx(math.sqrt(g.sharpness.value), rel=1e-6)
    assert row["log_volume_top3"] == pytest.approx(g.top_log_volume(3).mean, rel=1e-6)
    assert row["mls"] == pytest.approx(g.mls.value, rel=1e-6)
    assert row["mls_stderr"] == pytest.approx(g.mls.sample_stderr, rel=1e-6)
    assert row["nmls"] == pytest.approx(g.nmls.value, rel=1e-6)
    assert row["local_dimensionality"] == pytest.approx(g.local_dimensionality.mean, rel=1e-6)
    sides = fk.bounds(model, X[:20], geometry=g)["MLS"].sides
    assert row["log10_mls_d"] == pytest.approx(sides["D"] / math.log(10), rel=1e-6)
    assert row["status_mls"] == "holds"
    assert m.measure() is None  # there is a row for this step


def test_train_loss_is_the_mean_since_the_row_before() -> None:
    m = fk.Monitor(mlp(), X, every=3).start()
    for value in (1.0, 2.0, 6.0):
        m.step(value)
    for tensor in (torch.tensor(5.0, requires_grad=True), torch.tensor([7.0], dtype=torch.float64), 3):
        m.step(tensor)
    m.step()
    m.finish()
    assert m.column("train_loss")[1:3] == [3.0, 5.0]
    assert "train_loss" not in m.history[3]
    with pytest.raises(ValueError, match=r"loss: expected a scalar, got shape \(2,\)"):
        m.start().step(torch.ones(2))


class Elsewhere(torch.Tensor):
    """As on a device whose numbers are not waited for."""

    is_cpu = False  # type: ignore[assignment]

    def item(self) -> float:
        raise AssertionError("this waits for the device")


def test_losses_on_a_device_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running_loss, "PENDING", 3)
    m = fk.Monitor(mlp(), X, every=8).start()
    losses = [torch.tensor(float(k)).as_subclass(Elsewhere) for k in range(8)]
    for k, loss in enumerate(losses[:4]):
        m.step(loss)
        assert len(m._loss._pending) == (k + 1) % 3
        loss.zero_()  # a copy was kept
    assert m.state_dict()["loss_sum"] == 0 + 1 + 2 + 3
    for loss in losses[4:]:
        m.step(loss)
    assert m.column("train_loss")[-1] == sum(range(8)) / 8


def test_the_model_called_another_way() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp()

        def forward(self, *, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"logits": self.net(pixels)}

    model = Named()
    options: dict[str, Any] = {"layers": "net.2", "params": ["net.0.*"], "bounds": True}
    row = fk.Monitor(
        model, X, Y, LOSS, samples=60, forward=lambda m, x: m(pixels=x)["logits"], **options
    ).start().history[0]  # fmt: skip
    g = fk.geometry(model.net, X, layers="2", params=["0.*"])
    assert row["nmls"] == pytest.approx(g.nmls.value, rel=1e-6)
    assert row["sharpness"] == pytest.approx(g.sharpness.value, rel=1e-6)
    assert row["probe_loss"] == pytest.approx(LOSS(model.net(X), Y).item(), rel=1e-6)
    assert row["log10_mls_a"] == pytest.approx(math.log10(g.mls.value), rel=1e-5)


def test_fewer_than_three_outputs() -> None:
    row = fk.Monitor(nn.Linear(6, 2), X, samples=60).start().history[0]
    assert row["log_volume_top3"] == pytest.approx(row["log_volume"])


def test_more_quantities() -> None:
    model = mlp()
    extra = {
        "lambda_max": lambda m: fk.max_eigenvalue(m, LOSS, (X, Y), seed=0),
        "norm": lambda m: m[0].weight.norm(),  # carries a graph
    }
    m = fk.Monitor(model, X, extra=extra).start()
    assert m.history[0]["lambda_max"] == pytest.approx(
        fk.max_eigenvalue(model, LOSS, (X, Y), seed=0).value, rel=1e-5
    )
    assert m.column("norm") == [pytest.approx(float(model[0].weight.detach().norm()))]
    with pytest.raises(TypeError, match="extra: 'all' gave a Parameter; it must give one number"):
        fk.Monitor(model, X, extra={"all": lambda m: m[0].weight}).start()
    for name in ("step", "train_loss", "mls"):
        with pytest.raises(ValueError, match=f"extra: '{name}' is a column of the monitor's own"):
            fk.Monitor(model, X, extra={name: lambda m: 7.0}).start()
    with pytest.raises(KeyError, match="'status' holds text"):
        m.column("status")
    with pytest.raises(KeyError, match="'norms' was not measured; there are step, seconds"):
        m.column("norms")


def test_token_ids_are_measured_exactly() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 3), nn.Flatten())
    ids = torch.randint(9, (20, 4))
    row = fk.Monitor(model, ids).start().history[0]
    assert row["sharpness"] == pytest.approx(fk.sharpness(model, ids).value, rel=1e-6)
    assert "sharpness_sketch_stderr" not in row


def test_bad_options() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module, got function"):
        fk.Monitor(lambda x: x, X)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_memory: expected a positive number"):
        fk.Monitor(mlp(), X, max_memory=0)
    with pytest.raises(TypeError, match="tensorboard: expected a folder or a SummaryWriter, got int"):
        fk.Monitor(mlp(), X, tensorboard=3)
    with pytest.raises(TypeError, match="q: expected a function, got int"):
        fk.Monitor(mlp(), X, extra={"q": 3})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="layers: 'convs' matches no linear or convolutional layer"):
        fk.Monitor(mlp(), X, layers="convs").start()
    with pytest.raises(ValueError, match="loss_fn: it must return one scalar"):
        fk.Monitor(mlp(), X, Y, nn.CrossEntropyLoss(reduction="none")).start()
    with pytest.raises(TypeError, match="x: expected a tensor, a dataset or a loader, got ndarray"):
        fk.Monitor(mlp(), X.numpy(), Y)
    with pytest.raises(TypeError, match="loss: expected a scalar tensor or a number, got str"):
        fk.Monitor(mlp(), X).start().step("a")  # type: ignore[arg-type]
    m = fk.Monitor(mlp(), X)
    with pytest.raises(RuntimeError, match="step: the monitor has not been started"):
        m.step()
    with pytest.raises(ValueError, match="step: expected a number of steps from 0 on, got -1"):
        m.start(-1)


class Writer:
    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.append((tag, value, step))


def test_scalars_go_to_a_writer_of_ones_own() -> None:
    writer, model = Writer(), mlp()
    with fk.Monitor(model, X, Y, LOSS, every=2, tensorboard=writer) as m:
        train(model, 4, m.step)
    found = {(tag, step): value for tag, value, step in writer.scalars}
    for row in m.history:
        assert found["flatkern/sharpness", row["step"]] == row["sharpness"]
        assert found["flatkern/probe_loss", row["step"]] == row["probe_loss"]
    assert {step for _, _, step in writer.scalars} == {0, 2, 4}
    assert not any(tag.endswith(("probe", "status", "/step")) for tag, _, _ in writer.scalars)


def test_scalars_in_a_folder_survive_a_restart(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="needs tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    path, model = tmp_path / "run.csv", mlp()
    options: dict[str, Any] = {"every": 2, "path": path, "resume": True, "tensorboard": tmp_path / "events"}
    m = fk.Monitor(model, X, **options).start()
    train(model, 6, lambda _: m.step())
    m.stop()
    with fk.Monitor(model, X, **options).start(2) as again:  # back to an earlier checkpoint
        train(model, 4, lambda _: again.step())
    events = EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    found = [(e.step, e.value) for e in events.Scalars("flatkern/sharpness")]
    assert [step for step, _ in found] == [0, 2, 4, 6]
    assert [value for _, value in found] == pytest.approx(again.column("sharpness"), rel=1e-6)


def test_a_missing_tensorboard_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match="tensorboard: the package is not there; pip install tensorboard"):
        fk.Monitor(mlp(), X, tensorboard=tmp_path)


def test_six_panels_show_the_rows(monitor: fk.Monitor) -> None:
    import matplotlib

    backend = matplotlib.rcParams._get_backend_or_none()  # type: ignore[attr-defined]
    figure = monitor.plot()
    assert matplotlib.rcParams._get_backend_or_none() == backend  # type: ignore[attr-defined]
    assert [q.key for q in panels_of(monitor.history)] == [
        "train_loss", "nmls", "sqrt_sharpness", "log_volume_top3", "mls", "log_local_dimensionality",
    ]  # fmt: skip
    for ax, key in zip(figure.axes, [q.key for q in panels_of(monitor.history)], strict=True):
        steps, values = ax.lines[0].get_data()
        drawn = [row for row in monitor.history if key in row]
        assert list(steps) == [row["step"] for row in drawn]
        assert list(values) == [row[key] for row in drawn]
        assert ax.get_xlabel() == "step"
    assert figure.axes[0].get_yscale() == "log"
    # the band of √S comes from the standard error of S
    band = figure.axes[2].collections[0].get_paths()[0].get_extents()
    rows = monitor.history
    top = max(math.sqrt(row["sharpness"] + row["sharpness_stderr"]) for row in rows)
    assert band.y1 == pytest.approx(top)


def test_panels_follow_a_logarithmic_schedule_and_say_what_is_missing() -> None:
    rows: list[dict[str, Any]] = [
        {"step": s, "mls": 1.0 + s, "probe_loss": 0.5} for s in (0, 1, 3, 10, 30, 100, 300)
    ]
    figure = six_panels(rows)
    titles = {ax.get_title(loc="left"): ax for ax in figure.axes}
    assert titles["MLS"].get_xscale() == "log"
    assert list(titles["MLS"].lines[0].get_xdata()) == [1, 3, 10, 30, 100, 300]
    assert titles["loss on the probe"].lines
    assert not titles["NMLS"].lines
    assert titles["NMLS"].texts[0].get_text() == "not measured"
    assert len(six_panels([]).axes) == 6


def test_saving(monitor: fk.Monitor, tmp_path: Path) -> None:
    for ending in ("csv", "jsonl", "json", "png", "svg"):
        monitor.save(tmp_path / f"a.{ending}")
    with (tmp_path / "a.csv").open() as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == monitor.column("step")
    assert len(read_rows(tmp_path / "a.jsonl")) == len(json.loads((tmp_path / "a.json").read_text())) == 9
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "a.svg").read_text()
    with pytest.raises(ValueError, match=r"path: 'a\.xls' must end in"):
        monitor.save(tmp_path / "a.xls")


def test_history_is_a_copy(monitor: fk.Monitor) -> None:
    monitor.history[0]["step"] = 99
    monitor.history.clear()
    assert monitor.history[0]["step"] == 0
