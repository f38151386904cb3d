"""CIFAR-10's python batches: read exactly, and nothing in them is run."""

import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from flatkern.experiments.cifar import read_cifar
from flatkern.experiments.data import load
from flatkern.experiments.errors import UserError

NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


def batch(seed: int, n: int = 20) -> dict[bytes, object]:
    generator = np.random.default_rng(seed)
    return {
        b"batch_label": b"training batch",
        b"labels": [int(v) for v in np.arange(n) % 10],
        b"data": generator.integers(0, 256, (n, 3072), dtype=np.uint8),
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i, name in enumerate(NAMES):
        (folder / name).write_bytes(pickle.dumps(batch(i), protocol=2))
    return tmp_path


def test_batches_are_read_in_order(root: Path) -> None:
    for place in (root, root / "cifar-10-batches-py"):
        x, labels = read_cifar(place, "train")
        assert np.array_equal(x, np.concatenate([batch(i)[b"data"] for i in range(5)]))
        assert np.array_equal(labels, np.tile(np.arange(10), 10))
        assert np.array_equal(read_cifar(place, "test")[0], batch(5)[b"data"])


def test_two_classes_or_all_ten(root: Path) -> None:
    two, ten = (load(name, root=root) for name in ("cifar-2", "cifar-10"))
    assert (len(two.train), len(ten.train), len(two.test)) == (20, 100, 4)
    assert two.train.labels.unique().tolist() == [0, 1]
    assert two.train.targets.shape == (20, 10)
    assert two.as_images().train.x.shape == (20, 3, 32, 32)
    assert two.source.startswith("CIFAR-10, classes 0 and 1")
    with pytest.raises(UserError, match="needs --root"):
        load("cifar-10")


class Harmful:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch ran",)


@pytest.mark.parametrize(
    ("held", "what"),
    [
        (Harmful(), "it asks for"),
        ([1], "holds a list"),
        ({b"data": batch(0)[b"data"], b"labels": [1]}, "list of 20"),
        ({b"data": batch(0)[b"data"], b"labels": [11] * 20}, "labels from 0 to 9"),
        ({b"labels": [1]}, "not an array of bytes"),
    ],
)
def test_other_files_are_refused(
    root: Path, held: object, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(held, protocol=2))
    with pytest.raises(UserError, match=what):
        read_cifar(root, "test")
    assert not (root / "ran").exists()


def test_missing_and_damaged_files_are_named(root: Path) -> None:
    path = root / "cifar-10-batches-py" / "data_batch_3"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="data_batch_3: not a batch"):
        read_cifar(root, "train")
    path.unlink()
    with pytest.raises(UserError, match="data_batch_3: no such file"):
        read_cifar(root, "train")
