"""Flatness without a Hessian-vector product: S_GN, the trace of the Gauss-Newton matrix, per-sample gradient norms."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flatkern._loss_roots import with_roots
from flatkern.jacobian_trace import Method, Roots, Settings, estimate_trace
from flatkern.left_as_found import leaves_as_found
from flatkern.linearize import Forward, budget, linearizations
from flatkern.loss_data import LossData, check_target, output_gradient, separate_loss
from flatkern.losses import Reduction, identity_cotangents
from flatkern.problem import (
    ParameterSelection,
    check_input,
    check_model,
    differentiation,
    model_device,
    select_parameters,
)
from flatkern.results import Estimate, PerSample
from flatkern.squared_norms import layer_of, parameter_squared_norms

__all__ = ["ggn_trace", "gradient_norms", "sharpness"]


@differentiation()
@leaves_as_found
def sharpness(
    model: nn.Module,
    x: Any,
    *,
    params: ParameterSelection = None,
    forward: Forward | None = None,
    method: Method = "auto",
    rtol: float = 0.02,
    samples: int | None = None,
    seed: int = 0,
    per_layer: bool = False,
    per_parameter: bool = False,
    max_memory: int | None = None,
) -> Estimate:
    """Sharpness S_GN = (1/n) Σ_i ‖∂f(x_i)/∂θ‖_F²: exactly, or sketched where there are many outputs.

    The Frobenius norm runs over all N output entries and all selected parameters; 1/n in front, no 1/N. It is the trace
    of the Gauss-Newton matrix of (1/n) Σ ½‖f(x_i) − y_i‖² at any θ, hence the trace of that loss's Hessian where it is
    interpolated. It is not λ_max. The figures of the paper plot √S_GN.

    Computed by ghost norms: for a dense layer ‖∂(u·f)/∂(W, b)‖² = ‖cotangent‖² (‖input‖² + 1), so N backward passes
    to the layers' outputs suffice and no parameter gradient is formed; where a weight is shared over positions
    (convolutions, sequences, several uses of one tensor) the small per-sample gradient or two Gram matrices, whichever
    is cheaper. Parameters without a rule take per-sample gradients (said in ``notes``). The sketch draws signs ε_i and
    takes ‖∂(ε_i·f(x_i))/∂θ‖², unbiased, one backward pass a draw.

    Args:
        model: any module [n, ...] → [n, ...] whose samples do not interact; left exactly as found.
        x: inputs with the samples on axis 0; floating point, or integers (token ids). With ``forward`` one batch of
            any kind, or an iterable of batches.
        params: names or globs of parameters; default all with ``requires_grad``.
        forward: (model, batch) → (output, anything), where the model is not simply called.
        method: ``"exact"``, ``"sketch"``, or the cheaper of the two: exact for up to 64 cotangents a
            sample, else two draws tell whether ``rtol`` takes fewer draws than that (or memory forbids the exact way).
        rtol: relative standard error that the sketch is drawn to.
        samples: number of draws instead; 1 gives no standard error (``nan``).
        seed: of the signs.
        per_layer, per_parameter: also split the value (``Estimate.per_layer``, ``per_parameter``).
        max_memory: bytes of the working set; default 1 GiB. Samples are chunked to fit.

    Returns:
        An :class:`Estimate`: ``stderr`` is 0 where exact, else √(Σ_i s_i²/k) from each sample's own k draws, with its
        degrees of freedom in ``dof`` (at least about 10 are drawn for, where ``samples`` is not given);
        ``sample_stderr`` over the n samples; ``per_sample`` [n] float64; ``passes`` the cotangents a sample.

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
    check_model(model)
    batches: Iterable[tuple[Any, Any]]
    if forward is None:
        check_input(x, differentiable=False)
        batches = [(x.to(model_device(model)), None)]
    else:
        batches = LossData(model, x, forward)
        forward = batches.forward
    settings = Settings(method, rtol, samples, seed, per_layer, per_parameter, budget(max_memory))
    roots = Roots(
        exact=lambda output, _: identity_cotangents(output),
        sketch=lambda output, _target, signs: signs.to(output.dtype),
        columns=lambda output: output[0].numel(),
        weight=lambda output, _: float(len(output)),
        denominator=lambda total: total,
        shared=True,
    )
    return estimate_trace(model, batches, select_parameters(model, params), roots, settings, forward)


