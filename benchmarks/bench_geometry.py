"""σ_max and log-volume of networks with 1,000 outputs and 150,528 inputs, no Jacobian formed.

``python -m benchmarks.bench_geometry`` measures a ResNet-50 and a ViT-S/16 with random weights on noise and writes
benchmarks/results/geometry.json. Every figure is one run; each network runs in a process of its own, so that the peak
memory is its own.
"""

from __future__ import annotations

import argparse
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import flatkern as fk
from benchmarks.timing import save
from benchmarks.vision_models import resnet50, vit_s16

MODELS: dict[str, Callable[[], nn.Module]] = {"ResNet-50": resnet50, "ViT-S/16": vit_s16}


def noise(n: int, side: int) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def timed(function: Callable[[], fk.Geometry]) -> tuple[fk.Geometry, float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    result = function()
    return result, time.process_time() - cpu, time.perf_counter() - wall


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def sensitivity(name: str, n: int, checked: int) -> dict[str, Any]:
    """σ_max to 1 %, and how far it is from a run to 0.01 % on the first samples."""
    model, x = MODELS[name](), noise(n, 224)
    before = peak_mib()
    g, cpu, wall = timed(lambda: fk.geometry(model, x, method="matrix-free", probes=0, params=()))
    peak = peak_mib()
    sigma = g.max_sensitivity
    assert sigma.residuals is not None
    assert sigma.upper is not None
    finer = fk.geometry(
        model, x[:checked], method="matrix-free", probes=0, params=(), rtol=1e-4, max_steps=200, seed=7
    )
    error = (sigma.values[:checked] / finer.max_sensitivity.values - 1).abs().max()
    return {
        "case": "sigma_max", "model": name, "n": n, "outputs": g.outputs, "inputs": g.inputs, "cpu_s": cpu,
        "wall_s": wall, "passes": g.passes, "largest_residual": float((sigma.residuals / sigma.values).max()),
        "largest_upper": float((sigma.upper / sigma.values).max()), "checked": checked,
        "largest_error": float(error), "peak_mib": peak, "model_mib": before, "rank_bound": g.rank_bound,
        "mls": g.mls.value,
        "log_volume": "; ".join(g.log_volume.notes) if math.isinf(g.log_volume.values[0]) else "not asked for",
    }  # fmt: skip


def volumes(
    name: str, n: int, side: int, settings: list[tuple[int, int]], rank: int | None
) -> list[dict[str, Any]]:
    """Log-volume (of ``rank`` directions of the outputs at random, or all) with error bars, beside the exact one.

    ``settings``: pairs of probes and steps.
    """
    model, x = MODELS[name](), noise(n, side)
    subspace = None
    if rank is not None:
        subspace = torch.randn(1000, rank, generator=torch.Generator().manual_seed(2))
    exact, exact_cpu, _ = timed(
        lambda: fk.geometry(model, x, layers=(), method="cotangents", params=(), subspace=subspace)
    )
    rows = []
    for probes, steps in settings:
        how: dict[str, Any] = {"probes": probes, "volume_steps": steps, "subspace": subspace}
        start = time.process_time()
        g = fk.geometry(model, x, method="matrix-free", params=(), **how)
        cpu = time.process_time() - start
        v, d = g.log_volume, g.local_dimensionality
        assert v.errors is not None
        assert v.lower is not None
        assert d.errors is not None
        rows += [
            {
                "case": "volume", "model": name, "side": side, "sample": i, "outputs": g.outputs, "inputs": g.inputs,
                "probes": probes, "steps": steps, "value": float(v.values[i]), "stderr": float(v.errors[i]),
                "lower": float(v.lower[i]), "exact": float(exact.log_volume.values[i]),
                "dimensionality": float(d.values[i]), "dimensionality_stderr": float(d.errors[i]),
                "dimensionality_exact": float(exact.local_dimensionality.values[i]),
                "condition_number": float(exact.condition_number.values[i]), "cpu_s": cpu / n,
                "exact_cpu_s": exact_cpu / n, "passes": g.passes, "exact_passes": exact.passes,
            }
            for i in range(n)
        ]  # fmt: skip
    return rows


def run(job: str, n: int) -> list[dict[str, Any]]:
    kind, name = job.split(":")
    if kind == "sigma":
        return [sensitivity(name, n, checked=min(2, n))]
    return volumes(name, 1, 32, [(4, 20), (4, 60)], rank=100)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--job", help="one job, in this process; prints JSON")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.job:
        torch.manual_seed(0)
        print(json.dumps(run(arguments.job, arguments.samples)))
        return
    rows = []
    for job in ("sigma:ResNet-50", "sigma:ViT-S/16", "volume:ResNet-50"):
        command = [sys.executable, "-m", "benchmarks.bench_geometry", "--job", job]
        command += ["--threads", str(arguments.threads), "--samples", str(arguments.samples)]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        if found.returncode:
            raise SystemExit(f"{job}: {found.stderr}")
        rows += json.loads(found.stdout.strip().splitlines()[-1])
        print(json.dumps(rows[-1], indent=1), flush=True)
    settings = {
        "threads": arguments.threads,
        "dtype": "float32",
        "data": "standard normal noise; random weights (Kaiming; PyTorch's default), seed 0",
        "max_memory": "1 GiB",
    }
    print("written:", save("geometry", settings, rows))


if __name__ == "__main__":
    main()
