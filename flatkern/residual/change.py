"""Random changes δz of the places where parameters enter a run, which stand for changes of the parameters.

For a use z = W a + b whose input does not depend on W, Σ_kl over the entries of (W, b) of ∂²φ/∂θ_k² equals
Σ_ts κ_ts Σ_c ∂²φ/∂z_tc∂z_sc with κ_ts = a_t·a_s + 1[bias] (each entry of row c moves z_tc by its entry of a_t). A δz
with Cov(δz_tc, δz_sd) = [c = d] κ_ts therefore has E δzᵀ∇²φ δz equal to the trace. Every sample draws its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping

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
        octet = torch.arange(256, device=like.device).unsqueeze(1) >> torch.arange(8, device=like.device)
        self._table = (octet & 1).to(like.dtype) * 2 - 1  # eight signs a byte
        self._drawn: dict[tuple[object, ...], Tensor] = {}

    def signs(self, key: tuple[object, ...], shape: tuple[int, ...]) -> Tensor:
        """Independent ±1."""
        if key not in self._drawn:
            count = torch.Size(shape).numel()
            words = torch.empty((count + 63) // 64, dtype=torch.int64, device=self._generator.device)
            words.random_(-(1 << 63), None, generator=self._generator)
            octets = words.view(torch.uint8).to(self._like.device, torch.int32)
            self._drawn[key] = self._table.index_select(0, octets).flatten()[:count].reshape(shape)
        return self._drawn[key]


class Entry(ABC):
    """One operation that takes selected parameters in."""

    def __init__(self, op: Op, axis: SampleAxis, names: tuple[str, ...], *, shared: bool) -> None:
        self.op, self.axis, self.names = op, axis, names
        self.shared = shared
        """Whether one of the parameters has other uses: the same change of it then goes in everywhere."""
        self.like = op.output.tensor.new_empty(0)
        """Of the output's dtype and device."""

    def keeps(self) -> Iterable[Value]:
        """Values whose tensors :meth:`change` and :meth:`variance` read; of the others the shapes."""
        return self.op.inputs

    @abstractmethod
    def change(self, draws: Draws, inputs: Callable[[Value], Tensor], base: Tensor | None = None) -> Tensor:
        """δz, plus ``base``, in the shape of the output, for the given values of the inputs."""

    def turn(self, draws: Draws, tangents: Mapping[int, Tensor]) -> Tensor | None:
        """Δ ȧ: how the change moves with the inputs, half the second derivative; only wanted where shared."""
        return None

    @abstractmethod
    def variance(self) -> Tensor:
        """E δz², broadcastable to the output."""

    @property
    def channels(self) -> int | None:
        """An axis of the output along which the entries of δz are uncorrelated; ``None`` where there may be none."""
        return 1

    @property
    def output(self) -> Tensor:
        """The output's value, or after it was let go a tensor without data."""
        return self.op.output.tensor
