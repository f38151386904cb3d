"""The jets' NumPy door."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flatkern import kernels
from flatkern.kernels._activation_forms import KINDS

native = pytest.importorskip("flatkern.native", reason="the NumPy door was not built")


@pytest.fixture
def arrays():
    source = np.random.default_rng(0)
    return (
        source.standard_normal((5, 37)),
        source.standard_normal((5, 37)),
        source.standard_normal((3, 5, 37)),
        source.standard_normal((3, 5, 37)),
    )


def check(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.numpy().dtype
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_same_results_as_over_tensors(arrays, dtype):
    z, g, t, dg = (a.astype(dtype) for a in arrays)
    tensors = zt, gt, tt, dgt = tuple(map(torch.from_numpy, (z, g, t, dg)))
    w, wt = z[0], zt[0]
    for kind in KINDS:
        check(native.activation_derivatives(z, kind), kernels.activation_derivatives(zt, kind))
        check(native.activation_jet(z, t, kind, s=dg), kernels.activation_jet(zt, tt, kind, s=dgt))
        check(native.activation_pullback(z, g, t, dg, kind), kernels.activation_pullback(*tensors, kind))
    check(native.activation_jet(z, t, "tanh"), kernels.activation_jet(zt, tt, "tanh"))
    check(
        native.activation_derivatives(z, "elu", alpha=0.3),
        kernels.activation_derivatives(zt, "elu", alpha=0.3),
    )
    for log in (False, True):
        check(
            (native.softmax_curvature(z, t, g, log=log),), (kernels.softmax_curvature(zt, tt, gt, log=log),)
        )
    scale = np.linspace(0, 1, 5, dtype=dtype)
    check(
        (native.cross_entropy_hvp(z, t, scale=scale), native.cross_entropy_hvp(z, t)),
        (
            kernels.cross_entropy_hvp(zt, tt, scale=torch.from_numpy(scale)),
            kernels.cross_entropy_hvp(zt, tt),
        ),
    )
    inverse = torch.from_numpy(scale)
    check(
        (native.layer_norm_tangent(z, scale, t, w), native.layer_norm_curvature(z, scale, t, g, w)),
        (
            kernels.layer_norm_tangent(zt, inverse, tt, wt),
            kernels.layer_norm_curvature(zt, inverse, tt, gt, wt),
        ),
    )


def test_threads_and_strides(arrays):
    z, g, t, _ = arrays
    many, tangents = np.tile(z, (400, 1)), np.tile(t, (1, 400, 1))
    for one, several in (
        (native.activation_jet(z, t, "gelu"), native.activation_jet(many, tangents, "gelu", threads=3)),
        (
            (native.cross_entropy_hvp(z, t),),
            (native.cross_entropy_hvp(many, tangents, threads=3),),
        ),
    ):
        for a, b in zip(one, several, strict=True):
            np.testing.assert_allclose(b, np.tile(a, (1,) * (a.ndim - 2) + (400, 1)), rtol=1e-13)
    bent = native.softmax_curvature(z, t, g)
    several = native.softmax_curvature(many, tangents, np.tile(g, (400, 1)), threads=3)
    np.testing.assert_allclose(several, np.tile(bent, (1, 400)), rtol=1e-13)
    same = native.softmax_curvature(np.asfortranarray(z), t[:, ::-1][:, ::-1], g)
    np.testing.assert_array_equal(same, bent)
    assert native.activation_derivatives(np.zeros((0, 3)), "relu").bend.shape == (0, 3)
    nothing, tangents = np.zeros((0, 3)), np.zeros((2, 0, 3))
    assert native.layer_norm_tangent(nothing, nothing[:, 0], tangents).shape == (2, 0, 3)
    assert (
        native.softmax_curvature(np.zeros((3, 0)), np.zeros((2, 3, 0)), np.zeros((3, 0))).tolist()
        == [[0.0] * 3] * 2
    )


def test_refusals(arrays):
    z, g, t, _ = arrays
    with pytest.raises(TypeError, match=r"numpy\.ndarray"):
        native.activation_derivatives([1.0], "relu")
    with pytest.raises(TypeError, match="float32 or float64"):
        native.softmax_curvature(z.astype(np.float16), t, g)
    with pytest.raises(TypeError, match="convert one"):
        native.activation_jet(z, t.astype(np.float32), "relu")
    with pytest.raises(ValueError, match="kinds are"):
        native.activation_derivatives(z, "swish")
    with pytest.raises(ValueError, match=r"t\[None\]"):
        native.softmax_curvature(z, g, g)
    with pytest.raises(ValueError, match="scale must have shape"):
        native.cross_entropy_hvp(z, t, scale=z)
    with pytest.raises(ValueError, match="at least 1 axis"):
        native.layer_norm_tangent(np.array(1.0), np.array(1.0), np.ones(1))
    with pytest.raises(ValueError, match="inverse must have shape"):
        native.layer_norm_curvature(z, z, t, g)
    with pytest.raises(ValueError, match="threads"):
        native.softmax_curvature(z, t, g, threads=0)
