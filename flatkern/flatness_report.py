"""All measures of flatness of one model in one call, sharing what can be shared."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch import nn

from flatkern.estimators.common import check_positive
from flatkern.flatness_measures import DEFAULT_RTOL, QUANTITIES, Measuring
from flatkern.flatness_table import Flatness
from flatkern.left_as_found import left_as_found
from flatkern.linearize import Forward, budget
from flatkern.losses import Reduction
from flatkern.problem import ParameterSelection, check_model, differentiation

__all__ = ["flatness"]


@differentiation()
def flatness(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    *,
    quantities: str | Sequence[str] | None = None,
    params: ParameterSelection = None,
    layer: str | None = None,
    reduction: Reduction | None = None,
    forward: Forward | None = None,
    rtol: float = DEFAULT_RTOL,
    seed: int | None = None,
    max_memory: int | None = None,
) -> Flatness:
    """Loss, gradient, S_GN, the traces of G and H, λ_max, adaptive and relative flatness: one table with error bars.

    ====================== ======================================================== =================================
    quantity               definition                                               as by
    ====================== ======================================================== =================================
    ``loss``               L(θ), the loss's own normalization
    ``gradient_norm``      ‖∇L‖₂
    ``gradient_norms``     (1/n) Σ_i ‖∂ℓ_i/∂θ‖², ℓ_i a sample's undivided term      :func:`flatkern.gradient_norms`
    ``fisher_trace``       Σ_i ‖∂ℓ_i/∂θ‖² / denominator (empirical Fisher matrix)
    ``sharpness``          S_GN = (1/n) Σ_i ‖∂f(x_i)/∂θ‖_F²                         :func:`flatkern.sharpness`
    ``ggn_trace``          Tr G, the Gauss-Newton matrix                            :func:`flatkern.ggn_trace`
    ``hessian_trace``      Tr H                                                     :func:`flatkern.hessian_trace`
    ``max_eigenvalue``     λ_max(H)                                                 :func:`flatkern.max_eigenvalue`
    ``adaptive_sharpness`` ½ Σ_k θ_k² H_kk                                          :func:`flatkern.adaptive_sharpness`
    ``relative_flatness``  κ of the last dense layer                                :func:`flatkern.relative_flatness`
    ====================== ======================================================== =================================

    With up to 64 outputs a sample everything but the Hessian's own part comes from one pass: N cotangents are pulled
    back to where the parameters enter, and the output Hessian's roots and the loss's gradients are combined there. In
    networks of piecewise linear operations Tr H and the adaptive sharpness then need nothing more. With more outputs
    the functions of the table are called one after another, with their sign sketches.

    Args:
        model, loss_fn, data, params, reduction, forward: as for :func:`flatkern.ggn_trace`; any loss.
        quantities: names from the table (the last column's split by layer comes with them); default all.
        layer: for the relative flatness.
        rtol: relative standard error of what is estimated.
        seed: of all that is drawn; the global generator is never used.
        max_memory: bytes of the working set; default 1 GiB.

    Returns:
        A :class:`Flatness`: ``print`` it, ``result["hessian_trace"].value``, ``.to_dict()``, ``.plot()``. A quantity
        that cannot be had for this model has ``value`` None and a ``reason``.

    Cost: the shared pass (a forward pass, min(N, all cotangents) backward to the layers, one to the parameters), a
    recorded forward pass, and what λ_max (10 to 40 products) and the residuals take; docs/flatness.md has measurements.

    Raises:
        TypeError, ValueError: bad arguments, models and data that no quantity can take.

    Source: the functions named above; docs/flatness.md.

    Example:
        >>> import torch, flatkern as fk
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> data = torch.randn(16, 4), torch.arange(16) % 3
        >>> table = fk.flatness(model, torch.nn.CrossEntropyLoss(), data, seed=0)
        >>> table["hessian_trace"].stderr, table["hessian_trace"].value == table["ggn_trace"].value
        (0.0, True)
    """
    started = time.perf_counter()
    check_model(model)
    check_positive(rtol, "rtol")
    wanted = _wanted(quantities)
    with left_as_found(model, data):
        run = Measuring(
            model, loss_fn, data, params, layer, reduction, forward, rtol, seed, budget(max_memory), wanted
        )
        measures = {name: run.measure(name) for name in wanted}
    return Flatness(
        measures=measures,
        num_data=run.num_data,
        num_parameters=sum(p.numel() for p in run.parameters.values()),
        seconds=time.perf_counter() - started,
        shared_seconds=run.sums.seconds if run.sums is not None else 0.0,
        notes=tuple(run.notes),
    )


def _wanted(quantities: str | Sequence[str] | None) -> tuple[str, ...]:
    if quantities is None:
        return tuple(QUANTITIES)
    asked = [quantities] if isinstance(quantities, str) else list(quantities)
    for name in asked:
        if name not in QUANTITIES:
            raise ValueError(f"quantities: {name!r} is unknown; expected some of {', '.join(QUANTITIES)}")
    if not asked:
        raise ValueError("quantities: an empty list asks for nothing")
    return tuple(name for name in QUANTITIES if name in asked)
