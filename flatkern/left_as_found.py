"""Model, random states and what reads the data, as they were before a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from torch import nn

from flatkern.operators.batches import reading
from flatkern.problem import preserve_state

__all__ = ["leaves_as_found", "left_as_found"]

P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def left_as_found(model: nn.Module, data: Any) -> Iterator[None]:
    """Buffers, the global generators and those of a loader are restored, on errors too."""
    with preserve_state(model, allow_random=True), reading(data):
        yield


def leaves_as_found(function: Callable[P, R]) -> Callable[P, R]:
    """:func:`left_as_found` around calls of a function of ``model`` and ``data`` (or ``x``)."""
    signature = inspect.signature(function)
    source = "data" if "data" in signature.parameters else "x"

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        given = signature.bind(*args, **kwargs).arguments
        if not isinstance(given["model"], nn.Module):  # the function says so
            return function(*args, **kwargs)
        with left_as_found(given["model"], given[source]):
            return function(*args, **kwargs)

    return call
