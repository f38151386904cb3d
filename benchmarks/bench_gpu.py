"""CUDA kernels against torch on the same GPU, and against the time that their memory traffic takes at copy speed.

``python -m benchmarks.bench_gpu --output FOLDER`` writes gpu.json and gpu.md there (`make gpu-check` runs it).
CUDA events around calls in turns after a warm-up, medians. ``--device cpu --quick`` runs the same calls where there is
no GPU, which shows that the script works and nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import flatkern as fk
from benchmarks.bench_ghost import by_gradients, by_grams
from benchmarks.bench_jets import ACTIVATIONS, cross_entropy_hvp
from benchmarks.timing import environment
from flatkern import kernels
from flatkern.kernels._select import using

Call = Callable[[], object]


@dataclass
class Case:
    """One row: the kernel, what it is compared with, and the bytes that it must move at least."""

    what: str
    own: Call
    other: Call
    against: str
    bytes: int = 0
    queued: bool = True
    """Whether the GPU is kept busy until the call has been dispatched, so that the time is that of its kernels."""


class Device:
    """Random tensors and times on one device."""

    def __init__(self, name: str, quick: bool) -> None:
        self.name, self.quick = name, quick
        self.generator = torch.Generator(name).manual_seed(0)

    def count(self, n: int) -> int:
        """As many as a row of the table has, or a few."""
        return max(2, n // 4096) if self.quick else n

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(*shape, dtype=dtype, device=self.name, generator=self.generator)

    def milliseconds(self, call: Call, queued: bool = True) -> float:
        """Of one call, by events on the current stream."""
        if self.name == "cpu":
            begun = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - begun)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if queued:
            torch.cuda._sleep(400_000)  # clock cycles: some 200 us
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)

    def medians(self, calls: dict[str, Call], rounds: int, queued: bool = True) -> dict[str, float]:
        """Median milliseconds of each call, taken in turns after a warm-up; fewer rounds once a row has taken 2 s."""
        for call in calls.values():
            for _ in range(1 if self.quick else 3):
                call()
        times: dict[str, list[float]] = {name: [] for name in calls}
        begun = time.perf_counter()
        for done in range(rounds):
            if done >= 3 and time.perf_counter() - begun > 2:
                break
            for name, call in calls.items():
                times[name].append(self.milliseconds(call, queued))
        return {name: statistics.median(values) for name, values in times.items()}


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def matrices(on: Device) -> Iterator[Case]:
    for dtype in (torch.float32, torch.float64):
        for c in (4, 10, 32, 64, 128):
            n, size = on.count(64_000_000 // c**2), dtype.itemsize
            rows = on.normal(n, c, 2 * c, dtype=dtype)
            G = rows @ rows.mT
            yield Case(
                f"spd_logdet {short(dtype)} c={c} n={n}",
                lambda G=G: kernels.spd_logdet(G),
                lambda G=G: torch.linalg.slogdet(G),
                "slogdet",
                n * (c * c + 1) * size,
            )
    for c, d in ((5, 64), (10, 784), (32, 512), (64, 512), (128, 1024)):
        n = on.count(60_000_000 // (c * d))
        x = on.normal(n, c, d)

        def composed(x: Tensor = x) -> tuple[Tensor, ...]:
            wide = x.double()
            gram = wide @ wide.mT
            trace, square = gram.diagonal(dim1=-2, dim2=-1).sum(-1), gram.square().sum((-2, -1))
            return torch.linalg.cholesky_ex(gram)[0], trace, square

        yield Case(
            f"gram_stats float32 c={c} d={d} n={n}",
            lambda x=x: kernels.gram_stats(x),
            composed,
            "float64 product and Cholesky",
            n * c * d * 4,
        )
        if c <= 64:
            if c > 32:  # torch before 2.12 takes such matrices one by one
                n, x = max(2, n // 16), x[: max(2, n // 16)]
            yield Case(
                f"gram_singular_values float32 c={c} d={d} n={n}",
                lambda x=x: kernels.gram_singular_values(x),
                lambda x=x: torch.linalg.eigvalsh(x.double() @ x.double().mT),
                "float64 product and eigvalsh",
                n * c * d * 4,
            )


def elements(on: Device) -> Iterator[Case]:
    n = on.count(1 << 24)
    z, t = on.normal(n), on.normal(n)
    for kind, formula in ACTIVATIONS.items():
        yield Case(
            f"activation_jet {kind} n={n}",
            lambda kind=kind: kernels.activation_jet(z, t[None], kind),
            lambda formula=formula: formula(z, t),
            "the formula, eager",
            5 * 4 * n,
        )
    rows, vocabulary = on.count(4096), 50_257 if not on.quick else 257
    logits, v = on.normal(rows, vocabulary), on.normal(rows, vocabulary)
    yield Case(
        f"cross_entropy_hvp {rows} x {vocabulary}",
        lambda: kernels.cross_entropy_hvp(logits, v[None]),
        lambda: cross_entropy_hvp(logits, v),
        "the formula, eager",
        3 * 4 * rows * vocabulary,
    )
    size = on.count(1 << 26)
    vectors = on.normal(4, size)
    yield Case(
        f"rademacher 4 x {size}",
        lambda: kernels.rademacher(0, 4, size, device=on.name),
        lambda: torch.randint(0, 2, (4, size), device=on.name).mul_(2).sub_(1).float(),
        "torch.randint",
        4 * 4 * size,
    )
    yield Case(
        f"rademacher_dot 4 x {size}",
        lambda: kernels.rademacher_dot(vectors, 0),
        lambda: (vectors * torch.randint(0, 2, (4, size), device=on.name).mul_(2).sub_(1)).sum(-1),
        "torch.randint, product, sum",
        4 * 4 * size,
    )
    image, current, previous = (on.normal(4, size) for _ in range(3))
    beta = torch.ones(4, dtype=torch.float64, device=on.name)

    def steps() -> tuple[Tensor, Tensor, Tensor]:
        alpha = (image * current).sum(-1)
        residual = image - alpha[:, None] * current - beta[:, None].float() * previous
        return residual, alpha, residual.norm(dim=-1)

    yield Case(
        f"lanczos_step 4 x {size}",
        lambda: kernels.lanczos_step(image, current, previous, beta),
        steps,
        "the same in torch",
        6 * 4 * 4 * size,
    )


def attention_and_ghosts(on: Device) -> Iterator[Case]:
    length = 64 if on.quick else 2048
    q, k, v, dq, dk, dv = (on.normal(2, 8, length, 64) for _ in range(6))
    leaves = [x.requires_grad_() for x in (q, k, v)]

    def double_backward(which: str) -> Call:
        with using(which):  # type: ignore[arg-type]
            out = kernels.attention(*leaves, is_causal=True)
            first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)

        def call() -> object:
            with using(which):  # type: ignore[arg-type]
                return torch.autograd.grad(first, leaves, (dq, dk, dv), retain_graph=True)

        return call

    yield Case(
        f"attention, double backward, T={length} causal, 16 heads of 64",
        double_backward("compiled"),
        double_backward("reference"),
        "PyTorch by query blocks",
    )

    def tangent(which: str) -> Call:
        def call() -> object:
            with using(which):  # type: ignore[arg-type]
                return torch.func.jvp(
                    lambda q, k, v: kernels.attention(q, k, v, is_causal=True),
                    (q.detach(), k.detach(), v.detach()),
                    (dq, dk, dv),
                )

        return call

    yield Case(
        f"attention, forward tangent, T={length} causal, 16 heads of 64",
        tangent("compiled"),
        tangent("reference"),
        "PyTorch by query blocks",
    )
    for n, positions, d_in, d_out in ((64, 128, 512, 512), (32, 1024, 64, 64), (16, 256, 768, 768)):
        n, positions = on.count(n * 64) if on.quick else n, 16 if on.quick else positions
        a, g = on.normal(n, positions, d_in), on.normal(1, n, positions, d_out)
        cheaper = by_gradients if positions > d_in else by_grams
        yield Case(
            f"ghost_norm n={n} T={positions} {d_in} -> {d_out}",
            lambda a=a, g=g: kernels.ghost_norm(a, g),
            lambda a=a, g=g, form=cheaper: form(a, g),
            "gradients formed" if cheaper is by_gradients else "Gram matrices formed",
        )


def whole_calls(on: Device) -> Iterator[Case]:
    """What the library's users call, on the kernels and on the reference."""
    n = on.count(2048)
    width = 32 if on.quick else 512
    model = nn.Sequential(
        nn.Linear(784, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 10)
    )
    model.to(on.name)
    x, y = on.normal(n, 784), torch.randint(0, 10, (n,), device=on.name)
    loss = nn.CrossEntropyLoss()
    op = fk.hessian(model, loss, (x, y))
    vectors = on.normal(8, op.shape[0])

    def both(call: Call) -> tuple[Call, Call]:
        def on_reference() -> object:
            with using("reference"):
                return call()

        return call, on_reference

    for what, call in (
        (f"hessian, 8 products, MLP of width {width}, n={n}", lambda: op @ vectors.mT),
        ("hessian_trace, the same", lambda: fk.hessian_trace(model, loss, (x, y), seed=0)),
        ("geometry, the same", lambda: fk.geometry(model, x[:256])),
    ):
        own, reference = both(call)
        yield Case(what, own, reference, "flatkern's PyTorch reference", queued=False)


