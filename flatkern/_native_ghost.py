"""Ghost norms over NumPy arrays; public as part of :mod:`flatkern.native`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from flatkern import _native
from flatkern.kernels._ghost_shapes import Form, check_form, geometry, leading, take_formed

Floats = NDArray[np.float32] | NDArray[np.float64]


def ghost_norm(a: Floats, g: Floats, *, form: Form = "auto", threads: int = 1) -> NDArray[np.float64]:
    """‖Σ_t g_t a_tᵀ‖² of a [..., T, d_in] and g [..., T, d_out], tile by tile; see `flatkern.kernels.ghost_norm`.

    Raises:
        TypeError: not arrays of one dtype, float32 or float64 in native byte order.
        ValueError: shapes that do not go together, or an unknown form.

    Example:
        >>> import numpy as np
        >>> ghost_norm(np.ones((2, 3, 5)), np.ones((2, 3, 4))).tolist()
        [180.0, 180.0]
    """
    a, g = _pair("ghost_norm", "a", a, g, form)
    lead, absent = leading("ghost_norm", a.shape, g.shape)
    samples = lead[absent:]
    shared = np.broadcast_to(a.reshape(a.shape[a.ndim - 2 - len(samples) :]), (*samples, *a.shape[-2:]))
    stacked = np.broadcast_to(g, (*lead, *g.shape[-2:])).reshape(
        math.prod(lead[:absent]), *samples, *g.shape[-2:]
    )
    return _norms(shared, stacked, 1, form, threads).reshape(lead)


def conv_ghost_norm(
    x: Floats,
    g: Floats,
    kernel_size: Sequence[int],
    *,
    stride: Sequence[int] | int = 1,
    padding: Sequence[int] | int = 0,
    dilation: Sequence[int] | int = 1,
    groups: int = 1,
    form: Form = "auto",
    threads: int = 1,
) -> NDArray[np.float64]:
    """The same of a convolution's weight, x [n, C_in, *size], g [..., n, C_out, *positions]; no patches are formed.

    See `flatkern.kernels.conv_ghost_norm`.

    Raises:
        TypeError: not arrays of one dtype, float32 or float64 in native byte order.
        ValueError: shapes or numbers that do not go together, or an unknown form.

    Example:
        >>> import numpy as np
        >>> conv_ghost_norm(np.ones((1, 1, 4, 4)), np.ones((1, 3, 3, 3)), (2, 2)).tolist()
        [972.0]
    """
    name = "conv_ghost_norm"
    x, g = _pair(name, "x", x, g, form)
    shape = geometry(name, x.shape, g.shape, kernel_size, stride, padding, dilation, groups)
    dims, n = len(shape.kernel), len(x)
    padded = np.pad(x, ((0, 0), (0, 0), *((p, p) for p in shape.padding)))
    spans = tuple(gap * (size - 1) + 1 for gap, size in zip(shape.dilation, shape.kernel, strict=True))
    every = sliding_window_view(padded, spans, axis=tuple(range(2, 2 + dims)))
    at = [slice(None)] * 2 + [slice(None, None, step) for step in (*shape.stride, *shape.dilation)]
    view = every[tuple(at)]
    patches = view.reshape(n, groups, -1, *view.shape[2:]) if groups > 1 else view[:, None]
    rows = np.moveaxis(g.reshape(shape.cotangents), 3, -1)
    norms = _norms(np.moveaxis(patches, 2, 2 + dims), rows, dims, form, threads)
    return norms.sum(-1).reshape(*shape.lead, n)


def _norms(
    a: NDArray[Any], g: NDArray[Any], position_dims: int, form: str, threads: int
) -> NDArray[np.float64]:
    samples = g.ndim - 2 - position_dims
    positions, d_in = math.prod(g.shape[1 + samples : -1]), math.prod(a.shape[samples + position_dims :])
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    formed = take_formed(form, positions, d_in, g.shape[-1], g.shape[0])
    value: NDArray[np.float64] = _native.ghost_norm(a, g, position_dims, formed, int(threads))
    return value


def _pair(name: str, argument: str, a: Any, g: Any, form: str) -> tuple[NDArray[Any], NDArray[Any]]:
    check_form(name, form)
    for which, x in ((argument, a), ("g", g)):
        if not isinstance(x, np.ndarray):
            raise TypeError(f"{name}: {which} must be a numpy.ndarray, got {type(x).__name__}")
        if x.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
            raise TypeError(
                f"{name}: {which} has dtype {x.dtype}; use float32 or float64 in native byte order"
            )
        if x.ndim < 2:
            raise ValueError(f"{name}: {which}: expected at least two dimensions, got shape {x.shape}")
    if a.dtype != g.dtype:
        raise TypeError(f"{name}: g has dtype {g.dtype}, {argument} {a.dtype}; convert one of them")
    aligned = [
        x if x.flags.aligned and not any(s % x.itemsize for s in x.strides) else np.ascontiguousarray(x)
        for x in (a, g)
    ]
    return aligned[0], aligned[1]
