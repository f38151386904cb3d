"""The kernels over NumPy arrays: no tensors, no copies, for other tools.

The same code as `flatkern.kernels` runs here, forward only. Arrays of any shape and strides are read where
they lie; `threads` asks for more than one thread, used only where each has some 100 µs of work. The
interpreter lock is released meanwhile.
"""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

try:
    import flatkern._native as _native
except ImportError as _error:
    raise ImportError(
        "flatkern.native needs the compiled kernels, which are not there for this Python "
        f"({_error}); build them with `FLATKERN_BUILD=required pip install --no-build-isolation -e .`"
    ) from _error

from flatkern._native_ghost import conv_ghost_norm, ghost_norm
from flatkern._native_jets import (
    ActivationDerivatives,
    Jet,
    Pullback,
    activation_derivatives,
    activation_jet,
    activation_pullback,
    cross_entropy_hvp,
    layer_norm_curvature,
    layer_norm_tangent,
    softmax_curvature,
)

__all__ = [
    "ActivationDerivatives",
    "GramStats",
    "Jet",
    "LanczosStep",
    "Pullback",
    "activation_derivatives",
    "activation_jet",
    "activation_pullback",
    "build_info",
    "conv_ghost_norm",
    "cross_entropy_hvp",
    "ghost_norm",
    "gram",
    "gram_stats",
    "lanczos_step",
    "layer_norm_curvature",
    "layer_norm_tangent",
    "normal",
    "rademacher",
    "rademacher_dot",
    "softmax_curvature",
    "spd_logdet",
]

Floats = NDArray[np.float32] | NDArray[np.float64]
_MAX_DIMS = 10


class GramStats(NamedTuple):
    """What `gram_stats` returns, one entry a sample; see `flatkern.kernels.GramStats`."""

    logdet: NDArray[np.float64]
    trace: NDArray[np.float64]
    frobenius_sq: NDArray[np.float64]
    rank_deficient: NDArray[np.bool_]
    pivot_ratio: NDArray[np.float64]
    bad_pivots: NDArray[np.int64]


def spd_logdet(G: Floats, *, threads: int = 1) -> Floats:
    """log det G of symmetric positive definite matrices, [..., c, c] → [...], in G's dtype.

    Reads the lower triangle. -inf where a pivot is at or below c ε times its diagonal entry, NaN where the
    triangle is not finite. c ≤ 128.

    Raises:
        TypeError: not an array of float32 or float64 in native byte order.
        ValueError: not square, or c > 128.

    Example:
        >>> import numpy as np
        >>> float(np.exp(spd_logdet(np.diag([1.0, 2.0, 3.0]))).round())
        6.0
    """
    return cast(Floats, _native.spd_logdet(_array("spd_logdet", G, square=True), _threads(threads))[()])


def gram(x: Floats, *, threads: int = 1) -> NDArray[np.float64]:
    """The Gram matrix x xᵀ in float64: [..., c, d] → [..., c, c]; c ≤ 128.

    Raises:
        TypeError: not an array of float32 or float64 in native byte order.
        ValueError: fewer than two dimensions, or c > 128.

    Example:
        >>> import numpy as np
        >>> gram(np.array([[1.0, 2.0], [0.0, 1.0]])).tolist()
        [[5.0, 2.0], [2.0, 1.0]]
    """
    return cast(NDArray[np.float64], _native.gram(_array("gram", x, square=False), _threads(threads)))


def gram_stats(x: Floats, *, threads: int = 1) -> GramStats:
    """log det(x xᵀ), tr(x xᵀ), ‖x xᵀ‖_F², rank deficiency, pivots of every sample, [..., c, d] → [...]; c ≤ 128.

    Accumulated in float64, with the thresholds of `flatkern.kernels.gram_stats`, and the rows themselves factored where
    their Gram matrix has lost the digits.

    Raises:
        TypeError: not an array of float32 or float64 in native byte order.
        ValueError: fewer than two dimensions, or c > 128.

    Example:
        >>> import numpy as np
        >>> gram_stats(np.array([[[2.0, 0.0], [0.0, 3.0]]])).trace.tolist()
        [13.0]
    """
    return GramStats(*_native.gram_stats(_array("gram_stats", x, square=False), _threads(threads)))


class LanczosStep(NamedTuple):
    """What `lanczos_step` returns; see `flatkern.kernels.LanczosStep`."""

    residual: Floats
    alpha: NDArray[np.float64]
    norm: NDArray[np.float64]


def rademacher(
    seed: int, count: int, size: int, *, first: int = 0, dtype: Any = np.float32, threads: int = 1
) -> Floats:
    """Signs ±1, rows ``first`` to ``first + count`` of the matrix of ``seed``: [count, size].

    The numbers of `flatkern.kernels.rademacher`.

    Raises:
        TypeError: another dtype than float32 and float64.
        ValueError: a count, row or seed that is negative or 2**63 and more.

    Example:
        >>> float(abs(rademacher(0, 2, 10)).sum())
        20.0
    """
    return _random_rows("rademacher", seed, count, size, first, dtype, threads)


def normal(
    seed: int, count: int, size: int, *, first: int = 0, dtype: Any = np.float32, threads: int = 1
) -> Floats:
    """Standard normal numbers, rows ``first`` to ``first + count`` of the matrix of ``seed``: [count, size].

    The numbers of `flatkern.kernels.normal`.

    Raises:
        TypeError: another dtype than float32 and float64.
        ValueError: a count, row or seed that is negative or 2**63 and more.

    Example:
        >>> normal(0, 1, 3).shape
        (1, 3)
    """
    return _random_rows("normal", seed, count, size, first, dtype, threads)


