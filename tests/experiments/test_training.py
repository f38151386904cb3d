"""The hand-written training step against autograd and torch.optim; the schedule; independence of the split."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from flatkern.experiments.data import Dataset, load
from flatkern.experiments.networks import build_mlp
from flatkern.experiments.parallel import train_all
from flatkern.experiments.schedule import log_schedule
from flatkern.experiments.settings import DemoConfig, Setting, for_data, full, paper, quick
from flatkern.experiments.sgd import BatchStream, Ensemble
from flatkern.experiments.training import train_setting


def tiny(**changes: object) -> DemoConfig:
    config = replace(
        quick(),
        data="digits",
        hidden=(12, 11, 10),
        num_train=64,
        num_test=50,
        num_probe=16,
        steps=60,
        points=6,
        spectrum_samples=32,
        spectrum_probes=2,
        spectrum_steps=10,
        jobs=1,
    )
    return replace(config, **changes)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def data() -> Dataset:
    return load("digits", num_train=64, num_test=50)


@pytest.mark.parametrize("sizes", [(7, 5), (7, 5, 4), (6, 9, 8, 7, 3)])
def test_steps_equal_autograd_and_sgd(sizes: tuple[int, ...]) -> None:
    networks = Ensemble(sizes, seeds=(0, 1, 2), dtype=torch.float64)
    models = [networks.member(k) for k in range(3)]
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.3) for m in models]
    generator = torch.Generator().manual_seed(5)
    # two batch sizes: buffers must follow
    for batch in (4, 4, 6, 6, 6):
        x = torch.randn(3, batch, sizes[0], generator=generator, dtype=torch.float64)
        y = torch.randn(3, batch, sizes[-1], generator=generator, dtype=torch.float64)
        networks.step(x, y, 0.3)
        for k, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            optimizer.zero_grad()
            nn.MSELoss()(model(x[k]), y[k]).backward()
            optimizer.step()
    for k, model in enumerate(models):
        for found, expected in zip(networks.member(k).parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


def test_initialization_is_pytorchs_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(11)
    model = build_mlp((5, 4, 3))
    state = torch.get_rng_state()
    member = Ensemble((5, 4, 3), seeds=(2, 11)).member(1)
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(model.parameters(), member.parameters(), strict=True):
        assert torch.equal(a, b)


def test_batches_go_through_every_sample_once_an_epoch() -> None:
    stream = BatchStream(10, 4, seeds=(0, 1))
    drawn = torch.cat([stream.next() for _ in range(5)], dim=1)  # two epochs
    for row in drawn:
        assert torch.equal(row[:10].sort().values, torch.arange(10))
        assert torch.equal(row[10:].sort().values, torch.arange(10))
    assert not torch.equal(drawn[0], drawn[1])
    with pytest.raises(ValueError, match="batch size 11"):
        BatchStream(10, 11, seeds=(0,))


@pytest.mark.parametrize(("steps", "points"), [(0, 5), (1, 1), (7, 50), (50_000, 45), (750_000, 80)])
def test_schedule(steps: int, points: int) -> None:
    schedule = log_schedule(steps, points)
    assert schedule == sorted(set(schedule))
    assert (schedule[0], schedule[-1]) == (0, steps)
    assert len(schedule) <= points + 2
    late = [b / a for a, b in pairwise(schedule) if a > 200]
    assert not late or max(late) / min(late) < 1.05


def test_schedule_refuses_nonsense() -> None:
    with pytest.raises(ValueError, match="points 0"):
        log_schedule(10, 0)


def test_presets_have_five_settings_that_share_the_middle() -> None:
    for config in (full(), quick(), paper()):
        assert len(config.settings) == 5
        assert config.middle in config.rate_sweep
        assert config.middle in config.batch_sweep
    assert paper().sizes(784) == (784, 500, 500, 500, 10)
    assert paper().learning_rates == (0.05, 0.1, 0.2)


def test_the_same_seed_gives_the_same_run(data: Dataset) -> None:
    config, setting = tiny(), Setting(1.0, 20)
    first, second = (train_setting(config, setting, data) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.rows == b.rows
        assert all(torch.equal(a.weights[k], b.weights[k]) for k in a.weights)
    assert first[0].rows != first[1].rows


def test_processes_change_no_number(data: Dataset) -> None:
    config = tiny(steps=20, points=3)
    alone = train_all(config, data, progress=False)
    together = train_all(replace(config, jobs=2), data, progress=False)
    assert [r.name for r in alone] == [r.name for r in together]
    for a, b in zip(alone, together, strict=True):
        assert a.column("step") == b.column("step")
        assert a.column("sharpness") == pytest.approx(b.column("sharpness"), rel=1e-4)


def test_a_diverging_network_is_recorded_and_harms_no_other(data: Dataset) -> None:
    config = tiny(steps=200, points=5)
    runs = train_setting(config, Setting(1e20, 8), data)
    assert all(run.diverged for run in runs)
    assert all(run.column("train_loss")[-1] != run.column("train_loss")[-1] for run in runs)


def test_progress_adds_up_to_all_steps(data: Dataset) -> None:
    told: list[int] = []
    train_setting(tiny(steps=130), Setting(0.5, 8), data, told.append)
    assert sum(told) == 2 * 130


def test_other_images_have_settings_of_their_own() -> None:
    assert for_data(full(), "digits-mnist") == full()
    assert for_data(full(), "fashion-mnist").learning_rates == (0.5, 1.0, 1.5)
    digits = for_data(full(), "digits")
    assert digits.num_train is not None
    assert digits.num_test is not None
    assert digits.num_train + digits.num_test <= 1797
    assert for_data(paper(), "fashion-mnist") == replace(paper(), data="fashion-mnist")
