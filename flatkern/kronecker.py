"""Kronecker-factored curvature (KFAC) as a linear operator with its eigendecomposition."""

from __future__ import annotations

import time
from typing import Any, get_args

import torch
from torch import Tensor, nn

from flatkern.curvature_rows import CurvatureRows
from flatkern.ggn_entries import check_fisher
from flatkern.kronecker_blocks import CurvatureBlock, Function
from flatkern.kronecker_factors import Approximation, Block, groups_of, plan
from flatkern.linearize import Forward, budget
from flatkern.losses import Reduction
from flatkern.operators.base import LinearOperator
from flatkern.operators.identity import digest
from flatkern.operators.linearization import vector_kind
from flatkern.problem import Layout, ParameterSelection, differentiation

__all__ = ["KFAC", "kfac"]


class KFAC(LinearOperator):
    """A block-diagonal approximation of the GGN or Fisher matrix, symmetric [P, P]; made by :func:`kfac`.

    Attributes:
        blocks: a :class:`flatkern.kronecker_blocks.CurvatureBlock` each, with ``names`` and ``eigenvalues``; Kronecker
            ones have ``input_factor`` and ``output_factor``.
        others: parameters without Kronecker factors, and what they have instead.
        loss: Σ numerators / Σ denominators of the data it was made from.
        num_data, seconds, notes: as in other results.
    """

    layout: Layout

    def __init__(
        self,
        blocks: list[CurvatureBlock],
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        *,
        others: dict[str, str],
        loss: float,
        num_data: int,
        seconds: float,
        notes: tuple[str, ...],
    ) -> None:
        super().__init__((layout.size, layout.size), dtype, device, symmetric=True, layout=layout)
        self.blocks, self.others, self.loss = tuple(blocks), others, loss
        self.num_data, self.seconds, self.notes = num_data, seconds, notes

    def _rows(self, rows: Tensor) -> Tensor:
        out = torch.empty_like(rows)
        for block in self.blocks:
            block.apply(rows, out)
        return out

    @property
    def trace(self) -> float:
        """Σ Tr A · Tr B, plus the exact traces of the other blocks."""
        return sum(block.trace for block in self.blocks)

    @property
    def eigenvalues(self) -> Tensor:
        """All P of them, float64 descending."""
        return torch.cat([block.eigenvalues for block in self.blocks]).sort(descending=True).values

    def logdet(self, delta: float = 0.0) -> float:
        """log det(K + δ I), −∞ where that is singular.

        Raises:
            ValueError: ``delta`` is negative or not finite.
        """
        delta = _checked(delta, positive=False)
        return sum(float((block.eigenvalues + delta).log().sum()) for block in self.blocks)

    def solve(self, b: Tensor, delta: float) -> Tensor:
        """(K + δ I)⁻¹ b for b [P] or [P, k], exactly in the factors' eigenbases; δ > 0."""
        found: Tensor = self.inverse(delta) @ b
        return found

    def inverse(self, delta: float) -> LinearOperator:
        """(K + δ I)⁻¹ as an operator, δ > 0."""
        delta = _checked(delta, positive=True)
        return _FunctionOf(self, lambda values: 1 / (values + delta), ("inverse", delta))

    def inverse_root(self, delta: float) -> LinearOperator:
        """(K + δ I)^(−½): maps white noise to samples of N(0, (K + δ I)⁻¹); δ > 0."""
        delta = _checked(delta, positive=True)
        return _FunctionOf(self, lambda values: (values + delta).rsqrt(), ("inverse root", delta))

    def _identity(self) -> str | None:
        generator = torch.Generator().manual_seed(0)
        probe = torch.randn(self.shape[0], generator=generator).to(self.device, self.dtype)
        return digest("KFAC", self.layout.names, self @ probe, self.trace)


class _FunctionOf(LinearOperator):
    """f(K) for a function f of the eigenvalues."""

    def __init__(self, base: KFAC, function: Function, what: tuple[Any, ...]) -> None:
        super().__init__(base.shape, base.dtype, base.device, symmetric=True, layout=base.layout)
        self._base, self._function, self._what = base, function, what

    def _rows(self, rows: Tensor) -> Tensor:
        out = torch.empty_like(rows)
        for block in self._base.blocks:
            block.function(self._function, rows, out)
        return out

    def _identity(self) -> str | None:
        return digest(self._base._identity(), self._what)


def _checked(delta: Any, *, positive: bool) -> float:
    number = float(delta)
    if not 0 <= number < float("inf") or (positive and number == 0):
        raise ValueError(
            f"delta: expected a {'positive' if positive else 'non-negative'} number, got {delta!r}"
        )
    return number


