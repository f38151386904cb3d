"""The patches of a convolution, whole and as shifts of one copy."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatkern as fk
from flatkern.layers import outer
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


def _networks() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    return {
        "1d": (nn.Sequential(nn.Conv1d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten()), torch.randn(4, 2, 6)),
        "2d, grouped, dilated": (
            nn.Sequential(nn.Conv2d(4, 4, 3, groups=2, dilation=2), nn.Tanh(), nn.Flatten()),
            torch.randn(3, 4, 9, 9),
        ),
        "2d, stride across": (
            nn.Sequential(nn.Conv2d(1, 2, 3, stride=(1, 2), padding=1, bias=False), nn.ReLU(), nn.Flatten()),
            torch.randn(5, 1, 6, 6),
        ),
        "3d": (nn.Sequential(nn.Conv3d(2, 2, 2), nn.Tanh(), nn.Flatten()), torch.randn(3, 2, 3, 4, 3)),
    }


@pytest.mark.parametrize("name", sorted(_networks()))
@pytest.mark.parametrize("max_memory", [None, 300000])
def test_norms_from_shifts(name: str, max_memory: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = _networks()[name]
    model, x = model.double(), x.double()
    parameters = dict(model.named_parameters())
    jacobian = torch.func.jacrev(lambda p: torch.func.functional_call(model, p, x))(parameters)
    true = sum(float(j.detach().square().sum()) for j in jacobian.values()) / len(x)
    monkeypatch.setattr(outer, "_KEPT_BYTES", 0)  # patches of this size would be kept instead
    monkeypatch.setattr(outer.OuterTerm, "_by_kernel", lambda term: False)  # it forms nothing at all
    used = []
    monkeypatch.setattr(
        outer.OuterTerm,
        "_energy_of_pieces",
        lambda term, part, kept=outer.OuterTerm._energy_of_pieces: used.append(part) or kept(term, part),
    )
    found = fk.sharpness(model, x, method="exact", max_memory=max_memory)
    assert used
    assert found.value == pytest.approx(true, rel=1e-12)
