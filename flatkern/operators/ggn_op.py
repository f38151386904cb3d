"""The generalized Gauss-Newton matrix of a loss as a linear operator: J, the loss's own Hessian, Jᵀ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.losses import Loss, Reduction
from flatkern.operators.curvature import CurvatureOperator
from flatkern.problem import ParameterSelection

__all__ = ["GGNOperator", "ggn"]


class GGNOperator(CurvatureOperator):
    """Jᵀ H_L J [P, P]; made by :func:`ggn`."""

    method = "double backward through the output, closed-form loss Hessian"

    def _linearize(self, output: Tensor, target: Tensor) -> _OutputGraph:
        if self._loss.product is None:
            self.method = "double backward through the output, autograd loss Hessian"
        self._numerator(output.detach(), target)  # its checks only
        return _OutputGraph(self._parameters, output, target, self._loss)


class _OutputGraph:
    """A batch's output with its graph.

    Jᵀ w is linear in w, so the gradient of ⟨Jᵀ w, v⟩ in w is J v: two backward passes, through the part of
    the graph that leads to w only. w = 0 stands in for all w.
    """

    def __init__(self, parameters: Sequence[Tensor], output: Tensor, target: Tensor, loss: Loss) -> None:
        self._parameters = parameters
        self._output, self._target, self._loss = output, target, loss
        self._dummy = torch.zeros_like(output, requires_grad=True)
        pulled: Sequence[Tensor | None] = []
        if output.requires_grad:
            pulled = torch.autograd.grad(
                output, parameters, grad_outputs=self._dummy, create_graph=True, allow_unused=True
            )
        self._active = [i for i, g in enumerate(pulled) if g is not None and g.requires_grad]
        self._pulled = [g for g in pulled if g is not None and g.requires_grad]
        self._point = output.detach()
        self._gradient = _output_gradient(self._point, target, loss) if loss.product is None else None

    @property
    def roots(self) -> Sequence[Tensor]:
        return [self._output, *self._pulled]

    def apply(self, tangents: Sequence[Tensor]) -> Sequence[Tensor | None]:
        if not self._pulled:
            return [None] * len(self._parameters)
        cotangents = [tangents[i] for i in self._active]
        (change,) = torch.autograd.grad(
            self._pulled, self._dummy, grad_outputs=cotangents, retain_graph=True, allow_unused=True
        )
        if change is None:
            return [None] * len(self._parameters)
        curved = self._loss_product(change)
        if curved is None:
            return [None] * len(self._parameters)
        return torch.autograd.grad(
            self._output, self._parameters, grad_outputs=curved, retain_graph=True, allow_unused=True
        )

    def _loss_product(self, change: Tensor) -> Tensor | None:
        """The output Hessian of the numerator over the number of samples, times a change of the output."""
        if self._loss.product is not None:
            return self._loss.product(self._point, self._target, change) / len(self._point)
        if self._gradient is None:
            return None
        point, gradient = self._gradient
        (curved,) = torch.autograd.grad(
            gradient, point, grad_outputs=change, retain_graph=True, allow_unused=True
        )
        return curved


def _output_gradient(point: Tensor, target: Tensor, loss: Loss) -> tuple[Tensor, Tensor] | None:
    """The loss's gradient in the output with its graph; ``None`` for a loss linear in the output."""
    point = point.clone().requires_grad_()
    value = loss.numerator(point, target) / len(point)
    if not value.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(value, point, create_graph=True, allow_unused=True)
    return (point, gradient) if gradient is not None and gradient.requires_grad else None


def ggn(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    *,
    params: ParameterSelection = None,
    reduction: Reduction | None = None,
    max_memory: int | None = None,
) -> GGNOperator:
    """The generalized Gauss-Newton matrix of a loss as a linear operator.

    G = Σ_i J_iᵀ H_i J_i / denominator [P, P], with J_i = ∂f(x_i)/∂θ [N, P] and H_i = ∂²ℓ_i/∂f² [N, N]. It is
    positive semi-definite where the loss is convex in the output, and the Hessian without its term in
    ∂²f/∂θ². Arguments, weights of batches, result and errors are those of :func:`flatkern.operators.hessian`.

    The split between model and loss is where ``model`` ends: a model that ends in ``log_softmax``, with a
    loss that is linear in it (NLL), has a zero G; end it at the logits and use ``nn.CrossEntropyLoss``. A
    ``loss_fn`` that itself uses parameters (weight decay) contributes nothing beyond its dependence on the
    output.

    Cost: one forward and one backward pass with graph at the start; each product a J v (two thirds of a
    gradient for dense layers) and a Jᵀ u (as much). The loss's Hessian is closed-form for torch's losses and
    autograd's for a callable.

    Source: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", Neural
    Computation 14 (2002).

    Example:
        >>> import torch
        >>> from flatkern.operators import ggn
        >>> G = ggn(torch.nn.Linear(3, 1), torch.nn.MSELoss(), (torch.ones(4, 3), torch.zeros(4, 1)))
        >>> G @ torch.tensor([1.0, 0.0, 0.0, 0.0])
        tensor([2., 2., 2., 2.])
    """
    return GGNOperator(model, loss_fn, data, params=params, reduction=reduction, max_memory=max_memory)
