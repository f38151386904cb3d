"""Singular values of batches of matrices through their small Gram matrices, and what is derived from them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _gram
from ._checks import check_matrices, few_dims
from ._registration import concrete, differentiated, forward_rule, in_graph, quick, register
from ._select import runs_compiled

MAX_SPECTRUM = 64
"""Rows up to which the compiled eigensolver works."""
_FLOOR = 1e-10
"""Below this ratio of eigenvalues the smallest singular value of a Gram matrix in float64 has lost six digits."""


class GramSpectrum(NamedTuple):
    """What `gram_spectrum` returns, one entry a sample."""

    singular_values: Tensor
    """σ_1 ≥ … ≥ σ_r of x, float64 [..., r], r = min(c, d)."""
    sigma_max: Tensor
    """σ_1, float64 [...]; 0 where r = 0."""
    participation_ratio: Tensor
    """(Σ σ²)² / Σ σ⁴, float64 [...], between 1 and r; 0 where x = 0."""
    log_volume: Tensor
    """Σ_{j ≤ k} log σ_j, float64 [...]; -inf where σ_k ≤ 8 √r ε σ_1 (ε of x's dtype)."""


def gram_singular_values(x: Tensor, *, precise: bool = True) -> Tensor:
    r"""The singular values of every sample in descending order, from the smaller Gram matrix in float64.

    For up to 64 values by Householder tridiagonalization and QL iterations of G = x xᵀ, a vector of samples at once. A
    sample whose smallest eigenvalue is below 10⁻¹⁰ of its largest has lost the digits of σ_r in G; its rows are then
    factored, x = L Q, and L is diagonalized by one-sided Jacobi rotations. Chosen sample by sample inside the kernel.
    The CUDA kernel turns the Gram matrix's Cholesky factor by Jacobi rotations too, and takes a factor from the rows in
    twice the precision for samples that lost digits.

    The derivative is ∂σ_j = u_jᵀ ∂x xᵀ u_j / σ_j; second derivatives divide by σ_j² − σ_i² and are not finite where
    values coincide, as those of `torch.linalg.svdvals`.

    Args:
        x: [..., c, d], float32 or float64, any strides.
        precise: with False samples that lost the digits of small values are left so, which is quicker where only the
            large ones matter: every σ² is good to rounding of σ_1². No effect where a derivative may be asked for, and
            little on a GPU.

    Returns:
        [..., min(c, d)], float64; NaN for a sample with NaN or infinities.

    Cost: c²d/2 + 2c³/3 + 8c² multiply-adds a sample (c the smaller side), three times that where a derivative may be
        asked for. Above 64 `torch.linalg.eigvalsh`.

    Raises:
        TypeError: another dtype or layout.
        ValueError: fewer than two dimensions.

    Source:
        Wilkinson & Reinsch, Handbook for Automatic Computation II (1971), II/2 and II/3.

    Example:
        >>> import torch
        >>> gram_singular_values(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 4.0]]))
        tensor([4., 3.], dtype=torch.float64)
    """
    check_matrices("gram_singular_values", x, square=False)
    return _apply(x if x.shape[-2] <= x.shape[-1] else x.mT, precise)


def gram_spectrum(x: Tensor, k: int | None = None) -> GramSpectrum:
    r"""σ_max, participation ratio and the log-volume of the k largest directions of every sample, without an SVD.

    Args:
        x: [..., c, d], float32 or float64, any strides.
        k: how many singular values enter `log_volume`, 1 … min(c, d); default all of them.

    Returns:
        GramSpectrum of float64 tensors, NaN for a sample with NaN or infinities.

    Cost, derivatives and accuracy: those of `gram_singular_values`. Where `log_volume` is -inf its derivative is zero.

    Raises:
        TypeError: another dtype or layout, or a k that is not an integer.
        ValueError: fewer than two dimensions, or k out of range.

    Example:
        >>> import torch
        >>> s = gram_spectrum(torch.tensor([[3.0, 0.0, 0.0], [0.0, 0.0, 4.0]]), k=1)
        >>> round(s.log_volume.exp().item(), 6)
        4.0
    """
    check_matrices("gram_spectrum", x, square=False)
    r = min(x.shape[-2:])
    if k is not None and (isinstance(k, bool) or not isinstance(k, int)):
        raise TypeError(f"gram_spectrum: k must be an integer, got {type(k).__name__}")
    if k is not None and not 1 <= k <= r:
        raise ValueError(f"gram_spectrum: k must be between 1 and min(c, d) = {r}, got {k}")
    values = gram_singular_values(x)
    if r == 0:
        zero = values.sum(-1)
        return GramSpectrum(values, zero, zero, zero)
    squares = values.square()
    quartic = squares.square().sum(-1)
    nothing = quartic == 0
    ratio = torch.where(nothing, 0.0, squares.sum(-1).square() / torch.where(nothing, 1.0, quartic))
    top, kept = values[..., 0], values[..., : k or r]
    deficient = kept[..., -1] <= 8 * r**0.5 * torch.finfo(x.dtype).eps * top
    volume = torch.where(deficient[..., None], 1.0, kept).log().sum(-1)
    return GramSpectrum(values, top, ratio, torch.where(deficient, -torch.inf, volume))


def reference_values(x: Tensor, precise: bool) -> Tensor:
    """Singular values, descending: by `eigvalsh` of the Gram matrix, or by SVD where it has lost digits."""
    G = _gram.reference(x)
    finite = G.isfinite().all(-1).all(-1)
    identity = torch.eye(x.shape[-2], dtype=torch.float64, device=x.device)
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite[..., None, None], G, identity))
    values = eigenvalues.clamp_min(0).sqrt().flip(-1)
    if precise and x.shape[-2] > 0:
        lost = finite & (eigenvalues[..., 0] < _FLOOR * eigenvalues[..., -1])
        if not concrete(x):
            chosen = torch.where(lost[..., None, None], x, 0.0).double()
            values = torch.where(lost[..., None], torch.linalg.svdvals(chosen), values)
        elif bool(lost.any()):
            values = values.clone()
            values[lost] = torch.linalg.svdvals(x[lost].double())
    return torch.where(finite[..., None], values, torch.nan)


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values, descending, and left singular vectors as rows: by `eigh` of the Gram matrix, or by SVD.

    Where samples cannot be chosen without waiting (a GPU, a tracer) all are decomposed.
    """
    c = x.shape[-2]
    G = _gram.reference(x)
    finite = G.isfinite().all(-1).all(-1)
    wide = torch.where(finite[..., None, None], x, 0.0).double()
    identity = torch.eye(c, dtype=torch.float64, device=x.device)
    eigenvalues, vectors = torch.linalg.eigh(torch.where(finite[..., None, None], G, identity))
    values, U = eigenvalues.clamp_min(0).sqrt().flip(-1), vectors.mT.flip(-2)
    if c > 0:
        lost = finite & (eigenvalues[..., 0] < _FLOOR * eigenvalues[..., -1])
        if not concrete(x):
            turned, exact, _ = torch.linalg.svd(wide, full_matrices=False)
            values = torch.where(lost[..., None], exact, values)
            U = torch.where(lost[..., None, None], turned.mT, U)
        elif bool(lost.any()):
            turned, exact, _ = torch.linalg.svd(wide[lost], full_matrices=False)
            values, U = values.clone(), U.clone()
            values[lost], U[lost] = exact, turned.mT
    return (
        torch.where(finite[..., None], values, torch.nan),
        torch.where(finite[..., None, None], U, torch.nan),
    )


def _raw(x: Tensor, precise: bool) -> Tensor:
    if not runs_compiled(x, limit=MAX_SPECTRUM, squares=1):
        return reference_values(x, precise)
    values: Tensor = torch.ops.flatkern.gram_singular_values(few_dims(x), precise)
    return values.reshape(x.shape[:-1])


def _raw_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    if not runs_compiled(x, limit=MAX_SPECTRUM, squares=2):
        return reference(x)
    values, U = torch.ops.flatkern.gram_singular_vectors(few_dims(x))
    return values.reshape(x.shape[:-1]), U.reshape(*x.shape[:-1], x.shape[-2])


def _gaps(values: Tensor) -> Tensor:
    """1 / (σ_j² − σ_i²) at [j, i], 0 on the diagonal."""
    squares = values.square()
    gaps = squares[..., :, None] - squares[..., None, :]
    diagonal = torch.eye(values.shape[-1], dtype=torch.bool, device=values.device)
    return torch.where(diagonal, 0.0, 1 / torch.where(diagonal, 1.0, gaps))


def _over(a: Tensor, values: Tensor) -> Tensor:
    """a / (2σ), 0 where a is."""
    nothing = a == 0
    return torch.where(nothing, 0.0, a / torch.where(nothing, 1.0, 2 * values))


@quick
class _Spectrum(torch.autograd.Function):
    """x → (σ, U): with G = x xᵀ and M = U ∂G Uᵀ, ∂σ_j = M_jj / 2σ_j and ∂u_j = Σ_{i ≠ j} M_ij u_i / (σ_j² − σ_i²)."""

    @staticmethod
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        return _raw_vectors(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], *output)
        ctx.save_for_forward(inputs[0], *output)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor | None:
        x, values, U = ctx.saved_tensors
        g_values, g_vectors = grads
        terms = []
        wide = x.double()
        if g_values is not None:
            terms.append(U.mT @ (2 * _over(g_values, values)[..., None] * (U @ wide)))
        if g_vectors is not None:
            M = g_vectors @ U.mT * _gaps(values)
            terms.append(U.mT @ (M + M.mT) @ (U @ wide))
        return sum(terms[1:], terms[0]).to(x.dtype) if terms else None

    @staticmethod
    @forward_rule
    def jvp(x: Tensor, values: Tensor, U: Tensor, T: Tensor) -> tuple[Tensor, Tensor]:
        half = (U @ T.double()) @ (U @ x.double()).mT
        M = half + half.mT
        return _over(M.diagonal(dim1=-2, dim2=-1), values), (M * _gaps(values)) @ U

    @staticmethod
    def vmap(_info: Any, in_dims: Any, x: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
        return _both(x.movedim(in_dims[0], 0)), (0, 0)


def _both(x: Tensor) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _Spectrum.apply(x) if differentiated(x) else _raw_vectors(x)
    return result


@in_graph
def _apply(x: Tensor, precise: bool) -> Tensor:
    return _both(x)[0] if differentiated(x) else _raw(x, precise)


def _fake(x: Tensor, precise: bool = True) -> Tensor:
    return x.new_empty(x.shape[:-1], dtype=torch.float64)


def _fake_vectors(x: Tensor) -> tuple[Tensor, Tensor]:
    return _fake(x), x.new_empty((*x.shape[:-1], x.shape[-2]), dtype=torch.float64)


register("gram_singular_values", _fake)
register("gram_singular_vectors", _fake_vectors, outputs=2)
