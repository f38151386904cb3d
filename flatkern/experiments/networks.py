"""The networks of the experiments, by name: the paper's MLPs, VGG-10 and LeNet, and small vision transformers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flatkern.experiments.data import CLASSES
from flatkern.experiments.errors import UserError
from flatkern.experiments.vit import SmallViT

__all__ = ["NETWORKS", "build_mlp", "build_network", "network_from", "takes_vectors"]

NETWORKS = ("mlp-tanh", "mlp-relu", "vgg10", "lenet")
"""Besides these ``vit-WIDTH-DEPTH``."""
_ACTIVATIONS = {"mlp-tanh": nn.Tanh, "mlp-relu": nn.ReLU}
_VIT = re.compile(r"vit-(\d+)-(\d+)")


def takes_vectors(name: str) -> bool:
    """Whether images enter the network flat."""
    return name in _ACTIVATIONS


def build_mlp(sizes: Sequence[int], activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    """Linear layers of the given sizes with an activation between them, PyTorch's default initialization."""
    layers: list[nn.Module] = []
    for i, (a, b) in enumerate(itertools.pairwise(sizes)):
        layers += [activation()] if i else []
        layers.append(nn.Linear(a, b))
    return nn.Sequential(*layers)


def build_network(name: str, shape: Sequence[int], hidden: Sequence[int]) -> nn.Module:
    """A network with ten outputs for images [channels, height, width], PyTorch's default initialization.

    Args:
        name: of :data:`NETWORKS`, or ``vit-WIDTH-DEPTH``.
        shape: channels, height and width; an MLP takes the image as a vector.
        hidden: widths between inputs and outputs, of an MLP.

    Raises:
        UserError: an unknown name, or images that do not fit.
    """
    channels, height, width = shape
    if name in _ACTIVATIONS:
        return build_mlp((channels * height * width, *hidden, CLASSES), _ACTIVATIONS[name])
    if name == "vgg10":
        return _vgg(channels, height, width)
    if name == "lenet":
        return _lenet(channels, height, width)
    if found := _VIT.fullmatch(name):
        return SmallViT(shape, width=int(found[1]), depth=int(found[2]), outputs=CLASSES)
    raise UserError(f"unknown network {name!r}; there are {', '.join(NETWORKS)} and vit-WIDTH-DEPTH")


def network_from(
    name: str, shape: Sequence[int], hidden: Sequence[int], state: Mapping[str, Tensor]
) -> nn.Module:
    """A network with given weights, which are not copied; draws no random number on the way."""
    with torch.device("meta"):
        model = build_network(name, shape, hidden)
    model.load_state_dict(dict(state), assign=True)
    return model


def _vgg(channels: int, height: int, width: int) -> nn.Sequential:
    """Five 3×3 convolutions with padding 2, each with ReLU and max-pooling, then 128 and 10 units."""
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise((channels, 16, 16, 32, 64, 64)):
        layers += [nn.Conv2d(a, b, 3, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        height, width = (height + 2) // 2, (width + 2) // 2
    head = [nn.Flatten(), nn.Linear(64 * height * width, 128), nn.ReLU(), nn.Linear(128, CLASSES)]
    return nn.Sequential(*layers, *head)


def _lenet(channels: int, height: int, width: int) -> nn.Sequential:
    """LeNet-5 with ReLU and max-pooling; 28×28 images are padded to its 32×32."""
    padding = {(28, 28): 2, (32, 32): 0}.get((height, width))
    if padding is None:
        raise UserError(f"lenet takes images of 28×28 or 32×32 pixels; these have {height}×{width}")
    return nn.Sequential(
        nn.Conv2d(channels, 6, 5, padding=padding),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.ReLU(),
        nn.Linear(120, 84),
        nn.ReLU(),
        nn.Linear(84, CLASSES),
    )