@differentiation()
def kfac(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    *,
    approx: Approximation = "expand",
    fisher: str = "ggn",
    samples: int = 1,
    seed: int = 0,
    params: ParameterSelection = None,
    reduction: Reduction | None = None,
    forward: Forward | None = None,
    max_block: int = 256,
    max_factor: int = 8192,
    max_memory: int | None = None,
) -> KFAC:
    """Kronecker-factored approximation of the GGN or Fisher matrix, block diagonal over layers.

    A layer z = W a + b adds the gradients g_ik a_iᵀ (a with a 1 appended for b), with the cotangents g_ik of its output
    for the columns of a root of the output Hessian. Its exact block (1/D) Σ_i (Σ_k g_ik g_ikᵀ) ⊗ a_i a_iᵀ, D the loss's
    denominator over the whole data set, is replaced by B ⊗ A:

    * ``"expand"``: A = mean of a aᵀ over samples and positions, B = (1/D) Σ_i Σ_k Σ_t g gᵀ;
    * ``"reduce"``: A = mean over samples of ā āᵀ, ā the mean over positions, B = (1/D) Σ_i Σ_k (Σ_t g)(Σ_t g)ᵀ.

    The two agree where a layer sees one position a sample. There the block is exact for one sample, and for a linear
    network under the squared error. Groups of a convolution have factors of their own; a weight used several times
    counts its uses as positions.

    Parameters that are not the weight or bias of a dense layer or convolution (norms, embeddings, transposed
    convolutions, directly used tensors, weights computed from others) have their exact block up to ``max_block``
    entries and their exact diagonal beyond, and so has a layer with more than ``max_factor`` inputs or outputs (a head
    over a vocabulary); ``others`` and ``notes`` say which.

    Args:
        model, loss_fn, data, params, reduction, forward: as for :func:`flatkern.ggn_trace`.
        approx: see above.
        fisher: ``"ggn"``: cotangents of the output Hessian's root; ``"mc"``: of ``samples`` drawn labels;
            ``"empirical"``: of the data's labels (see :func:`flatkern.fisher`).
        samples, seed: for ``"mc"``, as for :func:`flatkern.ggn_diagonal`.
        max_block: entries of a parameter without factors up to which its block is exact.
        max_factor: largest side of a factor (8 max_factor² bytes).
        max_memory: bytes of the working set; default 1 GiB; factors come beside it.

    Returns:
        A :class:`KFAC` operator in the layout of :func:`flatkern.ggn`: ``@``, ``trace``, ``eigenvalues``,
        ``logdet(delta)``, ``solve(b, delta)``, ``inverse(delta)``, ``inverse_root(delta)``, ``to_dense()``, ``loss``.
        Factors and products in float64, vectors in the parameters' dtype.

    Cost: a forward pass without graph, one with; K cotangents pulled back to the layers' outputs; d_in² and K d_out²
    multiplications a position. The eigendecompositions are made when first needed and kept.

    Raises:
        TypeError, ValueError: as :func:`flatkern.ggn_trace`.

    Source: Martens & Grosse, arXiv 1503.05671; convolutions: Grosse & Martens, arXiv 1602.01407; expand and reduce:
    Eschenhagen et al., arXiv 2311.00636.

    Example:
        >>> import torch, flatkern as fk
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> K = fk.kfac(model, torch.nn.CrossEntropyLoss(), (torch.randn(16, 4), torch.arange(16) % 3))
        >>> K.shape, K.others
        ((67, 67), {})
        >>> v = torch.randn(67)
        >>> bool(torch.allclose(K.shift(0.1) @ K.solve(v, 0.1), v, atol=1e-4))
        True
    """
    started = time.perf_counter()
    if approx not in get_args(Approximation):
        raise ValueError(f"approx: expected 'expand' or 'reduce', got {approx!r}")
    if not isinstance(max_block, int) or isinstance(max_block, bool) or max_block < 0:
        raise ValueError(f"max_block: expected an integer of at least 0, got {max_block!r}")
    if not isinstance(max_factor, int) or isinstance(max_factor, bool) or max_factor < 1:
        raise ValueError(f"max_factor: expected an integer of at least 1, got {max_factor!r}")
    limit = budget(max_memory)
    kind = check_fisher(fisher, samples, seed)
    rows = CurvatureRows(
        model, loss_fn, data,
        params=params, reduction=reduction, forward=forward, kind=kind, draws=samples, seed=seed,
    )  # fmt: skip
    dtype, device = vector_kind(rows.parameters)
    survey = rows.survey()
    blocks: list[Block] | None = None
    others: dict[str, str] = {}
    notes: dict[str, None] = {}
    for chunk in rows.chunks(limit // 2):
        groups = groups_of(chunk)
        if blocks is None:
            blocks, others = plan(groups, rows.parameters, approx, max_block, max_factor)
        for block in blocks:
            block.add(groups, chunk.lin.scratch)
        notes.update(dict.fromkeys(chunk.gradients.notes))
        del chunk, groups
    assert blocks is not None
    for what in ("exact block", "exact diagonal"):
        named = [name for name, found in others.items() if found == what]
        if named:
            notes[f"no Kronecker factors but the {what}: {', '.join(named)}"] = None
    return KFAC(
        [block.block(survey.denominator) for block in blocks], Layout(rows.parameters), dtype, device,
        others=others, loss=survey.loss, num_data=survey.num_data, seconds=time.perf_counter() - started,
        notes=tuple(notes),
    )  # fmt: skip
