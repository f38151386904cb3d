"""Seeds of a setting as one batched ensemble: the numbers of one network after the other, and kept through a kill."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
from torch import nn

from flatkern.cli import main
from flatkern.experiments.data import Dataset, load
from flatkern.experiments.devices import CPU, resolve
from flatkern.experiments.errors import Cancelled, UserError
from flatkern.experiments.networks import build_network
from flatkern.experiments.parallel import run_file, train_groups
from flatkern.experiments.reproduce import ReproduceConfig, reproduction
from flatkern.experiments.settings import Group
from flatkern.experiments.trainers import AutogradTrainer, BatchedTrainer, trainer_for
from flatkern.experiments.training import Run, train_group
from tests.experiments.killed import TINY

SHAPES = {"mlp-relu": (1, 4, 4), "lenet": (1, 28, 28), "vgg10": (3, 16, 16), "vit-8-2": (1, 8, 8)}


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load("digits", num_train=60, num_test=40).as_images()


def config_of(**changes: object) -> ReproduceConfig:
    settings = TINY | {"network": "vit-8-1", "seeds": 3, "steps": 40, "ensemble": True}
    return reproduction("fig1", **(settings | changes))


@pytest.mark.parametrize("name", list(SHAPES))
def test_steps_are_those_of_the_networks_alone(name: str) -> None:
    shape = SHAPES[name]

    def build() -> nn.Module:
        return build_network(name, shape, (7, 6)).double()

    one, batched = AutogradTrainer(build, (0, 1, 5)), BatchedTrainer(build, (0, 1, 5))
    for k in range(3):
        assert all(torch.equal(v, batched.state(k)[key]) for key, v in one.state(k).items())
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        images = (math.prod(shape),) if name.startswith("mlp") else shape
        x = torch.rand(3, 4, *images, generator=generator, dtype=torch.float64)
        y = torch.randn(3, 4, 10, generator=generator, dtype=torch.float64)
        one.step(x, y, 0.1)
        batched.step(x, y, 0.1)
    for k in range(3):
        for key, value in one.state(k).items():
            torch.testing.assert_close(batched.state(k)[key], value, rtol=1e-10, atol=1e-12)
        member = batched.member(k)
        torch.testing.assert_close(member(x[k]), one.member(k)(x[k]), rtol=1e-9, atol=1e-11)


def test_a_member_is_a_copy_and_weights_go_round() -> None:
    trainer = BatchedTrainer(lambda: nn.Linear(3, 2), (0, 1))
    before = trainer.state(1)
    member = trainer.member(1)
    with torch.no_grad():
        member.weight.fill_(7.0)
    assert torch.equal(trainer.state(1)["weight"], before["weight"])
    trainer.load(0, before)
    assert torch.equal(trainer.state(0)["weight"], before["weight"])
    trainer.step(torch.ones(2, 4, 3), torch.ones(2, 4, 2), 0.1)
    assert not torch.equal(trainer.state(0)["weight"], before["weight"])


def test_running_statistics_are_refused() -> None:
    with pytest.raises(ValueError, match="without buffers"):
        BatchedTrainer(lambda: nn.BatchNorm1d(3), (0, 1))


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    BatchedTrainer(lambda: nn.Linear(3, 2), (0, 1))
    assert torch.equal(torch.get_rng_state(), state)


def test_runs_are_those_of_the_networks_alone(data: Dataset) -> None:
    config = config_of()
    (group, *_) = config.groups
    assert group.seeds == (0, 1, 2)
    together = train_group(config, group, data)
    alone = config_of(ensemble=None)
    assert isinstance(trainer_for(config, data, group.seeds), BatchedTrainer)
    assert isinstance(trainer_for(alone, data, group.seeds), AutogradTrainer)
    for seed, run in enumerate(together):
        (other,) = train_group(alone, Group(group.setting, (seed,)), data)
        assert [row["step"] for row in run.rows] == [row["step"] for row in other.rows]
        for row, expected in zip(run.rows, other.rows, strict=True):
            for key in ("train_loss", "test_loss", "log10_sqrt_sharpness", "log_volume", "mls"):
                assert row[key] == pytest.approx(expected[key], rel=2e-3), key


def same(a: list[Run], b: list[Run]) -> None:
    for first, second in zip(a, b, strict=True):
        assert repr(first.rows) == repr(second.rows)
        assert all(torch.equal(v, second.weights[k]) for k, v in first.weights.items())


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("stop", ["kill", "cancel"])
def test_an_ensemble_is_gone_on_with(
    stop: str, tmp_path: Path, data: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of()
    group = config.groups[0]
    file = run_file(tmp_path, group)
    saves = 0
    real = os.replace

    def dies(*arguments: object) -> None:
        nonlocal saves
        saves += 1
        if saves == 3:
            raise Killed
        real(*arguments)  # type: ignore[arg-type]

    def cancels(steps: int) -> None:
        if steps:
            raise Cancelled

    with monkeypatch.context() as patch:
        if stop == "kill":
            patch.setattr(os, "replace", dies)
        with pytest.raises(Killed if stop == "kill" else Cancelled):
            train_group(
                config, group, data, cancels if stop == "cancel" else lambda _: None, file, save_every=0.0
            )
    held = file.load()
    assert held is not None
    assert held["step"] < config.steps
    assert len(held["weights"]) == 3
    same(train_group(config, group, data, file=file), train_group(config, group, data))


def test_groups_are_found_in_their_files(tmp_path: Path, data: Dataset) -> None:
    config = config_of(steps=10, points=2)
    first = train_groups(config, config.groups, data, folder=tmp_path, progress=False)
    times = {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert len(times) == len(config.settings)
    second = train_groups(config, config.groups, data, folder=tmp_path, progress=False)
    assert times == {p: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    for group in config.groups:
        same(first[group], second[group])


def test_an_ensemble_keeps_its_runs_apart_and_the_default_is_where_it_was() -> None:
    assert reproduction("fig1").runs_folder.name == "mlp-tanh-c8107c0148"
    assert reproduction("fig1", ensemble=False).runs_folder == reproduction("fig1").runs_folder
    folders = {
        reproduction("fig1", **changes).runs_folder
        for changes in ({}, {"ensemble": True}, {"device": "cuda"}, {"device": "cuda", "ensemble": False})
    }
    assert len(folders) == 4
    # the same kind of device gives the same numbers, whatever its number
    assert reproduction("fig1", device="cuda:1").runs_folder in folders
    assert all(len(g.seeds) == 1 for g in reproduction("fig1").groups)
    assert all(len(g.seeds) == 1 for g in reproduction("fig1", device="cuda", ensemble=False).groups)
    assert [g.seeds for g in reproduction("fig1", device="cuda", seeds=3).groups] == [(0, 1, 2)] * 3


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpu:0", ""])
def test_names_that_are_no_device(name: str) -> None:
    with pytest.raises(UserError, match="expected cpu, cuda or cuda:N"):
        reproduction("fig1", device=name)


def test_devices() -> None:
    assert resolve("cpu") == CPU
    if torch.cuda.is_available():
        assert resolve("cuda").type == "cuda"
    else:
        with pytest.raises(UserError, match="use --device cpu"):
            resolve("cuda")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("command", [["reproduce", "fig1"], ["demo"]])
def test_the_command_line_says_so(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*command, "--data", "digits", "--device", "cuda", "--output", str(tmp_path / "out")]) == 2
    assert "use --device cpu" in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.html").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("network", ["mlp-tanh", "vit-8-1"])
def test_a_gpu_gives_the_numbers_of_the_cpu(network: str, data: Dataset) -> None:
    flat = load("digits", num_train=60, num_test=40) if network.startswith("mlp") else data
    here, there = (config_of(network=network, device=device) for device in ("cpu", "cuda"))
    for run, other in zip(
        train_group(here, here.groups[0], flat), train_group(there, there.groups[0], flat), strict=True
    ):
        assert all(v.device.type == "cpu" for v in other.weights.values())
        for row, expected in zip(run.rows, other.rows, strict=True):
            assert row["train_loss"] == pytest.approx(expected["train_loss"], rel=1e-2)
