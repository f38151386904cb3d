"""XNysTrace: XTrace on Nyström approximations, for positive semi-definite operators; one product a vector."""

from __future__ import annotations

import torch
from torch import Tensor

from flatkern.estimators.sketch import Sketch
from flatkern.estimators.small import CHUNK

__all__ = ["shifted_forms", "smallest_ritz_value", "xnystrace_values"]


def shifted_forms(
    forms: Tensor, images_gram: Tensor, vectors_gram: Tensor, size: int, eps: float
) -> tuple[Tensor, Tensor]:
    """Symmetric M + νN, and the shift ν: as large as the rounding of the products, never zero.

    An image is off by eps ‖Y‖, a form cᵀMc with ‖Ωc‖² = λ_min(N) by eps ‖Y‖ ‖Ωc‖, which νλ_min(N) must outweigh, as it
    must the rounding of the factorization, m eps Tr M.
    """
    least = torch.linalg.eigvalsh(vectors_gram)[0].clamp_min(1e-12).clamp_max(size)
    shift = 2 * eps * (images_gram.diagonal().sum() / least).sqrt() + 1e-30
    shift = shift + len(forms) * torch.finfo(forms.dtype).eps * forms.diagonal().sum().abs() / least
    return (forms + forms.mT) / 2 + shift * vectors_gram, shift


def smallest_ritz_value(forms: Tensor, vectors_gram: Tensor) -> float:
    """The smallest eigenvalue of A compressed to the span of the test vectors."""
    factor = torch.linalg.cholesky(vectors_gram)
    half = torch.linalg.solve_triangular(factor, (forms + forms.mT) / 2, upper=False)
    return float(torch.linalg.eigvalsh(torch.linalg.solve_triangular(factor, half.mT, upper=False))[0])


def xnystrace_values(sketch: Sketch, size: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """The m values, [m], the covariance of two of them, and a flag (0: fine) that M was not positive definite.

    With B = A + νI, its Nyström approximation B_i = BΩ_i (Ω_iᵀBΩ_i)⁻¹ (BΩ_i)ᵀ from all test vectors but ω_i,
    and d = P − m + 1,

        x_i = Tr B_i + d/‖P_i ω_i‖² · ω_iᵀ (B − B_i) ω_i − νP,

    P_i the projector off the span of Ω_i, on which B − B_i vanishes. By Schur complements, with M = ΩᵀBΩ =
    LLᵀ, K = L⁻¹(BΩ)ᵀ(BΩ)L⁻ᵀ and s_i = L⁻¹e_i:  ω_iᵀ(B − B_i)ω_i = 1/‖s_i‖²,  Tr B_i = Tr K − s_iᵀKs_i/‖s_i‖²,
    ‖P_i ω_i‖² = 1/(N⁻¹)_ii with N = ΩᵀΩ. K is summed from L⁻¹(BΩ)ᵀ in chunks: through the images' Gram
    matrix half of the digits would be lost. Leaving out two vectors gives the covariance of two values, as in
    XTrace.

    Source: Epperly, Tropp, Webber, "XTrace: Making the most of every sample in stochastic trace estimation",
    SIAM J. Matrix Anal. Appl. 45 (2024).
    """
    m = len(sketch)
    forms, shift = shifted_forms(sketch.forms, sketch.images_gram, sketch.vectors_gram, size, eps)
    factor, flag = torch.linalg.cholesky_ex(forms)
    compressed = torch.zeros(m, m, dtype=torch.float64, device=forms.device)
    for start in range(0, size, CHUNK):
        part = slice(start, start + CHUNK)
        images = torch.cat([y[:, part].double() for y in sketch.images()])
        images = images + shift * torch.cat([v[:, part].double() for v in sketch.vectors()])
        whitened = torch.linalg.solve_triangular(factor, images, upper=False)
        compressed += whitened @ whitened.mT
    unit = torch.eye(m, dtype=torch.float64, device=forms.device)
    directions = torch.linalg.solve_triangular(factor, unit, upper=False)  # columns s_i
    inverse, removed = directions.mT @ directions, directions.mT @ compressed @ directions
    outside = torch.linalg.inv(sketch.vectors_gram)
    whole = compressed.diagonal().sum() - shift * size
    weights, gone, lengths = inverse.diagonal(), removed.diagonal(), outside.diagonal()
    one = whole - gone / weights + (size - m + 1) * lengths / weights
    # without j too: Schur complements of the 2 × 2 blocks of M⁻¹ and N⁻¹
    rest = (weights[:, None] - inverse.square() / weights[None]).clamp_min(1e-14 * weights[:, None])
    freed = lengths[:, None] - outside.square() / lengths[None]
    taken = gone[:, None] * weights[None] + gone[None] * weights[:, None] - 2 * inverse * removed
    two = whole - taken / (rest * weights[None]) + (size - m + 2) * freed / rest
    changes = one[:, None] - two
    products = changes * changes.mT
    covariance = (products.sum() - products.diagonal().sum()) / (m * (m - 1))
    # a deficient rank: each value is exact, and only leaving out two vectors would lose anything
    half = torch.linalg.solve_triangular(factor, sketch.vectors_gram, upper=False)
    largest = torch.linalg.solve_triangular(factor, half.mT, upper=False).norm()
    return one, torch.where(shift * largest > 0.01, 0.0, covariance), flag
