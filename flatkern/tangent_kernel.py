"""The empirical neural tangent kernel, exactly, from the layer rules."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flatkern.gradient_rows import GradientRows, gram
from flatkern.linearize import budget
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

__all__ = ["ntk"]


@differentiation()
def ntk(
    model: nn.Module,
    x: Tensor,
    x2: Tensor | None = None,
    *,
    params: ParameterSelection = None,
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
        x: inputs with the samples on axis 0; floating point, or integers (token ids).
        x2: other inputs [m, ...] for the columns; default ``x``, where half of the matrix is computed.
        params: names or globs of parameters; default all with ``requires_grad``; a tied tensor counts once.
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
    check_input(x, differentiable=False)
    if x2 is not None:
        check_input(x2, differentiable=False, name="x2")
    sides, sizes = [], []
    for value in (x,) if x2 is None else (x, x2):
        value = value.detach().to(device)
        with preserve_state(model), torch.no_grad():
            outputs = check_output(model, model(value[:1].clone()), 1).numel()
        sizes.append(len(value) * outputs)
        sides.append(
            GradientRows(
                model,
                [(value, None)],
                parameters,
                lambda output, _target, _start: identity_cotangents(output),
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
