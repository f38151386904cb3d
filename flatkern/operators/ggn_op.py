"""The generalized Gauss-Newton matrix of a loss as a linear operator: J, the loss's own Hessian, Jᵀ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.losses import Loss, Reduction
from flatkern.operators.batches import Forward
from flatkern.operators.curvature import CurvatureOperator
from flatkern.operators.gradient_tape import GradientTape
from flatkern.operators.linearization import Linearization
from flatkern.operators.linearized import LinearizedOutput
from flatkern.operators.output_map import OutputMap
from flatkern.operators.products import Mode
from flatkern.problem import ParameterSelection

__all__ = ["CurvedOutput", "GGNOperator", "curved", "ggn", "output_gradient"]

OutputProduct = Callable[[Tensor], Tensor | None]


class GGNOperator(CurvatureOperator):
    """Jᵀ H_L J [P, P]; made by :func:`ggn`."""

    def _check_loss(self) -> None:
        if self._loss.name == "NLLLoss":
            raise ValueError(
                "loss_fn: NLLLoss is linear in the model's output, so the Gauss-Newton matrix split there is 0; end "
                "the model at the logits and use CrossEntropyLoss, or take fk.fisher(kind='mc')"
            )

    @property
    def method(self) -> str:
        """Where the loss's Hessian comes from."""
        known = "closed-form" if self._loss.product is not None else "autograd"
        way = "tangents of" if self._linearized else "double backward through"
        return f"{way} the output, {known} loss Hessian"

    @property
    def semidefinite(self) -> bool:  # type: ignore[override]
        """Known where the loss's output Hessian has a real square root."""
        return self._loss.root is not None

    def _linearize(
        self, output: Tensor, target: Tensor, index: int, tape: GradientTape | None
    ) -> Linearization:
        self._numerator(output.detach(), target)  # its checks only
        product = _loss_product(output.detach(), target, self._loss)
        return curved(self._parameters, output, product, tape, several=self._loss.product is not None)


def curved(
    parameters: Sequence[Tensor],
    output: Tensor,
    product: OutputProduct,
    tape: GradientTape | None,
    *,
    several: bool = False,
) -> Linearization:
    """Jᵀ C J with C in closed form: by autograd's graph, or as tangent programs with the tape of the output.

    ``several``: C also takes [k, *output], all vectors in one call.
    """
    if tape is None:
        return CurvedOutput(OutputMap(parameters, output), product, several=several)
    return LinearizedOutput(tape, output, parameters, product, several=several)


class CurvedOutput:
    """Jᵀ C J of one batch, C a symmetric map [*output] → [*output]; ``several`` as of :func:`curved`."""

    def __init__(self, outputs: OutputMap, product: OutputProduct, *, several: bool = False) -> None:
        self._map, self._product, self._several = outputs, product, several

    @property
    def roots(self) -> Sequence[Tensor]:
        """The tensors whose autograd graphs are kept."""
        return self._map.roots

    def apply(
        self,
        tangents: Sequence[Tensor | None],
        wanted: Sequence[int],
        *,
        batched: bool = False,
        places: Sequence[Tensor] | None = None,
    ) -> Sequence[Tensor | None]:
        """J v, C, Jᵀ."""
        change = self._map.push(tangents, batched=batched)
        if change is None:
            return [None] * len(wanted)
        if batched and not self._several:
            rows = [row for c in change if (row := self._product(c)) is not None]
            curved = torch.stack(rows) if rows else None
        else:
            curved = self._product(change)
        return [None] * len(wanted) if curved is None else self._map.pull(curved, wanted, batched=batched)


def _loss_product(point: Tensor, target: Tensor, loss: Loss) -> OutputProduct:
    """The output Hessian of the numerator over the number of samples."""
    closed_form = loss.product
    if closed_form is not None:
        return lambda change: closed_form(point, target, change).div_(
            len(point)
        )  # closed forms give new tensors
    found = output_gradient(point, target, loss, create_graph=True)
    if found is None:
        return lambda change: None
    leaf, gradient = found

    def product(change: Tensor) -> Tensor | None:
        if not gradient.requires_grad:  # a loss linear in the output
            return None
        return torch.autograd.grad(gradient, leaf, grad_outputs=change, retain_graph=True, allow_unused=True)[
            0
        ]

    return product


def output_gradient(
    point: Tensor, target: Tensor, loss: Loss, *, create_graph: bool
) -> tuple[Tensor, Tensor] | None:
    """The output as a leaf and the gradient there of the numerator over the number of samples.

    ``None``: the loss does not depend on the output.
    """
    leaf = point.detach().clone().requires_grad_()
    # a view, as a loss may write to its argument in place
    value = loss.numerator(leaf.view_as(leaf), target) / len(leaf)
    if not value.requires_grad:
        return None
    (gradient,) = torch.autograd.grad(value, leaf, create_graph=create_graph, allow_unused=True)
    return None if gradient is None else (leaf, gradient)


def ggn(
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
    block_size: int | None = None,
    train_mode: bool = False,
    seed: int = 0,
) -> GGNOperator:
    """The generalized Gauss-Newton matrix of a loss as a linear operator.

    G = Σ_i J_iᵀ H_i J_i / denominator [P, P], with J_i = ∂f(x_i)/∂θ [N, P] and H_i = ∂²ℓ_i/∂f² [N, N]. It is
    positive semi-definite where the loss is convex in the output, and the Hessian without its term in
    ∂²f/∂θ². Arguments, weights of batches, result and errors are those of
    :func:`flatkern.operators.hessian`; it needs output and loss apart, so ``loss_fn=None`` raises.

    The split between model and loss is where ``model`` ends: a model that ends in ``log_softmax``, with a
    loss that is linear in it, has a zero G; end it at the logits and use ``nn.CrossEntropyLoss``.
    ``nn.NLLLoss`` therefore raises, and a callable linear in the output gives zeros. A
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
    return GGNOperator(
        model,
        loss_fn,
        data,
        params=params,
        reduction=reduction,
        max_memory=max_memory,
        forward=forward,
        check_determinism=check_determinism,
        mode=mode,
        block_size=block_size,
        train_mode=train_mode,
        seed=seed,
    )
