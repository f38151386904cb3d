"""A vision transformer small enough to be trained on a few thousand images by one core."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flatkern.experiments.errors import UserError

__all__ = ["SmallViT"]

_HEAD = 8
"""Width of one attention head."""


class _Block(nn.Module):
    """Attention and a two-layer perceptron, each after a layer norm and beside a skip."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // _HEAD
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, tokens, width = x.shape
        qkv = self.qkv(self.before_attention(x)).view(n, tokens, 3, self.heads, _HEAD)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        weights = torch.softmax(q @ k.mT * _HEAD**-0.5, dim=-1)
        x = x + self.out((weights @ v).transpose(1, 2).reshape(n, tokens, width))
        return x + self.down(F.gelu(self.up(self.before_mlp(x))))


class SmallViT(nn.Module):
    """Patches of a seventh or a quarter of the image's side, pre-norm blocks, the mean over tokens, a linear head.

    Args:
        shape: channels, height and width of the images.
        width: of the tokens, a multiple of 8 (the width of a head).
        depth: number of blocks.
        outputs: size of the output.
    """

    def __init__(self, shape: Sequence[int], *, width: int, depth: int, outputs: int) -> None:
        super().__init__()
        channels, height, wide = shape
        side = next((s for s in (7, 4) if height % s == 0 and wide % s == 0), None)
        if side is None:
            raise UserError(f"a vit takes images whose sides 7 or 4 divides; these have {height}×{wide}")
        if width < _HEAD or width % _HEAD or depth < 1:
            raise UserError(
                f"vit-{width}-{depth}: the width must be a multiple of {_HEAD}, the depth at least 1"
            )
        patch = (height // side, wide // side)
        self.patches = nn.Conv2d(channels, width, patch, stride=patch)
        self.positions = nn.Parameter(0.02 * torch.randn(1, side * side, width))
        self.blocks = nn.Sequential(*(_Block(width) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs [n, outputs] of images [n, channels, height, width]."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.norm(self.blocks(tokens)).mean(1))
