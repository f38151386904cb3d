"""Random probes, dots with them and the step of Lanczos against the same in torch, with copying as the bound.

Run: ``python -m benchmarks.bench_probes`` writes ``results/probes.json``. One thread, CPU time, in turns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import alternate, save
from flatkern import kernels

ROWS, SIZE, ROUNDS = 8, 669_706, 15  # the parameters of the MLP 784-512-512-10


def ways(dtype: torch.dtype) -> dict[str, dict[str, Callable[[], Any]]]:
    """For each operation: flatkern's, torch's, and a copy of as many bytes as it must move."""
    generator = torch.Generator().manual_seed(0)
    w, v, u = (torch.randn(ROWS, SIZE, dtype=dtype, generator=generator) for _ in range(3))
    beta = torch.rand(ROWS, dtype=torch.float64, generator=generator)
    out, second = torch.empty_like(w), torch.empty_like(w)

    def copies(reads: int) -> Callable[[], None]:
        def run() -> None:  # a copy reads and writes: as much as two readings
            for _ in range(reads):
                second.copy_(w)

        return run

    def step() -> tuple[Tensor, Tensor]:
        alpha = torch.stack([torch.dot(a, b) for a, b in zip(v, w, strict=True)])
        torch.addcmul(w, v, alpha[:, None], value=-1, out=out)
        out.addcmul_(u, beta[:, None].to(dtype), value=-1)
        return alpha, torch.linalg.vector_norm(out, dim=1)

    return {
        "signs": {
            "flatkern": lambda: kernels.rademacher(0, ROWS, SIZE, dtype=dtype),
            "torch": lambda: torch.empty_like(w).bernoulli_(0.5, generator=generator).mul_(2).sub_(1),
            "filling": lambda: torch.empty_like(w).fill_(1),
        },
        "normal numbers": {
            "flatkern": lambda: kernels.normal(0, ROWS, SIZE, dtype=dtype),
            "torch": lambda: torch.empty_like(w).normal_(generator=generator),
            "filling": lambda: torch.empty_like(w).fill_(1),
        },
        "dots with signs, float64 sums": {
            "flatkern": lambda: kernels.rademacher_dot(w, 0),
            "torch": lambda: (v.double() * w.double()).sum(1),
            "reading": lambda: w.sum(),
        },
        "Lanczos step": {
            "flatkern": lambda: kernels.lanczos_step(w, v, u, beta, out=out),
            "torch": step,
            "3 copies": copies(3),
        },
    }


def main() -> None:
    torch.set_num_threads(1)
    rows = []
    for dtype in (torch.float32, torch.float64):
        for name, sides in ways(dtype).items():
            times = {way: t["cpu_s"] for way, t in alternate(sides, dict.fromkeys(sides, ROUNDS)).items()}
            bound = next(way for way in times if way not in ("flatkern", "torch"))
            rows.append(
                {
                    "operation": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "flatkern_ms": 1e3 * times["flatkern"],
                    "torch_ms": 1e3 * times["torch"],
                    "ratio": times["torch"] / times["flatkern"],
                    "bound": bound,
                    "over_bound": times["flatkern"] / times[bound],
                }
            )
            print(rows[-1], flush=True)
    settings = {"rows": ROWS, "size": SIZE, "rounds": ROUNDS}
    print(save("probes", settings, rows))


if __name__ == "__main__":
    main()
