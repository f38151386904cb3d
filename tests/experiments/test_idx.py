"""The IDX reader refuses whatever is not exactly an IDX file of bytes, and names the file."""

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from flatkern.experiments.data import load
from flatkern.experiments.errors import UserError
from flatkern.experiments.idx import find_idx, read_idx


def idx(values: np.ndarray, code: int = 0x08) -> bytes:
    return (
        bytes([0, 0, code, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()
    )


IMAGES = np.arange(2 * 3 * 4, dtype=np.uint8).reshape(2, 3, 4)


@pytest.mark.parametrize("compress", [False, True])
def test_reads_what_was_written(tmp_path: Path, compress: bool) -> None:
    path = tmp_path / ("a.gz" if compress else "a")
    path.write_bytes(gzip.compress(idx(IMAGES), mtime=0) if compress else idx(IMAGES))
    np.testing.assert_array_equal(read_idx(path, 3), IMAGES)


def test_a_gunzipped_file_that_kept_its_ending_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gz"
    path.write_bytes(idx(IMAGES))
    with pytest.raises(UserError, match="not a gzip file"):
        read_idx(path, 3)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "too few"),
        (b"\x89PNG1234", "two zero bytes"),
        (idx(IMAGES, code=0x07), "unknown IDX type code 0x07"),
        (idx(IMAGES, code=0x0D), "32-bit float"),
        (idx(IMAGES[0]), "2 dimensions where 3"),
        (idx(IMAGES)[:10], "truncated inside the header"),
        (idx(IMAGES)[:-1], "truncated: the header"),
        (idx(IMAGES) + b"x", "too long"),
        (idx(IMAGES[:0]), "empty"),
        (gzip.compress(idx(IMAGES), mtime=0)[:-9], "damaged gzip"),
        (gzip.compress(idx(IMAGES), mtime=0)[:12] + b"garbage" * 9, "damaged gzip"),
    ],
)
def test_damage_is_named(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "train-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as error:
        read_idx(path, 3)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_and_a_missing_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        read_idx(tmp_path / "none", 3)
    with pytest.raises(UserError, match="train-images-idx3-ubyte"):
        find_idx(tmp_path, "train-images", 3)
    with pytest.raises(UserError, match="no such folder"):
        load("fashion-mnist", root=tmp_path / "nowhere")


def write_set(folder: Path, train: int = 30, test: int = 20, labels: int | None = None, top: int = 9) -> None:
    rng = np.random.default_rng(0)
    for split, n in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (n, 28, 28)).astype(np.uint8)
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images), mtime=0))
        values = rng.integers(0, top + 1, labels or n).astype(np.uint8)
        values[0] = top
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(values))


def test_a_folder_of_idx_files_is_a_data_set(tmp_path: Path) -> None:
    write_set(tmp_path)
    data = load("fashion-mnist", root=tmp_path, num_train=12)
    assert data.train.x.shape == (12, 784)
    assert len(data.test) == 20
    assert float(data.train.x.min()) >= 0
    assert float(data.train.x.max()) <= 1


def test_labels_must_fit_the_images(tmp_path: Path) -> None:
    write_set(tmp_path, labels=29)
    with pytest.raises(UserError, match="29 labels for the 30 images"):
        load("fashion-mnist", root=tmp_path)
    write_set(tmp_path, top=10)
    with pytest.raises(UserError, match="label 10"):
        load("fashion-mnist", root=tmp_path)
