"""All non-zero eigenvalues of the Gauss-Newton matrix, from the Gram matrix of its rows."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.curvature_rows import CurvatureRows, Survey
from flatkern.estimators.common import check_count
from flatkern.estimators.eigenpairs import eigsh
from flatkern.ggn_entries import summed_products
from flatkern.gradient_rows import gram
from flatkern.left_as_found import leaves_as_found
from flatkern.linearize import Forward, budget
from flatkern.losses import Reduction
from flatkern.operators import ggn
from flatkern.operators.adapters import as_operator
from flatkern.operators.base import LinearOperator
from flatkern.operators.linearization import vector_kind
from flatkern.problem import ParameterSelection, differentiation
from flatkern.root_jacobian import EigenvectorOperator, RootJacobian

__all__ = ["GGNSpectrum", "ggn_spectrum"]


@dataclass(frozen=True)
class GGNSpectrum:
    """Eigenvalues of the Gauss-Newton matrix, descending, and how far to trust them."""

    values: Tensor
    """float64 [r]: those above ``floor`` (with ``k``, the largest k of them)."""
    floor: float
    """Below it a computed eigenvalue is rounding and counts as zero."""
    num_zeros: int | None
    """P − the number of eigenvalues above the floor; ``None`` where only some were computed."""
    complete: bool
    """Whether ``values`` holds all non-zero eigenvalues."""
    trace: float | None
    """Tr G as the trace of the matrix that was decomposed; ``None`` for Lanczos."""
    trace_error: float | None
    """|Σ all eigenvalues − Tr G| / Tr G, Tr G by ghost norms (of the Gauss-Newton matrix itself: its diagonal)."""
    method: str
    num_data: int
    num_rows: int
    """m: cotangents over all samples; the Gram matrix is m by m."""
    num_parameters: int
    loss: float
    seconds: float
    residuals: Tensor | None = None
    """‖G v − λ v‖ for Lanczos, [r]; ``None`` where all eigenvalues were computed."""
    vectors: LinearOperator | None = field(default=None, repr=False)
    """Orthonormal eigenvectors as an operator [P, r]: ``vectors @ c``, ``vectors.T @ v``."""
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)


@differentiation()
@leaves_as_found
def ggn_spectrum(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    *,
    k: int | None = None,
    vectors: bool = False,
    params: ParameterSelection = None,
    reduction: Reduction | None = None,
    forward: Forward | None = None,
    max_size: int = 6000,
    seed: int = 0,
    max_memory: int | None = None,
) -> GGNSpectrum:
    """All non-zero eigenvalues of the generalized Gauss-Newton matrix G = Σ_i J_iᵀ H_i J_i / denominator [P, P].

    With rows γ_ik = s_ik·∂f(x_i)/∂θ for the columns s_ik of a root of H_i, G = Rᵀ R / denominator has the non-zero
    eigenvalues of the Gram matrix R Rᵀ / denominator [m, m]: m = n N rows for the squared error, n (C − 1) for
    cross-entropy (a position). It is formed from the layer rules (see :func:`flatkern.ntk`), without a parameter
    gradient where these apply, accumulated and decomposed in float64. Where P is smaller than m, G itself is formed.

    Args:
        model, loss_fn, data, params, reduction, forward: as for :func:`flatkern.ggn_trace`; normalized likewise, by the
            denominator of the whole data set.
        k: return the k largest only; needed where neither m nor P is at most ``max_size``: then by block Lanczos on
            products with G (:func:`flatkern.eigsh`), with residuals.
        vectors: also give the eigenvectors, as an operator that keeps U [m, r] and not V [P, r]:
            V c = Rᵀ (U Λ^(−½) c), one backward pass with combined cotangents. Those of small λ lose digits, as
            eps √(λ_max/λ) of the model's dtype.
        max_size: largest matrix that is decomposed (8 max_size² bytes, 4/3 max_size³ flops; nine times that with
            vectors).
        seed: of Lanczos's start vectors.
        max_memory: bytes of the working set beside the matrix (three times for its decomposition); default 1 GiB.

    Returns:
        A :class:`GGNSpectrum`.

    Cost: one forward pass over the data, K cotangents pulled back to the layers' outputs, m² d_out flops a dense layer,
    the decomposition.

    Raises:
        TypeError, ValueError: as :func:`flatkern.ggn_trace`; too large a problem without ``k``; data that change
            from pass to pass.

    Source: Dangel, Tatzel & Hennig, "ViViT: Curvature access through the generalized Gauss-Newton's low-rank
    structure", TMLR 2022, arXiv 2106.02624.

    Example:
        >>> import torch, flatkern as fk
        >>> model = torch.nn.Linear(4, 3)
        >>> data = torch.randn(8, 4), torch.arange(8) % 3
        >>> s = fk.ggn_spectrum(model, torch.nn.CrossEntropyLoss(), data, vectors=True)
        >>> len(s), s.num_zeros, s.vectors.shape  # 5 columns of (x, 1), 2 directions of the classes
        (10, 5, (15, 10))
    """
    started = time.perf_counter()
    limit = budget(max_memory)
    for name, value in (("k", k), ("max_size", max_size)):
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ValueError(f"{name}: expected an integer of at least 1, got {value!r}")
    check_count(seed, "seed", least=0)
    rows = CurvatureRows(model, loss_fn, data, params=params, reduction=reduction, forward=forward)
    survey = rows.survey()
    parameters = sum(p.numel() for p in rows.parameters.values())
    size = min(survey.rows, parameters)

    def result(values: Tensor, method: str, **rest: Any) -> GGNSpectrum:
        return GGNSpectrum(
            values=values, method=method, num_data=survey.num_data, num_rows=survey.rows,
            num_parameters=parameters, loss=survey.loss, seconds=time.perf_counter() - started, **rest,
        )  # fmt: skip

    if size > max_size:
        if k is None:
            raise ValueError(
                f"max_size: all eigenvalues need a matrix of {size} by {size} ({survey.rows} rows, {parameters} "
                f"parameters), more than {max_size}; give k for the largest ones by Lanczos, or raise max_size"
            )
        pairs = eigsh(
            ggn(model, loss_fn, data, params=params, reduction=reduction, forward=forward, max_memory=max_memory),
            min(k, parameters), seed=seed,
        )  # fmt: skip
        notes: tuple[str, ...] = (
            () if bool(pairs.converged.all()) else ("not all pairs converged; see residuals",)
        )
        return result(
            pairs.values, "block Lanczos on products with G",
            floor=0.0, num_zeros=None, complete=False, trace=None, trace_error=None, residuals=pairs.residuals,
            vectors=as_operator(pairs.vectors) if vectors else None, notes=notes + pairs.notes,
        )  # fmt: skip
    dual = survey.rows <= parameters
    matrix, trace, notes = (_gram if dual else _primal)(rows, survey, parameters, limit)
    own_trace = float(matrix.diagonal().sum())
    if not own_trace < float("inf"):  # NaN as well
        raise ValueError(
            "model: the gradients overflow or are NaN at this θ; measure in float64 (model.double())"
        )
    if vectors:
        values, columns = torch.linalg.eigh(matrix)
        columns = columns.flip(-1)
    else:
        values, columns = torch.linalg.eigvalsh(matrix), None
    del matrix
    values = values.flip(-1)
    dtype, _ = vector_kind(rows.parameters)
    eps = max(torch.finfo(torch.float64).eps, torch.finfo(dtype).eps ** 2)
    floor = 4 * size * eps * max(float(values[0]), 0.0)
    count = int((values > floor).sum())
    found = count if k is None else min(k, count)
    operator: LinearOperator | None = None
    if columns is not None and dual:
        left = columns[:, :found] * values[:found].rsqrt()
        operator = EigenvectorOperator(RootJacobian(rows, survey, limit // 2), left)
    elif columns is not None:
        operator = as_operator(columns[:, :found].to(dtype))
    total = float(values.sum())
    return result(
        values[:found].clone(), f"eigenvalues of the {'Gram' if dual else 'Gauss-Newton'} matrix ({size} by {size})",
        floor=floor, num_zeros=parameters - count, complete=found == count, trace=own_trace,
        trace_error=abs(total - trace) / trace if trace else abs(total), vectors=operator, notes=notes,
    )  # fmt: skip


def _gram(
    rows: CurvatureRows, survey: Survey, _parameters: int, limit: int
) -> tuple[Tensor, float, tuple[str, ...]]:
    matrix, trace, notes = gram(rows.rows, None, (survey.rows, survey.rows), limit, with_trace=True)
    matrix /= survey.denominator
    return matrix, trace / survey.denominator, notes


def _primal(
    rows: CurvatureRows, survey: Survey, parameters: int, limit: int
) -> tuple[Tensor, float, tuple[str, ...]]:
    matrix, notes = summed_products(rows, parameters, limit)
    matrix /= survey.denominator
    return matrix, float(matrix.diagonal().sum()), notes
