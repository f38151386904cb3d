"""Random rows that are a function of (seed, row, element), and dots with them that never store them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ._checks import check_dtype
from ._philox import NORMALS, NORMALS_PER_BLOCK, SIGNS, SIGNS_PER_BLOCK, normals, philox, signs
from ._registration import in_graph, quick
from ._select import compiled_available, runs_compiled_rows

_SEEDS = 1 << 63
_AT_ONCE = 1 << 20  # elements that the reference draws at a time


def rademacher(
    seed: int,
    count: int,
    size: int,
    *,
    first: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    r"""Independent signs ±1, rows ``first`` to ``first + count`` of the matrix that ``seed`` stands for.

    Element (i, j) is a bit of Philox 4x32-10 at counter (j div 128, i) with the seed as key: the same number on
    every device, in every dtype, whatever rows are drawn at once. No generator's state is used or changed.

    Args:
        seed: 0 to 2⁶³ − 1.
        count, size: shape of the result.
        first: index of the first row.
        dtype: float32 or float64.
        device: where to.

    Returns:
        [count, size].

    Cost: one pass of writing; ten integer rounds for 128 signs.

    Raises:
        TypeError: another dtype.
        ValueError: a negative argument, or a seed too large.

    Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.

    Example:
        >>> rademacher(0, 2, 8).equal(rademacher(0, 5, 8)[:2])
        True
    """
    return _rows("rademacher", seed, count, size, first, dtype, torch.device(device))


def normal(
    seed: int,
    count: int,
    size: int,
    *,
    first: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    r"""Independent standard normal numbers, rows ``first`` to ``first + count`` of the matrix of ``seed``.

    Box–Muller of 32-bit words in float32, rounded alike on every device; float64 holds the same values. The
    largest possible magnitude is 6.8. Otherwise as :func:`rademacher`, with numbers independent of its.

    Args:
        seed: 0 to 2⁶³ − 1.
        count, size: shape of the result.
        first: index of the first row.
        dtype: float32 or float64.
        device: where to.

    Returns:
        [count, size].

    Cost: ten integer rounds, two logarithms, roots, sines and cosines for four numbers.

    Raises:
        TypeError: another dtype.
        ValueError: a negative argument, or a seed too large.

    Source: Box, Muller, Ann. Math. Statist. 29 (1958); Salmon et al. as above.

    Example:
        >>> normal(0, 1, 100_000).std().round(decimals=2)
        tensor(1.)
    """
    return _rows("normal", seed, count, size, first, dtype, torch.device(device))


def rademacher_dot(x: Tensor, seed: int, *, first: int = 0) -> Tensor:
    r"""Σ_j s_ij x_ij with the signs s of :func:`rademacher`, which are made on the way and never stored.

    Args:
        x: [..., k, size], float32 or float64. Row i goes with row ``first`` + i of the signs, the same for
            all leading dimensions.
        seed: as of :func:`rademacher`.
        first: index of the row that belongs to x[..., 0, :].

    Returns:
        [..., k] float64, summed in float64 in an order that depends on ``size`` alone. Differentiable in x,
        any number of times.

    Cost: one reading of x.

    Raises:
        TypeError: not a tensor of float32 or float64.
        ValueError: fewer than two dimensions; a negative or too large seed.

    Example:
        >>> import torch
        >>> x = torch.randn(3, 50, dtype=torch.float64)
        >>> torch.allclose(rademacher_dot(x, 7), (rademacher(7, 3, 50, dtype=x.dtype) * x).sum(1))
        True
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"rademacher_dot: expected a torch.Tensor, got {type(x).__name__}")
    check_dtype("rademacher_dot", x.dtype)
    if x.dim() < 2:
        raise ValueError(f"rademacher_dot: expected [..., k, size], got shape {tuple(x.shape)}")
    _check_counts("rademacher_dot", seed=seed, first=first)
    return _dot(x, seed, first)


# -- reference --------------------------------------------------------------------------------------------
_FORMS = {
    "rademacher": (SIGNS, SIGNS_PER_BLOCK, signs),
    "normal": (NORMALS, NORMALS_PER_BLOCK, normals),
}


