"""Flatness by exact ways: S_GN and the trace of the Gauss-Newton matrix, without a Hessian-vector product."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.linearize import budget, linearizations
from flatkern.losses import Loss, Reduction, identity_cotangents, resolve_loss
from flatkern.problem import (
    Batches,
    ParameterSelection,
    check_input,
    check_model,
    differentiation,
    model_device,
    select_parameters,
)
from flatkern.results import Estimate, standard_error
from flatkern.squared_norms import SquaredNorms, layer_of, parameter_squared_norms

__all__ = ["ggn_trace", "sharpness"]


@differentiation()
def sharpness(
    model: nn.Module,
    x: Tensor,
    *,
    params: ParameterSelection = None,
    per_layer: bool = False,
    max_memory: int | None = None,
) -> Estimate:
    """Sharpness S_GN = (1/n) Σ_i ‖∂f(x_i)/∂θ‖_F², exactly.

    The Frobenius norm runs over all N output entries and all selected parameters; 1/n in front, no 1/N. It is the trace
    of the Gauss-Newton matrix of (1/n) Σ ½‖f(x_i) − y_i‖² at any θ, hence the trace of that loss's Hessian where it is
    interpolated. It is not λ_max. The figures of the paper plot √S_GN.

    Computed by ghost norms: for a dense layer ‖∂(u·f)/∂(W, b)‖² = ‖cotangent‖² (‖input‖² + 1), so N backward passes
    to the layers' outputs suffice and no parameter gradient is formed; where a weight is shared over positions
    (convolutions, sequences) the small per-sample gradient or two Gram matrices, whichever is cheaper. Parameters
    without a rule take per-sample gradients (said in ``notes``).

    Args:
        model: any module [n, ...] → [n, ...] whose samples do not interact; left exactly as found.
        x: inputs with the samples on axis 0; floating point, or integers (token ids).
        params: names or globs of parameters; default all with ``requires_grad``.
        per_layer: also split the value by layer (``Estimate.per_layer``).
        max_memory: bytes of the working set; default 1 GiB. Samples are chunked to fit.

    Returns:
        An exact :class:`Estimate` (``stderr`` 0; ``sample_stderr`` over the n samples; ``per_sample`` [n] float64).

    Raises:
        TypeError, ValueError: bad arguments, NaN or Inf, train-mode batch norm or dropout, a random forward pass.

    Source:
        Chen, Recanatesi & Shea-Brown, arXiv 2310.01770, the sharpness of sec. 2; ghost norms: Goodfellow,
        arXiv 1510.01799.

    Example:
        >>> import torch, flatkern as fk
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2))
        >>> s = fk.sharpness(model, torch.randn(16, 4), per_layer=True)
        >>> bool(abs(sum(s.per_layer.values()) - s.value) < 1e-5 * s.value)
        True
    """
    started = time.perf_counter()
    check_model(model)
    check_input(x, differentiable=False)
    parameters = select_parameters(model, params)
    x = x.to(model_device(model))
    total = _Total(per_layer)
    for lin in linearizations(model, x, parameters, with_input=False, max_memory=budget(max_memory)):
        total.add(parameter_squared_norms(model, lin, identity_cotangents(lin.output), parameters))
        del lin
    return total.estimate(float(len(x)), started)


@differentiation()
def ggn_trace(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    *,
    params: ParameterSelection = None,
    reduction: Reduction | None = None,
    per_layer: bool = False,
    max_memory: int | None = None,
) -> Estimate:
    """Trace of the generalized Gauss-Newton matrix Σ_i J_iᵀ H_i J_i / denominator, exactly.

    J_i = ∂f(x_i)/∂θ and H_i the output Hessian of the loss, of which a square root S_i is known in closed form:
    Tr = Σ_i Σ_k ‖J_iᵀ s_ik‖² / denominator, by ghost norms with the columns of S_i as cotangents (N of them for the
    squared error, C − 1 a position for cross-entropy). The normalization is the loss's own: ``nn.MSELoss()`` divides by
    the number of output entries n·N and has no ½, a mean over a loader is Σ numerators / Σ denominators.

    Args:
        model: as for :func:`sharpness`.
        loss_fn: ``nn.CrossEntropyLoss`` (class weights, label smoothing, ignore_index, probability targets),
            ``nn.MSELoss`` or ``nn.BCEWithLogitsLoss``.
        data: a pair (x, y) or a re-iterable of pairs (a DataLoader).
        params, per_layer, max_memory: as for :func:`sharpness`.
        reduction: not needed for these losses.

    Returns:
        An exact :class:`Estimate`; ``per_sample`` holds each sample's contribution n·(its summand), whose mean is
        the value.

    Raises:
        TypeError, ValueError: as :func:`sharpness`; a loss without a closed-form output Hessian (use
            ``fk.trace(fk.ggn(model, loss_fn, data))``).

    Example:
        >>> import torch, flatkern as fk
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> fk.ggn_trace(model, torch.nn.CrossEntropyLoss(), (x, y)).stderr
        0.0
    """
    started = time.perf_counter()
    check_model(model)
    loss = resolve_loss(loss_fn, reduction)
    if loss.root is None:
        raise ValueError(
            f"loss_fn: no closed-form output Hessian is known for {loss.name}; use "
            "fk.trace(fk.ggn(model, loss_fn, data)), or CrossEntropyLoss, MSELoss, BCEWithLogitsLoss"
        )
    parameters = select_parameters(model, params)
    total, weight = _Total(per_layer), 0.0
    for x, y in Batches(data, model_device(model)):
        for norms, part in _batch_norms(model, loss, x, y, parameters, budget(max_memory)):
            total.add(norms)
            weight += part
    return total.estimate(loss.denominator(weight), started)


def _batch_norms(
    model: nn.Module, loss: Loss, x: Tensor, y: Tensor, parameters: dict[str, nn.Parameter], max_memory: int
) -> Iterator[tuple[SquaredNorms, float]]:
    assert loss.root is not None
    check_input(x, differentiable=False)
    check_input(y, differentiable=False, name="y")
    for lin in linearizations(model, x, parameters, with_input=False, max_memory=max_memory, own_roots=True):
        output, target = lin.output.detach(), y[lin.samples]
        loss.numerator(output, target)  # a wrong target gets the loss's own message
        roots = loss.root(output, target)
        yield parameter_squared_norms(model, lin, roots, parameters), float(loss.weight(output, target))


class _Total:
    """Sums chunks of per-sample squared norms into one estimate."""

    def __init__(self, per_layer: bool) -> None:
        self._per_layer: dict[str, Tensor] | None = {} if per_layer else None
        self._parts: list[Tensor] = []
        self._notes: dict[str, None] = {}

    def add(self, norms: SquaredNorms) -> None:
        self._parts.append(norms.total)
        self._notes.update(dict.fromkeys(norms.notes))
        if self._per_layer is not None:
            for name, values in norms.by_parameter.items():
                layer = layer_of(name)
                self._per_layer[layer] = (
                    self._per_layer.get(layer, torch.zeros_like(values[0])) + values.sum()
                )

    def estimate(self, denominator: float, started: float) -> Estimate:
        values = torch.cat(self._parts)
        n = len(values)
        per_sample = values * (n / denominator)  # so that the value is their mean
        value = float(per_sample.mean())
        if value != value or value in (float("inf"), -float("inf")):
            raise ValueError(
                "model: the gradients overflow or are NaN at this θ; measure in float64 (model.double())"
            )
        return Estimate(
            value=value,
            sample_stderr=standard_error(per_sample),
            method="exact (ghost norms)",
            num_data=n,
            passes=1,
            seconds=time.perf_counter() - started,
            per_sample=per_sample,
            per_layer=None
            if self._per_layer is None
            else {layer: float(v) / denominator for layer, v in self._per_layer.items()},
            notes=tuple(self._notes),
        )
