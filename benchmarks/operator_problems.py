"""The models and data that operators are timed on: float32, cross-entropy, random data, default initialization."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


def mlp() -> nn.Sequential:
    """784-512-512-10 with ReLU."""
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def vgg() -> nn.Sequential:
    """Three pairs of 3×3 convolutions (16, 32, 64 channels) with ReLU and max-pool, then 1024-128-10."""
    layers: list[nn.Module] = []
    channels = 3
    for width in (16, 32, 64):
        for _ in range(2):
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 128), nn.ReLU(), nn.Linear(128, 10))


class Attention(nn.Module):
    """Self-attention [n, T, width] → [n, T, width] through ``F.scaled_dot_product_attention``."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Queries, keys and values of all heads from one layer."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a GELU MLP, each after a layer norm and beside a skip connection."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """The usual pre-norm block."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """32×32 images in patches of 4 (T = 64), four blocks of width 128 with four heads, mean over positions."""

    def __init__(self, width: int = 128, heads: int = 4, depth: int = 4) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, width, 4, stride=4)
        self.position = nn.Parameter(0.02 * torch.randn(64, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images [n, 3, 32, 32] → logits [n, 10]."""
        x = self.embed(x).flatten(2).mT + self.position
        return self.head(self.norm(self.blocks(x)).mean(1))


@dataclass(frozen=True)
class Problem:
    """A model, a batch size, and the size of each of the eight batches of a loader."""

    title: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    n: int
    loader_n: int

    def model(self) -> nn.Module:
        """The same weights at every call."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.make()

    def batch(self, n: int, seed: int = 0) -> Batch:
        """Normal inputs and uniform labels."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, *self.shape, generator=generator)
        return x, torch.randint(0, 10, (n,), generator=generator)

    def loader(self, batches: int = 8) -> list[Batch]:
        """Equal batches, since one peer weighs them all alike."""
        return [self.batch(self.loader_n, seed) for seed in range(batches)]


IMAGE = (3, 32, 32)
PROBLEMS = [
    Problem("MLP 784-512-512-10", mlp, (784,), 512, 512),
    Problem("MLP 784-512-512-10", mlp, (784,), 64, 64),
    Problem("VGG-like CNN", vgg, IMAGE, 64, 16),
    Problem("ViT, 4 blocks", ViT, IMAGE, 32, 4),
]
