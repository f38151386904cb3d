"""Where networks are trained and measured: the CPU, or a GPU by name."""

from __future__ import annotations

import os

import torch

from flatkern.experiments.errors import UserError

__all__ = ["CPU", "check_name", "resolve"]

CPU = torch.device("cpu")


def check_name(name: str) -> None:
    """Refuse what is no ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        UserError: another name.
    """
    kind, _, number = name.partition(":")
    if not (name == "cpu" or (kind == "cuda" and (name == "cuda" or number.isdecimal()))):
        raise UserError(f"--device {name}: expected cpu, cuda or cuda:N")


def resolve(name: str) -> torch.device:
    """The device of a name; ``cuda`` without a number is the process's own under torchrun (LOCAL_RANK).

    Raises:
        UserError: there is no such device.
    """
    check_name(name)
    if name == "cpu":
        return CPU
    if not torch.cuda.is_available():
        why = "torch sees no GPU" if torch.backends.cuda.is_built() else "this torch was built without CUDA"
        raise UserError(f"--device {name}: {why}; use --device cpu")
    count = torch.cuda.device_count()
    device = torch.device(name)
    if device.index is None:
        local = os.environ.get("LOCAL_RANK", "0")
        device = torch.device("cuda", int(local) % count if local.isdecimal() else 0)
    if device.index >= count:
        raise UserError(f"--device {name}: there are {count} GPUs, numbered from 0")
    return device
