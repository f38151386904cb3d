"""The jets over NumPy arrays; public as part of :mod:`flatkern.native`."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flatkern import _native
from flatkern.kernels._activation_forms import Kind, numbers

Floats = NDArray[np.float32] | NDArray[np.float64]


class ActivationDerivatives(NamedTuple):
    """φ, φ' and φ'' of every entry; see `flatkern.kernels.ActivationDerivatives`."""

    value: Floats
    slope: Floats
    bend: Floats


class Jet(NamedTuple):
    """Value, first and second-order terms; see `flatkern.kernels.Jet`."""

    value: Floats
    first: Floats
    second: Floats


class Pullback(NamedTuple):
    """A cotangent pulled back, and its tangents; see `flatkern.kernels.Pullback`."""

    cotangent: Floats
    tangents: Floats


def activation_derivatives(
    z: Floats,
    kind: Kind,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    threshold: float | None = None,
    threads: int = 1,
) -> ActivationDerivatives:
    """φ(z), φ'(z), φ''(z) in z's shape and dtype; see `flatkern.kernels.activation_derivatives`.

    Raises:
        TypeError: not an array of float32 or float64 in native byte order.
        ValueError: an unknown kind, or a parameter that it does not have.

    Example:
        >>> import numpy as np
        >>> activation_derivatives(np.array([2.0]), "relu").value.tolist()
        [2.0]
    """
    name = "activation_derivatives"
    which = numbers(name, kind, alpha, beta, threshold)
    return ActivationDerivatives(
        *_native.activation_derivatives(_dense(name, "z", z), *which, _threads(threads))
    )


def activation_jet(
    z: Floats,
    t: Floats,
    kind: Kind,
    *,
    s: Floats | None = None,
    alpha: float | None = None,
    beta: float | None = None,
    threshold: float | None = None,
    threads: int = 1,
) -> Jet:
    """φ(z), φ'(z) ż_j, φ''(z) ż_j² + φ'(z) z̈_j for tangents [k, *z.shape]; see `flatkern.kernels.activation_jet`.

    Raises:
        TypeError: not arrays of one dtype, float32 or float64 in native byte order.
        ValueError: shapes that do not fit, or an unknown kind.

    Example:
        >>> import numpy as np
        >>> activation_jet(np.zeros(1), np.ones((2, 1)), "sigmoid").first.tolist()
        [[0.25], [0.25]]
    """
    name = "activation_jet"
    which = numbers(name, kind, alpha, beta, threshold)
    z, t = _dense(name, "z", z), _dense(name, "t", t)
    _tangents(name, "t", t, z)
    if s is not None:
        s = _like(name, "s", s, t.shape, z)
    return Jet(*_native.activation_jet(z, t, s, *which, _threads(threads)))


def activation_pullback(
    z: Floats,
    g: Floats,
    t: Floats,
    dg: Floats,
    kind: Kind,
    *,
    alpha: float | None = None,
    beta: float | None = None,
    threshold: float | None = None,
    threads: int = 1,
) -> Pullback:
    """g φ'(z) and ġ_j φ'(z) + g φ''(z) ż_j; see `flatkern.kernels.activation_pullback`.

    Raises:
        TypeError: not arrays of one dtype, float32 or float64 in native byte order.
        ValueError: shapes that do not fit, or an unknown kind.

    Example:
        >>> import numpy as np
        >>> one = np.ones(1)
        >>> activation_pullback(0 * one, one, one[None], 0 * one[None], "softplus").tangents.tolist()
        [[0.25]]
    """
    name = "activation_pullback"
    which = numbers(name, kind, alpha, beta, threshold)
    z, t = _dense(name, "z", z), _dense(name, "t", t)
    _tangents(name, "t", t, z)
    g, dg = _like(name, "g", g, z.shape, z), _like(name, "dg", dg, t.shape, z)
    return Pullback(*_native.activation_pullback(z, g, t, dg, *which, _threads(threads)))


def softmax_curvature(p: Floats, t: Floats, g: Floats, *, log: bool = False, threads: int = 1) -> Floats:
    """⟨g, D²p[ż_j, ż_j]⟩ of p = softmax(z) over the last axis, or of log p; see `flatkern.kernels.softmax_curvature`.

    Raises:
        TypeError: not arrays of one dtype, float32 or float64 in native byte order.
        ValueError: shapes that do not fit.

    Example:
        >>> import numpy as np
        >>> p, t = np.array([0.5, 0.5]), np.array([[1.0, 0.0]])
        >>> softmax_curvature(p, t, np.array([1.0, 0.0]), log=True).tolist()
        [-0.25]
    """
    name = "softmax_curvature"
    p, t = _rows(name, "p", p), _dense(name, "t", t)
    _tangents(name, "t", t, p)
    g = _like(name, "g", g, p.shape, p)
    curvature: Floats = _native.softmax_curvature(p, t, g, bool(log), _threads(threads))
    return curvature


