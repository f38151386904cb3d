"""The Hessian of a loss as a linear operator, by double backward over kept graphs or by tangent programs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.losses import Reduction
from flatkern.operators.batches import Forward
from flatkern.operators.curvature import CurvatureOperator
from flatkern.operators.forward_over_reverse import ForwardOverReverse
from flatkern.operators.gradient_tape import GradientTape, noting
from flatkern.operators.linearization import Linearization
from flatkern.operators.linearized import LinearizedGradient
from flatkern.operators.products import Mode
from flatkern.problem import ParameterSelection, all_finite, pairs_aligned
from flatkern.tape import Value

__all__ = ["HessianOperator", "hessian", "hvp"]


class HessianOperator(CurvatureOperator):
    """∂²L/∂θ² [P, P]; made by :func:`hessian`."""

    splits_at_output = False

    def _without_graph(self, batch: Any, index: int) -> Linearization | None:
        if self._forward is not None:
            return None
        return ForwardOverReverse(
            self._model, self._named, batch, self._loss, self._autocast, self._train, index
        )

    @property
    def method(self) -> str:
        """How a product is done."""
        return "tangent of the gradient" if self._linearized else "double backward"

    def _linearize(self, output: Tensor, target: Any, index: int, tape: GradientTape | None) -> Linearization:
        with noting(tape):
            value = self._numerator(output, target)
        gradients: Sequence[Tensor | None] = [None] * len(self._parameters)
        noted: Sequence[Value | None] = [None] * len(self._parameters)
        if value.requires_grad and tape is not None:
            _, noted = tape.backward(value, self._parameters, torch.ones_like(value).detach())
            gradients = [None if g is None else g.tensor for g in noted]
        elif value.requires_grad:
            gradients = torch.autograd.grad(value, self._parameters, create_graph=True, allow_unused=True)
        for name, gradient in zip(self.layout.names, gradients, strict=True):
            if gradient is not None and not bool(torch.isfinite(gradient.detach().sum())):
                _check_finite(name, gradient.detach())
        return (
            _GradientGraph(self._parameters, gradients) if tape is None else LinearizedGradient(tape, noted)
        )


def _check_finite(name: str, gradient: Tensor) -> None:
    # the sum may overflow where no entry does; only the entries decide
    if not all_finite(gradient):
        raise ValueError(
            f"model: the gradient with respect to {name!r} holds NaN or Inf although the loss is finite"
        )


class _GradientGraph:
    """A batch's gradient with its graph; H v is the gradient of ⟨∇L, v⟩."""

    def __init__(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        self._parameters = parameters
        # a parameter that the loss is linear in, or does not use, has a gradient without a graph
        self._active = {i: g for i, g in enumerate(gradients) if g is not None and g.requires_grad}

    @property
    def roots(self) -> Sequence[Tensor]:
        """The tensors whose autograd graphs are kept."""
        return list(self._active.values())

    def apply(
        self,
        tangents: Sequence[Tensor | None],
        wanted: Sequence[int],
        *,
        batched: bool = False,
        places: Sequence[Tensor] | None = None,
    ) -> Sequence[Tensor | None]:
        """The gradient of ⟨∇L, v⟩ in the wanted parameters."""
        used = [i for i in self._active if tangents[i] is not None]
        if not used:
            return [None] * len(wanted)
        return torch.autograd.grad(
            [self._active[i] for i in used],
            [self._parameters[i] for i in wanted],
            grad_outputs=[pairs_aligned(t) for i in used if (t := tangents[i]) is not None],
            retain_graph=True,
            allow_unused=True,
            is_grads_batched=batched,
        )


def hessian(
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
) -> HessianOperator:
    """The Hessian of a loss in the parameters as a linear operator.

    H = ∂²L/∂θ² [P, P], L = Σ_b numerator_b / Σ_b denominator_b with both sums over the whole data set: ragged
    batches, class weights and ignored labels weigh as in one batch with everything in it.

    Args:
        model: any module; in eval mode where it has batch norm or dropout (or see ``train_mode``). It is left as found.
        loss_fn: ``nn.CrossEntropyLoss``, ``nn.MSELoss``, ``nn.BCEWithLogitsLoss``, or any callable
            (output, target) → scalar with ``reduction`` said. ``nn.NLLLoss``, ``nn.HuberLoss``, ``nn.SmoothL1Loss``
            and :class:`flatkern.losses.TokenCrossEntropyLoss` (outputs [B, T, V]) are known as well. ``None`` for a
            model that computes its own loss: then ``forward`` returns the loss, or (loss, weight) with the
            batch's weight in the mean (default: its number of samples), and ``reduction`` is required.
        data: one pair (x, y) or a re-iterable of pairs (a list, a DataLoader), samples on axis 0.
        params: names or globs; default all parameters with ``requires_grad``. Tied ones count once; unused
            ones have zero rows and columns.
        reduction: ``"mean"`` or ``"sum"`` over samples, for a callable ``loss_fn`` only. It is checked once, against
            the values on two halves of the first batch.
        max_memory: bytes for kept graphs (default 1 GiB). Batches beyond it are rebuilt in every product; a
            single rebuilt batch still takes what it takes.
        forward: (model, batch) → (output, target), for batches that are not pairs: dicts, models of Hugging Face
            (``lambda m, b: (m(input_ids=b["input_ids"]).logits, b["labels"])``). Samples on axis 0.
        mode: ``"auto"`` keeps what fits: autograd's graphs, or tangent programs of the recorded gradient where
            these are faster (tried at the first product with several vectors, or after eight single ones; the data
            are read again for them). For the other batches it takes the faster of rebuilding the graph and forward
            over reverse, timed on the first of them. ``"kept"`` takes graphs, kept or rebuilt; ``"linearized"`` takes
            programs, and raises where an operation has no rule; ``"rebuilt"`` and ``"forward"`` keep nothing.
            ``"forward"`` needs pairs (x, y).
        block_size: vectors in one batched pass; default: 1 or up to 8, whichever is faster, timed at the first
            product with several vectors. Where a layer has no batching rule it is 1. ``info`` says what was chosen.
        check_determinism: read the data a second time and run the model twice on the first batch, once, when the
            operator is made, and raise where something differs (shuffling where batches are rebuilt,
            augmentation, random models), naming the cause. ``False`` skips it. Lists are not read again.
        train_mode: allow batch norm with batch statistics, dropout, and other randomness in the forward pass. The loss
            is then one fixed function of θ: statistics are those of each batch as it is composed, and are
            differentiated through; the random numbers of batch b come from (``seed``, b), the same in every pass.
            Running statistics are not updated. ``False``: such models raise.
        seed: of the masks under ``train_mode``.

    Returns:
        A symmetric operator on vectors [P] and [P, k] in the parameters' dtype (float32 for bfloat16 and
        float16, which are summed in float32) on their device, with ``layout``, ``num_data``, ``denominator``
        and ``info``. At kinks (ReLU) it is the almost-everywhere Hessian, as autograd defines it.

    Cost: one pass with graph (about 2 to 3 gradients) at the start; each product about 1.2 to 2.1 gradients
    for kept batches and 2.5 to 4.2 for rebuilt ones. Memory: the graphs, about twice those of a training
    step.

    Raises:
        TypeError, ValueError: input that cannot be used, naming the argument.
        StaleOperatorError: (in a product) the weights changed; ``H.refresh()`` linearizes anew.
        RuntimeError: (in a product) data read again differs from the first pass.

    Source: Pearlmutter, "Fast exact multiplication by the Hessian", Neural Computation 6 (1994).

    Example:
        >>> import torch
        >>> from flatkern.operators import hessian
        >>> model = torch.nn.Linear(3, 2)
        >>> H = hessian(model, torch.nn.CrossEntropyLoss(), (torch.ones(4, 3), torch.tensor([0, 1, 1, 0])))
        >>> H.shape, (H @ torch.ones(8)).shape
        ((8, 8), torch.Size([8]))
    """
    return HessianOperator(
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


def hvp(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    v: Tensor,
    *,
    params: ParameterSelection = None,
    reduction: Reduction | None = None,
    forward: Forward | None = None,
    train_mode: bool = False,
    seed: int = 0,
) -> Tensor:
    """One product H v of a loss's Hessian with a vector, or with the columns of a matrix.

    H = ∂²L/∂θ² as in :func:`hessian`, whose arguments and errors these are; v is [P] or [P, k] (columns) in the
    order of the selected parameters, and so is the result. Each batch's graph is built, used and freed, so
    memory is that of one batch. The data are read once. For more than one product at the same weights
    :func:`hessian` is cheaper.

    Cost: about 2.5 to 4.4 gradients for one vector, 1.2 to 2.1 for each further one.

    Example:
        >>> import torch
        >>> from flatkern.operators import hvp
        >>> model = torch.nn.Linear(3, 1)
        >>> hvp(model, torch.nn.MSELoss(), (torch.ones(4, 3), torch.zeros(4, 1)), torch.ones(4))
        tensor([8., 8., 8., 8.])
    """
    op = HessianOperator(
        model,
        loss_fn,
        data,
        params=params,
        reduction=reduction,
        forward=forward,
        train_mode=train_mode,
        seed=seed,
        linearize=False,
        check_determinism=False,
    )
    return op._once(v)
