"""The patches of a convolution, whole and as shifts of one copy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flatkern.layers.conv import patches, shifted

SETTINGS = [
    # kernel, stride, padding, dilation, groups, size
    ((3,), (1,), (1,), (1,), 1, (7,)),
    ((3,), (1,), (0,), (2,), 2, (9,)),
    ((3, 2), (1, 1), (1, 0), (1, 1), 1, (5, 6)),
    ((2, 3), (1, 2), (2, 1), (2, 1), 2, (6, 7)),
    ((2, 2, 3), (1, 2, 1), (0, 1, 1), (1, 1, 2), 1, (4, 4, 6)),
]


@pytest.mark.parametrize("setting", SETTINGS)
def test_shifts_hold_the_entries_of_the_patches(setting: tuple[tuple[int, ...], ...]) -> None:
    kernel, stride, padding, dilation, groups, size = setting
    source = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, *size, generator=source, dtype=torch.float64)
    whole = patches(x, kernel, stride, padding, dilation, groups)  # [n, G, T, C/G · prod(kernel)]
    rows = whole.mT.reshape(3 * groups, 4 // groups, kernel[0], -1, whole.shape[2])
    pieces = shifted(x, kernel, stride, padding, dilation, groups)
    assert len(pieces) == kernel[0]
    for d, piece in enumerate(pieces):
        torch.testing.assert_close(piece, rows[:, :, d].flatten(1, 2), rtol=0, atol=0)
    # and the patches are those that the convolution multiplies its weight with
    weight = torch.randn(2 * groups, 4 // groups, *kernel, generator=source, dtype=torch.float64)
    convolve = (F.conv1d, F.conv2d, F.conv3d)[len(kernel) - 1]
    true = convolve(x, weight, None, stride, padding, dilation, groups).flatten(2)
    ours = whole @ weight.reshape(groups, 2, -1).mT
    torch.testing.assert_close(ours.mT.flatten(1, 2), true)
