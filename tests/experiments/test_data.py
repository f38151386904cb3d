"""Subsets are deterministic, disjoint and of the size asked for."""

from pathlib import Path

import pytest
import torch

from flatkern.experiments.data import DEBIAN_FASHION, load
from flatkern.experiments.errors import UserError


def test_the_same_seed_gives_the_same_images() -> None:
    a, b = (load("digits-mnist", num_train=50, num_test=40, seed=3) for _ in range(2))
    assert torch.equal(a.train.x, b.train.x)
    assert torch.equal(a.test.labels, b.test.labels)
    c = load("digits-mnist", num_train=50, num_test=40, seed=4)
    assert not torch.equal(a.train.x, c.train.x)


def test_training_and_test_images_are_disjoint_and_scaled() -> None:
    data = load("digits-mnist", num_train=300, num_test=200)
    assert data.train.x.shape == (300, 784)
    assert data.train.x.dtype == torch.float32
    assert float(data.train.x.max()) == 1.0
    rows = torch.cat([data.train.x, data.test.x])
    assert len(torch.unique(rows, dim=0)) == len(rows)


def test_targets_are_one_hot_floats() -> None:
    train = load("digits", num_train=100, num_test=10).train
    assert train.x.shape == (100, 64)
    assert train.targets.shape == (100, 10)
    assert torch.equal(train.targets.argmax(1), train.labels)
    assert torch.equal(train.targets.sum(1), torch.ones(100))


def test_everything_is_split_where_no_size_is_given() -> None:
    data = load("digits")
    assert (len(data.train), len(data.test)) == (1437, 360)


def test_too_many_images_are_refused() -> None:
    with pytest.raises(UserError, match="5000 images; 5000 for training and 1 for"):
        load("digits-mnist", num_train=5000, num_test=1)


def test_a_folder_for_packaged_data_is_refused() -> None:
    with pytest.raises(UserError, match="--root"):
        load("digits", root=Path("/tmp"))


@pytest.mark.skipif(not DEBIAN_FASHION.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_debians_fashion_mnist() -> None:
    data = load("fashion-mnist")
    assert (len(data.train), len(data.test)) == (60_000, 10_000)
    assert torch.equal(torch.bincount(data.train.labels), torch.full((10,), 6000))
