"""XTrace: every test vector gives an unbiased value with the range that the others have found."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flatkern.estimators.sampling_run import Run
from flatkern.estimators.sketch import Sketch
from flatkern.estimators.small import inner

__all__ = ["xtrace_products", "xtrace_values"]


def xtrace_products(run: Run, sketch: Sketch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The m further products, with the basis Q: C, W = QΩᵀ, H = Q A Qᵀ and T = (A Qᵀ)ᵀ Ωᵀ, all [m, m]."""
    basis, coefficients = sketch.basis()
    m = len(basis)
    compressed = run.array("compressed", (m, m), torch.float64)
    tested = run.array("tested", (m, m), torch.float64)
    for block in run.blocks("range", m):
        if block.known:
            continue
        image = (run.op @ basis[block.span].mT).mT
        compressed[:, block.span] = inner(basis, image)
        tested[block.span] = torch.cat([inner(image, v) for v in sketch.vectors()], dim=1)
    overlaps = torch.cat([inner(basis, v) for v in sketch.vectors()], dim=1)
    return coefficients, overlaps, compressed, tested


def xtrace_values(
    coefficients: Tensor,
    overlaps: Tensor,
    compressed: Tensor,
    tested: Tensor,
    squared_norms: Tensor,
    size: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """The m values, [m], and the covariance of two of them, 0-d, from what :func:`xtrace_products` gives.

    With Q_i an orthonormal basis of the images of all test vectors but ω_i, and P_i = I − Q_i Q_iᵀ,

        x_i = Tr Q_iᵀ A Q_i + d_i/‖P_i ω_i‖² · ω_iᵀ P_i A P_i ω_i,    d_i = P − rank Q_i,

    each unbiased since ω_i is independent of Q_i and P_i ω_i/‖P_i ω_i‖ uniform on the sphere of the complement.

    Downdating: with C = U Σ Vᵀ (singular values beyond rounding dropped), s_i is the unit vector in the span of
    U that is orthogonal to all columns of C but the i-th: Σ⁻¹ times the i-th row of V, in U, normalized. It
    exists where that column is independent of the others, i.e. where the row is a unit vector; else s_i = 0, and
    leaving ω_i out changes nothing. Then Q_i Q_iᵀ = Q (U Uᵀ − s_i s_iᵀ) Qᵀ. No triangular factor is inverted,
    so a deficient rank, zero included, stays finite.

    The values are not independent: each uses nearly the same range. Let x_ij be the value of ω_i with the range
    that all but ω_i and ω_j have found. Given that range, x_ij and x_ji are independent with mean Tr A, and
    x_i has mean Tr A given all but ω_i, so that Cov(x_i, x_j) = E (x_i − x_ij)(x_j − x_ji). The mean of these
    products over all pairs is an unbiased value of the covariance, and

        Var (mean of x) = E s²/m + Cov(x_i, x_j)    with s² = Σ (x_i − mean)²/(m − 1).

    The first term alone, the leave-one-out standard error, is too small by up to a half on spectra that decay.

    Source: Epperly, Tropp, Webber, "XTrace: Making the most of every sample in stochastic trace estimation",
    SIAM J. Matrix Anal. Appl. 45 (2024), for x_i.
    """
    m = len(coefficients)
    s, left, alone = downdates(coefficients, eps)
    projector = left @ left.mT
    h, w, t = projector @ compressed @ projector, projector @ overlaps, projector @ tested
    forms = _Forms(
        trace=h.diagonal().sum(),
        own=(s * coefficients).sum(0),
        overlap=s.mT @ w,
        crossed=s.mT @ (t - h @ w - h.mT @ w),
        between=s.mT @ h @ s,
        rest=(t * w).sum(0) - (w * (h @ w)).sum(0),
        outside=squared_norms - w.square().sum(0),
        dimension=size - (left.square().sum(0) > 0.5).sum(),
        alone=alone,
    )
    one, two = forms.without_one(), forms.without_two(s.mT @ s)
    changes = one[:, None] - two
    products = changes * changes.mT
    return one, (products.sum() - products.diagonal().sum()) / (m * (m - 1))


def downdates(coefficients: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The s_i as columns [m, m], the columns of U (zero beyond the rank), and which s_i exist [m]."""
    left, sigma, right = torch.linalg.svd(coefficients)
    kept = sigma > sigma[0] * eps * len(sigma)
    left = left * kept  # nothing is read, so shapes stay
    inverse = torch.where(kept, 1 / torch.where(kept, sigma, 1.0), 0.0)
    # the i-th row of V is a unit vector where its part in the null space is rounding
    alone = (right * ~kept[:, None]).abs().amax(0) < 1e-10
    directions = left @ (inverse[:, None] * right)
    norms = torch.linalg.vector_norm(directions, dim=0)
    return torch.where(alone, directions / torch.where(norms > 0, norms, 1.0), 0.0), left, alone


@dataclass(frozen=True)
class _Forms:
    """Everything x_i depends on. With R the directions taken out of the range and γ the coordinates of the
    projection of w_i on them, ω_iᵀPAPω_i = γ₁ s_i·c_i − (t_i·w̃ − w̃ᵀHw̃), w̃ = w_i − Rγ; the image of ω_i is in
    the range, and s_j·c_i = 0 for j ≠ i.
    """

    trace: Tensor
    own: Tensor
    overlap: Tensor
    crossed: Tensor
    between: Tensor
    rest: Tensor
    outside: Tensor
    dimension: Tensor
    alone: Tensor

    def without_one(self) -> Tensor:
        """x_i, [m]."""
        a, k = self.overlap.diagonal(), self.between.diagonal()
        # t·w̃ − w̃ᵀHw̃ = (t·w − wᵀHw) − γ(s·t − sᵀHw − wᵀHs) − γ² sᵀHs
        residual = a * self.own - (self.rest - a * self.crossed.diagonal() - a * a * k)
        return self.trace - k + _scaled(residual, self.dimension + self.alone, self.outside + a * a)

    def without_two(self, cosines: Tensor) -> Tensor:
        """x_ij, [m, m]."""
        a, b = self.overlap.diagonal()[:, None], self.overlap.mT  # s_i·w_i and s_j·w_i
        k = self.between.diagonal()
        determinant = (1 - cosines.square()).clamp_min(1e-14)
        first, second = (a - cosines * b) / determinant, (b - cosines * a) / determinant
        both = self.between + self.between.mT
        taken = (k[:, None] + k[None] - cosines * both) / determinant
        quadratic = first.square() * k[:, None] + first * second * both + second.square() * k[None]
        linear = first * self.crossed.diagonal()[:, None] + second * self.crossed.mT
        residual = first * self.own[:, None] - (self.rest[:, None] - linear - quadratic)
        dimension = self.dimension + self.alone[:, None] + self.alone[None]
        outside = self.outside[:, None] + first * a + second * b
        return self.trace - taken + _scaled(residual, dimension, outside)


def _scaled(residual: Tensor, dimension: Tensor, outside: Tensor) -> Tensor:
    """The form of a vector brought to the squared length ``dimension``; zero where nothing is left of it."""
    usable = (dimension > 0) & (outside > 0)
    return torch.where(usable, residual * dimension / torch.where(usable, outside, 1.0), 0.0)
