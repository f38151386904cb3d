"""Activations, softmax, cross-entropy and norms with second-order terms: against eager PyTorch, Inductor and a copy.

``python -m benchmarks.bench_jets`` writes benchmarks/results/jets.json: one thread, the smallest CPU time over rounds
in which all sides take turns in one process. The other sides compute the same three results from the shortest formulas
in PyTorch, called directly and through ``torch.compile``. *copy*: ``y.copy_(x)`` of as many bytes as are read and
written here; no kernel that reads and writes memory once can be much faster where the data do not fit into the caches.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

import flatkern as fk
from benchmarks.operator_problems import Block
from benchmarks.timing import minima, save
from benchmarks.trace_networks import LOSS, MODELS, train
from flatkern import kernels
from flatkern.experiments.data import load
from flatkern.losses import TokenCrossEntropyLoss
from flatkern.operators import HessianOperator
from flatkern.operators.tangent_rules import softmax as softmax_rules
from flatkern.residual import elementwise

Formula = Callable[..., tuple[Tensor, ...]]


# -- the shortest formulas in PyTorch --------------------------------------------------------------------------


def relu(z: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """Second order 0."""
    slope = (z > 0).to(z.dtype)
    return torch.relu(z), slope * t, torch.zeros_like(t)


def gelu(z: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """By erf."""
    below = 0.5 * (1 + torch.erf(z * 0.5**0.5))
    density = torch.exp(-0.5 * z * z) * (0.5 / math.pi) ** 0.5
    return z * below, (below + z * density) * t, (2 - z * z) * density * t * t


def gelu_tanh(z: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """By tanh."""
    rate, cubic = (2 / math.pi) ** 0.5, 0.044715
    y = torch.tanh(rate * z * (1 + cubic * z * z))
    u, d = rate * (1 + 3 * cubic * z * z), 1 - y * y
    s, first, second = 0.5 * (1 + y), 0.5 * d * u, 0.5 * d * (6 * rate * cubic * z - 2 * y * u * u)
    return z * s, (s + z * first) * t, (2 * first + z * second) * t * t


def silu(z: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """By the logistic function."""
    s = torch.sigmoid(z)
    d = s * (1 - s)
    return z * s, (s + z * d) * t, d * (2 + z * (1 - 2 * s)) * t * t


def tanh(z: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """By 1 − tanh²."""
    y = torch.tanh(z)
    d = 1 - y * y
    return y, d * t, -2 * y * d * t * t


def sigmoid(z: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """By σ (1 − σ)."""
    s = torch.sigmoid(z)
    d = s * (1 - s)
    return s, d * t, d * (1 - 2 * s) * t * t


def softplus(z: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """Its slope is the logistic function."""
    s = torch.sigmoid(z)
    return nn.functional.softplus(z), s * t, s * (1 - s) * t * t


def elu(z: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """By one exponential."""
    growth, positive = torch.exp(z.clamp(max=0)), z > 0
    slope = torch.where(positive, 1.0, growth)
    return torch.where(positive, z, growth - 1), slope * t, torch.where(positive, 0.0, growth) * t * t


ACTIVATIONS: dict[str, Formula] = {
    f.__name__: f for f in (relu, gelu, gelu_tanh, silu, tanh, sigmoid, softplus, elu)
}


def softmax_curvature(p: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """With p itself as the cotangent."""
    c = t - (p * t).sum(-1, keepdim=True)
    return (((p - (p * p).sum(-1, keepdim=True)) * p * c * c).sum(-1),)


def cross_entropy_hvp(z: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """p ∘ (v − ⟨p, v⟩)."""
    p = torch.softmax(z, -1)
    return (p * (v - (p * v).sum(-1, keepdim=True)),)


def wide_cross_entropy_hvp(z: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """The same accumulated in float32."""
    return (cross_entropy_hvp(z.float(), v.float())[0].to(z.dtype),)


def layer_norm_tangent(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """x in the place of what was normalized, σ = 1."""
    c = t - t.mean(-1, keepdim=True)
    return (c - x * (x * c).mean(-1, keepdim=True),)


def layer_norm_curvature(x: Tensor, t: Tensor) -> tuple[Tensor, ...]:
    """The same, and x as the cotangent."""
    c = t - t.mean(-1, keepdim=True)
    p, q = (x * c).mean(-1), (c * c).mean(-1)
    return ((x * x).sum(-1) * (3 * p * p - q) - 2 * p * (x * c).sum(-1),)


# -- the tables ------------------------------------------------------------------------------------------------


def sides(
    own: Callable[[], object], formula: Formula, z: Tensor, t: Tensor
) -> dict[str, Callable[[], object]]:
    """The three sides; the compiled one has been compiled."""
    compiled = torch.compile(formula, dynamic=False)
    compiled(z, t)
    return {"own": own, "eager": lambda: formula(z, t), "inductor": lambda: compiled(z, t)}


def copied(count: int) -> Callable[[], object]:
    """A copy that reads and writes ``count`` bytes together."""
    source = torch.ones(count // 8)
    to = torch.empty_like(source)
    return lambda: to.copy_(source)


def row(what: str, size: str, dtype: torch.dtype, times: dict[str, float]) -> dict[str, Any]:
    """One row of the result."""
    best = min(times["own"], times.get("out", math.inf))
    return {
        "kernel": what,
        "size": size,
        "dtype": str(dtype).removeprefix("torch."),
        **{f"{name}_us": round(value, 1) for name, value in times.items()},
        "over_eager": times["eager"] / times["own"],
        "over_inductor": times["inductor"] / times["own"],
        "over_inductor_out": times["inductor"] / best,
        "of_copy_speed": times["copy"] / times["own"],
        "of_copy_speed_out": times["copy"] / best,
    }


def activation_rows(seconds: float) -> list[dict[str, Any]]:
    """``activation_jet`` for one tangent: two arrays read, three written."""
    return [activation_row(kind, n, seconds) for n in (1 << 18, 1 << 22) for kind in ACTIVATIONS]


def activation_row(kind: Any, n: int, seconds: float) -> dict[str, Any]:
    """One kind and size."""
    z, t = torch.randn(n), torch.randn(n)
    room = [torch.empty(n), torch.empty(1, n), torch.empty(1, n)]
    functions = sides(lambda: kernels.activation_jet(z, t[None], kind), ACTIVATIONS[kind], z, t)
    functions["out"] = lambda: kernels.activation_jet(z, t[None], kind, out=room)
    functions["copy"] = copied(5 * 4 * n)
    result = row(f"activation_jet {kind}", f"{n:,}", z.dtype, minima(functions, seconds))
    show(result)
    return result


def row_rows(seconds: float) -> list[dict[str, Any]]:
    """Softmax, cross-entropy and norms."""
    out = []

    def bent(p: Tensor, t: Tensor) -> Tensor:
        return kernels.softmax_curvature(p, t, p)

    def moved(x: Tensor, t: Tensor) -> Tensor:
        return kernels.layer_norm_tangent(x, ones[: len(x)], t)

    def turned(x: Tensor, t: Tensor) -> Tensor:
        return kernels.layer_norm_curvature(x, ones[: len(x)], t, x)

    ones = torch.ones(4096)
    cases: list[tuple[str, tuple[int, int], torch.dtype, Callable[..., object], Formula, int]] = [
        ("softmax_curvature", (4096, 64), torch.float32, bent, softmax_curvature, 2),
        ("softmax_curvature", (1024, 1024), torch.float32, bent, softmax_curvature, 2),
        ("cross_entropy_hvp", (4096, 10), torch.float32, kernels.cross_entropy_hvp, cross_entropy_hvp, 3),
        ("cross_entropy_hvp", (1024, 1000), torch.float32, kernels.cross_entropy_hvp, cross_entropy_hvp, 3),
        ("cross_entropy_hvp", (128, 50257), torch.float32, kernels.cross_entropy_hvp, cross_entropy_hvp, 3),
        (
            "cross_entropy_hvp",
            (128, 50257),
            torch.bfloat16,
            kernels.cross_entropy_hvp,
            wide_cross_entropy_hvp,
            3,
        ),
        ("layer_norm_tangent", (4096, 64), torch.float32, moved, layer_norm_tangent, 3),
        ("layer_norm_tangent", (2048, 768), torch.float32, moved, layer_norm_tangent, 3),
        ("layer_norm_curvature", (4096, 64), torch.float32, turned, layer_norm_curvature, 2),
        ("layer_norm_curvature", (2048, 768), torch.float32, turned, layer_norm_curvature, 2),
    ]
    for name, shape, dtype, own, formula, arrays in cases:
        z, t = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
        functions = sides(lambda own=own, z=z, t=t: own(z, t[None]), formula, z, t)
        functions["copy"] = copied(arrays * z.element_size() * z.numel())
        out.append(row(name, f"{shape[0]:,} × {shape[1]:,}", dtype, minima(functions, seconds)))
        show(out[-1])
    return out


def formula_product(output: Tensor, target: Tensor, v: Tensor) -> Tensor:
    """The Hessian product of cross-entropy as the library had it: by softmax, from the likeliest class."""
    axis = v.ndim - output.ndim + 1
    p, top = output.softmax(1), output.argmax(1, keepdim=True)
    v = v - v.gather(axis, top.expand(*v.shape[: axis - 1], *top.shape))
    kept = (target != -100).to(output.dtype)
    return kept.unsqueeze(1) * p * (v - (p * v).sum(axis, keepdim=True))


def formula_product_last(output: Tensor, target: Tensor, v: Tensor) -> Tensor:
    """The same with the classes on the last axis."""
    axis = v.ndim - output.ndim + 1
    return formula_product(output.movedim(-1, 1), target, v.movedim(-1, axis)).movedim(axis, -1)


def library_rows(seconds: float) -> list[dict[str, Any]]:
    """What changes for those who never call a kernel."""
    out = []
    for vocabulary in (1000, 50257):
        model = nn.Sequential(
            nn.Embedding(vocabulary, 64), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, vocabulary)
        )
        x, y = torch.randint(vocabulary, (4, 32)), torch.randint(vocabulary, (4, 32))
        operator = fk.ggn(model, TokenCrossEntropyLoss(), (x, y))
        plain = fk.ggn(model, TokenCrossEntropyLoss(), (x, y))
        plain._loss = replace(plain._loss, product=formula_product_last)
        v = torch.randn(operator.shape[1])
        plain.refresh()
        functions = {"own": lambda o=operator, v=v: o @ v, "before": lambda o=plain, v=v: o @ v}
        torch.testing.assert_close(functions["own"](), functions["before"](), rtol=1e-3, atol=1e-5)
        out.append(
            library_row(
                f"GGN product, {vocabulary:,} classes, 128 tokens, width 64", minima(functions, seconds)
            )
        )
    for vocabulary in (1000, 10000):
        for vectors in (1, 8):
            out.append(hessian_row(vocabulary, vectors, seconds))
    data = load("digits-mnist", num_train=64, num_test=10).train
    for name in ("MLP GELU", "MLP tanh", "VGG GELU", "ViT GELU"):
        torch.manual_seed(0)
        model = MODELS[name]()
        train(model, data.x, data.labels, 50)
        model.eval()

        def run(model: nn.Module = model) -> object:
            return fk.hessian_trace(model, LOSS, (data.x, data.labels), samples=10, seed=0)

        def before(run: Callable[[], object] = run) -> object:
            with patch.object(elementwise, "_kind", lambda op: None):  # by PyTorch's formulas
                return run()

        out.append(
            library_row(
                f"hessian_trace, {name}, 64 digits, 10 probes",
                minima({"own": run, "before": before}, 3 * seconds),
            )
        )
    return out


def hessian_row(vocabulary: int, vectors: int, seconds: float) -> dict[str, Any]:
    """Products with the Hessian by tangent programs, of a small transformer with many classes."""
    width = 128
    model = nn.Sequential(
        nn.Embedding(vocabulary, width),
        Block(width, 4),
        Block(width, 4),
        nn.LayerNorm(width),
        nn.Linear(width, vocabulary),
    )
    data = torch.randint(vocabulary, (4, 64)), torch.randint(vocabulary, (4, 64))

    def build() -> HessianOperator:
        return fk.hessian(model, TokenCrossEntropyLoss(), data, mode="linearized", block_size=vectors)

    operator = build()
    with patch.object(softmax_rules.LogSoftmax, "meet", lambda rule, consumers: None):  # rule by rule
        plain = build()
        v = torch.randn(vectors, operator.shape[1]).mT
        plain @ v
    torch.testing.assert_close(operator @ v, plain @ v, rtol=1e-3, atol=1e-5)
    what = f"Hessian product, tangent program, {vocabulary:,} classes, 256 tokens, width 128"
    what += ", eight vectors" if vectors > 1 else ""
    return library_row(what, minima({"own": lambda: operator @ v, "before": lambda: plain @ v}, 3 * seconds))


def library_row(what: str, times: dict[str, float]) -> dict[str, Any]:
    """Before and after."""
    result = {
        "kernel": what,
        "before_us": round(times["before"], 1),
        "own_us": round(times["own"], 1),
        "ratio": times["before"] / times["own"],
    }
    show(result)
    return result


def show(result: dict[str, Any]) -> None:
    """One line."""
    print({k: round(v, 2) if isinstance(v, float) else v for k, v in result.items()}, flush=True)


def main() -> None:
    """Measure everything and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of CPU time a row")
    parser.add_argument("--only", nargs="*", default=["activations", "rows", "library"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    parts = {"activations": activation_rows, "rows": row_rows, "library": library_rows}
    with torch.no_grad():
        rows = [
            r
            for name in ("activations", "rows")
            if name in options.only
            for r in parts[name](options.seconds)
        ]
    if "library" in options.only:
        rows += library_rows(options.seconds)
    settings = {
        "threads": 1,
        "timing": f"smallest CPU time over interleaved rounds, {options.seconds:g} s a row",
        "data": "normal random numbers",
    }
    if len(options.only) == len(parts):
        save("jets", settings, rows)


if __name__ == "__main__":
    main()
