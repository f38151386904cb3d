"""Train mode as a fixed function of θ: batch statistics, and masks that are the same in every pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from flatkern.operators.batches import batch_seed
from flatkern.problem import check_model, model_device, preserve_state

__all__ = ["TrainMode"]


class TrainMode:
    """What to do about batch norm with batch statistics, dropout and other randomness in a forward pass.

    Not allowed (the default), they are refused. Allowed, the loss is one fixed function of θ for given batches: batch
    norm normalizes with the statistics of the batch, which are differentiated through, and every random number of
    batch b's forward pass comes from a generator seeded by (``seed``, b), in each pass anew. Running statistics and
    the generators' states stay as they were.
    """

    def __init__(self, allowed: bool, seed: int) -> None:
        if not isinstance(allowed, bool):
            raise TypeError(f"train_mode: expected True or False, got {allowed!r}")
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise ValueError(f"seed: expected an integer of at least 0, got {seed!r}")
        self.allowed, self._seed = allowed, seed

    def check(self, model: nn.Module) -> None:
        """Refuse what is not allowed."""
        check_model(model, train_mode=self.allowed)

    def preserved(self, model: nn.Module) -> AbstractContextManager[None]:
        """Restores generators and buffers; random numbers that are not allowed raise."""
        return preserve_state(model, allow_random=self.allowed)

    @contextmanager
    def region(self, model: nn.Module, index: int) -> Iterator[None]:
        """For the forward passes of batch ``index``; generators are left to the caller to restore."""
        if not self.allowed:
            yield
            return
        tracking = [
            m
            for m in model.modules()
            if isinstance(m, nn.modules.batchnorm._NormBase) and m.training and m.track_running_stats
        ]
        seed = batch_seed(self._seed, index)
        device = model_device(model)
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            torch.cuda.default_generators[device.index or 0].manual_seed(seed)
        try:
            for module in tracking:  # their in-place update has no derivative under torch.func
                module.track_running_stats = False
            yield
        finally:
            for module in tracking:
                module.track_running_stats = True