@differentiation()
@leaves_as_found
def ggn_trace(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    *,
    params: ParameterSelection = None,
    reduction: Reduction | None = None,
    forward: Forward | None = None,
    method: Method = "auto",
    rtol: float = 0.02,
    samples: int | None = None,
    seed: int = 0,
    per_layer: bool = False,
    per_parameter: bool = False,
    max_memory: int | None = None,
) -> Estimate:
    """Trace of the generalized Gauss-Newton matrix Σ_i J_iᵀ H_i J_i / denominator: exactly, or by a sign sketch.

    J_i = ∂f(x_i)/∂θ and H_i the output Hessian of the loss, with a square root S_i (closed form for torch's losses):
    Tr = Σ_i Σ_k ‖J_iᵀ s_ik‖² / denominator, by ghost norms with the columns of S_i as cotangents (N of them for the
    squared error, C − 1 a position for cross-entropy). The sketch draws signs ε_i and takes ‖J_iᵀ S_i ε_i‖², whose
    mean is the same: one backward pass a draw, whatever the number of classes or tokens. The normalization is the
    loss's own: ``nn.MSELoss()`` divides by the number of output entries n·N and has no ½, a mean over a loader is
    Σ numerators / Σ denominators.

    Args:
        model: as for :func:`sharpness`.
        loss_fn: ``nn.CrossEntropyLoss`` (class weights, label smoothing, ignore_index, probability targets),
            ``fk.losses.TokenCrossEntropyLoss`` for outputs [B, T, V], ``nn.MSELoss``, ``nn.BCEWithLogitsLoss``,
            ``nn.HuberLoss``, or any callable (output, target) → scalar that is convex in the output (its Hessian is
            then formed by autograd, for up to 1,024 outputs a sample).
        data: a pair (x, y) or a re-iterable of pairs (a DataLoader); with ``forward`` batches of any kind.
        reduction: ``"mean"`` or ``"sum"`` for a callable.
        forward: (model, batch) → (output, target) for other batches, with the samples on axis 0 of all tensors, e.g.
            ``lambda model, b: (model(**b).logits[:, :-1], b["input_ids"][:, 1:])``.
        params, method, rtol, samples, seed, per_layer, per_parameter, max_memory: as for :func:`sharpness`.

    Returns:
        An :class:`Estimate` as of :func:`sharpness`; ``per_sample`` holds each sample's contribution n·(its summand),
        whose mean is the value.

    Raises:
        TypeError, ValueError: as :func:`sharpness`; a loss that is not convex in the output, or linear in it by
            construction (``nn.NLLLoss``).

    Example:
        >>> import torch, flatkern as fk
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> fk.ggn_trace(model, torch.nn.CrossEntropyLoss(), (x, y)).stderr
        0.0
        >>> e = fk.ggn_trace(model, torch.nn.CrossEntropyLoss(), (x, y), method="sketch", samples=8)
        >>> e.passes, e.stderr > 0
        (8, True)
    """
    check_model(model)
    loss = with_roots(separate_loss(loss_fn, reduction))
    if loss.name == "NLLLoss":
        raise ValueError(
            "loss_fn: NLLLoss is linear in the model's output, so the Gauss-Newton matrix split there is 0; end the "
            "model at the logits and use CrossEntropyLoss"
        )
    settings = Settings(method, rtol, samples, seed, per_layer, per_parameter, budget(max_memory))
    assert loss.root is not None
    assert loss.sketch is not None
    unchecked = [loss.callable]

    def weight(output: Tensor, target: Tensor) -> float:
        check_target(loss, output, target, unchecked)
        return float(loss.weight(output, target))

    roots = Roots(loss.root, loss.sketch, loss.columns, weight, loss.denominator)
    parameters = select_parameters(model, params)
    batches = LossData(model, data, forward)
    return estimate_trace(model, batches, parameters, roots, settings, batches.forward)


