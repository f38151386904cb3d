"""The Jacobians of a chunk of samples as products, J_i v_i and J_iᵀ u_i for all samples at once; nothing is formed."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

from flatkern.operators.graph_memory import graph_bytes
from flatkern.operators.output_map import OutputMap

__all__ = ["SampleMap", "frozen"]

_CACHE_BYTES = 1 << 24


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter requires a gradient while the block runs: graphs then keep what the input's derivatives need."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    try:
        for p in trainable:
            p.requires_grad_(False)
        yield
    finally:
        for p in trainable:
            p.requires_grad_(True)


class SampleMap:
    """J_i of n samples, of Qᵀf where columns Q [N, r] are given; vectors carry k right sides, [k, n, ·].

    Both graphs are kept: a product is one backward pass, J v through the graph of Jᵀ w (linear in w).

    Args:
        output: [n, ...] with its graph, made in a twice differentiable form.
        source: where the derivative is taken in.
        shape: of the source, [n, ...].
        subspace: Q, or ``None``.
    """

    def __init__(
        self, output: Tensor, source: GradientEdge, shape: torch.Size, subspace: Tensor | None
    ) -> None:
        self._map = OutputMap([source], output)  # type: ignore[list-item]  # autograd takes edges as well
        self._shape, self._output = shape, output
        # sums of squares need more digits than half precision has
        self._dtype = torch.promote_types(output.dtype, torch.float32)
        self._subspace = None if subspace is None else subspace.to(output.device, self._dtype)
        self.n = len(output)
        self.outputs = output[0].numel() if subspace is None else subspace.shape[1]
        self.inputs = shape[1:].numel()
        # several right sides at once save dispatch; beyond the cache they only add memory traffic
        size = graph_bytes(self._map.roots)
        self._block = max(1, _CACHE_BYTES // max(size, 1)) if output.device.type == "cpu" else 8
        self.products = 0
        """Products so far, a sample."""

    @property
    def like(self) -> Tensor:
        """A tensor of the vectors' dtype and device."""
        return self._output.detach().to(self._dtype)

    def push(self, v: Tensor) -> Tensor:
        """J v: [k, n, M] → [k, n, N or r]."""
        found = self._through(self._pushed, v.reshape(len(v), *self._shape), self._output[0].numel())
        return found if self._subspace is None else found @ self._subspace

    def pull(self, u: Tensor) -> Tensor:
        """Jᵀ u: [k, n, N or r] → [k, n, M]."""
        full = u if self._subspace is None else u @ self._subspace.mT
        return self._through(self._pulled, full.reshape(len(u), *self._output.shape), self.inputs)

    def _pushed(self, tangents: Tensor, batched: bool) -> Tensor | None:
        return self._map.push([tangents], batched=batched)

    def _pulled(self, cotangents: Tensor, batched: bool) -> Tensor | None:
        return self._map.pull(cotangents, batched=batched)[0]

    def _through(self, product: Callable[[Tensor, bool], Tensor | None], rows: Tensor, width: int) -> Tensor:
        """In one batched pass where the work is small, one by one where it is not or cannot be batched."""
        self.products += len(rows)
        parts: list[Tensor | None] = []
        start = 0
        while start < len(rows):
            count = min(self._block, len(rows) - start)
            block = rows[start : start + count].to(self._output.dtype)
            if count > 1:
                try:
                    with _quiet():
                        parts.append(product(block, True))
                except RuntimeError:  # an operation of this model cannot be batched
                    self._block = 1
                    continue
            else:
                found = product(block[0], False)
                parts.append(None if found is None else found[None])
            start += count
        if any(p is None for p in parts):
            return rows.new_zeros(len(rows), self.n, width)
        return torch.cat([p.reshape(-1, self.n, width).to(self._dtype) for p in parts if p is not None])


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*performance drop.*")  # slower, still right
        yield
