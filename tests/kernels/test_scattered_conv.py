"""Convolutions pulled back from scattered cotangents, both implementations against dense ones in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flatkern.kernels._scattered_conv import (
    ConvShape,
    densified,
    scattered_conv_input,
    scattered_conv_norms,
)
from flatkern.kernels._select import using

from .helpers import both, dtypes

CASES = {
    "3x3": (3, 5, (3, 3), (1, 1), (2, 2), (1, 1), (9, 7)),
    "1x1": (4, 2, (1, 1), (1, 1), (0, 0), (1, 1), (4, 5)),
    "5x5 strided": (2, 3, (5, 5), (2, 1), (1, 2), (1, 1), (11, 8)),
    "dilated": (13, 4, (3, 2), (1, 2), (3, 0), (2, 3), (7, 9)),
    "long": (1, 2, (1, 7), (1, 1), (0, 3), (1, 1), (1, 19)),
}


def problem(case, k, dtype, n=2):
    c_in, c_out, kernel, stride, padding, dilation, size = CASES[case]
    weight = torch.randn(c_out, c_in, *kernel, dtype=dtype)
    inputs = torch.randn(n, c_in, *size, dtype=dtype)
    out = F.conv2d(inputs, weight, None, stride, padding, dilation).shape[2:]
    entries = max(1, out.numel() // 3)
    index = torch.stack([torch.randperm(out.numel())[:entries] for _ in range(n * c_out)])
    index = index.reshape(n, c_out, entries)
    index[torch.rand(index.shape) < 0.2] = -1
    values = torch.randn(n, k, c_out, entries, dtype=dtype)
    values[(index < 0)[:, None].expand_as(values)] = float("nan")  # what has no place must not matter
    return values, index, weight, inputs, ConvShape(size, tuple(out), stride, padding, dilation)


def plain(values, index, weight, inputs, shape):
    """Everything in float64, sample by sample and cotangent by cotangent, through autograd."""
    n, k, c_out, _ = values.shape
    x = inputs.double().requires_grad_()
    w = weight.double().requires_grad_()
    b = torch.zeros(c_out, dtype=torch.float64, requires_grad=True)
    rows, norms = torch.zeros(n, k, *inputs.shape[1:], dtype=torch.float64), torch.zeros(n, 2)
    norms = norms.double()
    places = torch.zeros(n, shape.outputs[0] * shape.outputs[1], dtype=torch.float64)
    for i in range(n):
        for j in range(k):
            g = torch.zeros(c_out, places.shape[1], dtype=torch.float64)
            for c in range(c_out):
                for place, value in zip(index[i, c].tolist(), values[i, j, c].tolist(), strict=True):
                    if place >= 0:
                        g[c, place] += value
            out = F.conv2d(x[i : i + 1], w, b, shape.stride, shape.padding, shape.dilation)
            found = torch.autograd.grad(out, (x, w, b), g.reshape(1, c_out, *shape.outputs))
            rows[i, j] = found[0][i]
            norms[i] += torch.stack([f.square().sum() for f in found[1:]])
            places[i] += g.square().sum(0)
    return rows, norms, places


@both
@dtypes
@pytest.mark.parametrize("k", [1, 5, 17])
@pytest.mark.parametrize("case", list(CASES))
def test_against_autograd(case, k, dtype, which):
    values, index, weight, inputs, shape = problem(case, k, dtype)
    rows, norms, places = plain(values, index, weight, inputs, shape)
    with using(which):
        found = scattered_conv_input(values, index, weight, shape)
        of_weight, of_bias, of_place = scattered_conv_norms(values, index, inputs, weight.shape[2:], shape)
    relative = 1e-5 if dtype == torch.float32 else 1e-12
    scale = float(rows.abs().max())
    assert found.dtype == dtype
    assert found.shape == rows.shape
    assert torch.allclose(found.double(), rows, rtol=0, atol=relative * scale)
    assert torch.allclose(of_weight, norms[:, 0], rtol=relative)
    assert torch.allclose(of_bias, norms[:, 1], rtol=10 * relative)
    assert torch.allclose(of_place, places, rtol=relative)


@both
def test_no_samples_and_no_places(which):
    values, index, weight, inputs, shape = problem("3x3", 3, torch.float32)
    with using(which):
        none = scattered_conv_input(values[:0], index[:0], weight, shape)
        nowhere = scattered_conv_input(values, torch.full_like(index, -1), weight, shape)
        norms = scattered_conv_norms(values, torch.full_like(index, -1), inputs, weight.shape[2:], shape)
    assert none.shape == (0, 3, *inputs.shape[1:])
    assert not nowhere.any()
    assert not any(found.any() for found in norms)


def test_densified_adds_up_what_has_one_place():
    values = torch.tensor([[[[1.0, 2.0, 4.0]]]])
    dense = densified(values, torch.tensor([[[2, 2, -1]]]), (2, 2))
    assert dense.flatten().tolist() == [0, 0, 3, 0]


def test_operands_that_do_not_fit_are_refused():
    values, index, weight, _, shape = problem("3x3", 3, torch.float32)
    if not hasattr(torch.ops.flatkern, "scattered_conv_input"):
        pytest.skip("no compiled kernels")
    operator = torch.ops.flatkern.scattered_conv_input
    channels_last = weight.permute(0, 2, 3, 1).contiguous()
    with pytest.raises(RuntimeError, match="shape"):
        operator(values, index[:1], channels_last, shape.settings)
    with pytest.raises(RuntimeError, match="dtype"):
        operator(values, index.int(), channels_last, shape.settings)
    with pytest.raises(RuntimeError, match="output does not belong"):
        operator(values, index, channels_last, [*shape.settings[:2], 99, 99, *shape.settings[4:]])
