"""How fast an operator's spectrum decays, as the vectors of a pilot see it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flatkern.estimators.common import require_finite
from flatkern.estimators.sketch import Sketch
from flatkern.estimators.xnystrace import shifted_forms

__all__ = ["Decay", "is_symmetric", "observe"]

_ORDERS = 24
_JITTER = 1e-14
_ASYMMETRY = 1e-3


@dataclass(frozen=True)
class Decay:
    """What m pilot vectors say about the variances of trace estimators; all numbers on the host.

    Attributes:
        seen: m.
        trace: mean of the pilot's own quadratic forms, and ``trace_stderr``.
        squared_diagonal: Σ_k A_kk².
        sign_variance: variance of vᵀAv with random signs v, and its ``relative_error``.
        symmetric: whether ω_i·Aω_j = ω_j·Aω_i to rounding.
        one_sided: ‖(I − QQᵀ)A‖_F² for Q a basis of r images, r = 0 … m − 1.
        two_sided: ‖(I − QQᵀ)A(I − QQᵀ)‖_F² as a share of it, from r = 3 m/4 on.
        nystrom: ‖A − A_r‖_F² less (Tr A − A_r)²/(P − r) for the Nyström approximation from r vectors;
            ``None``: A is not definite.
    """

    seen: int
    trace: float
    trace_stderr: float
    squared_diagonal: float
    sign_variance: float
    relative_error: float
    symmetric: bool
    one_sided: Tensor
    two_sided: float
    nystrom: Tensor | None

    def form_variance(self, rank: int) -> float:
        """Variance of one form on the complement of ``rank`` images, extrapolated beyond the pilot."""
        share = 1 + (self.two_sided - 1) * min(1.0, 4 * rank / (3 * self.seen))
        squared = _at(self.one_sided, rank)
        return (2 * share if self.symmetric else 1 + share) * squared

    def one_sided_at(self, rank: int) -> float:
        """``one_sided``, extrapolated beyond the pilot."""
        return _at(self.one_sided, rank)

    def nystrom_variance(self, rank: int) -> float:
        """Variance of one form of A minus its Nyström approximation from ``rank`` vectors."""
        return math.inf if self.nystrom is None else 2 * _at(self.nystrom, rank)


def observe(sketch: Sketch, size: int, eps: float, *, what: str = "trace") -> Decay:
    """Read a sketch (one host synchronization).

    Vectors that were not used for a basis are fresh ones for it: with Q from r of the images,
    E ‖(I − QQᵀ)Aω‖² = ‖(I − QQᵀ)A‖_F² and E (ω'ᵀPAω)(ωᵀPAω') = Tr PAPA over pairs of the others, which is
    ‖PAP‖_F² for symmetric A. Both, and the same for Nyström approximations, follow from the small inner
    products; they are averaged over orders of the vectors.
    """
    gram, forms, vectors, entries = (
        t.cpu() for t in (sketch.images_gram, sketch.forms, sketch.vectors_gram, sketch.entries_gram)
    )
    require_finite(forms, what)
    require_finite(gram, what)
    m = len(gram)
    values = size * forms.diagonal() / vectors.diagonal()
    squares = gram.diagonal()
    pairs = (forms * forms.mT).sum() - forms.diagonal().square().sum()
    symmetric = is_symmetric(forms, eps)
    diagonal, diagonal_error = _mean_of_pairs(entries)
    half = squares.mean() if symmetric else (squares.mean() + pairs / (m * (m - 1))) / 2
    generator = torch.Generator().manual_seed(0)
    count = max(2, min(_ORDERS, 2**24 // m**3))
    orders = torch.stack([torch.randperm(m, generator=generator) for _ in range(count)])
    rows, columns = orders[:, :, None], orders[:, None, :]
    grams = gram[rows, columns]
    one_sided, factor = _pivots(grams)
    nystrom = _nystrom(forms, gram, vectors, size, eps, rows, columns, grams) if symmetric else None
    return Decay(
        seen=m,
        trace=float(values.mean()),
        trace_stderr=float(values.std()) / m**0.5,
        squared_diagonal=max(diagonal, float(values.mean()) ** 2 / size),  # Cauchy-Schwarz
        # no credit for a diagonal that is not seen clearly: outliers make it look larger than all of A
        sign_variance=max(0.0, 2 * (float(half) - max(0.0, diagonal - 2 * diagonal_error))),
        relative_error=float(squares.std() / squares.mean().clamp_min(1e-300)) / m**0.5,
        symmetric=symmetric,
        one_sided=one_sided,
        two_sided=_two_sided_share(forms[rows, columns], grams, factor),
        nystrom=nystrom,
    )


def _mean_of_pairs(products: Tensor) -> tuple[float, float]:
    """Mean of products of different vectors and its standard error, from the mean of each vector's own."""
    m = len(products)
    means = (products.sum(1) - products.diagonal()) / (m - 1)
    return float(means.mean()), 2 * float(means.std()) / m**0.5


