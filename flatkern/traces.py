"""The trace of a loss's Hessian: exact where outputs are piecewise affine in a parameter, else exact + sampled."""

from __future__ import annotations

import time
from typing import Any, Literal, get_args

import torch
from torch import nn

from flatkern.estimators.common import check_positive, make_generator
from flatkern.left_as_found import leaves_as_found
from flatkern.linearize import Forward, budget
from flatkern.losses import Reduction, resolve_loss
from flatkern.problem import (
    ParameterSelection,
    check_model,
    differentiation,
    select_parameters,
)
from flatkern.results import HessianTrace
from flatkern.tape import UnsupportedError
from flatkern.trace_goal import Goal
from flatkern.trace_split import Split

__all__ = ["hessian_trace"]

Method = Literal["auto", "sites", "double-backward", "hutchinson"]


@differentiation()
@leaves_as_found
def hessian_trace(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    *,
    params: ParameterSelection = None,
    reduction: Reduction | None = None,
    forward: Forward | None = None,
    rtol: float | None = None,
    atol: float | None = None,
    samples: int | None = None,
    max_samples: int = 1000,
    method: Method = "auto",
    per_layer: bool = False,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    max_memory: int | None = None,
) -> HessianTrace:
    """Tr ∂²L/∂θ² of a loss, exactly where that is possible and else to a tolerance with a valid standard error.

    ∂²L/∂θ² = JᵀH_L J + Σ_i Σ_c ∂ℓ_i/∂f_c ∂²f_c(x_i)/∂θ². The first trace, that of the GGN, is exact by ghost norms
    (:func:`ggn_trace`), unless the second has to be sampled and a tolerance is to be met: then it may be sketched,
    with the cheapest plan for both. The second vanishes for every parameter in whose single entries the outputs are
    piecewise affine, the others fixed: read off the autograd graph of the run, operation by operation. ReLU networks
    need nothing more. For the other parameters it is sampled in activation space: every sample draws its own random
    change of every layer's output, whose covariance stands for changes of all weights at once, and
    uᵀ∇²(r·f)u is taken by a tangent forward pass. What an elementwise nonlinearity does to the weights
    of its own layer and, in dense networks, of the layer before is put in exactly: with two hidden layers nothing is
    left to sample.

    Args:
        model: any module whose samples do not interact, in eval mode; left exactly as found.
        loss_fn: ``nn.CrossEntropyLoss`` (weights, smoothing, ignore_index, probabilities),
            :class:`flatkern.losses.TokenCrossEntropyLoss`, ``nn.MSELoss``, ``nn.BCEWithLogitsLoss``,
            ``nn.HuberLoss``, ``nn.SmoothL1Loss``. Other losses take the plain estimator.
        data: a pair (x, y) or a re-iterable of pairs; with ``forward`` batches of any kind.
        params: names or globs of parameters; default all with ``requires_grad``.
        reduction: ``"mean"`` or ``"sum"``, for a callable loss only.
        forward: (model, batch) → (output, target), as for :func:`ggn_trace`.
        rtol: aim at stderr ≤ rtol · |trace|; 0.01 where neither ``atol`` nor ``samples`` is given.
        atol: aim at stderr ≤ atol; with both, the looser one counts.
        samples: number of probes, at least 2; then there is no pilot, and the GGN part is that of :func:`ggn_trace`
            (exact for up to 64 cotangents a sample).
        max_samples: never more probes than this (``converged`` is then false).
        method: ``"sites"`` (a tangent pass a probe; all operations need a rule), ``"double-backward"`` (any
            operation), ``"hutchinson"`` (``fk.trace(fk.hessian(...))``), or ``"auto"``: the first that works.
        per_layer: also split value and error by layer; the GGN part is then that of :func:`ggn_trace`, and the sampled
            part takes double backward passes.
        seed: an integer; or ``generator``. The global generator is never used.
        generator: see ``seed``.
        max_memory: bytes of the working set; default 1 GiB. Samples are chunked to fit.

    Returns:
        A :class:`HessianTrace`: ``stderr`` is the estimator's own error, √(Σ_i s_i²/k) over the samples' own k values
        (a bound on it where one draw was enough), with its degrees of freedom in ``dof``; 0 where everything was exact,
        NaN where a handful of draws coincide. ``sample_stderr`` is that of the mean over samples with the estimator's
        part taken out. ``exact`` and ``sampled`` name the parameters.
        ``samples`` holds the k probe values; ``None`` where both parts were planned together, or a parameter was left
        to the plain estimator.

    Cost: the GGN trace, one forward and one backward pass, and 0.2 to 1 gradients a probe (of which 2 or 3 mostly do);
    with a sketched GGN part a forward pass and a pilot more, but 1 to 5 cotangents a sample instead of one less than
    there are classes. At kinks it is the almost-everywhere Hessian, as autograd defines it.

    Raises:
        TypeError, ValueError: as :func:`ggn_trace` and ``fk.trace``, naming the argument.

    Source: derivation and checks in docs/hessian-trace.md.

    Example:
        >>> import torch, flatkern as fk
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> fk.hessian_trace(net, torch.nn.CrossEntropyLoss(), (x, y)).stderr
        0.0
    """
    started = time.perf_counter()
    check_model(model)
    loss = resolve_loss(loss_fn, reduction)
    if method not in get_args(Method):
        raise ValueError(f"method: {method!r} is unknown; expected one of {', '.join(get_args(Method))}")
    goal = Goal(check_positive(rtol, "rtol"), check_positive(atol, "atol"), samples, max_samples)
    parameters = select_parameters(model, params)
    source = make_generator(seed, generator, torch.device("cpu"))
    job = Split(
        model,
        loss_fn,
        loss,
        data,
        parameters,
        reduction,
        goal,
        source,
        budget(max_memory),
        per_layer,
        forward,
    )
    if method == "hutchinson":
        return job.plain("", started)
    reason = job.unsuitable()
    if not reason:
        try:
            return job.run(method, started)
        except UnsupportedError as error:
            reason = str(error)
    if method != "auto" or per_layer:
        option = "per_layer" if per_layer else f"method={method!r}"
        raise ValueError(f"{option}: not possible for this model: {reason}")
    return job.plain(reason, started)