def rademacher_dot(x: Floats, seed: int, *, first: int = 0, threads: int = 1) -> NDArray[np.float64]:
    """Σ_j s_ij x_ij with the signs of `rademacher`, never stored: [..., k, size] → [..., k].

    Raises:
        TypeError: not an array of float32 or float64 in native byte order.
        ValueError: fewer than two dimensions; a row or seed that is negative or 2**63 and more.

    Example:
        >>> import numpy as np
        >>> x = np.ones((2, 10))
        >>> bool((rademacher_dot(x, 3) == rademacher(3, 2, 10).sum(1)).all())
        True
    """
    _counts("rademacher_dot", seed=seed, first=first)
    x = np.ascontiguousarray(_floats("rademacher_dot", x))
    lead = x.shape[:-1]
    flat = x.reshape(-1 if x.size else int(np.prod(lead[:-1])), *x.shape[-2:])
    return cast(
        NDArray[np.float64], _native.rademacher_dot(flat, seed, first, _threads(threads)).reshape(lead)
    )


def lanczos_step(
    image: Floats, current: Floats, previous: Floats, beta: NDArray[Any], *, threads: int = 1
) -> LanczosStep:
    """α = ⟨v, w⟩, r = w − α v − β u, ‖r‖ of k Lanczos runs; w, v, u [k, size], β [k].

    Raises:
        TypeError: not arrays of one dtype, float32 or float64.
        ValueError: shapes that do not go together.

    Example:
        >>> import numpy as np
        >>> lanczos_step(np.ones((1, 2)), np.eye(2)[:1], np.zeros((1, 2)), np.zeros(1)).residual.tolist()
        [[0.0, 1.0]]
    """
    rows = [np.ascontiguousarray(_floats("lanczos_step", x)) for x in (image, current, previous)]
    if any(x.dtype != rows[0].dtype for x in rows):
        raise TypeError(f"lanczos_step: expected one dtype, got {', '.join(str(x.dtype) for x in rows)}")
    beta = np.ascontiguousarray(beta, dtype=np.float64)
    if any(x.ndim != 2 or x.shape != rows[0].shape for x in rows) or beta.shape != rows[0].shape[:1]:
        raise ValueError(
            "lanczos_step: expected image, current and previous [k, size] and beta [k], got "
            f"{', '.join(str(x.shape) for x in (*rows, beta))}"
        )
    return LanczosStep(*_native.lanczos_step(*rows, beta, _threads(threads)))


def gram_singular_values(x: Floats, *, threads: int = 1) -> NDArray[np.float64]:
    """Singular values of every sample in descending order, [..., c, d] → [..., min(c, d)] in float64; min(c, d) ≤ 64.

    See `flatkern.kernels.gram_singular_values`.

    Raises:
        TypeError: not an array of float32 or float64 in native byte order.
        ValueError: fewer than two dimensions, or min(c, d) > 64.

    Example:
        >>> import numpy as np
        >>> gram_singular_values(np.array([[3.0, 0.0, 0.0], [0.0, 0.0, 4.0]])).tolist()
        [4.0, 3.0]
    """
    name = "gram_singular_values"
    if isinstance(x, np.ndarray) and x.ndim >= 2 and x.shape[-2] > x.shape[-1]:
        x = np.swapaxes(x, -1, -2)
    checked = _array(name, x, square=False, limit="max_spectrum")
    return cast(NDArray[np.float64], _native.gram_singular_values(checked, _threads(threads)))


def build_info() -> dict[str, Any]:
    """Instruction set chosen and available, compiler, flags, CUDA architectures."""
    return dict(_native.build_info())


def _counts(name: str, **counts: int) -> None:
    for argument, value in counts.items():
        if not 0 <= value < 1 << 63:
            raise ValueError(f"{name}: {argument} = {value} is out of range; expected 0 to 2**63 - 1")


def _random_rows(name: str, seed: int, count: int, size: int, first: int, dtype: Any, threads: int) -> Floats:
    _counts(name, seed=seed, count=count, size=size, first=first)
    like = _floats(name, np.empty((0, 0), dtype=dtype))
    return cast(Floats, getattr(_native, name)(like, seed, first, count, size, _threads(threads)))


def _array(name: str, x: Any, *, square: bool, limit: str = "max_size") -> NDArray[Any]:
    x = _floats(name, x)
    if square and x.shape[-1] != x.shape[-2]:
        raise ValueError(f"{name}: expected square matrices [..., c, c], got shape {x.shape}")
    most = int(_native.build_info()[limit])
    if x.shape[-2] > most:
        raise ValueError(f"{name}: c = {x.shape[-2]} is more than the {most} rows that the kernels take")
    odd = any(s % x.itemsize for s in x.strides)  # a field of a structured array, say
    if odd or not x.flags.aligned or x.ndim > _MAX_DIMS:
        x = np.ascontiguousarray(x)
    return x


def _floats(name: str, x: Any) -> NDArray[Any]:
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{name}: expected a numpy.ndarray, got {type(x).__name__}")
    if x.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(
            f"{name}: dtype {x.dtype} is not supported; use float32 or float64 in native byte order"
        )
    if x.ndim < 2:
        raise ValueError(f"{name}: expected at least two dimensions, got shape {x.shape}")
    return x


def _threads(threads: int) -> int:
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    return int(threads)
