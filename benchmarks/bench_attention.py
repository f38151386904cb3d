"""A Hessian-vector product through attention on a kept graph: by query blocks against torch's decomposed form.

``python -m benchmarks.bench_attention`` runs everything in one go, checks that both sides agree, prints the ratios
and writes benchmarks/results/attention.json; under pytest (``make bench``) the same pieces are timed one by one.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import alternate, save
from flatkern.attention_form import LEAST_CAUSAL_WEIGHTS, LEAST_WEIGHTS
from flatkern.kernels import attention
from flatkern.operators.graph_memory import graph_bytes

HEADS, WIDTH = 4, 64
SHAPES = [
    (length, batch, causal) for length in (256, 1024, 2048) for batch in (1, 4) for causal in (False, True)
]


def decomposed(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """torch's form that can be differentiated twice."""
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


def blocks(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """flatkern's."""
    return attention(q, k, v, is_causal=is_causal)


SIDES: dict[str, Callable[[Tensor, Tensor, Tensor, bool], Tensor]] = {
    "blocks": blocks,
    "decomposed": decomposed,
}


def inputs(length: int, batch: int) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v and a vector for each."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(batch, HEADS, length, WIDTH, generator=generator) for _ in range(6)]
    return tensors[:3], tensors[3:]


def product(
    side: str, causal: bool, leaves: list[Tensor], vectors: list[Tensor]
) -> tuple[Callable[[], tuple[Tensor, ...]], float]:
    """The product of the Hessian of ‖attention‖²/2 in (q, k, v) with one vector, and the kept graph's MiB."""
    leaves = [t.detach().requires_grad_() for t in leaves]
    loss = SIDES[side](*leaves, causal).square().sum() / 2
    gradients = torch.autograd.grad(loss, leaves, create_graph=True)

    def run() -> tuple[Tensor, ...]:
        return torch.autograd.grad(gradients, leaves, vectors, retain_graph=True)

    return run, graph_bytes(gradients, leaves) / 2**20


def status(field: str) -> int:
    """A line of /proc/self/status in KiB."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak(side: str, length: int, batch: int, causal: bool) -> float:
    """MiB of resident memory that graph and product take at their highest; this process should do nothing else."""
    torch.set_num_threads(1)
    product(side, causal, *inputs(64, 1))[0]()
    given = inputs(length, batch)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    before = status("VmRSS")
    product(side, causal, *given)[0]()
    return (status("VmHWM") - before) / 1024


def peak_elsewhere(side: str, *shape: int) -> float:
    """The same in a process of its own."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench_attention",
        "--peak",
        side,
        *(str(int(s)) for s in shape),
    ]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


@pytest.mark.parametrize("side", list(SIDES))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention(benchmark, side, shape):
    length, batch, causal = shape
    benchmark(product(side, causal, *inputs(length, batch))[0])


def main() -> None:
    """Time both sides in turns and write the table's numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--peak", nargs=4, metavar=("SIDE", "LENGTH", "BATCH", "CAUSAL"))
    arguments = parser.parse_args()
    if arguments.peak:
        side, length, batch, causal = arguments.peak
        print(peak(side, int(length), int(batch), bool(int(causal))))
        return
    torch.set_num_threads(arguments.threads)
    rows = []
    for length, batch, causal in SHAPES:
        given = inputs(length, batch)
        made = {side: product(side, causal, *given) for side in SIDES}
        ours, theirs = (torch.cat([t.flatten() for t in made[side][0]()]) for side in SIDES)
        error = float((ours - theirs).norm() / theirs.norm())
        if not error < 1e-5:
            raise SystemExit(
                f"T = {length}, batch {batch}, causal {causal}: the two sides differ by {error:.1e}"
            )
        calls = {256: 40, 1024: 12, 2048: 7}[length] if batch == 1 else {256: 20, 1024: 5, 2048: 3}[length]
        times = alternate({side: made[side][0] for side in SIDES}, dict.fromkeys(SIDES, calls))
        graphs = {side: made[side][1] for side in SIDES}
        del made, given
        peaks = {side: peak_elsewhere(side, length, batch, causal) for side in SIDES}
        chosen = length**2 >= (LEAST_CAUSAL_WEIGHTS if causal else LEAST_WEIGHTS)
        row = {
            "length": length,
            "batch": batch,
            "causal": causal,
            "blocks_ms": 1e3 * times["blocks"]["cpu_s"],
            "decomposed_ms": 1e3 * times["decomposed"]["cpu_s"],
            "ratio": times["decomposed"]["cpu_s"] / times["blocks"]["cpu_s"],
            "wall_ratio": times["decomposed"]["wall_s"] / times["blocks"]["wall_s"],
            "blocks_graph_mib": graphs["blocks"],
            "decomposed_graph_mib": graphs["decomposed"],
            "blocks_peak_mib": peaks["blocks"],
            "decomposed_peak_mib": peaks["decomposed"],
            "operators_take": "blocks" if chosen else "decomposed",
            "relative_difference": error,
        }
        rows.append(row)
        print({k: round(v, 7) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
    settings = {
        "threads": arguments.threads,
        "dtype": "float32",
        "shape": f"{HEADS} heads of {WIDTH}, no mask",
        "data": "standard normal, seed 0",
        "timing": "one warm-up each, calls interleaved, medians; CPU milliseconds",
        "peak": "resident set above the inputs, graph and one product, in a process of its own",
    }
    print("written:", save("attention", settings, rows))


if __name__ == "__main__":
    main()
