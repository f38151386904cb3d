"""The few samples that every measurement of a run is taken on."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from flatkern.monitor.undisturbed import random_states_kept

__all__ = ["Pick", "Probe", "choose_probe"]

Pick = Callable[[Any], tuple[Tensor, Tensor | None]]
"""A batch → inputs and targets."""


@dataclass(frozen=True)
class Probe:
    """Inputs [n, ...] and, where there are any, targets [n, ...], copied."""

    x: Tensor
    y: Tensor | None
    fingerprint: str
    """Tells probe sets apart: a short hash of their bytes."""

    def __len__(self) -> int:
        return len(self.x)

    def to(self, device: torch.device) -> Probe:
        """The same on a device."""
        y = None if self.y is None else self.y.to(device)
        return Probe(self.x.to(device), y, self.fingerprint)


def choose_probe(x: Any, y: Any, samples: int, seed: int, pick: Pick | None = None) -> Probe:
    """A fixed random choice of ``samples`` samples (all where there are fewer), the same for the same data and seed.

    Args:
        x: inputs [n, ...]; or a dataset, a ``DataLoader`` or any iterable of batches. A dataset with a length is asked
            for the chosen samples alone, of other iterables the first batches are taken.
        y: targets [n, ...] to inputs that are a tensor.
        samples: how many.
        seed: of the choice, and of what the dataset draws itself (augmentation); no generator's state moves.
        pick: batch → (inputs, targets); default pairs, or a tensor alone.
    """
    if isinstance(samples, bool) or not isinstance(samples, int) or samples < 1:
        raise ValueError(f"samples: expected a positive whole number, got {samples!r}")
    if isinstance(x, Tensor):
        found = _from_tensors(x, y, samples, seed)
    elif hasattr(x, "__array__"):
        raise TypeError(
            f"x: expected a tensor, a dataset or a loader, got {type(x).__name__}; use torch.as_tensor(x)"
        )
    elif y is not None:
        raise TypeError(f"y: x is a {type(x).__name__}, which brings its own targets; leave y out")
    else:
        with random_states_kept():
            torch.default_generator.manual_seed(seed)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # noqa: NPY002
            found = _from_data(x, samples, seed, pick or _pair)
    inputs, targets = (None if t is None else t.detach().clone() for t in found)
    assert inputs is not None
    return Probe(inputs, targets, _fingerprint(inputs, targets))


def _from_tensors(x: Tensor, y: Any, samples: int, seed: int) -> tuple[Tensor, Tensor | None]:
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"x: shape {tuple(x.shape)} holds no sample; axis 0 holds the samples")
    if y is not None and not isinstance(y, Tensor):
        raise TypeError(f"y: expected a tensor as x is, got {type(y).__name__}")
    if y is not None and (y.ndim == 0 or len(y) != len(x)):
        raise ValueError(f"y: shape {tuple(y.shape)} for {len(x)} samples in x; axis 0 must agree")
    chosen = _choice(len(x), samples, seed)
    return x[chosen.to(x.device)], None if y is None else y[chosen.to(y.device)]


def _choice(n: int, samples: int, seed: int) -> Tensor:
    if n <= samples:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:samples].sort().values


def _from_data(data: Any, samples: int, seed: int, pick: Pick) -> tuple[Tensor, Tensor | None]:
    dataset, collate = data, default_collate
    if isinstance(data, DataLoader):
        dataset, collate = data.dataset, data.collate_fn
        if data.batch_sampler is None:  # it hands out what the dataset has, uncollated
            dataset = None
    sized = isinstance(dataset, Dataset) and not isinstance(dataset, IterableDataset)
    if sized and hasattr(dataset, "__len__"):
        if len(dataset) == 0:
            raise ValueError("x: the dataset is empty")
        return pick(collate([dataset[int(i)] for i in _choice(len(dataset), samples, seed)]))
    if not isinstance(data, Iterable) or isinstance(data, Mapping):
        raise TypeError(
            f"x: expected a tensor with the samples on axis 0, a dataset or batches, got {type(data).__name__}"
        )
    if hasattr(data, "__next__"):
        raise TypeError("x: a one-shot iterator would be used up here; pass a list or a DataLoader")
    return _first(data, samples, pick)


def _first(batches: Iterable[Any], samples: int, pick: Pick) -> tuple[Tensor, Tensor | None]:
    inputs: list[Tensor] = []
    targets: list[Tensor] = []
    for batch in batches:
        x, y = pick(batch)
        inputs.append(x)
        targets += [] if y is None else [y]
        if sum(map(len, inputs)) >= samples:
            break
    if not inputs:
        raise ValueError("x: no batch in it")
    return torch.cat(inputs)[:samples], torch.cat(targets)[:samples] if targets else None


def _pair(batch: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(batch, Tensor):
        return batch, None
    if (
        isinstance(batch, (tuple, list))
        and len(batch) in (1, 2)
        and all(isinstance(t, Tensor) for t in batch)
    ):
        return batch[0], batch[1] if len(batch) == 2 else None
    raise TypeError(
        f"x: a batch must be a tensor or a pair of tensors (inputs, targets), got {type(batch).__name__}; pass the "
        "probe samples as tensors instead"
    )


def _fingerprint(*tensors: Tensor | None) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        if tensor is not None:
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return f"probe-{digest.hexdigest()[:8]}"
