"""Which implementation runs: loads the compiled library, or says why the reference is used instead."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

PACKAGE = Path(__file__).resolve().parent.parent
LIBRARY = Path(os.environ.get("FLATKERN_LIBRARY", "") or PACKAGE / "_C.so")
"""The operators; `FLATKERN_LIBRARY` names another build of them (the tests of the CUDA kernels on the host)."""
MAX_SIZE = 128
"""Rows up to which the compiled kernels work; larger matrices take the PyTorch composition."""

CHOICES = ("auto", "compiled", "reference")
ISAS = ("baseline", "avx2", "avx512")


@dataclass(frozen=True)
class KernelInfo:
    """What runs behind `flatkern.kernels`, for `flatkern info` and bug reports."""

    kernels: Literal["compiled", "reference"]
    requested: str
    """The value of `FLATKERN_KERNELS`."""
    reason: str
    """Why the reference is used; empty where the compiled kernels are."""
    isa: str
    """Instruction set of the CPU kernels, chosen for this processor; empty for the reference."""
    cuda: bool
    """Whether CUDA kernels are in the library (not whether there is a GPU)."""
    cuda_architectures: tuple[str, ...]
    compiler: str
    nvcc: str
    torch_at_build: str
    torch_now: str


def environment_choice(name: str, allowed: tuple[str, ...], default: str) -> str:
    """An environment variable with a closed set of values; anything else raises and names them."""
    value = os.environ.get(name, "").strip() or default
    if value not in allowed and value != default:
        raise ValueError(f"{name}={value!r} is not known; the allowed values are {', '.join(allowed)}")
    return value


def _build_info() -> dict[str, Any]:
    try:
        info: dict[str, Any] = json.loads((PACKAGE / "_build_info.json").read_text())
    except (OSError, ValueError):
        return {
            "status": "missing",
            "reason": "the package was never built (pip install it, or `make setup`)",
        }
    return info


def _load() -> str:
    """Loads the library; returns why that is not possible, or nothing."""
    info = _build_info()
    if not LIBRARY.exists():
        return str(info.get("reason") or f"{LIBRARY} does not exist")
    try:
        torch.ops.load_library(LIBRARY)
    except (OSError, RuntimeError) as error:
        return f"{LIBRARY} could not be loaded: {error}"
    return ""


class _State:
    """The one mutable thing here: the choice, made at import."""

    def __init__(self) -> None:
        self.requested = environment_choice("FLATKERN_KERNELS", CHOICES, "auto")
        environment_choice("FLATKERN_ISA", ISAS, "")
        self.build = _build_info()
        self.problem = _load()
        self.available = not self.problem
        # a library of an earlier build in a source tree lacks what was added since
        self.jets = self.available and hasattr(torch.ops.flatkern, "activation_jet")
        self.attention = self.available and hasattr(torch.ops.flatkern, "attention_second")
        self.compiled = self.available and self.requested != "reference"
        if self.requested == "compiled" and self.problem:
            raise ImportError(f"FLATKERN_KERNELS=compiled, but there are no compiled kernels: {self.problem}")
        if self.requested == "auto" and self.problem and self.build.get("status") != "skipped":
            warnings.warn(
                f"flatkern runs on its PyTorch reference, which is slower: {self.problem}",
                RuntimeWarning,
                stacklevel=2,
            )


_state = _State()


def runs_compiled(x: Tensor, *, cuda: bool = True, limit: float = MAX_SIZE, squares: int = 0) -> bool:
    """Whether the compiled kernel takes these matrices.

    `cuda`: whether the operator has a CUDA kernel; `limit`: the most rows it takes; `squares`: see `rows_that_fit`.
    """
    rows, on_gpu = x.shape[-2], x.device.type == "cuda"
    if rows > limit or (on_gpu and not cuda) or not runs_compiled_rows(x.device):
        return False
    return not on_gpu or rows <= _rows_on(x.device, squares)


def rows_that_fit(shared_bytes: int, squares: int = 0) -> int:
    """Up to how many rows the CUDA kernels' factorizations fit a block's shared memory.

    They hold a triangle in numbers of twice the precision, 2 c + 32 more, and so many squares with rows of odd length.
    """

    def needed(c: int) -> int:
        return 8 * (c * (c + 1) + 2 * c + 32 + squares * c * (c | 1))

    return max((c for c in range(MAX_SIZE + 1) if needed(c) <= shared_bytes), default=0)


@cache
def _rows_on(device: torch.device, squares: int) -> int:
    if not torch.cuda.is_available():  # shapes traced for a GPU that is not there
        return MAX_SIZE
    # a block may ask for all that a multiprocessor has but the 1 KiB that the system keeps for itself
    shared = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor - 1024
    return rows_that_fit(shared, squares)


def runs_compiled_rows(device: torch.device) -> bool:
    """Whether the compiled kernels run on this device, for operators that take any size."""
    if not _state.compiled:
        return False
    return device.type == "cpu" or (device.type == "cuda" and bool(_state.build.get("cuda")))


def runs_elementwise(x: Tensor) -> bool:
    """Whether the compiled jets run for this tensor: they have no limit of size."""
    if not _state.compiled or not _state.jets or x.device.type not in ("cpu", "cuda"):
        return False
    return x.device.type == "cpu" or bool(_state.build.get("cuda"))


def jets_available() -> bool:
    """Whether the library that was loaded has the jets."""
    return _state.jets


def attention_available() -> bool:
    """Whether the library that was loaded has attention."""
    return _state.attention


def compiled_available() -> bool:
    """Whether the compiled library was loaded (its operators exist), chosen or not."""
    return _state.available


@contextmanager
def using(which: Literal["compiled", "reference"]) -> Iterator[None]:
    """Switches the implementation inside a block: for tests and benchmarks, not for threads."""
    if which == "compiled" and not _state.available:
        raise RuntimeError(f"there are no compiled kernels: {_state.problem}")
    before, _state.compiled = _state.compiled, which == "compiled"
    try:
        yield
    finally:
        _state.compiled = before


def active() -> KernelInfo:
    """What runs behind `flatkern.kernels` now.

    Example:
        >>> import flatkern.kernels as kernels
        >>> kernels.active().kernels in ("compiled", "reference")
        True
    """
    reason = ""
    if not _state.compiled:
        reason = _state.problem or "FLATKERN_KERNELS=reference"
    isa = ""
    if _state.compiled:
        try:
            import flatkern._native as _native

            isa = str(_native.build_info()["isa"])
        except ImportError:
            isa = "unknown (the NumPy door was built for another Python)"
    build = _state.build
    return KernelInfo(
        kernels="compiled" if _state.compiled else "reference",
        requested=_state.requested,
        reason=reason,
        isa=isa,
        cuda=bool(build.get("cuda")) and _state.available,
        cuda_architectures=tuple(build.get("cuda_architectures", ())),
        compiler=str(build.get("compiler", "")),
        nvcc=str(build.get("nvcc", "")),
        torch_at_build=str(build.get("torch", "")),
        torch_now=torch.__version__,
    )
