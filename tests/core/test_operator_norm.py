"""Norms of layers as operators against the singular values of their explicit matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flatkern.operator_norm import operator_norm

CONVOLUTIONS = {
    "plain": (nn.Conv2d(2, 3, 3, padding=1), (2, 5, 5)),
    "padding 2": (nn.Conv2d(3, 4, 3, padding=2), (3, 4, 4)),
    "stride": (nn.Conv2d(2, 4, 3, stride=2), (2, 7, 7)),
    "stride beyond the kernel": (nn.Conv2d(2, 4, 2, stride=3), (2, 8, 8)),
    "dilation": (nn.Conv2d(2, 2, 3, dilation=2), (2, 8, 7)),
    "dilation and stride": (nn.Conv2d(2, 2, 3, dilation=2, stride=2), (2, 9, 9)),
    "groups": (nn.Conv2d(4, 6, 2, groups=2), (4, 5, 5)),
    "circular": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), (2, 4, 4)),
    "reflect": (nn.Conv1d(2, 3, 5, padding=3, padding_mode="reflect"), (2, 6)),
    "replicate": (nn.Conv1d(2, 3, 3, padding=4, padding_mode="replicate"), (2, 5)),
    "three dimensions": (nn.Conv3d(2, 2, 2), (2, 3, 3, 3)),
    "same": (nn.Conv2d(2, 2, 3, padding="same"), (2, 4, 4)),
}


def matrix_of(module: nn.Module, shape: torch.Size) -> torch.Tensor:
    eye = torch.eye(shape.numel(), dtype=torch.float64).reshape(-1, *shape)
    with torch.no_grad():
        return (module(eye) - module(torch.zeros_like(eye[:1]))).flatten(1).T


@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_a_convolution_is_an_operator(name):
    module, shape = CONVOLUTIONS[name]
    module, shape = module.double(), torch.Size(shape)
    true = float(torch.linalg.svdvals(matrix_of(module, shape))[0])
    norm = operator_norm(module, shape)
    assert norm.value == pytest.approx(true, rel=1e-6)
    assert norm.value <= true * (1 + 1e-12)
    assert true * (1 - 1e-12) <= norm.safe <= norm.upper * (1 + 1e-12)
    assert true <= norm.upper * (1 + 1e-12)


def test_the_reshaped_matrix_has_another_norm():
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False).double()
    nn.init.ones_(conv.weight)
    norm = operator_norm(conv, torch.Size((1, 30, 30)))
    reshaped = float(conv.weight.detach().norm())
    assert norm.value > 2.9 * reshaped
    assert norm.upper == pytest.approx(3 * reshaped)


@pytest.mark.parametrize("shape", [(5, 9), (300, 250), (210, 400)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_dense_layer(shape, dtype):
    torch.manual_seed(0)
    layer = nn.Linear(shape[1], shape[0]).to(dtype)
    true = float(torch.linalg.matrix_norm(layer.weight.detach().double(), 2))
    norm = operator_norm(layer, torch.Size((shape[1],)))
    assert norm.value == pytest.approx(true, rel=1e-6 if dtype == torch.float64 else 1e-4)
    assert norm.safe >= true * (1 - 1e-6)
    assert norm.upper >= true * (1 - 1e-12)


def test_a_later_search_starts_at_the_last_result():
    torch.manual_seed(0)
    conv, shape = nn.Conv2d(8, 8, 3, padding=1).double(), torch.Size((8, 10, 10))
    first = operator_norm(conv, shape)
    again = operator_norm(conv, shape)
    assert again.value == pytest.approx(first.value, rel=1e-9)
    assert again.steps < first.steps
    with torch.no_grad():
        conv.weight.mul_(1e-3)
        conv.weight[0, 0, 1, 1] = 5.0  # another direction is now the largest
    true = float(torch.linalg.svdvals(matrix_of(conv, shape))[0])
    assert operator_norm(conv, shape).value == pytest.approx(true, rel=1e-6)


def test_a_zero_weight():
    conv = nn.Conv2d(1, 1, 3).double()
    nn.init.zeros_(conv.weight)
    norm = operator_norm(conv, torch.Size((1, 5, 5)))
    assert (norm.value, norm.residual, norm.safe) == (0, 0, 0)
