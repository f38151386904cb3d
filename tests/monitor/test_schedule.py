"""Which steps are measured, and how much time it takes."""

from __future__ import annotations

from itertools import pairwise

import pytest

import flatkern as fk
from flatkern.monitor import schedule
from flatkern.monitor.schedule import Clock, Schedule
from tests.monitor.training import LOSS, X, Y, mlp, train


def due(every: object, steps: int, per_decade: int = 10) -> list[int]:
    s = Schedule(every, per_decade)  # type: ignore[arg-type]
    return [step for step in range(steps) if s.due(step)]


def test_every_k_steps_and_given_steps() -> None:
    assert due(7, 22) == [0, 7, 14, 21]
    assert due([0, 3, 5, 100], 22) == [0, 3, 5]


@pytest.mark.parametrize("per_decade", [1, 3, 10, 40])
def test_logarithmic_steps(per_decade: int) -> None:
    found = due("log", 20_001, per_decade)
    expected = {0} | {round(10 ** (k / per_decade)) for k in range(5 * per_decade)}
    assert found == sorted(step for step in expected if step <= 20_000)
    late = [b / a for a, b in pairwise(found) if a > 300]
    assert max(late) < 1.02 * 10 ** (1 / per_decade)


def test_a_run_is_measured_at_start_end_and_when_due() -> None:
    model = mlp()
    with fk.Monitor(model, X, every=10) as m:
        train(model, 25, lambda _: m.step())
    assert m.column("step") == [0, 10, 20, 25]
    with fk.Monitor(model, X, every=5) as m:
        train(model, 10, lambda _: m.step())
    assert m.column("step") == [0, 5, 10]


class Time:
    """A clock that a test sets."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    now = Time()
    monkeypatch.setattr(schedule, "time", now)
    return now


def test_the_share_is_kept(time: Time) -> None:
    clock = Clock(0.05)
    clock.start()
    taken = 0
    for _ in range(2000):
        time.now += 0.01  # a step of training
        if clock.affordable():
            time.now += 0.03
            clock.measured(0.03)
            taken += 1
            assert taken == 1 or clock.measuring <= 0.05 * clock.training + 1e-12
    assert clock.training == pytest.approx(20.0)
    assert clock.measuring == pytest.approx(0.03 * taken)
    assert 0.045 < clock.measuring / clock.training <= 0.05
    # what came before counts
    later = Clock(0.05)
    later.restore(clock.training, clock.measuring + 1.0, 0.03)
    later.start()
    assert not later.affordable()
    time.now += 21.0
    assert later.affordable()
    later.stop()
    time.now += 1000.0
    assert later.training == pytest.approx(41.0)


def test_within_a_share_of_a_real_run() -> None:
    model = mlp()
    steps = 0
    with fk.Monitor(model, X, Y, LOSS, every=1, share=0.2) as m:
        while steps < 300 or (
            len(m.history) < 3 and steps < 30_000
        ):  # one slow measurement takes long to earn
            train(model, 300, m.step)
            steps += 300
        rows = m.history
    assert 3 <= len(rows) < steps // 2
    # the first is taken whatever it costs; each later one kept the share when it was decided
    for before, row in pairwise(rows[:-1]):
        spent = sum(float(r["measure_seconds"]) for r in rows if r["step"] <= before["step"])
        assert spent + float(before["measure_seconds"]) <= 0.2 * float(row["seconds"]) + 1e-3
    assert m.overhead == pytest.approx(
        sum(float(r["measure_seconds"]) for r in m.history) / m._clock.training, rel=1e-9
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"every": 0}, ValueError, "every: expected a positive number of steps, got 0"),
        ({"every": True}, TypeError, "every: .* got bool"),
        ({"every": 2.5}, TypeError, "every: .* got float"),
        ({"every": "sometimes"}, ValueError, "every: .* got 'sometimes'"),
        ({"every": []}, ValueError, "every: expected a list of steps"),
        ({"every": [1, -1]}, ValueError, "every: expected a list of steps"),
        (
            {"every": "log", "per_decade": 0},
            ValueError,
            "per_decade: expected a positive whole number, got 0",
        ),
        ({"share": 5}, ValueError, "share: expected a part .* got 5"),
        ({"share": 0.0}, ValueError, "share: expected a part"),
    ],
)
def test_bad_schedules(options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fk.Monitor(mlp(), X, **options)  # type: ignore[arg-type]
