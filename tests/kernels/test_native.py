"""The NumPy door."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flatkern import kernels

native = pytest.importorskip("flatkern.native", reason="the NumPy door was not built")


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal((33, 6, 19))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_same_results_as_over_tensors(x, dtype):
    x = x.astype(dtype)
    t = torch.from_numpy(x)
    ours, theirs = native.gram_stats(x), kernels.gram_stats(t)
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.numpy().dtype
        np.testing.assert_allclose(a, b.numpy(), rtol=1e-10)
    G = native.gram(x)
    np.testing.assert_allclose(G, kernels.gram(t).numpy(), rtol=1e-12, atol=1e-12)
    logdet = native.spd_logdet(G.astype(dtype))
    assert logdet.dtype == dtype
    np.testing.assert_allclose(logdet, np.linalg.slogdet(G)[1], rtol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads(x, threads):
    many = np.tile(x, (200, 1, 1))
    one = native.gram_stats(x)
    got = native.gram_stats(many, threads=threads)
    for a, b in zip(got, one, strict=True):
        np.testing.assert_allclose(a, np.tile(b, 200), rtol=1e-12)


def test_any_strides(x):
    expected = native.gram(x)
    wide = np.full((33, 12, 40), np.nan)
    wide[:, ::2, 1:39:2] = x
    field = np.zeros((33, 6, 19), dtype=np.dtype([("tag", "i1"), ("value", "f8")], align=False))
    field["value"] = x
    for same in (
        np.asfortranarray(x),
        wide[:, ::2, 1:39:2],
        x[::-1][::-1],
        np.ascontiguousarray(x[:, :, ::-1])[:, :, ::-1],
        field["value"],
    ):
        np.testing.assert_allclose(native.gram(same), expected, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(native.gram(np.broadcast_to(x[0], (4, 6, 19))), np.stack([expected[0]] * 4))


def test_shapes(x):
    assert isinstance(native.spd_logdet(np.eye(3)), float)
    assert native.gram(x.reshape(3, 11, 6, 19)).shape == (3, 11, 6, 6)
    assert native.gram_stats(x[:0]).logdet.shape == (0,)
    assert native.gram(x.reshape(33, 1, 1, 1, 1, 1, 1, 1, 1, 1, 6, 19)).shape[-2:] == (6, 6)
    assert native.spd_logdet(np.zeros((2, 0, 0))).tolist() == [0.0, 0.0]
    assert native.gram_stats(np.ones((1, 3, 2))).rank_deficient.tolist() == [True]


@pytest.mark.parametrize("dtype", [np.float16, np.int64, np.complex128, ">f8", object])
def test_other_dtypes_raise(dtype):
    with pytest.raises(TypeError, match="float32 or float64"):
        native.gram(np.ones((2, 3, 3)).astype(dtype))


def test_other_refusals(x):
    with pytest.raises(TypeError, match=r"numpy\.ndarray"):
        native.gram([[1.0]])
    with pytest.raises(ValueError, match="two dimensions"):
        native.gram(np.ones(3))
    with pytest.raises(ValueError, match="square"):
        native.spd_logdet(x)
    with pytest.raises(ValueError, match="128"):
        native.gram(np.ones((129, 2)))
    with pytest.raises(ValueError, match="threads"):
        native.gram(x, threads=0)


def test_build_info():
    info = native.build_info()
    assert info["isa"] in info["isa_available"]
    assert isinstance(info["cuda"], bool)
    assert info["max_size"] == 128
