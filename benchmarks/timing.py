"""How benchmarks time and what they say about the machine: CPU seconds beside wall seconds, medians, ratios."""

from __future__ import annotations

import json
import math
import os
import platform
import random
import statistics
import subprocess
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch

import flatkern as fk

RESULTS = Path(__file__).parent / "results"


def alternate(
    functions: dict[str, Callable[[], object]], rounds: dict[str, int]
) -> dict[str, dict[str, float]]:
    """Median CPU and wall seconds of each function, taken in turns so that a noisy moment hits all alike.

    Each turn has an order of its own (drawn with a fixed seed): no function always finds the caches as one certain
    other left them.

    Args:
        functions: by name; each is called once beforehand to warm up.
        rounds: how many timed calls each gets; the calls are spread over the whole run.
    """
    cpu: dict[str, list[float]] = {name: [] for name in functions}
    wall: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    most = max(rounds.values())
    order = list(functions.items())
    draw = random.Random(0)
    for step in range(most):
        draw.shuffle(order)
        for name, function in order:
            if step * rounds[name] // most == (step + 1) * rounds[name] // most:
                continue
            begun_cpu, begun = time.process_time(), time.perf_counter()
            function()
            cpu[name].append(time.process_time() - begun_cpu)
            wall[name].append(time.perf_counter() - begun)
    return {
        name: {
            "cpu_s": statistics.median(cpu[name]),
            "wall_s": statistics.median(wall[name]),
            "calls": len(cpu[name]),
        }
        for name in functions
    }


def minima(functions: dict[str, Callable[[], object]], seconds: float, least: int = 7) -> dict[str, float]:
    """The smallest CPU time of each function, in µs, over rounds in drawn orders that take so many seconds together."""
    best = dict.fromkeys(functions, math.inf)
    order = list(functions.items())
    for _, function in order:
        function()
    draw, begun, rounds = random.Random(0), time.process_time(), 0
    while rounds < least or time.process_time() - begun < seconds:
        draw.shuffle(order)
        for name, function in order:
            start = time.thread_time()
            function()
            best[name] = min(best[name], time.thread_time() - start)
        rounds += 1
    return {name: 1e6 * value for name, value in best.items()}


def environment() -> dict[str, Any]:
    """Machine, versions and kernel set of a run."""
    model = platform.processor()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        pass
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=RESULTS.parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    kernels = fk.kernels.active()
    return {
        "date": date.today().isoformat(),
        "cpu": model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "flatkern": fk.__version__,
        "commit": commit,
        "kernels": f"{kernels.kernels} ({kernels.isa})",
    }


def save(name: str, settings: dict[str, Any], rows: list[dict[str, Any]]) -> Path:
    """Write ``benchmarks/results/NAME.json`` with the environment."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    content = {"environment": environment(), "settings": settings, "rows": rows}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path