def copying(on: Device, rounds: int) -> tuple[float, int]:
    """Milliseconds of a long copy and the bytes that it reads and writes."""
    source = on.normal(on.count(1 << 28))
    to = torch.empty_like(source)
    return on.medians({"copy": lambda: to.copy_(source)}, rounds)["copy"], 2 * 4 * source.numel()


def measure(on: Device, rounds: int) -> Iterator[dict[str, Any]]:
    """The rows, one by one; a call that fails leaves its error in its row."""
    copy_ms, moved = copying(on, rounds)
    speed = moved / copy_ms  # bytes read and written a millisecond
    yield {"what": "copy", "own_ms": copy_ms, "gb_per_s": speed / 1e6}
    for group in (matrices, elements, attention_and_ghosts, whole_calls):
        try:
            for case in group(on):
                row: dict[str, Any] = {"what": case.what, "against": case.against, "bytes": case.bytes}
                try:
                    times = on.medians({"own": case.own, "other": case.other}, rounds, case.queued)
                except Exception as error:
                    yield row | {"error": f"{type(error).__name__}: {error}"}
                    continue
                row |= {
                    "own_ms": times["own"],
                    "other_ms": times["other"],
                    "ratio": times["other"] / times["own"],
                }
                yield row | {"of_copy_speed": case.bytes / speed / times["own"] if case.bytes else None}
        except Exception as error:
            yield {"what": group.__name__, "error": f"{type(error).__name__}: {error}"}


