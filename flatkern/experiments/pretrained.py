"""Image classifiers from local files, by ``transformers`` or ``timm`` where these are installed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.experiments.errors import UserError

__all__ = ["Pretrained", "model_files", "pretrained_models"]

_FILES = (".safetensors", ".pth", ".pt", ".bin")


@dataclass(frozen=True)
class Pretrained:
    """One model and the images it takes."""

    name: str
    model: nn.Module
    """Images → logits, in eval mode."""
    size: tuple[int, int, int]
    """Channels, height and width."""
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def images(self, x: Tensor) -> Tensor:
        """Images [n, channels, height, width] in [0, 1] as the model takes them (grey as colours)."""
        channels, height, width = self.size
        x = nn.functional.interpolate(
            x, (height, width), mode="bilinear", align_corners=False, antialias=True
        )
        if x.shape[1] != channels:
            x = x.mean(1, keepdim=True).expand(-1, channels, -1, -1)
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self.mean, self.std))
        return (x - mean) / std


class _Logits(nn.Module):
    """The logits of a model that returns them among others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).logits


def pretrained_models(folder: Path) -> Iterator[Pretrained]:
    """Every model of a folder, in the order of their names.

    A sub-folder with a ``config.json`` is read by ``transformers`` (safetensors only); a file ``NAME.safetensors``,
    ``NAME.pth``, ``NAME.pt`` or ``NAME.bin`` has the weights of timm's model NAME, read as weights only. Nothing is
    looked up on the network.

    Raises:
        UserError: no such folder, no model in it, the package a model needs is not installed, or it cannot be read.
    """
    folders, files = model_files(folder)
    for path in folders:
        yield _from_transformers(path)
    for path in files:
        yield _from_timm(path)


def model_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """The sub-folders and the files that models are read from.

    Raises:
        UserError: no such folder, or no model in it.
    """
    if not folder.is_dir():
        raise UserError(f"--weights: {folder} is not a folder")
    folders = [p for p in sorted(folder.iterdir()) if (p / "config.json").is_file()]
    files = [p for p in sorted(folder.iterdir()) if p.is_file() and p.suffix in _FILES]
    if not folders and not files:
        raise UserError(
            f"--weights: {folder} has neither sub-folders with a config.json (transformers) nor files such as "
            "NAME.safetensors (timm)"
        )
    return folders, files


def _from_transformers(path: Path) -> Pretrained:
    try:
        import transformers
    except ImportError:
        raise UserError(f"{path}: needs the package transformers: pip install transformers") from None
    try:
        model = transformers.AutoModelForImageClassification.from_pretrained(
            path, local_files_only=True, use_safetensors=True, trust_remote_code=False
        )
        side = model.config.image_size
        height, width = (side, side) if isinstance(side, int) else side
        size = (int(model.config.num_channels), int(height), int(width))
    except Exception as error:
        told = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: transformers cannot make an image classifier of it ({told})") from None
    mean, std = _normalization(path / "preprocessor_config.json", size[0])
    return Pretrained(path.name, _Logits(model).eval(), size, mean, std)


def _normalization(path: Path, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation that the model's images are brought to; a half each where the files do not say."""
    half = (0.5,) * channels
    if not path.is_file():
        return half, half
    try:
        held: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not held.get("do_normalize", True):
        return (0.0,) * channels, (1.0,) * channels
    return tuple(held.get("image_mean", half)), tuple(held.get("image_std", half))


def _from_timm(path: Path) -> Pretrained:
    try:
        import timm
    except ImportError:
        raise UserError(f"{path}: needs the package timm: pip install timm") from None
    from flatkern.experiments.checkpoints import load_into, read_checkpoint

    try:
        model = timm.create_model(path.stem, pretrained=False).eval()
        settings = timm.data.resolve_model_data_config(model)
    except Exception as error:
        told = " ".join(str(error).split())[:160]
        raise UserError(f"{path}: the file's name must be that of a model of timm ({told})") from None
    load_into(model, read_checkpoint(path))
    return Pretrained(
        path.stem, model, tuple(settings["input_size"]), tuple(settings["mean"]), tuple(settings["std"])
    )
