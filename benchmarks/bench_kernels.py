"""The kernels against torch's own operators, one thread, CPU time, both sides in the same run.

    make bench                            with pytest-benchmark
    python -m benchmarks.bench_kernels    the table of ratios, and benchmarks/results/kernels.json

Random data, one warm-up call, then all sides in turn; the ratio is that of their smallest CPU times over the rounds, so
that a busy neighbour costs rounds rather than truth.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks.timing import minima, save
from flatkern import kernels


@dataclass(frozen=True)
class Row:
    """One comparison: seconds of CPU time a call."""

    kernel: str
    dtype: str
    n: int
    c: int
    d: int
    ours: float
    torch: float
    against: str

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.torch / self.ours


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def cpu_seconds(functions: list[Callable[[], object]], seconds: float) -> list[float]:
    """The smallest CPU seconds of each function, called in turn for so many seconds together."""
    named = {str(i): f for i, f in enumerate(functions)}
    times = minima(named, seconds)
    return [1e-6 * times[name] for name in named]


def spd(n: int, c: int, dtype: torch.dtype) -> Tensor:
    x = torch.randn(n, c, 2 * c, dtype=dtype)
    return x @ x.mT


def logdet_rows(n: int, limit: float) -> list[Row]:
    out = []
    for dtype in (torch.float32, torch.float64):
        for c in (2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 24, 32, 48, 64):
            G = spd(n, c, dtype)
            ours, theirs = cpu_seconds(
                [lambda G=G: kernels.spd_logdet(G), lambda G=G: torch.linalg.slogdet(G)], limit
            )
            out.append(Row("spd_logdet", name_of(dtype), n, c, c, ours, theirs, "slogdet(G)"))
    return out


def stats_rows(n: int, limit: float) -> list[Row]:
    out = []
    sizes = ((2, 64), (4, 64), (5, 64), (6, 64), (8, 64), (10, 32), (10, 64), (10, 128), (10, 512))
    for c, d in (*sizes, (16, 64), (16, 512), (32, 64), (32, 512)):
        for dtype in (torch.float32, torch.float64):
            x = torch.randn(n if c * d < 5_000 else n // 5, c, d, dtype=dtype)
            functions: list[Callable[[], object]] = [
                lambda x=x: kernels.gram_stats(x),
                lambda x=x: torch.linalg.slogdet(x @ x.mT),
            ]
            against = ["slogdet(x @ x.mT)"]
            if dtype == torch.float32:  # what it takes in torch to have the accuracy of our accumulation
                functions.append(lambda x=x: torch.linalg.slogdet((y := x.double()) @ y.mT))
                against.append("y = x.double(); slogdet(y @ y.mT)")
            ours, *others = cpu_seconds(functions, limit)
            for took, what in zip(others, against, strict=True):
                out.append(Row("gram_stats", name_of(dtype), len(x), c, d, ours, took, what))
    return out


def backward_rows(n: int, limit: float) -> list[Row]:
    out = []
    for dtype, c in itertools.product((torch.float32, torch.float64), (2, 4, 8, 10, 16, 32)):
        G = spd(n, c, dtype).requires_grad_()
        x = torch.randn(n, c, 64, dtype=dtype, requires_grad=True)

        def through(f: Callable[[Tensor], Tensor], t: Tensor) -> Callable[[], object]:
            return lambda: torch.autograd.grad(f(t).sum(), t)

        pairs = [
            ("spd_logdet + grad", G, c, kernels.spd_logdet, lambda G: torch.linalg.slogdet(G).logabsdet),
            (
                "gram_stats + grad",
                x,
                64,
                lambda x: kernels.gram_stats(x).logdet,
                lambda x: torch.linalg.slogdet(x @ x.mT).logabsdet,
            ),
        ]
        for name, t, d, mine, theirs in pairs:
            ours, others = cpu_seconds([through(mine, t), through(theirs, t)], limit)
            out.append(Row(name, name_of(dtype), n, c, d, ours, others, "slogdet and its backward"))
    return out


def spectrum_rows(n: int, limit: float) -> list[Row]:
    out = []
    for c, d in ((2, 64), (4, 64), (8, 64), (10, 64), (10, 784), (16, 64), (32, 64), (64, 128)):
        for dtype in (torch.float32, torch.float64):
            x = torch.randn(n if c * d < 1_000 else n // 20, c, d, dtype=dtype)

            def eigenvalues(x: Tensor = x) -> Tensor:
                wide = x.double()
                return torch.linalg.eigvalsh(wide @ wide.mT)

            ours, *others = cpu_seconds(
                [
                    lambda x=x: kernels.gram_singular_values(x),
                    eigenvalues,
                    lambda x=x: torch.linalg.svdvals(x),
                ],
                limit,
            )
            for took, what in zip(others, ("y = x.double(); eigvalsh(y @ y.mT)", "svdvals(x)"), strict=True):
                row = Row("gram_singular_values", name_of(dtype), len(x), c, d, ours, took, what)
                out.append(row)
    return out


def main() -> None:
    """Compare everything in one run and write benchmarks/results/kernels.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("-n", type=int, default=10_000, help="samples")
    parser.add_argument("--seconds", type=float, default=0.5, help="of CPU time a row, 7 rounds at least")
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rows = [
        *logdet_rows(options.n, options.seconds),
        *stats_rows(options.n, options.seconds),
        *backward_rows(options.n, options.seconds),
        *spectrum_rows(options.n, options.seconds),
    ]
    for r in rows:
        print(f"{r.kernel:20} {r.dtype:8} c={r.c:<3} d={r.d:<4} {r.ratio:5.1f}x  against {r.against}")
    settings = {
        "threads": 1,
        "data": "normal random rows; G = x xᵀ of [c, 2c] rows",
        "timing": (
            "one warm-up each, then interleaved rounds (7 or more); smallest CPU time, in milliseconds"
        ),
    }
    table = [
        {
            "kernel": r.kernel,
            "dtype": r.dtype,
            "n": r.n,
            "c": r.c,
            "d": r.d,
            "flatkern_ms": 1e3 * r.ours,
            "torch_ms": 1e3 * r.torch,
            "against": r.against,
            "ratio": r.ratio,
        }
        for r in rows
    ]
    print("written:", save("kernels", settings, table))


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name_of)


@DTYPES
@pytest.mark.parametrize("c", [4, 10, 32])
@pytest.mark.parametrize("who", ["flatkern", "torch"])
def test_spd_logdet(benchmark, one_thread, dtype, c, who):
    G = spd(10_000, c, dtype)
    benchmark.group = f"spd_logdet c={c} {name_of(dtype)}"
    benchmark(kernels.spd_logdet if who == "flatkern" else torch.linalg.slogdet, G)


@DTYPES
@pytest.mark.parametrize("d", [32, 128, 512])
@pytest.mark.parametrize("who", ["flatkern", "torch"])
def test_gram_stats(benchmark, one_thread, dtype, d, who):
    x = torch.randn(2_000, 10, d, dtype=dtype)
    benchmark.group = f"gram_stats c=10 d={d} {name_of(dtype)}"
    benchmark(kernels.gram_stats if who == "flatkern" else lambda x: torch.linalg.slogdet(x @ x.mT), x)


if __name__ == "__main__":
    main()
