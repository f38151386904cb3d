"""R = Sᵀ J as a linear operator: for eigenvectors from those of a Gram matrix."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flatkern.curvature_rows import CurvatureRows, Survey
from flatkern.operators.base import LinearOperator
from flatkern.operators.evaluation import evaluate
from flatkern.operators.forms import Autocast, twice_differentiable
from flatkern.operators.graph_memory import graph_bytes
from flatkern.operators.linearization import check_layers, vector_kind
from flatkern.operators.output_map import OutputMap
from flatkern.operators.staleness import WeightsWatch
from flatkern.problem import Layout, preserve_state
from flatkern.samples import count_samples

__all__ = ["EigenvectorOperator", "RootJacobian"]


class RootJacobian(LinearOperator):
    """Rows s_ik·∂f_i/∂θ / √denominator, [m, P], in the order of batches, samples, cotangents.

    Graphs of the first batches are kept within ``max_memory`` bytes, those of the others rebuilt in every product.
    """

    layout: Layout

    def __init__(self, rows: CurvatureRows, survey: Survey, max_memory: int) -> None:
        check_layers(rows.model, rows.parameters.values())
        dtype, device = vector_kind(rows.parameters)
        layout = Layout(rows.parameters)
        super().__init__((survey.rows, layout.size), dtype, device, layout=layout)
        self._source, self._scale = rows, survey.denominator**-0.5
        self._leaves = tuple(rows.parameters.values())
        self._autocast = Autocast(device)
        self._watch = WeightsWatch(rows.model)
        self._kept: dict[int, tuple[OutputMap, Tensor]] = {}
        self._room, self._max_memory = max_memory, max_memory

    def _batches(self) -> Any:
        self._watch.check()
        for index, (inputs, target) in enumerate(self._source):
            found = self._kept.get(index)
            if found is None:
                found = self._linearize(inputs, target)
                size = graph_bytes(found[0].roots, self._source.model.parameters())
                size += found[1].numel() * found[1].element_size()
                if size <= self._room:
                    self._room -= size
                    self._kept[index] = found
            yield found
            del found

    def _linearize(self, inputs: Any, target: Any) -> tuple[OutputMap, Tensor]:
        source = self._source
        with preserve_state(source.model), twice_differentiable(source.model):
            with self._autocast.region():
                if source.forward is None:
                    n = count_samples(inputs)
                    output, target = evaluate(source.model, (inputs, target), None, own_loss=False, samples=n)
                else:
                    output, target = source.forward(source.model, inputs)
            with self._autocast.outside():
                outputs = OutputMap(self._leaves, output)
        roots = source.roots(output.detach(), target, 0)
        return outputs, roots.reshape(*roots.shape[:2], -1)  # [K, n, N]; N = 1 where samples have one number

    def _rows(self, rows: Tensor) -> Tensor:
        """R v for each row."""
        out = torch.empty(len(rows), self.shape[0], dtype=self.dtype, device=self.device)
        start = 0
        for outputs, roots in self._batches():
            k, n, _ = roots.shape
            for index, row in enumerate(rows):
                pieces = zip(row.split([p.numel() for p in self._leaves]), self._leaves, strict=True)
                change = outputs.push([piece.view_as(p).to(p.dtype) for piece, p in pieces])
                if change is None:
                    out[index, start : start + n * k] = 0
                else:
                    part = torch.einsum("kno,no->nk", roots, change.reshape(n, -1)) * self._scale
                    out[index, start : start + n * k] = part.flatten()
            start += n * k
        return out

    def _adjoint_rows(self, rows: Tensor) -> Tensor:
        """Rᵀ u for each row: one backward pass with combined cotangents."""
        out = torch.zeros(len(rows), self.shape[1], dtype=self.dtype, device=self.device)
        start = 0
        for outputs, roots in self._batches():
            k, n, _ = roots.shape
            for index, row in enumerate(rows):
                weights = row[start : start + n * k].reshape(n, k).to(roots.dtype) * self._scale
                combined = torch.einsum("kno,nk->no", roots, weights).view_as(outputs.output)
                for place, part in zip(self.layout.slices.values(), outputs.pull(combined), strict=True):
                    if part is not None:
                        out[index, place] += part.reshape(-1)
            start += n * k
        return out


class EigenvectorOperator(LinearOperator):
    """V = Rᵀ U Λ^(−½) [P, r]: orthonormal eigenvectors of Rᵀ R from those of R Rᵀ; no column is formed.

    ``V @ c`` is one backward pass, ``V.T @ v`` one product J v.
    """

    def __init__(self, rows: RootJacobian, left: Tensor) -> None:
        super().__init__((rows.shape[1], left.shape[1]), rows.dtype, rows.device)
        self.parameter_layout = rows.layout
        self._jacobian, self._left = rows, left

    def _rows(self, rows: Tensor) -> Tensor:
        combined = rows.to(self._left.dtype) @ self._left.mT
        return self._jacobian._adjoint_rows(combined.to(self.dtype))

    def _adjoint_rows(self, rows: Tensor) -> Tensor:
        inner = self._jacobian._rows(rows)
        return (inner.to(self._left.dtype) @ self._left).to(self.dtype)
