"""Random changes δz of the places where parameters enter a run, which stand for changes of the parameters.

For a use z = W a + b whose input does not depend on W, Σ_kl over the entries of (W, b) of ∂²φ/∂θ_k² equals
Σ_ts κ_ts Σ_c ∂²φ/∂z_tc∂z_sc with κ_ts = a_t·a_s + 1[bias] (each entry of row c moves z_tc by its entry of a_t). A δz
with Cov(δz_tc, δz_sd) = [c = d] κ_ts therefore has E δzᵀ∇²φ δz equal to the trace. Every sample draws its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from flatkern.sample_axis import SampleAxis
from flatkern.tape import Op, Value

__all__ = ["RANK", "Draws", "Entry"]

RANK = 4
"""Rank R of the change of a weight shared by positions: Δ = R^(−1/2) Σ_r v_r u_rᵀ."""


class Draws:
    """The random signs of one probe, the same ones wherever a key is asked for again."""

    def __init__(self, generator: torch.Generator, like: Tensor) -> None:
        self._generator, self._like = generator, like
        self._drawn: dict[tuple[object, ...], Tensor] = {}

    def signs(self, key: tuple[object, ...], shape: tuple[int, ...]) -> Tensor:
        """Independent ±1."""
        if key not in self._drawn:
            count = torch.Size(shape).numel()
            words = torch.empty((count + 62) // 63, dtype=torch.int64, device=self._generator.device)
            words.random_(0, (1 << 63) - 1, generator=self._generator)  # 63 signs a word
            bits = (words.unsqueeze(1) >> torch.arange(63, device=words.device)) & 1
            flat = bits.flatten()[:count].to(self._like.device, self._like.dtype)
            self._drawn[key] = flat.mul_(2).sub_(1).reshape(shape)
        return self._drawn[key]


class Entry(ABC):
    """One operation that takes selected parameters in."""

    def __init__(self, op: Op, axis: SampleAxis, names: tuple[str, ...], *, shared: bool) -> None:
        self.op, self.axis, self.names = op, axis, names
        self.shared = shared
        """Whether one of the parameters has other uses: the same change of it then goes in everywhere."""

    @abstractmethod
    def change(self, draws: Draws, inputs: Callable[[Value], Tensor]) -> Tensor:
        """δz in the shape of the output, for the given values of the inputs; linear in them but for the shift."""

    def turn(self, draws: Draws, tangents: Mapping[int, Tensor]) -> Tensor | None:
        """Δ ȧ: how the change moves with the inputs, half the second derivative; only wanted where shared."""
        return None

    @abstractmethod
    def variance(self) -> Tensor:
        """E δz², broadcastable to the output."""

    @property
    def output(self) -> Tensor:
        """The output's value."""
        return self.op.output.tensor