def line(row: dict[str, Any]) -> str:
    """Of the table."""
    if "error" in row:
        return f"| {row['what']} | failed: {row['error'].splitlines()[0]} | | | |"
    part = f"{100 * row['of_copy_speed']:.0f} %" if row.get("of_copy_speed") else ""
    other = f"{row['other_ms']:.3f} ({row['against']})"
    return f"| {row['what']} | {row['own_ms']:.3f} | {other} | {row['ratio']:.2f} | {part} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("build/gpu"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, two rounds: does the script work")
    args = parser.parse_args()
    on = Device(args.device, args.quick)
    device = torch.cuda.get_device_name(args.device) if args.device != "cpu" else "cpu: no figures"
    args.output.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"device": device, "environment": environment(), "rows": []}
    here = result["environment"]
    about = f"{device}, {here['date']}, commit {here['commit']}, torch {here['torch']}"
    head = "| call | kernel, ms | torch, ms | ratio | of copy speed |\n| --- | --- | --- | --- | --- |"
    for row in measure(
        on, 2 if args.quick else args.rounds
    ):  # written after every row: the run may be cut off
        result["rows"].append(row)
        rows = result["rows"]
        table = [f"{about}; copy {rows[0]['gb_per_s']:.0f} GB/s", "", head, *(line(r) for r in rows[1:])]
        (args.output / "gpu.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        (args.output / "gpu.md").write_text("\n".join(table) + "\n", encoding="utf-8")
        if len(rows) > 1:
            print(line(row), flush=True)
    if failed := sum("error" in row for row in result["rows"]):
        sys.exit(f"bench_gpu: {failed} rows failed")


if __name__ == "__main__":
    main()
