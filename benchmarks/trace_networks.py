"""Networks whose Hessian's trace is measured: MLPs, VGGs and a ViT on rows of 784 pixels, and their training."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

__all__ = ["LOSS", "MODELS", "train"]

LOSS = nn.CrossEntropyLoss()


def mlp(act: type[nn.Module]) -> nn.Module:
    """784-512-512-10."""
    return nn.Sequential(nn.Linear(784, 512), act(), nn.Linear(512, 512), act(), nn.Linear(512, 10))


def vgg(act: type[nn.Module]) -> nn.Module:
    """Four 3×3 convolutions in two pooled stages, then 1568-64-10."""
    layers: list[nn.Module] = [nn.Unflatten(1, (1, 28, 28))]
    channels = 1
    for width in (16, 32):
        layers += [
            nn.Conv2d(channels, width, 3, padding=1),
            act(),
            nn.Conv2d(width, width, 3, padding=1),
            act(),
        ]
        layers.append(nn.MaxPool2d(2))
        channels = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 49, 64), act(), nn.Linear(64, 10))


class ViT(nn.Module):
    """Patches of 7 × 7, four pre-LN blocks of width 64 with four heads, GELU, mean over tokens."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Conv2d(1, width, 7, stride=7)
        self.position = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.Sequential(
            *(
                nn.TransformerEncoderLayer(
                    width, 4, 2 * width, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
                )
                for _ in range(4)
            )
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Images as rows [n, 784] → logits."""
        h = self.embed(x.view(-1, 1, 28, 28)).flatten(2).transpose(1, 2) + self.position
        logits: Tensor = self.head(self.norm(self.blocks(h)).mean(1))
        return logits


MODELS: dict[str, Callable[[], nn.Module]] = {
    "MLP ReLU": lambda: mlp(nn.ReLU),
    "MLP tanh": lambda: mlp(nn.Tanh),
    "MLP GELU": lambda: mlp(nn.GELU),
    "VGG ReLU": lambda: vgg(nn.ReLU),
    "VGG GELU": lambda: vgg(nn.GELU),
    "ViT GELU": ViT,
}


def train(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> None:
    """Adam, batches of 64."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    source = torch.Generator().manual_seed(0)
    for _ in range(steps):
        chosen = torch.randint(len(x), (64,), generator=source)
        optimizer.zero_grad()
        LOSS(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
