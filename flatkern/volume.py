"""Quantities of the input-output Jacobian alone, one value a sample: volume, sensitivity, dimensionality."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from flatkern.linearize import budget, linearizations, pull_back
from flatkern.losses import identity_cotangents
from flatkern.problem import check_input, check_model, differentiation, model_device
from flatkern.results import PerSample
from flatkern.spectra import Spectrum, full_log_volume, squared_singular_values
from flatkern.squared_norms import with_rows

__all__ = ["local_dimensionality", "log_volume", "max_sensitivity"]


@differentiation()
def log_volume(
    model: nn.Module, x: Tensor, rank: int | None = None, *, max_memory: int | None = None
) -> PerSample:
    """Log of the local volumetric ratio, log dV_i = ½ log det J_i J_iᵀ = Σ_j log σ_j(J_i), one value a sample.

    J_i = ∂f/∂x at x_i is N × M. With ``rank=k`` only the k largest singular values are summed (the curves published
    with the paper show k = 3). Natural logarithm.

    Args:
        model: any module [n, ...] → [n, ...] whose samples do not interact; left exactly as found.
        x: inputs [n, ...], floating point.
        rank: ``None`` for all N, or 1 … min(N, M).
        max_memory: bytes of the working set; default 1 GiB.

    Returns:
        A :class:`PerSample`: ``values`` float64 [n], −inf where J_i is rank deficient (σ ≤ 8 √N eps σ_max; counted in
        ``rank_deficient`` and left out of ``mean``).

    Raises:
        TypeError, ValueError: bad arguments; N > M with ``rank=None``, where the volume is undefined.

    Source:
        Chen, Recanatesi & Shea-Brown, arXiv 2310.01770 (dV, the local volumetric ratio).

    Example:
        >>> import torch, flatkern as fk
        >>> model = torch.nn.Linear(5, 2)
        >>> v = fk.log_volume(model, torch.randn(3, 5))
        >>> w = model.weight.detach().double()
        >>> torch.allclose(v.values, 0.5 * torch.logdet(w @ w.T).expand(3), atol=1e-5)
        True
    """
    started = time.perf_counter()
    if rank is None:
        parts = [_full_volume(rows) for rows in _jacobians(model, x, max_memory)]
        values = torch.cat([p.values for p in parts])
        degenerate = torch.cat([p.degenerate for p in parts if p.degenerate is not None])
        return PerSample(values, degenerate, seconds=time.perf_counter() - started)
    return replace(_spectrum(model, x, max_memory).log_volume(rank), seconds=time.perf_counter() - started)


@differentiation()
def max_sensitivity(model: nn.Module, x: Tensor, *, max_memory: int | None = None) -> PerSample:
    """σ_max(J_i), the spectral norm of the input-output Jacobian, one value a sample; its mean is the paper's MLS.

    No normalization by √N. Arguments, errors and conventions as :func:`log_volume`. Exact, by all N cotangents; with
    many outputs and inputs :func:`flatkern.geometry` finds it without a Jacobian.

    Example:
        >>> import torch, flatkern as fk
        >>> s = fk.max_sensitivity(torch.nn.Linear(5, 2), torch.randn(3, 5))
        >>> len(s), s.sample_stderr < 1e-6
        (3, True)
    """
    started = time.perf_counter()
    spectrum = _spectrum(model, x, max_memory, only_top=True)
    return PerSample(spectrum.top, seconds=time.perf_counter() - started)


@differentiation()
def local_dimensionality(model: nn.Module, x: Tensor, *, max_memory: int | None = None) -> PerSample:
    """Participation ratio D_PR = (Tr C)²/Tr(C²) of C = J_i J_iᵀ, one value a sample, between 1 and N.

    Scale invariant. 0, counted in ``rank_deficient``, where J_i = 0. Arguments and errors as :func:`log_volume`.

    Example:
        >>> import torch, flatkern as fk
        >>> d = fk.local_dimensionality(torch.nn.Linear(5, 2), torch.randn(3, 5))
        >>> bool((d.values >= 1).all() and (d.values <= 2).all())
        True
    """
    started = time.perf_counter()
    spectrum = _spectrum(model, x, max_memory, only_top=True)  # energies need no singular values beyond
    return replace(spectrum.participation_ratio(), seconds=time.perf_counter() - started)


def _full_volume(rows: Tensor) -> PerSample:
    _, outputs, inputs = rows.shape
    if outputs > inputs:
        raise ValueError(
            f"model: N = {outputs} outputs exceed M = {inputs} inputs, so det J Jᵀ = 0 for every sample and the "
            f"log-volume is undefined; ask for rank=k with k ≤ {inputs}"
        )
    return full_log_volume(rows)


def _spectrum(model: nn.Module, x: Tensor, max_memory: int | None, *, only_top: bool = False) -> Spectrum:
    parts = [squared_singular_values(rows, only_top=only_top) for rows in _jacobians(model, x, max_memory)]
    return Spectrum.concatenate(parts, min(parts[0].outputs, parts[0].inputs))


def _jacobians(model: nn.Module, x: Tensor, max_memory: int | None) -> Iterator[Tensor]:
    """Input-output Jacobians [n, N, M] of the samples, chunk by chunk."""
    check_model(model)
    check_input(x, differentiable=True)
    x = x.to(model_device(model))
    for lin in linearizations(model, x, {}, with_input=True, max_memory=budget(max_memory)):
        if lin.output.grad_fn is None or lin.input_edge is None:
            raise ValueError("model: its output does not depend differentiably on x")
        roots = identity_cotangents(lin.output)
        rows: Tensor | None = None
        for block, (cotangent,) in pull_back(lin, roots, [lin.input_edge]):
            if cotangent is not None:
                rows = with_rows(rows, cotangent, block, len(roots))
        if rows is None:
            raise ValueError("model: its output does not depend differentiably on x")
        yield rows
        del lin, rows
