"""The empirical neural tangent kernel, exactly, from the layer rules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.gradient_rows import GradientRows, gram
from flatkern.linearize import Forward, budget
from flatkern.loss_data import LossData
from flatkern.losses import identity_cotangents
from flatkern.problem import (
    ParameterSelection,
    check_input,
    check_model,
    check_output,
    differentiation,
    model_device,
    preserve_state,
    select_parameters,
)
from flatkern.samples import count_samples, take

__all__ = ["ntk"]


@differentiation()
def ntk(
    model: nn.Module,
    x: Any,
    x2: Any = None,
    *,
    params: ParameterSelection = None,
    forward: Forward | None = None,
    max_memory: int | None = None,
) -> Tensor:
    """The empirical neural tangent kernel K[(i, c), (j, d)] = ⟨∂f_c(x_i)/∂θ, ∂f_d(x'_j)/∂θ⟩, exact.

    Row i·N + c belongs to output entry c of sample i, as in :func:`flatkern.jacobian` (J Jᵀ is this matrix):
    ``K.reshape(n, N, m, N)`` has samples and outputs apart, its trace over c = d is the kernel of scalar tasks. No
    normalization. No parameter gradient is formed where rules apply: a dense layer adds (A A'ᵀ + 1) ∘ (G G'ᵀ) with
    its inputs A, the cotangents G at its output for unit cotangents of the model's, and 1 for the bias; a weight
    shared over positions Σ_{t,s} (g_t·g'_s)(a_t·a'_s + 1), pairwise or by small formed gradients, whichever is cheaper.

    Args:
        model: any module [n, ...] → [n, ...] whose samples do not interact; left exactly as found.
        x: inputs with the samples on axis 0; floating point, or integers (token ids). With ``forward`` one batch of any
            kind.
        x2: other inputs [m, ...] for the columns; default ``x``, where half of the matrix is computed.
        params: names or globs of parameters; default all with ``requires_grad``; a tied tensor counts once.
        forward: (model, batch) → (output, anything), where the model is not simply called.
        max_memory: bytes of the working set beside the result; default 1 GiB. Samples are chunked to fit, and pulled
            back again where the two sides do not fit together. A result larger than it is refused.

    Returns:
        float64 [n·N, m·N] on the model's device. Cotangents have the model's dtype, products of them are accumulated
        in float64: symmetric and positive semi-definite to float64 rounding, entries to the model's.

    Cost: N batched backward passes to the outputs of the layers a side, and 2 (n N)(m N) d_out flops a dense layer
    (half of that for one side).

    Raises:
        TypeError, ValueError: bad arguments, NaN or Inf, train-mode batch norm or dropout, a random forward pass; a
            result that exceeds ``max_memory``.

    Source: Jacot, Gabriel & Hongler, arXiv 1806.07572; contractions by layer: Novak, Sohl-Dickstein & Schoenholz,
    arXiv 2206.08720.

    Example:
        >>> import torch, flatkern as fk
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
        >>> x = torch.randn(5, 4, dtype=torch.float64)
        >>> K = fk.ntk(model, x)
        >>> J = fk.jacobian(model, x).to_dense()
        >>> K.shape, bool(torch.allclose(K, J @ J.T))
        (torch.Size([10, 10]), True)
    """
    check_model(model)
    limit, device = budget(max_memory), model_device(model)
    parameters = select_parameters(model, params)
    sides, sizes = [], []
    for name, value in (("x", x), ("x2", x2)):
        if name == "x2" and value is None:
            continue
        batches: Iterable[tuple[Any, Any]]
        if forward is None:
            check_input(value, differentiable=False, name=name)
            batches, checked = [(value.detach().to(device), None)], None
        else:
            data = LossData(model, value, forward)
            batches, checked = data, data.forward
        inputs = [part for part, _ in batches]
        if len(inputs) != 1:
            raise ValueError(f"{name}: expected one batch, got {len(inputs)}; put them together")
        first = take(inputs[0], slice(0, 1))
        with preserve_state(model), torch.no_grad():
            output = model(first.clone()) if checked is None else checked(model, first)[0]
            outputs = check_output(model, output, 1).numel()
        sizes.append(count_samples(inputs[0]) * outputs)
        sides.append(
            GradientRows(
                model,
                batches,
                parameters,
                lambda output, _target, _start: identity_cotangents(output),
                forward=checked,
                own_roots=False,
            )
        )
    shape = (sizes[0], sizes[-1])
    if 8 * shape[0] * shape[1] > limit:
        raise ValueError(
            f"max_memory: the kernel is {shape[0]} by {shape[1]}, {8 * shape[0] * shape[1]:,} bytes, and the limit is "
            f"{limit:,}; take fewer samples, or raise it"
        )
    return gram(sides[0], sides[1] if len(sides) > 1 else None, shape, limit)[0]
