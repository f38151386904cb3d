"""Relative flatness of a dense layer (Petzka et al.): a measure of flatness that does not change with its scale."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from flatkern.estimators.common import check_count, check_positive, make_generator
from flatkern.left_as_found import left_as_found
from flatkern.linearize import Forward, budget
from flatkern.losses import Reduction
from flatkern.problem import check_model, differentiation
from flatkern.relative_parts import LayerProblem, RelativeFlatness

__all__ = ["RelativeFlatness", "relative_flatness"]

DEFAULT_RTOL = 0.05


@differentiation()
def relative_flatness(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    *,
    layer: str | None = None,
    reduction: Reduction | None = None,
    forward: Forward | None = None,
    rtol: float | None = None,
    samples: int | None = None,
    max_samples: int = 2000,
    seed: int | None = None,
    generator: torch.Generator | None = None,
    max_memory: int | None = None,
) -> RelativeFlatness:
    """κ = Σ_{c,c'} ⟨w_c, w_c'⟩ Tr H_{cc'} of a dense layer z = W x + b, W [C, d] with rows w_c.

    H_{cc'} = ∂²L/∂w_c∂w_c' [d, d], L with the loss's own normalization. Multiplying W by s and dividing a layer
    before it by s (with ReLU between), which leaves f as it is, leaves κ as it is.

    Where L depends on W through an affine map, H is the Gauss-Newton matrix Σ_i H_i ⊗ x_i x_iᵀ and
    κ = Σ_i ‖x_i‖² Tr(Wᵀ H_i W)/denominator, H_i the output Hessian. In closed form, without a backward pass, if the
    layer's output is the model's: (2/N) ‖W‖_F² mean ‖x_i‖² for ``nn.MSELoss()``;
    Σ_i ω_i ‖x_i‖² (Σ_c p_c ‖w_c‖² − ‖Wᵀp‖²)/denominator for cross-entropy, ω_i a sample's (class) weight. Otherwise
    κ = Σ_i Σ_k ‖Wᵀ ∂(s_ik·f_i)/∂W‖_F²/denominator with roots s_ik of H_i, which also holds for a weight shared over
    positions and for layers before the last one with piecewise linear operations between. What is not affine in W
    (a tanh after the layer, a tied table) leaves a residual, which is sampled by Hessian products with W U, U of signs.

    Args:
        model, loss_fn, data, reduction, forward: as for :func:`flatkern.ggn_trace`; where there is no Gauss-Newton part
            (``nn.NLLLoss``, a loss that is not convex), all of it is sampled.
        layer: name of the module or of its weight (a matrix); default the last dense layer, as the graph shows it.
        rtol: relative standard error where something is drawn; 0.05.
        samples: number of draws instead, at least 2.
        max_samples: most draws.
        seed: an integer, or ``generator``; the global generator is never used.
        generator: see ``seed``.
        max_memory: bytes of the working set; default 1 GiB.

    Returns:
        A :class:`RelativeFlatness`; ``per_sample`` [n] (mean = value) where no residual is sampled.

    Cost: closed form: a forward pass. Else up to 64 cotangents a sample pulled back to the layer, beyond that signs
    (4 draws or more, one backward pass each). The residual: 1.2 to 2.1 gradients a product.

    Raises:
        TypeError, ValueError: no dense layer, several last ones, no such name; else as :func:`flatkern.ggn_trace`.

    Source: Petzka, Kamp, Adilova, Sminchisescu & Boley, "Relative Flatness and Generalization", NeurIPS 2021,
    arXiv 2001.00939.

    Example:
        >>> import torch, flatkern as fk
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = torch.nn.init.constant_(model.weight, 2.0)
        >>> k = fk.relative_flatness(model, torch.nn.MSELoss(), (torch.tensor([[1.0, 3.0]]), torch.zeros(1, 1)))
        >>> k.value, k.layer  # 2 · 8 · 10
        (160.0, 'weight')
    """
    started = time.perf_counter()
    check_model(model)
    check_positive(rtol, "rtol")
    check_count(max_samples, "max_samples", least=2)
    if samples is not None:
        check_count(samples, "samples", least=2)
    with left_as_found(model, data):
        problem = LayerProblem(
            model, loss_fn, data, reduction, forward, budget(max_memory), layer,
            rtol=rtol or DEFAULT_RTOL, samples=samples, max_samples=max_samples,
            generator=make_generator(seed, generator, torch.device("cpu")),
        )  # fmt: skip
        found = problem.measure()
    if not math.isfinite(found.value):
        raise ValueError("model: the gradients overflow or are NaN at this θ; measure in float64")
    return replace(found, seconds=time.perf_counter() - started)
