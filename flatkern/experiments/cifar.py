"""CIFAR-10's python batches: pickles, read by an unpickler that knows arrays and nothing else."""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flatkern.experiments.errors import UserError

__all__ = ["read_cifar"]

_FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
_FOLDER = "cifar-10-batches-py"
_PIXELS = 3 * 32 * 32
_ALLOWED = {
    (module, name)
    for module in ("numpy.core.multiarray", "numpy._core.multiarray")
    for name in ("_reconstruct", "scalar")
} | {("numpy", "ndarray"), ("numpy", "dtype"), ("_codecs", "encode")}


class _Unpickler(pickle.Unpickler):
    """A pickle can call anything; these files need arrays only."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)


def read_cifar(root: Path, split: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images [n, 3·32·32] (channel, row, column) and labels of ``train`` or ``test``.

    Args:
        root: the folder ``cifar-10-batches-py``, or the one it lies in.
        split: ``train`` (all of the five batches) or ``test``.

    Raises:
        UserError: a file is missing, is no such pickle, or holds anything but images and their labels.
    """
    folder = root / _FOLDER if (root / _FOLDER).is_dir() else root
    images, labels = [], []
    for name in _FILES[split]:
        path = folder / name
        if not path.is_file():
            raise UserError(
                f"{path}: no such file; --root DIR names the folder {_FOLDER} of the python version of CIFAR-10"
            )
        x, y = _batch(path)
        images.append(x)
        labels.append(y)
    return np.concatenate(images), np.concatenate(labels)


def _batch(path: Path) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    try:
        held = _Unpickler(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:  # a damaged pickle raises nearly anything
        told = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path}: not a batch of CIFAR-10 ({told[:120]})") from None
    if not isinstance(held, dict):
        raise UserError(f"{path}: holds a {type(held).__name__}, not the dictionary of a batch of CIFAR-10")
    x, y = (held.get(k, held.get(k.decode())) for k in (b"data", b"labels"))
    if not isinstance(x, np.ndarray) or x.dtype != np.uint8 or x.ndim != 2 or x.shape[1] != _PIXELS:
        raise UserError(f"{path}: 'data' is not an array of bytes [n, {_PIXELS}]")
    labels = np.asarray(y if y is not None else [])
    if labels.shape != (len(x),) or labels.dtype.kind not in "iu":
        raise UserError(f"{path}: 'labels' is not a list of {len(x)} whole numbers")
    if len(labels) == 0 or labels.min() < 0 or labels.max() > 9:
        raise UserError(f"{path}: labels from 0 to 9 are expected, for at least one image")
    return x, labels.astype(np.int64)
