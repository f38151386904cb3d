"""The largest eigenvalue of a loss's Hessian: the sharpness of the edge-of-stability literature."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.estimators.eigenpairs import Eigenpairs, eigsh
from flatkern.losses import Reduction
from flatkern.operators import hessian
from flatkern.operators.batches import Forward
from flatkern.operators.products import Mode
from flatkern.problem import ParameterSelection

__all__ = ["MaxEigenvalue", "max_eigenvalue"]


@dataclass(frozen=True)
class MaxEigenvalue:
    """λ_max with a bound on its error. ``float(result)`` gives the value; ``start=result`` starts the next."""

    value: float
    """λ, the Ritz value vᵀ H v."""
    error_bound: float
    """‖H v − λ v‖₂ ≥ |λ − the nearest eigenvalue|, from a product with the final v. Where the next eigenvalue
    is a gap γ away, the error is at most bound²/γ."""
    converged: bool
    """error_bound ≤ tol · (largest |Ritz value| seen)."""
    verified: bool
    """Whether a second run from a random start found nothing larger (see ``verify``)."""
    vector: Tensor = field(repr=False)
    """v [P] of unit norm, in the order of the selected parameters."""
    num_data: int
    matvecs: int
    seconds: float
    notes: tuple[str, ...] = ()

    def __float__(self) -> float:
        return self.value


def max_eigenvalue(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    *,
    params: ParameterSelection = None,
    reduction: Reduction | None = None,
    max_memory: int | None = None,
    forward: Forward | None = None,
    check_determinism: bool = True,
    mode: Mode = "auto",
    train_mode: bool = False,
    tol: float = 1e-3,
    max_matvecs: int = 1000,
    start: MaxEigenvalue | Eigenpairs | Tensor | None = None,
    verify: bool = False,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_seconds: float = 30.0,
) -> MaxEigenvalue:
    """λ_max(H), the (algebraically) largest eigenvalue of the Hessian H = ∂²L/∂θ², with its eigenvector.

    Gradient descent with step size η is stable on a quadratic where λ_max < 2/η. While training, hand the earlier
    result over as ``start``: after a small step a few products are enough.

    Args:
        model: any module; in eval mode where it has batch norm or dropout. It is left as found.
        loss_fn: as for :func:`flatkern.hessian`, and so are ``data``, ``params``, ``reduction``, ``max_memory``,
            ``forward``, ``check_determinism``, ``mode`` and ``train_mode``.
        data: one pair (x, y) or a re-iterable of pairs.
        params: names or globs; default all parameters with ``requires_grad``.
        reduction: ``"mean"`` or ``"sum"``, for a callable ``loss_fn`` only.
        max_memory: bytes for kept graphs.
        forward: (model, batch) → (output, target).
        check_determinism: compare two passes once; about the price of a product.
        mode: how products are done.
        train_mode: allow batch statistics, dropout and other randomness in the forward pass.
        tol: residual relative to the largest |Ritz value|; λ_max itself is usually far closer.
        max_matvecs: ends the run, with ``converged`` false.
        start: an earlier result, eigenpairs, or vectors [P] or [P, j]. A random part is always mixed in, so
            that another eigenvalue that has become the largest is seen; one within some tenths of a per
            cent of the one followed can be missed.
        verify: when converged, run once more from a random vector orthogonal to v; costs about 23 products.
        seed: integer seed of the search, and of the masks under ``train_mode`` (0 without it). The global generator
            is never used.
        generator: a ``torch.Generator`` for the search instead of ``seed``.
        progress: show a bar.
        checkpoint: see :func:`flatkern.eigsh`.
        checkpoint_seconds: see ``checkpoint``.

    Cost: linearizing once, then typically 10 to 40 products, or 5 to 15 from a good start. Memory: the graphs,
    and 26 vectors [P].

    Raises:
        TypeError, ValueError: an argument that cannot be used, named.
        FloatingPointError: products gave NaN or Inf.

    Source: Cohen et al., "Gradient descent on neural networks typically occurs at the edge of stability", ICLR 2021.

    Example:
        >>> import torch, flatkern as fk
        >>> model = torch.nn.Linear(3, 1)
        >>> data = (torch.tensor([[1.0, 2.0, 2.0]]), torch.zeros(1, 1))
        >>> sharpness = fk.max_eigenvalue(model, torch.nn.MSELoss(), data, seed=0)  # 2 (‖x‖² + 1)
        >>> round(float(sharpness), 3)
        20.0
    """
    begun = time.perf_counter()
    op = hessian(
        model,
        loss_fn,
        data,
        params=params,
        reduction=reduction,
        max_memory=max_memory,
        forward=forward,
        check_determinism=check_determinism,
        mode=mode,
        train_mode=train_mode,
        seed=0 if seed is None else seed,
    )
    pairs = eigsh(
        op,
        1,
        which="LA",
        tol=tol,
        max_matvecs=max_matvecs,
        start=start.vector if isinstance(start, MaxEigenvalue) else start,
        verify=verify,
        seed=seed,
        generator=generator,
        progress=progress,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
    )
    return MaxEigenvalue(
        value=float(pairs.values[0]),
        error_bound=float(pairs.residuals[0]),
        converged=bool(pairs.converged[0]),
        verified=pairs.verified,
        vector=pairs.vectors[:, 0],
        num_data=op.num_data,
        matvecs=pairs.matvecs,
        seconds=time.perf_counter() - begun,
        notes=pairs.notes,
    )
