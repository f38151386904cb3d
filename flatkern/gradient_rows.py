"""Rows s_ik·∂f_i/∂θ of a square root of a curvature matrix, over all batches, some samples at a time.

With R the rows of all samples i and cotangents k (k fastest), Rᵀ R is the Gauss-Newton matrix times the loss's
denominator where s_ik are the columns of a root of the output Hessian, and R Rᵀ, the Gram matrix, has the same non-zero
eigenvalues; with unit cotangents R Rᵀ is the empirical tangent kernel. No row is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.gradient_gram import Gradients, incompatible, parameter_gradients
from flatkern.graph import shapes_of
from flatkern.layers.outer import OuterTerm
from flatkern.layers.term import DenseTerm, Term
from flatkern.linearize import Forward, Linearization, linearizations
from flatkern.operators.graph_memory import graph_bytes
from flatkern.problem import differentiation

__all__ = ["Chunk", "GradientRows", "gram"]


@dataclass(frozen=True)
class Chunk:
    """The rows of some samples."""

    start: int
    """Index of the first row."""
    lin: Linearization
    target: Any
    gradients: Gradients
    bytes: int
    """What keeping it takes."""

    @property
    def rows(self) -> slice:
        """Its place among all rows."""
        return slice(self.start, self.start + self.gradients.n * self.gradients.k)


class GradientRows:
    """Rows over batches that can be read again.

    Args:
        model: checked.
        batches: re-iterable of (inputs, target); the target is ``None`` where ``forward`` gives it, or there is none.
        parameters: the selected ones, by name.
        roots: (output, target, index of the chunk's first sample) → cotangents [K, n, *output].
        forward: (model, batch) → (output, target).
        own_roots: whether cotangents differ between samples.
        cotangents: K where it is not the number of output entries.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[tuple[Any, Any]],
        parameters: Mapping[str, nn.Parameter],
        roots: Callable[[Tensor, Any, int], Tensor],
        *,
        forward: Forward | None = None,
        own_roots: bool = True,
        cotangents: int | None = None,
    ) -> None:
        self.model, self.parameters, self.forward = model, parameters, forward
        self._batches, self._roots, self._own, self._cotangents = batches, roots, own_roots, cotangents

    def chunks(self, max_memory: int, formed: Iterable[str] = ()) -> Iterator[Chunk]:
        """All rows in order, each chunk (with its graph) within about ``max_memory`` bytes.

        Args:
            max_memory: bytes.
            formed: parameters whose gradients must live in the parameter's own space.
        """
        start = sample = 0
        formed = tuple(formed)
        for inputs, target in self._batches:
            for lin in linearizations(
                self.model, inputs, self.parameters,
                with_input=False, max_memory=max_memory, cotangents=self._cotangents, own_roots=self._own,
                keep_cotangents=True, forward=self.forward,
            ):  # fmt: skip
                y = lin.target if self.forward is not None else target
                y = y[lin.samples] if self.forward is None and y is not None else y
                roots = self._roots(lin.output.detach(), y, sample)
                with differentiation():
                    found = parameter_gradients(self.model, lin, roots, self.parameters, formed)
                chunk = Chunk(start, lin, y, found, _bytes(lin, roots, self.model))
                start, sample = chunk.rows.stop, sample + lin.n
                yield chunk
                del lin, roots, found, chunk


def _bytes(lin: Linearization, roots: Tensor, model: nn.Module) -> int:
    entries = sum(shapes_of(node)[0].numel() for node in lin.uses.sites)
    cotangents = len(roots) * (entries + roots[0].numel()) * roots.element_size()
    return cotangents + graph_bytes([lin.output], model.parameters())


class _Apart(Exception):
    """Two chunks use parameters in different ways."""

    def __init__(self, names: set[str]) -> None:
        self.names = names


def gram(
    left: GradientRows,
    right: GradientRows | None,
    shape: tuple[int, int],
    max_memory: int,
    *,
    with_trace: bool = False,
) -> tuple[Tensor, float, tuple[str, ...]]:
    """R R'ᵀ, float64 of the given shape, Tr R Rᵀ by ghost norms (0 unless asked for), and notes.

    ``right`` ``None``: R Rᵀ, of which one half is computed.

    Chunks are kept up to half of ``max_memory``. Where more are needed the right side is read again for every such
    group of the left one.
    """
    formed: set[str] = set()
    while True:
        try:
            return _gram(left, right, shape, max_memory, formed, with_trace)
        except _Apart as apart:  # sequences of another length, say: start again in the parameters' own space
            formed |= apart.names


