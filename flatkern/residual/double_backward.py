"""The residual by two backward passes through the recorded operations a probe, split by layer."""

from __future__ import annotations

import torch
from torch import Tensor

from flatkern.residual.change import Draws
from flatkern.residual.chunk import Chunk
from flatkern.squared_norms import layer_of
from flatkern.tape import Value

__all__ = ["Twice"]


class Twice:
    """A second derivative along the change, by two backward passes through the recorded operations."""

    per_layer = True
    exact = False

    def __init__(self, chunk: Chunk, residual: Tensor) -> None:
        assert not chunk.output.is_meta, "the chunk's values were let go"
        self._chunk, self._residual = chunk, residual
        self._n = len(chunk.output)
        self._ops, self._reached = chunk.active_ops
        self._entry_of = {id(e.op): e for e in chunk.entries}
        self.layers = tuple(dict.fromkeys(layer_of(e.names[0]) for e in chunk.entries))
        self._final = chunk.tape.final.index
        self._like = chunk.output.detach()
        chunk.output = self._like  # its graph is not needed

    def draw_layers(self, generator: torch.Generator) -> Tensor:
        """One unbiased value a layer and sample, float64 [layers, n]; their expectations add up."""
        draws = Draws(generator, self._like)
        steps = torch.zeros(len(self.layers), self._n, dtype=self._like.dtype, device=self._like.device)
        current: dict[int, Tensor] = {}

        def moving(value: Value) -> Tensor:
            return current.get(value.index, value.tensor)

        with torch.enable_grad():
            steps.requires_grad_()
            for op in self._ops:
                results = op.run(moving)
                entry = self._entry_of.get(id(op))
                if entry is not None:
                    along = entry.change(draws, moving if entry.shared else (lambda v: v.tensor))
                    step = steps[self.layers.index(layer_of(entry.names[0]))]
                    rows = entry.axis.rows(along)
                    moved = entry.axis.back(rows * step.reshape(-1, *[1] * (rows.ndim - 1)), along.shape)
                    results = (results[0] + moved, *results[1:])
                for out, tensor in zip(op.outputs, results, strict=False):
                    if out is not None and out.index in self._reached:
                        current[out.index] = tensor
            output = current.get(self._final)
            if output is None or not output.requires_grad:
                return torch.zeros_like(steps, dtype=torch.float64)
            (first,) = torch.autograd.grad(output, steps, self._residual, create_graph=True)
            if not first.requires_grad:
                return torch.zeros_like(steps, dtype=torch.float64)
            (second,) = torch.autograd.grad(first.sum(), steps, allow_unused=True)
        return torch.zeros_like(steps, dtype=torch.float64) if second is None else second.detach().double()

    def draw(self, generator: torch.Generator) -> Tensor:
        """One unbiased value a sample, float64 [n]."""
        return self.draw_layers(generator).sum(0)
