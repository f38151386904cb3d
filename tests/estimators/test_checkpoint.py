"""A checkpoint is the old file or the new one, belongs to one run, and leaves settings as found."""

import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from flatkern.estimators.checkpoint import Checkpoint, require_seed
from flatkern.operators import as_operator
from flatkern.operators.base import LinearOperator


def matrix(size=6, change=0.0):
    values = torch.arange(1.0, size + 1, dtype=torch.float64)
    values[0] += change
    return as_operator(torch.diag(values))


class Nameless(LinearOperator):
    """A diagonal that cannot say what it is, and has an engine."""

    def __init__(self, values, engine="fast"):
        super().__init__((len(values), len(values)), values.dtype, symmetric=True)
        self.values, self.engine, self.products = values, engine, 0

    def _rows(self, rows):
        self.products += len(rows)
        return rows * self.values

    def _engine(self):
        return {"mode": self.engine}

    def _use_engine(self, state):
        self.engine = state["mode"]


def opened(path, op=None, **changes):
    given = {"what": "eigsh", "settings": {"seed": 1, "k": 3}, "seconds": 0.0, **changes}
    return Checkpoint(path, op=matrix() if op is None else op, **given)


def test_there_and_back(tmp_path):
    path = tmp_path / "run.npz"
    generator = torch.Generator().manual_seed(5)
    state = {
        "rows": torch.randn(3, 4, generator=generator),
        "count": torch.tensor(7),
        "flags": torch.tensor([True, False]),
        "generator": generator.get_state(),
        "empty": torch.zeros(0, 4, dtype=torch.float64),
        "columns": torch.arange(6.0).reshape(2, 3).mT,
    }
    with opened(path) as checkpoint:
        assert checkpoint.state is None
        assert checkpoint.due()
        checkpoint.save(**state)
    with opened(path) as checkpoint:
        assert checkpoint.state.keys() == state.keys()
        for key, value in state.items():
            assert torch.equal(checkpoint.state[key], value)
            assert checkpoint.state[key].dtype == value.dtype
        checkpoint.state["rows"] += 1  # its own memory
        restored = torch.Generator()
        restored.set_state(checkpoint.state["generator"])
    assert torch.equal(torch.randn(3, generator=restored), torch.randn(3, generator=generator))
    assert os.listdir(tmp_path) == ["run.npz"]


def test_without_a_path_nothing_happens(tmp_path):
    op = Nameless(torch.ones(3))
    with opened(None, op) as checkpoint:
        assert checkpoint.state is None
        assert not checkpoint.due()
        checkpoint.save(a=torch.ones(2))
    assert op.products == 0
    assert not os.listdir(tmp_path)


def test_due_goes_by_the_clock(tmp_path):
    with opened(tmp_path / "run", seconds=0.05) as checkpoint:
        assert not checkpoint.due()
        time.sleep(0.06)
        assert checkpoint.due()
        checkpoint.save()
        assert not checkpoint.due()


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"what": "trace"}, "eigsh.*trace"),
        ({"settings": {"seed": 2, "k": 3}}, "seed was 1 and is 2"),
        ({"settings": {"seed": 1}}, "k was 3 and is None"),
        ({"op": matrix(change=1e-12)}, "weights, data, loss or matrix entries"),
        ({"op": matrix(7)}, r"shape was \[6, 6\] and is \[7, 7\]"),
        ({"op": as_operator(matrix().obj.float())}, "dtype"),
    ],
)
def test_another_run_is_refused(tmp_path, changes, text):
    path = tmp_path / "run"
    with opened(path) as checkpoint:
        checkpoint.save(a=torch.ones(2))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=f"checkpoint: .*{text}"):
        opened(path, **changes)
    assert path.read_bytes() == before


def test_tensors_among_the_settings_are_compared(tmp_path):
    path, start = tmp_path / "run", torch.ones(4)
    with opened(path, settings={"start": start}) as checkpoint:
        checkpoint.save()
    opened(path, settings={"start": start.clone()}).close()
    start[2] = 1.0000001
    with pytest.raises(ValueError, match="start was"):
        opened(path, settings={"start": start})