@differentiation()
@leaves_as_found
def gradient_norms(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    *,
    params: ParameterSelection = None,
    reduction: Reduction | None = None,
    forward: Forward | None = None,
    per_layer: bool = False,
    max_memory: int | None = None,
) -> PerSample:
    """Squared gradient norm ‖∂ℓ_i/∂θ‖² of every sample's loss, from one backward pass.

    ℓ_i is the sample's own term of the loss's numerator, before any division: its cross-entropy times its class weight
    (summed over its tokens), or Σ (f − y)² over its N outputs. The gradient of the loss itself is Σ_i ∂ℓ_i/∂θ over the
    loss's denominator (n, the summed class weights, or n·N for ``nn.MSELoss()``), or over 1 for ``reduction="sum"``.

    Computed as in :func:`sharpness`, with ∂ℓ_i/∂f(x_i) as the only cotangent: a forward and a backward pass to the
    layers' outputs and the norms (1.0 to 1.4 gradients measured at n = 512, docs/performance.md), and no per-sample
    gradient is formed where rules apply.

    Args:
        model, params, max_memory: as for :func:`sharpness`.
        loss_fn, data, reduction, forward: as for :func:`ggn_trace`; the loss need not be convex.
        per_layer: also split the values by layer.

    Returns:
        A :class:`PerSample`: ``values`` [n] float64 in the order of the data, ``per_layer`` {layer: [n]}.

    Raises:
        TypeError, ValueError: as :func:`sharpness`; a callable that is not a sum or mean over samples.

    Source:
        Goodfellow, arXiv 1510.01799; weights shared over positions: Rochette et al., arXiv 1912.06015.

    Example:
        >>> import torch, flatkern as fk
        >>> model = torch.nn.Linear(4, 3)
        >>> g = fk.gradient_norms(model, torch.nn.CrossEntropyLoss(), (torch.randn(16, 4), torch.arange(16) % 3))
        >>> g.values.shape
        torch.Size([16])
    """
    started = time.perf_counter()
    check_model(model)
    loss = separate_loss(loss_fn, reduction)
    parameters = select_parameters(model, params)
    batches = LossData(model, data, forward)
    unchecked = [loss.callable]
    values: list[Tensor] = []
    layers: dict[str, list[Tensor]] = {}
    notes: dict[str, None] = {}
    for inputs, y in batches:
        for lin in linearizations(
            model, inputs, parameters,
            with_input=False, max_memory=budget(max_memory), cotangents=1, own_roots=True, forward=batches.forward,
        ):  # fmt: skip
            output, target = lin.output.detach(), lin.target if y is None else y[lin.samples]
            check_target(loss, output, target, unchecked)
            root = output_gradient(loss, output, target).unsqueeze(0)
            norms = parameter_squared_norms(model, lin, root, parameters)
            values.append(norms.total)
            notes.update(dict.fromkeys(norms.notes))
            by_layer: dict[str, Tensor] = {}
            for name, part in norms.by_parameter.items():
                layer = layer_of(name)
                by_layer[layer] = by_layer[layer] + part if layer in by_layer else part
            for layer, part in by_layer.items():
                layers.setdefault(layer, []).append(part)
            del lin
    found = torch.cat(values)
    if not bool(torch.isfinite(found).all()):
        raise ValueError(
            "model: the gradients overflow or are NaN at this θ; measure in float64 (model.double())"
        )
    return PerSample(
        found,
        method="exact (ghost norms)",
        seconds=time.perf_counter() - started,
        notes=tuple(notes),
        per_layer={layer: torch.cat(parts) for layer, parts in layers.items()} if per_layer else None,
    )
