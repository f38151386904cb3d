"""The diagonal of the Gauss-Newton matrix by layer rules, and the whole matrix of a small model, with the loss."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.curvature_rows import CurvatureRows, Kind
from flatkern.gradient_gram import Gradients
from flatkern.layers.embedding import RowsTerm
from flatkern.layers.outer import OuterTerm
from flatkern.layers.term import DenseTerm, Term, chunks
from flatkern.linearize import Forward, Linearization, budget
from flatkern.losses import Reduction
from flatkern.parameter_rows import explicit_rows
from flatkern.parameter_space import spread
from flatkern.problem import Layout, ParameterSelection, differentiation

__all__ = [
    "GGNEntries",
    "add_squares",
    "check_fisher",
    "ggn_diagonal",
    "ggn_matrix",
    "squares_summed",
    "summed_products",
]


@dataclass(frozen=True)
class GGNEntries:
    """Entries of a curvature matrix, with the loss from the same call."""

    values: Tensor
    """float64: the diagonal [P], or the matrix [P, P], in the order of ``layout``."""
    loss: float
    """Σ numerators / Σ denominators over the whole data set."""
    layout: Layout = field(repr=False)
    """Where each parameter lies; ``layout.unflatten(values)`` gives a diagonal by parameter."""
    num_data: int
    seconds: float
    notes: tuple[str, ...] = ()
    denominator: float = 1.0
    """What the summed numerators, and the matrix, were divided by."""


def check_fisher(fisher: str, samples: int, seed: int) -> Kind:
    """The kind of rows, checked."""
    if fisher not in ("ggn", "mc", "empirical"):
        raise ValueError(f"fisher: expected 'ggn', 'mc' or 'empirical', got {fisher!r}")
    for name, value, least in (("samples", samples, 1), ("seed", seed, 0)):
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    if samples != 1 and fisher != "mc":
        raise ValueError("samples: only fisher='mc' draws labels; leave it out")
    kinds: dict[str, Kind] = {"ggn": "ggn", "mc": "mc", "empirical": "empirical"}
    return kinds[fisher]


@differentiation()
def ggn_diagonal(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    *,
    fisher: str = "ggn",
    samples: int = 1,
    seed: int = 0,
    params: ParameterSelection = None,
    reduction: Reduction | None = None,
    forward: Forward | None = None,
    max_memory: int | None = None,
) -> GGNEntries:
    """The diagonal of the generalized Gauss-Newton matrix, exact by layer rules, with the loss.

    diag G = Σ_i Σ_k γ_ik² / denominator, γ_ik = s_ik·∂f(x_i)/∂θ with the columns s_ik of a root of the output Hessian.
    For a dense layer on vectors γ = g aᵀ, so that it is Σ_i (Σ_k g_ik²)(a_i²)ᵀ: one matrix product. Where a weight is
    shared over positions the small per-sample gradients are formed in chunks, then squared.

    Args:
        model, loss_fn, data, params, reduction, forward: as for :func:`flatkern.ggn_trace`.
        fisher: ``"ggn"``; ``"mc"`` or ``"empirical"`` for a Fisher matrix as in :func:`flatkern.fisher`.
        samples, seed: labels drawn a sample for ``"mc"``, and their seed; other batches or chunks give other draws.
        max_memory: bytes of the working set; default 1 GiB.

    Returns:
        A :class:`GGNEntries` with ``values`` [P].

    Cost: a forward pass without graph over the data, then one with; K cotangents pulled back to the layers' outputs; a
    matrix product a dense layer, K gradients' worth of them for shared weights.

    Raises:
        TypeError, ValueError: as :func:`flatkern.ggn_trace`.

    Source: Dangel, Kunstner & Hennig, "BackPACK", ICLR 2020, arXiv 1912.10985.

    Example:
        >>> import torch, flatkern as fk
        >>> model = torch.nn.Linear(3, 1)
        >>> d = fk.ggn_diagonal(model, torch.nn.MSELoss(), (torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(1, 1)))
        >>> d.values.round(decimals=4)  # 2 (x², 1)
        tensor([ 2.,  8., 18.,  2.], dtype=torch.float64)
    """
    started = time.perf_counter()
    limit = budget(max_memory)
    kind = check_fisher(fisher, samples, seed)
    rows = CurvatureRows(
        model, loss_fn, data,
        params=params, reduction=reduction, forward=forward, kind=kind, draws=samples, seed=seed,
    )  # fmt: skip
    survey = rows.survey()
    layout = Layout(rows.parameters)
    notes: dict[str, None] = {}
    total: Tensor | None = None
    for chunk in rows.chunks(limit // 2):
        if total is None:
            total = torch.zeros(layout.size, dtype=torch.float64, device=chunk.lin.output.device)
        notes.update(dict.fromkeys(chunk.gradients.notes))
        add_squares(total, chunk.lin, chunk.gradients, rows.parameters, layout, limit // 4)
        del chunk
    assert total is not None
    return GGNEntries(
        total / survey.denominator, survey.loss, layout, survey.num_data, time.perf_counter() - started, tuple(notes),
        survey.denominator,
    )  # fmt: skip


def add_squares(
    total: Tensor,
    lin: Linearization,
    gradients: Gradients,
    parameters: Mapping[str, nn.Parameter],
    layout: Layout,
    max_memory: int,
) -> None:
    """Σ_i Σ_k γ_ik² of some samples, added to ``total`` [P] (float64)."""
    for name, terms in gradients.terms.items():
        uses = lin.uses.grouped(name) if name in lin.uses.by_parameter else [()]
        for group, term in zip(uses, terms, strict=True):
            with torch.no_grad():
                squares = squares_summed(term, max_memory)
            own = squares if not group else spread(group, parameters[name], squares.reshape(term.shape))
            total[layout.slices[name]] += own.detach().flatten()


def squares_summed(term: Term, max_memory: int) -> Tensor:
    """Σ_i Σ_k γ_ik², float64 in the order of the term's shape."""
    if isinstance(term, OuterTerm) and term.sizes[1] == 1:
        g = term.cotangents[..., 0, :].double().square().sum(0)  # [n, G, d_g]
        a = term.features(slice(0, term.n))[:, :, 0].double().square()  # [n, G, d_a]
        left, right = (a, g) if term.transposed else (g, a)
        return torch.einsum("ngi,ngj->gij", left, right).flatten()
    if isinstance(term, DenseTerm):
        return term.gradients.double().square().sum((0, 1)).flatten()
    if isinstance(term, RowsTerm):
        return _rows_squared(term).flatten()
    total = torch.zeros(term.shape.numel(), dtype=torch.float64, device=term.device)
    at_once = max(1, max_memory // (2 * term.gradient_bytes))
    for part in chunks(term.n, at_once // term.k):
        for block in chunks(term.k, at_once // (part.stop - part.start)):
            formed = term.explicit(part, block)
            total += formed.double().square().sum((0, 1)).flatten()
    return total


def _rows_squared(term: RowsTerm) -> Tensor:
    """Occurrences of a token in one sample are added up before they are squared."""
    keys, inverse = torch.unique(term.samples * term.shape[0] + term.rows, return_inverse=True)
    summed = torch.zeros(term.k, len(keys), term.shape[1], dtype=torch.float64, device=term.device)
    summed.index_add_(1, inverse, term.cotangents.double())
    out = torch.zeros(*term.shape, dtype=torch.float64, device=term.device)
    return out.index_add_(0, keys % term.shape[0], summed.square().sum(0))


@differentiation()
def ggn_matrix(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    *,
    fisher: str = "ggn",
    samples: int = 1,
    seed: int = 0,
    params: ParameterSelection = None,
    reduction: Reduction | None = None,
    forward: Forward | None = None,
    max_size: int = 6000,
    max_memory: int | None = None,
) -> GGNEntries:
    """The generalized Gauss-Newton matrix itself [P, P], for small models or selected parameters, with the loss.

    G = Σ_i Σ_k γ_ik γ_ikᵀ / denominator with the gradients γ_ik of :func:`flatkern.ggn_diagonal`, formed for a few
    samples at a time and accumulated in float64.

    Args:
        model, loss_fn, data, fisher, samples, seed, params, reduction, forward, max_memory: as for
            :func:`flatkern.ggn_diagonal`.
        max_size: largest P.

    Returns:
        A :class:`GGNEntries` with ``values`` [P, P], symmetric positive semi-definite.

    Cost: n K P² multiplications for n samples with K cotangents; 8 P² bytes beside ``max_memory``.

    Raises:
        TypeError, ValueError: as :func:`flatkern.ggn_trace`; P exceeds ``max_size``.

    Example:
        >>> import torch, flatkern as fk
        >>> model = torch.nn.Linear(2, 1)
        >>> g = fk.ggn_matrix(model, torch.nn.MSELoss(), (torch.tensor([[1.0, 2.0]]), torch.zeros(1, 1)))
        >>> g.values.round(decimals=4)
        tensor([[2., 4., 2.],
                [4., 8., 4.],
                [2., 4., 2.]], dtype=torch.float64)
    """
    started = time.perf_counter()
    limit = budget(max_memory)
    kind = check_fisher(fisher, samples, seed)
    rows = CurvatureRows(
        model, loss_fn, data,
        params=params, reduction=reduction, forward=forward, kind=kind, draws=samples, seed=seed,
    )  # fmt: skip
    layout = Layout(rows.parameters)
    if layout.size > max_size:
        raise ValueError(
            f"max_size: the matrix is {layout.size} by {layout.size}, more than {max_size}; select parameters with "
            "params=, take fk.ggn(...) or fk.kfac(...), or raise it"
        )
    survey = rows.survey()
    matrix, notes = summed_products(rows, layout.size, limit)
    return GGNEntries(
        matrix / survey.denominator, survey.loss, layout, survey.num_data, time.perf_counter() - started, notes,
        survey.denominator,
    )  # fmt: skip


def summed_products(rows: CurvatureRows, size: int, limit: int) -> tuple[Tensor, tuple[str, ...]]:
    """Σ γ γᵀ over all rows, float64 [P, P], and notes."""
    notes: dict[str, None] = {}
    matrix: Tensor | None = None
    for chunk in rows.chunks(limit // 4, tuple(rows.parameters)):
        if matrix is None:
            matrix = torch.zeros(size, size, dtype=torch.float64, device=chunk.lin.output.device)
        notes.update(dict.fromkeys(chunk.gradients.notes))
        for block in explicit_rows(chunk.gradients, rows.parameters, limit // 4):
            matrix.addmm_(block.mT, block)
        del chunk
    assert matrix is not None
    return matrix, tuple(notes)