def cross_entropy_hvp(z: Floats, v: Floats, *, scale: Floats | None = None, threads: int = 1) -> Floats:
    """ω (p ∘ v_j − p ⟨p, v_j⟩) over the last axis, ω = ``scale``; see `flatkern.kernels.cross_entropy_hvp`.

    Raises:
        TypeError: not arrays of one dtype, float32 or float64 in native byte order.
        ValueError: shapes that do not fit.

    Example:
        >>> import numpy as np
        >>> cross_entropy_hvp(np.zeros(2), np.array([[1.0, 0.0]])).tolist()
        [[0.25, -0.25]]
    """
    name = "cross_entropy_hvp"
    z, v = _rows(name, "z", z), _dense(name, "v", v)
    _tangents(name, "v", v, z)
    if scale is not None:
        scale = _like(name, "scale", scale, z.shape[:-1], z)
    product: Floats = _native.cross_entropy_hvp(z, scale, v, _threads(threads))
    return product


def layer_norm_tangent(
    unit: Floats, inverse: Floats, t: Floats, weight: Floats | None = None, *, threads: int = 1
) -> Floats:
    """The derivative of LayerNorm over the last axis along tangents [k, *unit.shape].

    See `flatkern.kernels.layer_norm_tangent`.

    Raises:
        TypeError: not arrays of one dtype, float32 or float64 in native byte order.
        ValueError: shapes that do not fit.

    Example:
        >>> import numpy as np
        >>> unit, inverse = np.array([1.0, -1.0]), np.array(0.5)
        >>> layer_norm_tangent(unit, inverse, np.array([[1.0, -1.0]])).tolist()
        [[0.0, 0.0]]
    """
    given = _normalized("layer_norm_tangent", unit, inverse, t, weight)
    tangent: Floats = _native.norm_tangent(*given, _threads(threads))
    return tangent


def layer_norm_curvature(
    unit: Floats,
    inverse: Floats,
    t: Floats,
    g: Floats,
    weight: Floats | None = None,
    *,
    threads: int = 1,
) -> Floats:
    """⟨g, D²y[ẋ_j, ẋ_j]⟩ of y = LayerNorm(x) by rows; see `flatkern.kernels.layer_norm_curvature`.

    Raises:
        TypeError: not arrays of one dtype, float32 or float64 in native byte order.
        ValueError: shapes that do not fit.

    Example:
        >>> import numpy as np
        >>> unit, inverse = np.array([1.0, -1.0]), np.array(0.5)
        >>> layer_norm_curvature(unit, inverse, np.array([[1.0, 0.0]]), unit).tolist()
        [0.0]
    """
    name = "layer_norm_curvature"
    unit, inverse, t, weight = _normalized(name, unit, inverse, t, weight)
    g = _like(name, "g", g, unit.shape, unit)
    curvature: Floats = _native.norm_curvature(unit, inverse, t, g, weight, _threads(threads))
    return curvature


def _normalized(
    name: str, unit: Any, inverse: Any, t: Any, weight: Any
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any] | None]:
    unit, t = _rows(name, "unit", unit), _dense(name, "t", t)
    _tangents(name, "t", t, unit)
    inverse = _like(name, "inverse", inverse, unit.shape[:-1], unit)
    w = None if weight is None else _like(name, "weight", weight, unit.shape[-1:], unit)
    return unit, inverse, t, w


def _dense(name: str, argument: str, x: Any) -> NDArray[Any]:
    if not isinstance(x, np.ndarray):
        raise TypeError(f"{name}: {argument} must be a numpy.ndarray, got {type(x).__name__}")
    if x.dtype not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise TypeError(
            f"{name}: {argument} has dtype {x.dtype}; use float32 or float64 in native byte order"
        )
    return np.require(x, requirements=("C_CONTIGUOUS", "ALIGNED"))


def _rows(name: str, argument: str, x: Any) -> NDArray[Any]:
    dense = _dense(name, argument, x)
    if dense.ndim < 1:
        raise ValueError(f"{name}: {argument} needs at least 1 axis; the last one is the row")
    return dense


def _like(name: str, argument: str, x: Any, shape: tuple[int, ...], primal: NDArray[Any]) -> NDArray[Any]:
    dense = _dense(name, argument, x)
    if dense.dtype != primal.dtype:
        raise TypeError(
            f"{name}: {argument} has dtype {dense.dtype}, the primal {primal.dtype}; convert one of them"
        )
    if dense.shape != shape:
        raise ValueError(f"{name}: {argument} must have shape {shape}, got {dense.shape}")
    return dense


def _tangents(name: str, argument: str, t: NDArray[Any], primal: NDArray[Any]) -> None:
    if t.ndim != primal.ndim + 1:
        raise ValueError(
            f"{name}: {argument} must have shape [k, *{primal.shape}], got {t.shape}; for a single tangent pass "
            f"{argument}[None]"
        )
    _like(name, argument, t, (t.shape[0], *primal.shape), primal)


def _threads(threads: int) -> int:
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    return int(threads)
