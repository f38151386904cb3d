"""A user's own model, loss and data, made by a function of theirs: ``module:factory`` or ``file.py:factory``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import Tensor, nn

from flatkern.experiments.errors import UserError

__all__ = ["Problem", "load_problem"]

_FORMS = "(model, loss_fn, data) or a dict with these keys"
_OPTIONS = ("reduction", "params")


@dataclass(frozen=True)
class Problem:
    """What is measured."""

    source: str
    """The factory, as it was named."""
    model: nn.Module
    loss_fn: Callable[..., Tensor]
    data: Any
    """A pair (x, y) or a re-iterable of pairs."""
    reduction: Any = None
    """``"mean"`` or ``"sum"``, for a loss that is a plain function."""
    params: Any = None
    """Names or globs of parameters; ``None`` for all that train."""


def load_problem(source: str) -> Problem:
    """Import the factory, call it, and check what it gives.

    Raises:
        UserError: with what is wrong and what to do, for anything from a missing module to a factory that fails.
    """
    place, colon, name = source.rpartition(":")
    if not colon or not place or not name:
        raise UserError(
            f"{source!r}: expected MODULE:FUNCTION, such as mypackage.train:make or train.py:make"
        )
    module = _from_file(Path(place)) if place.endswith(".py") else _from_path(place)
    factory = getattr(module, name, None)
    if factory is None:
        own = [
            k
            for k, v in vars(module).items()
            if callable(v) and getattr(v, "__module__", "") == module.__name__
        ]
        there = f"; there are {', '.join(own)}" if own else ""
        raise UserError(f"{source}: {place} has no {name!r}{there}")
    if not callable(factory):
        raise UserError(
            f"{source}: {name!r} is a {type(factory).__name__}; expected a function that returns {_FORMS}"
        )
    try:
        made = factory()
    except Exception as error:
        raise UserError(f"{source}: the factory failed: {_told(error)}") from error
    return _checked(source, made)


def _from_path(name: str) -> ModuleType:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is not None and (name == error.name or name.startswith(error.name + ".")):
            raise UserError(
                f"there is no module {error.name!r}; start from the folder that holds it, or name a file: "
                "path/to/file.py:factory"
            ) from None
        raise UserError(f"importing {name} failed: {_told(error)}") from error
    except Exception as error:
        raise UserError(f"importing {name} failed: {_told(error)}") from error


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # what lies beside it can be imported, as for `python file.py`
    found = importlib.util.spec_from_file_location(path.stem, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules[path.stem] = module
    try:
        found.loader.exec_module(module)
    except Exception as error:
        del sys.modules[path.stem]
        raise UserError(f"importing {path} failed: {_told(error)}") from error
    return module


def _told(error: Exception) -> str:
    """An error on one line, with the place it came from."""
    text = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):
        where = ""  # its text has the place
    return f"{type(error).__name__}: {text}{where}" if text else f"{type(error).__name__}{where}"


def _checked(source: str, made: Any) -> Problem:
    options: dict[str, Any] = {}
    if isinstance(made, Mapping):
        unknown = set(made) - {"model", "loss_fn", "data", *_OPTIONS}
        missing = [k for k in ("model", "loss_fn", "data") if k not in made]
        if unknown or missing:
            what = [f"{k!r} is missing" for k in missing] + [
                f"{k!r} is unknown" for k in sorted(map(str, unknown))
            ]
            raise UserError(f"{source}: the factory must return {_FORMS}; {', '.join(what)}")
        options = {k: made[k] for k in _OPTIONS if k in made}
        model, loss_fn, data = made["model"], made["loss_fn"], made["data"]
    elif isinstance(made, (tuple, list)) and len(made) == 3:
        model, loss_fn, data = made
    else:
        got = type(made).__name__
        if isinstance(made, (tuple, list)):
            got += f" of {len(made)}: {', '.join(type(m).__name__ for m in made)}"
        raise UserError(f"{source}: the factory must return {_FORMS}, got {got}")
    if not isinstance(model, nn.Module):
        raise UserError(f"{source}: model must be a torch.nn.Module, got {type(model).__name__}")
    if not callable(loss_fn):
        raise UserError(
            f"{source}: loss_fn must be a loss such as torch.nn.CrossEntropyLoss(), got {type(loss_fn).__name__}"
        )
    if isinstance(data, (Tensor, Mapping, str)) or not hasattr(data, "__iter__") or hasattr(data, "__next__"):
        raise UserError(
            f"{source}: data must be a pair of tensors (x, y) or something that can be iterated over again and gives "
            f"such pairs (a DataLoader, a list), got {type(data).__name__}"
        )
    return Problem(source, model, loss_fn, data, **options)
