"""The diagonal of a loss's Hessian: exact entry by entry where outputs are piecewise affine, else with error bars."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.estimators import Diagonal, diagonal
from flatkern.estimators.common import check_count, check_positive, make_generator
from flatkern.hessian_parts import hessian_parts
from flatkern.left_as_found import left_as_found
from flatkern.linearize import Forward, budget
from flatkern.losses import Reduction
from flatkern.operators import LinearOperator
from flatkern.problem import Layout, ParameterSelection, check_model, differentiation

__all__ = ["HessianDiagonal", "hessian_diagonal"]

DEFAULT_RTOL = 0.1
_PILOT = 16
"""Vectors whose spread tells how many are needed; they count."""
_RESERVE = 1.1
_UNREACHABLE = 10**12


@dataclass(frozen=True)
class HessianDiagonal:
    """∂²L/∂θ_k² for every entry, float64 on the model's device, in the order of ``layout``."""

    values: Tensor = field(repr=False)
    """[P]."""
    stderr: Tensor = field(repr=False)
    """[P], the estimator's standard error of each entry; 0 where it is exact."""
    ggn: Tensor | None = field(repr=False)
    """The diagonal of the Gauss-Newton matrix [P], exact; ``None`` where it cannot be had."""
    layout: Layout = field(repr=False)
    exact: tuple[str, ...]
    """Parameters whose entries are exact."""
    estimated: dict[str, str]
    """The others, with the reason; their entries have a ``stderr`` unless they were few enough for a product each."""
    method: str
    num_data: int
    samples: int
    """Random vectors that an estimated entry is a mean over; 0 where there are none."""
    matvecs: int
    seconds: float
    converged: bool
    notes: tuple[str, ...] = ()

    @property
    def relative_error(self) -> float:
        """‖stderr‖₂ / ‖values‖₂."""
        error, size = float(self.stderr.norm()), float(self.values.norm())
        return 0.0 if error == 0 else (error / size if size else math.inf)

    def as_dict(self) -> dict[str, Tensor]:
        """The values by parameter, in the parameters' shapes (views)."""
        return self.layout.unflatten(self.values)

    def stderr_dict(self) -> dict[str, Tensor]:
        """The standard errors likewise."""
        return self.layout.unflatten(self.stderr)

    def __len__(self) -> int:
        return len(self.values)


@differentiation()
def hessian_diagonal(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    *,
    params: ParameterSelection = None,
    reduction: Reduction | None = None,
    forward: Forward | None = None,
    rtol: float | None = None,
    samples: int | None = None,
    max_matvecs: int = 2000,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    max_memory: int | None = None,
) -> HessianDiagonal:
    """The diagonal of the Hessian of a loss, ∂²L/∂θ_k² = G_kk + R_kk.

    G is the Gauss-Newton matrix, whose diagonal is exact by layer rules (:func:`flatkern.ggn_diagonal`). The residual
    R_kk = Σ_i Σ_c ∂ℓ_i/∂f_c ∂²f_c(x_i)/∂θ_k² (over the loss's denominator) is 0 for every parameter in whose single
    entries the outputs are piecewise affine: those are exact, and in a ReLU network they are all. For the others diag R
    is estimated from products of R with sign vectors, R restricted to them: r is held fixed, so that a product costs
    one with H, and its error is that of the residual alone. With few such entries a product each makes them exact.

    Args:
        model, loss_fn, data, params, reduction, forward: as for :func:`flatkern.ggn_trace`. Where there is no
            Gauss-Newton diagonal (``nn.NLLLoss``, a loss that is not convex in the output or uses parameters itself,
            ``loss_fn=None``, too many outputs) all of diag H is estimated by :func:`flatkern.diagonal`.
        rtol: aim at ‖stderr‖₂ ≤ rtol · ‖diagonal‖₂ over all entries; 0.1 where ``samples`` is not given.
        samples: number of sign vectors instead, at least 2.
        max_matvecs: most products with R (or H).
        seed: an integer, or ``generator``; the global generator is never used.
        generator: see ``seed``.
        max_memory: bytes of the working set, and for kept graphs; default 1 GiB.

    Returns:
        A :class:`HessianDiagonal`: ``values`` [P] with ``stderr`` [P], ``as_dict()``, which parameters are exact and
        why the others are not.

    Cost: :func:`flatkern.ggn_diagonal` and a recorded forward pass; where something is not proven also making the
    operator (2 to 3 gradients) and 1.2 to 2.1 gradients a product.

    Raises:
        TypeError, ValueError: as :func:`flatkern.ggn_trace` and :func:`flatkern.diagonal`.

    Source: docs/flatness.md; Bekas, Kokiopoulou, Saad, Applied Numerical Mathematics 57 (2007).

    Example:
        >>> import torch, flatkern as fk
        >>> model = torch.nn.Linear(3, 1)
        >>> d = fk.hessian_diagonal(model, torch.nn.MSELoss(), (torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(1, 1)))
        >>> d.as_dict()["weight"].round(decimals=4), d.exact  # 2 x²
        (tensor([[ 2.,  8., 18.]], dtype=torch.float64), ('weight', 'bias'))
    """
    started = time.perf_counter()
    limit = budget(max_memory)
    check_positive(rtol, "rtol")
    check_count(max_matvecs, "max_matvecs", least=2)
    if samples is not None:
        check_count(samples, "samples", least=2)
        if rtol is not None:
            raise ValueError("rtol: give either rtol or samples; with samples there is no pilot")
    source = make_generator(seed, generator, torch.device("cpu"))
    check_model(model)
    found: Diagonal | None = None
    with left_as_found(model, data):
        parts = hessian_parts(
            model, loss_fn, data, params=params, reduction=reduction, forward=forward, max_memory=limit
        )
        values, stderr = parts.ggn.clone(), torch.zeros_like(parts.ggn)
        if parts.unproven:
            op = parts.operator()
            if parts.split:
                found = _residual(op, parts.ggn, parts.columns, rtol, samples, max_matvecs, limit, source)
            else:
                found = diagonal(
                    op,
                    rtol=rtol,
                    samples=samples,
                    max_matvecs=max_matvecs,
                    max_memory=limit,
                    generator=source,
                )
            values[parts.columns] += found.values
            stderr[parts.columns] = found.stderr
    result = HessianDiagonal(
        values=values,
        stderr=stderr,
        ggn=parts.ggn if parts.split else None,
        layout=parts.layout,
        exact=parts.exact,
        estimated=parts.unproven,
        method=_method(found, parts.split, len(parts.unproven), len(parts.parameters)),
        num_data=parts.num_data,
        samples=0 if found is None else found.samples,
        matvecs=0 if found is None else found.matvecs,
        seconds=time.perf_counter() - started,
        converged=found is None or samples is not None or found.converged,
        notes=parts.notes + (() if found is None else found.notes),
    )
    if not bool(torch.isfinite(values.sum())):
        raise ValueError("model: second derivatives overflow or are NaN at this θ; measure in float64")
    return result