def is_symmetric(forms: Tensor, eps: float) -> bool:
    """Whether ω_i·Aω_j = ω_j·Aω_i for all pairs, as far as rounding allows."""
    off = forms - forms.diagonal().diag()
    allowed = max(_ASYMMETRY, 64 * eps)
    return bool((forms - forms.mT).norm() <= allowed * off.norm() + 64 * eps * forms.norm())


def _pivots(grams: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared Cholesky pivots, [m]: what is left of a vector given those before it; and the factors."""
    jitter = _JITTER * grams.diagonal(dim1=1, dim2=2).mean().clamp_min(1e-300)
    unit = torch.eye(grams.shape[-1], dtype=grams.dtype)
    factor, info = torch.linalg.cholesky_ex(grams + jitter * unit)
    if bool(info.any()):  # a deficient rank beyond what rounding allows for
        factor = torch.linalg.cholesky_ex(grams + 1e4 * jitter * unit).L
    squares = factor.diagonal(dim1=1, dim2=2).square().mean(0)
    return torch.nan_to_num(squares, nan=float(jitter)), factor


def _two_sided_share(forms: Tensor, grams: Tensor, factor: Tensor) -> float:
    """Tr PAPA / ‖PA‖_F² from pairs of vectors not in the basis, at r = 3 m/4."""
    m = forms.shape[-1]
    r = min(3 * m // 4, m - 2)
    if r < 1:
        return 1.0
    known, cross = factor[:, :r, :r], grams[:, :r, r:]
    parts = torch.cholesky_solve(cross, known)
    left = forms[:, r:, r:] - forms[:, r:, :r] @ parts
    products = (left * left.mT).sum((1, 2)) - left.diagonal(dim1=1, dim2=2).square().sum(1)
    squares = grams[:, r:, r:].diagonal(dim1=1, dim2=2) - (cross * parts).sum(1)
    whole, pair = float(squares.mean()), float(products.mean()) / ((m - r) * (m - r - 1))
    if not (math.isfinite(pair) and whole > 0):
        return 1.0
    # between these bounds lies every spectrum met; outside them is the noise of few pairs
    return min(1.0, max(0.3, pair / whole))


def _nystrom(
    forms: Tensor,
    gram: Tensor,
    vectors: Tensor,
    size: int,
    eps: float,
    rows: Tensor,
    columns: Tensor,
    grams: Tensor,
) -> Tensor | None:
    """The mean of ‖(A − A_r)ω‖² over vectors not among the r, less the part of a multiple of I, [m]."""
    shifted, _ = shifted_forms(forms, gram, vectors, size, eps)
    factor, info = torch.linalg.cholesky_ex(shifted[rows, columns])
    if bool(info.any()):
        return None
    # (A − A_r)ω = AΩ c with c the row of L⁻¹ of that vector, times its pivot
    half = torch.linalg.solve_triangular(factor, grams, upper=False)
    whole = torch.linalg.solve_triangular(factor, half.mT, upper=False).diagonal(dim1=1, dim2=2)
    pivots = factor.diagonal(dim1=1, dim2=2).square()
    left = size - torch.arange(len(forms))
    # forms of vectors of one length do not see the multiple of the identity in A − A_r
    return ((pivots * whole).mean(0) - pivots.mean(0).square() / left).clamp_min(0.0)


def _at(curve: Tensor, rank: int) -> float:
    """A curve over ranks 0 … m − 1, continued from its second half.

    Halfway, on a logarithmic scale, between the power law and the exponential through both ends of that half:
    the one takes a spectrum that bends down for slower than it is, the other a heavy tail for faster.
    """
    last = len(curve) - 1
    if rank <= last:
        return float(curve[rank])
    middle = max(1, last // 2)
    end, before = float(curve[last]), float(curve[middle])
    if end <= 0 or before <= end:
        return end
    drop = math.log(before / end)
    power = drop / math.log(last / middle) * math.log(rank / last)
    exponential = drop / (last - middle) * (rank - last)
    return end * math.exp(-(power + exponential) / 2)
