"""State dicts from files, read as weights only, into a model that they must fit."""

from __future__ import annotations

import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.experiments.errors import UserError

__all__ = ["Checkpoint", "load_into", "positions", "read_checkpoint"]

_PLACES = ("state_dict", "model_state_dict", "model")
"""Where a checkpoint of a whole training run usually has the weights."""
_PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DistributedDataParallel, torch.compile and a LightningModule put before the names."""
_STEPS = ("global_step", "step", "epoch")


@dataclass(frozen=True)
class Checkpoint:
    """The weights of one file."""

    path: Path
    state: dict[str, Tensor]
    step: int | None
    """Where training stood, if the file says so."""


def read_checkpoint(path: Path, key: str | None = None) -> Checkpoint:
    """Read a state dict, alone or inside a checkpoint under ``key``, on the CPU and without running any code of it.

    Raises:
        UserError: no such file, none that torch can read, one that needs code to be run, or one without a state dict.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    held: Any = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    if not isinstance(held, Mapping):
        raise UserError(
            f"{path}: it holds a {type(held).__name__}, not a state dict; save model.state_dict()"
        )
    if key is not None:
        if not isinstance(held.get(key), Mapping):
            raise UserError(f"{path}: no state dict under {key!r}; there are {_some(map(str, held))}")
        state: Any = held[key]
    else:
        state = held if _is_state(held) else next((held[k] for k in _PLACES if _is_state(held.get(k))), None)
        if state is None:
            raise UserError(
                f"{path}: no state dict in it; there are {_some(map(str, held))}; --key NAME says which it is"
            )
    found = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    steps = [value for k in _STEPS if type(value := held.get(k)) is int]
    return Checkpoint(path, found, steps[0] if steps else None)


def load_into(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Put the weights into the model; all of its names must be there, with their shapes, and no others.

    Raises:
        UserError: with the names that do not fit.
    """
    own = model.state_dict()
    wanted = {k: v for k, v in own.items() if isinstance(v, Tensor)}
    state = _named_as(wanted, checkpoint.state)
    missing = [k for k in wanted if k not in state]
    unexpected = [k for k in state if k not in wanted]
    shapes = [
        f"{k} {list(state[k].shape)} where the model has {list(v.shape)}"
        for k, v in wanted.items()
        if k in state and state[k].shape != v.shape
    ]
    wrong = [f"missing: {_some(missing)}"] if missing else []
    wrong += [f"not in the model: {_some(unexpected)}"] if unexpected else []
    wrong += [f"of another shape: {_some(shapes)}"] if shapes else []
    if wrong:
        raise UserError(f"{checkpoint.path}: does not fit the factory's model; {'; '.join(wrong)}")
    model.load_state_dict(own | state)


def positions(checkpoints: Sequence[tuple[Path, int | None]]) -> list[int]:
    """Where each stands on the axis: the steps in the files, else the last number of their names, else 0, 1, 2 …"""
    told = [step for _, step in checkpoints]
    numbers = [re.findall(r"\d+", path.stem) for path, _ in checkpoints]
    named = [int(n[-1]) if n else None for n in numbers]
    for steps in (told, named):
        known = [s for s in steps if s is not None]
        if len(set(known)) == len(checkpoints):
            return known
    return list(range(len(checkpoints)))


def _pickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        other = re.search(r"GLOBAL (\S+)", str(error))  # the class that weights do not need
        if other is None:
            raise UserError(f"{path}: not a file that torch.save wrote") from None
        raise UserError(
            f"{path}: it holds more than weights ({other[1]}), which would run code of the file; save "
            "model.state_dict()"
        ) from None
    except Exception as error:  # whatever torch's reader runs into in a file of another kind
        raise UserError(f"{path}: torch cannot read it ({' '.join(str(error).split())[:120]})") from None


def _safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise UserError(f"{path}: needs the package safetensors: pip install safetensors") from None
    try:
        return dict(load_file(path))
    except Exception as error:
        raise UserError(f"{path}: not a safetensors file ({' '.join(str(error).split())[:120]})") from None


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(v, Tensor) for v in value.values())


def _named_as(wanted: Mapping[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state without the prefixes that all of its names share, as many as fit the wanted names best."""
    ways = [state]
    while prefix := next((p for p in _PREFIXES if state and all(k.startswith(p) for k in state)), None):
        state = {k.removeprefix(prefix): v for k, v in state.items()}
        ways.append(state)
    return max(ways, key=lambda way: len(wanted.keys() & way.keys()))


def _some(names: Any, most: int = 4) -> str:
    listed = list(names)
    rest = f" and {len(listed) - most} more" if len(listed) > most else ""
    return ", ".join(listed[:most]) + rest if listed else "nothing"