def reference_rows(
    kind: str, seed: int, rows: tuple[int, int], columns: tuple[int, int], device: torch.device
) -> Tensor:
    """Rows and columns of ``kind``, [count, ≤ size]; int64 for signs, float32 for normal numbers."""
    stream, width, make = _FORMS[kind]
    low, high = columns[0] // width, -(-columns[1] // width)
    blocks = torch.arange(low, high, device=device)
    words = philox(seed, torch.arange(*rows, device=device)[:, None], blocks, stream)
    return make(words).flatten(1)[:, columns[0] - low * width : columns[1] - low * width]


def _reference(
    kind: str, seed: int, count: int, size: int, first: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    out = torch.empty(count, size, dtype=dtype, device=device)
    step = max(SIGNS_PER_BLOCK, _AT_ONCE // max(count, 1) // SIGNS_PER_BLOCK * SIGNS_PER_BLOCK)
    for start in range(0, size if count else 0, step):
        stop = min(start + step, size)
        out[:, start:stop] = reference_rows(kind, seed, (first, first + count), (start, stop), device)
    return out


def reference_dot(x: Tensor, seed: int, first: int) -> Tensor:
    """With the signs stored."""
    rows = _reference("rademacher", seed, x.shape[-2], x.shape[-1], first, torch.float64, x.device)
    return (x.double() * rows).sum(-1)


# -- dispatch ---------------------------------------------------------------------------------------------
def _check_counts(name: str, **counts: int) -> None:
    for argument, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: {argument}: expected an int, got {value!r}")
        if not 0 <= value < _SEEDS:
            raise ValueError(f"{name}: {argument} = {value} is out of range; expected 0 to 2**63 - 1")


def _rows(
    kind: str, seed: int, count: int, size: int, first: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    check_dtype(kind, dtype)
    _check_counts(kind, seed=seed, count=count, size=size, first=first)
    if not runs_compiled_rows(device):
        return _reference(kind, seed, count, size, first, dtype, device)
    like = torch.empty(0, dtype=dtype, device=device)
    rows: Tensor = getattr(torch.ops.flatkern, kind)(like, seed, first, count, size)
    return rows


def _raw_dot(x: Tensor, seed: int, first: int) -> Tensor:
    if not runs_compiled_rows(x.device):
        return reference_dot(x, seed, first)
    batch = x.shape[:-2]
    flat = x.reshape(batch.numel(), *x.shape[-2:]).contiguous()
    sums: Tensor = torch.ops.flatkern.rademacher_dot(flat, seed, first)
    return sums.reshape(*batch, x.shape[-2])


@quick
class _Dot(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, seed: int, first: int) -> Tensor:
        return _raw_dot(x, seed, first)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, int, int], output: Tensor) -> None:
        x, ctx.seed, ctx.first = inputs
        ctx.shape, ctx.dtype, ctx.device = x.shape, x.dtype, x.device

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        count, size = ctx.shape[-2:]
        rows = _rows("rademacher", ctx.seed, count, size, ctx.first, ctx.dtype, ctx.device)
        return grads[0].to(ctx.dtype)[..., None] * rows, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: Any) -> Tensor:
        # the map is linear; the product with stored signs keeps every enclosing level of torch.func
        count, size = ctx.shape[-2:]
        rows = _rows("rademacher", ctx.seed, count, size, ctx.first, torch.float64, ctx.device)
        return (tangent.double() * rows).sum(-1)

    @staticmethod
    def vmap(_info: Any, in_dims: Any, x: Tensor, seed: int, first: int) -> tuple[Tensor, int]:
        return _dot(x.movedim(in_dims[0], 0), seed, first), 0


@in_graph
def _dot(x: Tensor, seed: int, first: int) -> Tensor:
    value: Tensor = _Dot.apply(x, seed, first)
    return value


def _fake_rows(like: Tensor, seed: int, first: int, rows: int, size: int) -> Tensor:
    return like.new_empty(rows, size)


def _fake_dot(x: Tensor, seed: int, first: int) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float64)


if compiled_available():
    torch.library.register_fake("flatkern::rademacher", _fake_rows)
    torch.library.register_fake("flatkern::normal", _fake_rows)
    torch.library.register_fake("flatkern::rademacher_dot", _fake_dot)