def test_an_operator_without_identity_is_told_by_a_product(tmp_path):
    path, values = tmp_path / "run", torch.linspace(1, 2, 50)
    with opened(path, Nameless(values)) as checkpoint:
        checkpoint.save(a=torch.ones(1))
    for _ in range(2):  # the file written by a resumed run still knows the product
        op = Nameless(values.clone())
        with opened(path, op) as checkpoint:
            assert op.products == 1
            checkpoint.save(**checkpoint.state)
    with pytest.raises(ValueError, match="product with a fixed vector"):
        opened(path, Nameless(values * 1.001))
    with pytest.raises(ValueError, match="product with a fixed vector"):
        opened(path, Nameless(values * float("nan")))


def test_threads_and_engine_are_taken_over_and_given_back(tmp_path):
    path, threads = tmp_path / "run", torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        with opened(path, Nameless(torch.ones(5), "fast")) as checkpoint:
            checkpoint.save()
    finally:
        torch.set_num_threads(threads)
    op = Nameless(torch.ones(5), "slow")
    with opened(path, op) as checkpoint:
        assert torch.get_num_threads() == threads + 1
        assert op.engine == "fast"
        checkpoint.save()
    assert (torch.get_num_threads(), op.engine) == (threads, "slow")
    with pytest.raises(ZeroDivisionError), opened(path, op):
        raise ZeroDivisionError
    assert (torch.get_num_threads(), op.engine) == (threads, "slow")
    other = Nameless(torch.full((5,), 2.0), "slow")
    with pytest.raises(ValueError, match="checkpoint"):
        opened(path, other)
    assert (torch.get_num_threads(), other.engine) == (threads, "slow")


def test_damaged_files_are_refused(tmp_path):
    path = tmp_path / "run"
    with opened(path) as checkpoint:
        checkpoint.save(a=torch.arange(1000.0))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 1
    foreign = tmp_path / "foreign.npz"
    np.savez(foreign, a=np.ones(3))
    evil = tmp_path / "evil.npz"
    np.savez(evil, a=np.array([{}], dtype=object))
    for content in (
        b"",
        b"not a checkpoint",
        whole[: len(whole) // 2],
        whole[:-10],
        bytes(flipped),
        foreign.read_bytes(),
        evil.read_bytes(),
        pickle.dumps({"a": 1}),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"checkpoint: {path} cannot be read"):
            opened(path)


def test_faults_while_writing_leave_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "run"
    with opened(path) as checkpoint:
        checkpoint.save(a=torch.ones(2))
        before = path.read_bytes()

        def fail(*_):
            raise OSError("disk full")

        for where in ("replace", "fsync"):
            with monkeypatch.context() as patch:
                patch.setattr(os, where, fail)
                with pytest.raises(OSError, match="disk full"):
                    checkpoint.save(a=torch.zeros(2))
            assert path.read_bytes() == before
            assert os.listdir(tmp_path) == ["run"]
        checkpoint.save(a=torch.zeros(2))
    with opened(path) as checkpoint:
        assert torch.equal(checkpoint.state["a"], torch.zeros(2))


SAVING = """
import sys, torch
from flatkern.estimators.checkpoint import Checkpoint
from flatkern.operators import as_operator
with Checkpoint(sys.argv[1], what="eigsh", op=as_operator(torch.eye(3)), settings={}, seconds=0) as checkpoint:
    print("ready", flush=True)
    i = 0
    while True:
        checkpoint.save(a=torch.full((200_000,), float(i)), i=torch.tensor(float(i)))
        i += 1
"""


def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "run"
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        process = subprocess.Popen([sys.executable, "-c", SAVING, str(path)], stdout=subprocess.PIPE)
        try:
            process.stdout.readline()
            deadline = time.monotonic() + 30
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.2 * float(torch.rand(1, generator=generator)))
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
            process.stdout.close()
        with Checkpoint(path, what="eigsh", op=as_operator(torch.eye(3)), settings={}) as checkpoint:
            assert (checkpoint.state["a"] == checkpoint.state["i"]).all()


def test_bad_arguments_are_named(tmp_path):
    for call, error, text in (
        (lambda: opened(tmp_path), ValueError, "checkpoint: .*folder"),
        (lambda: opened(tmp_path / "no" / "run"), ValueError, "checkpoint: .*does not exist"),
        (lambda: opened(3), TypeError, "checkpoint: expected a path"),
        (lambda: opened(None, seconds=-1), ValueError, "checkpoint_seconds"),
        (lambda: opened(None, seconds=float("nan")), ValueError, "checkpoint_seconds"),
        (lambda: require_seed("run", torch.Generator()), ValueError, "generator.*seed"),
    ):
        with pytest.raises(error, match=text):
            call()
    require_seed(None, torch.Generator())
    require_seed("run", None)
