"""What a result was made with."""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

import torch

import flatkern as fk
from flatkern.experiments.parallel import available_cores

__all__ = ["describe"]

_PACKAGES = ("numpy", "scipy", "matplotlib", "mlxtend", "scikit-learn")


def describe() -> dict[str, Any]:
    """Versions, machine and kernel set, as plain values."""
    kernels = fk.kernels.active()
    found: dict[str, Any] = {
        "flatkern": fk.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    found |= {
        "machine": f"{platform.system()} {platform.machine()}",
        "cores": available_cores(),
        "kernels": kernels.kernels,
        "instruction_set": kernels.isa or "none (PyTorch reference)",
    }
    return found
