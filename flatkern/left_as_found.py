"""Model, random states and what reads the data, as they were before a call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from flatkern.operators.batches import reading
from flatkern.problem import preserve_state

__all__ = ["left_as_found"]


@contextmanager
def left_as_found(model: nn.Module, data: Any) -> Iterator[None]:
    """Buffers, the global generators and those of a loader are restored, on errors too.

    A ``DataLoader`` draws a seed from torch's global generator whenever it is read, even without shuffling.
    """
    with preserve_state(model, allow_random=True), reading(data):
        yield