def _gram(
    left: GradientRows,
    right: GradientRows | None,
    shape: tuple[int, int],
    max_memory: int,
    formed: set[str],
    with_trace: bool,
) -> tuple[Tensor, float, tuple[str, ...]]:
    trace = 0.0
    out: Tensor | None = None
    notes: dict[str, None] = {}
    quarter = max(1, max_memory // 4)
    for group, complete in _groups(left.chunks(quarter, formed), 2 * quarter):
        if out is None:
            out = torch.zeros(shape, dtype=torch.float64, device=group[0].lin.output.device)
        for chunk in group:
            notes.update(dict.fromkeys(chunk.gradients.notes))
            if with_trace:
                terms = [t for found in chunk.gradients.terms.values() for t in found]
                trace += sum(float(t.squared_norms(quarter).sum()) for t in terms)
        if right is None:
            for index, chunk in enumerate(group):
                for other in group[index:]:
                    _fill(out, chunk, other, quarter, formed, mirror=True)
            if complete:
                continue
        stop = group[-1].rows.stop
        for other in (left if right is None else right).chunks(quarter, formed):
            if right is None and other.start < stop:
                continue
            for chunk in group:
                _fill(out, chunk, other, quarter, formed, mirror=right is None)
            del other
    assert out is not None
    return out, trace, tuple(notes)


def _groups(chunks: Iterator[Chunk], max_memory: int) -> Iterator[tuple[list[Chunk], bool]]:
    """Consecutive chunks that fit together, and whether they are the last."""
    group: list[Chunk] = []
    size = 0
    for chunk in chunks:
        if group and size + chunk.bytes > max_memory:
            yield group, False
            group, size = [], 0
        group.append(chunk)
        size += chunk.bytes
        del chunk
    if group:
        yield group, True


def _fill(
    out: Tensor, first: Chunk, second: Chunk, max_memory: int, formed: set[str], *, mirror: bool
) -> None:
    if first is not second and (apart := set(incompatible(first.lin, second.lin)) - formed):
        raise _Apart(apart)
    block = gradient_products(first.gradients, second.gradients, max_memory)
    out[first.rows, second.rows] = block
    if mirror and first.start != second.start:
        out[second.rows, first.rows] = block.mT


@torch.no_grad()
def gradient_products(first: Gradients, second: Gradients, max_memory: int) -> Tensor:
    """Σ over parameters of ⟨γ_ik, γ'_jl⟩, float64 [n K, n' K'] with k fastest."""
    device = next((t.device for terms in first.terms.values() for t in terms), torch.device("cpu"))
    out = torch.zeros(first.n * first.k, second.n * second.k, dtype=torch.float64, device=device)
    pairs = {
        name: list(zip(terms, second.terms[name], strict=True))
        for name, terms in first.terms.items()
        if name in second.terms
    }
    done: set[str] = set()
    for name, found in pairs.items():
        if len(found) != 1 or not _single(*found[0]):
            continue
        bias = next((b for b in pairs if b not in done and _shares(pairs[b], found[0])), None)
        _add_single(out, *found[0], with_bias=bias is not None)
        done |= {name} if bias is None else {name, bias}
    for name, found in pairs.items():
        if name not in done:
            for a, b in found:
                out += a.gram(b, max_memory)
    return out


def _single(a: Term, b: Term) -> bool:
    """Whether both are single outer products g aᵀ."""
    return (
        isinstance(a, OuterTerm)
        and isinstance(b, OuterTerm)
        and a.transposed == b.transposed
        and a.sizes[:2] == b.sizes[:2] == (1, 1)
    )


def _shares(bias: list[tuple[Term, Term]], weight: tuple[Term, Term]) -> bool:
    """Whether the bias's gradients are the very cotangents of the weight's: then they add 1 to a·a'."""
    return len(bias) == 1 and all(
        isinstance(b, DenseTerm)
        and isinstance(w, OuterTerm)
        and b.gradients.data_ptr() == w.cotangents.data_ptr()
        and b.gradients.shape[2:] == w.cotangents.shape[4:]
        and b.gradients.stride()[:2] == w.cotangents.stride()[:2]
        for b, w in zip(bias[0], weight, strict=True)
    )


def _add_single(out: Tensor, a: Term, b: Term, *, with_bias: bool) -> None:
    """out += (A A'ᵀ [+ 1]) ∘ (G G'ᵀ), in bands of rows: one temporary beside the result would double the memory."""
    assert isinstance(a, OuterTerm)
    assert isinstance(b, OuterTerm)
    inputs = a.features(slice(0, a.n)).flatten(1).double() @ b.features(slice(0, b.n)).flatten(1).double().mT
    if with_bias:
        inputs += 1
    h = b.cotangents.flatten(2).transpose(0, 1).reshape(b.n * b.k, -1).double()
    step = max(1, 512 // a.k)
    for start in range(0, a.n, step):
        stop = min(start + step, a.n)
        first = 0
        if a is b:  # symmetric: the half right of the diagonal
            first = start
        g = a.cotangents[:, start:stop].flatten(2).transpose(0, 1).reshape((stop - start) * a.k, -1).double()
        product = (g @ h[first * b.k :].mT).reshape(stop - start, a.k, b.n - first, b.k)
        product *= inputs[start:stop, None, first:, None]
        rows = slice(start * a.k, stop * a.k)
        band = product.reshape((stop - start) * a.k, -1)
        out[rows, first * b.k :] += band
        if a is b and stop < b.n:
            out[stop * b.k :, rows] += band[:, (stop - first) * b.k :].mT