def _method(found: Diagonal | None, split: bool, unproven: int, total: int) -> str:
    if found is None:
        return "exact (Gauss-Newton diagonal; outputs piecewise affine in every parameter entry)"
    how = "a product an entry" if found.method == "exact" else f"{found.samples} vectors ({found.method})"
    if not split:
        return f"{how} with the Hessian"
    return f"exact Gauss-Newton diagonal + residual of {unproven} of {total} parameters: {how}"


def _residual(
    op: LinearOperator,
    ggn: Tensor,
    columns: Tensor,
    rtol: float | None,
    samples: int | None,
    max_matvecs: int,
    max_memory: int,
    source: torch.Generator,
) -> Diagonal:
    """diag R to an error that is small beside the whole of diag H."""
    size = op.shape[0]

    def draw(count: int) -> Diagonal:
        return diagonal(
            op, samples=count, method="hutchinson", max_matvecs=count, max_memory=max_memory, generator=source,
        )  # fmt: skip

    def outright() -> Diagonal:
        return diagonal(op, method="exact", max_matvecs=size + 1, max_memory=max_memory, generator=source)

    if samples is not None:
        if size <= min(samples, max_matvecs):
            return outright()
        return _cut(draw(min(samples, max_matvecs)), samples, max_matvecs)
    if size <= min(2 * _PILOT, max_matvecs):
        return outright()
    pilot = draw(min(_PILOT, max_matvecs))
    whole = ggn.clone()
    whole[columns] += pilot.values
    noise = float(pilot.stderr.square().sum())
    goal = (rtol or DEFAULT_RTOL) ** 2 * max(float(whole.square().sum()) - noise, 0.0)
    if noise <= goal:
        return pilot
    needed = math.ceil(min(_RESERVE * pilot.samples * noise / goal, _UNREACHABLE)) if goal else _UNREACHABLE
    if size <= min(needed, max_matvecs - pilot.samples):
        return outright()
    count = min(needed, max_matvecs) - pilot.samples
    if count < 2:
        return _cut(pilot, needed, max_matvecs)
    return _cut(_together(pilot, draw(count)), needed, max_matvecs)


def _together(a: Diagonal, b: Diagonal) -> Diagonal:
    """Means over both sets of vectors, with the spread over all of them."""
    n = a.samples + b.samples
    values = (a.samples * a.values + b.samples * b.values) / n
    squares = sum(d.stderr.square() * (d.samples * (d.samples - 1)) for d in (a, b))
    squares = squares + (a.values - b.values).square() * (a.samples * b.samples / n)
    return Diagonal(
        values=values,
        stderr=(squares / (n * (n - 1))).sqrt(),
        method=a.method,
        samples=n,
        matvecs=a.matvecs + b.matvecs,
        seconds=a.seconds + b.seconds,
        converged=True,
    )


def _cut(found: Diagonal, wanted: int, allowed: int) -> Diagonal:
    if wanted <= allowed:
        return found
    planned = "more" if wanted >= _UNREACHABLE else str(wanted)
    note = f"max_matvecs: {planned} products were planned, {allowed} allowed"
    return replace(found, converged=False, notes=(*found.notes, note))
