"""Measuring in the middle of a training run without changing it."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from flatkern.problem import model_device, preserve_state

__all__ = ["bare", "random_states_kept", "undisturbed"]


def bare(model: nn.Module) -> nn.Module:
    """The module inside ``DataParallel``, ``DistributedDataParallel`` and ``torch.compile``.

    Raises:
        TypeError: not a module.
        ValueError: its parameters are sharded over processes, so that no process could measure it.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            break
    wrapped = any(type(m).__name__ == "FullyShardedDataParallel" for m in model.modules())
    for name, parameter in model.named_parameters():
        # FSDP 1, FSDP 2 and other distributed tensors, DeepSpeed
        if wrapped or hasattr(parameter, "device_mesh") or hasattr(parameter, "ds_id"):
            raise ValueError(
                f"model: parameter {name!r} is sharded over processes; a monitor needs all of the model in one"
            )
    return model


@contextmanager
def random_states_kept() -> Iterator[None]:
    """The states of torch's CPU generator, NumPy's and Python's are afterwards as before."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        random.setstate(states[2])


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Eval mode, full precision and no gradients for the block; everything is then as it was, on errors too.

    ``training`` is written to each module rather than through ``eval()``, which some models override to merge weights.
    """
    modules = list(model.modules())
    modes = [module.training for module in modules]
    compiled = [module.__dict__.get("_compiled_call_impl") for module in modules]
    gradients = [(p, p.grad) for p in model.parameters()]
    try:
        for module, call in zip(modules, compiled, strict=True):
            module.training = False
            if call is not None:
                module._compiled_call_impl = None
        for parameter, _ in gradients:
            parameter.grad = None
        with (
            random_states_kept(),
            preserve_state(model, allow_random=True),
            torch.autocast(model_device(model).type, enabled=False),
        ):
            yield
    finally:
        for module, mode, call in zip(modules, modes, compiled, strict=True):
            module.training = mode
            if call is not None:
                module._compiled_call_impl = call
        for parameter, gradient in gradients:
            parameter.grad = gradient
