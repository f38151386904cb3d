"""What all estimators share: checking arguments, generators, progress bars."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from flatkern.operators.adapters import as_operator
from flatkern.operators.base import LinearOperator

__all__ = [
    "NotDefiniteError",
    "NotSymmetricError",
    "in_own_precision",
    "make_generator",
    "progress_bar",
    "require_finite",
    "row_bytes",
    "rows_per_block",
]

_BLOCK_BYTES = 1 << 26
_BLOCK_ROWS = 32


class NotSymmetricError(ValueError):
    """An algorithm for symmetric operators was given one that is not."""


class NotDefiniteError(ValueError):
    """An algorithm for positive definite operators was given one that is not."""


P = ParamSpec("P")
R = TypeVar("R")


def in_own_precision(function: Callable[P, R]) -> Callable[P, R]:
    """Vectors keep their dtype under ``torch.autocast``; an operator enters its own region."""

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if not any(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")):
            return function(*args, **kwargs)
        with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
            return function(*args, **kwargs)

    return call


def square_operator(op: Any) -> LinearOperator:
    """Any operator-like object as a square operator with at least one row."""
    operator = as_operator(op)
    if operator.shape[0] != operator.shape[1]:
        raise ValueError(f"op: it is {operator.shape[0]} by {operator.shape[1]}; a square operator is needed")
    return operator


def check_count(value: Any, name: str, *, least: int = 1, most: int | None = None) -> int:
    """An integer argument within its range."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int, got {value!r}")
    if value < least or (most is not None and value > most):
        raise ValueError(
            f"{name}: {value} is out of range; expected {least} to {'any' if most is None else most}"
        )
    return value


def check_positive(value: float | None, name: str) -> float | None:
    """A tolerance or width: ``None`` or a positive finite number."""
    if value is not None and not 0 < float(value) < float("inf"):
        raise ValueError(f"{name}: expected a positive finite number, got {value!r}")
    return None if value is None else float(value)


def make_generator(
    seed: int | None, generator: torch.Generator | None, device: torch.device
) -> torch.Generator:
    """The generator to draw from: the given one, a seeded one, or one seeded by the operating system."""
    if generator is not None:
        if seed is not None:
            raise ValueError("seed: give either seed or generator, not both")
        if not isinstance(generator, torch.Generator):
            raise TypeError(f"generator: expected a torch.Generator, got {type(generator).__name__}")
        return generator
    own = torch.Generator(device)
    if seed is None:
        own.seed()
    else:
        own.manual_seed(check_count(seed, "seed", least=0))
    return own


def rows_per_block(op: LinearOperator) -> int:
    """How many vectors to hand to an operator at once: at most 32, and at most 64 MiB."""
    return max(1, min(_BLOCK_ROWS, _BLOCK_BYTES // row_bytes(op)))


def row_bytes(op: LinearOperator) -> int:
    """Bytes of one vector [P]."""
    return op.shape[1] * op.dtype.itemsize


def require_finite(values: Tensor, what: str) -> Tensor:
    """Raise where an operator's products gave NaN or Inf; called once, when a result is read."""
    if not bool(torch.isfinite(values).all()):
        raise FloatingPointError(
            f"{what}: products with op gave NaN or Inf; look at the model's weights and data, or use float64"
        )
    return values


def progress_bar(total: int, *, enabled: bool, what: str) -> tqdm:
    """A bar that counts products with the operator."""
    return tqdm(total=total, desc=what, unit="matvec", disable=not enabled, leave=False)
