"""The Fisher matrix of a loss as a linear operator: sampled labels, or the empirical one."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from flatkern.losses import Reduction
from flatkern.operators.batches import Forward, batch_seed
from flatkern.operators.curvature import CurvatureOperator
from flatkern.operators.ggn_op import curved, output_gradient
from flatkern.operators.gradient_tape import GradientTape
from flatkern.operators.linearization import Linearization
from flatkern.operators.products import Mode
from flatkern.problem import ParameterSelection

__all__ = ["FisherOperator", "fisher"]


class FisherOperator(CurvatureOperator):
    """Σ_i J_iᵀ r_i r_iᵀ J_i / denominator [P, P]; made by :func:`fisher`."""

    semidefinite = True

    def __init__(
        self,
        model: nn.Module,
        loss_fn: object,
        data: Any,
        *,
        kind: Literal["mc", "empirical"] = "mc",
        samples: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if kind not in ("mc", "empirical"):
            raise ValueError(f"kind: expected 'mc' or 'empirical', got {kind!r}")
        if not isinstance(samples, int) or samples < 1:
            raise ValueError(f"samples: expected an integer of at least 1, got {samples!r}")
        if kind == "empirical" and samples != 1:
            raise ValueError("samples: the empirical Fisher draws no labels, so it has no number of samples")
        self.kind, self.seed, self.samples = kind, seed, samples
        super().__init__(model, loss_fn, data, seed=seed, **options)

    def _check_loss(self) -> None:
        if self.kind == "mc" and self._loss.sampled is None:
            raise ValueError(
                f"loss_fn: {self._loss.name} has no predictive distribution to draw labels from; use "
                "kind='empirical', or CrossEntropyLoss, NLLLoss, BCEWithLogitsLoss or MSELoss"
            )

    @property
    def method(self) -> str:
        """How the rank-one terms are made."""
        return (
            "per-sample gradients" if self.kind == "empirical" else f"{self.samples} sampled labels a sample"
        )

    def _settings(self) -> tuple[Any, ...]:
        return (self.kind, self.seed, self.samples)

    def _linearize(
        self, output: Tensor, target: Tensor, index: int, tape: GradientTape | None
    ) -> Linearization:
        self._numerator(output.detach(), target)  # its checks only
        residuals = self._residuals(output.detach(), target, index)
        n = len(output)

        def product(change: Tensor) -> Tensor:
            # Σ_s r_s ⟨r_s, c⟩ sample by sample; the operator multiplies with n again
            inner = (residuals * change).reshape(len(residuals), n, -1).sum(-1)
            weights = inner.reshape(*inner.shape, *[1] * (change.ndim - 1))
            return (residuals * weights).sum(0) / (len(residuals) * n)

        return curved(self._parameters, output, product, tape)

    def _residuals(self, output: Tensor, target: Tensor, index: int) -> Tensor:
        """Gradients of the numerator in the output, [samples, *output]."""
        if self.kind == "empirical":
            found = output_gradient(output, target, self._loss, create_graph=False)
            return torch.zeros_like(output)[None] if found is None else found[1].detach()[None] * len(output)
        assert self._loss.sampled is not None
        seed = batch_seed(self.seed, index)
        generator = torch.Generator().manual_seed(seed)
        return torch.stack([self._loss.sampled(output, target, generator) for _ in range(self.samples)])


def fisher(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    *,
    kind: Literal["mc", "empirical"] = "mc",
    seed: int = 0,
    samples: int = 1,
    params: ParameterSelection = None,
    reduction: Reduction | None = None,
    max_memory: int | None = None,
    forward: Forward | None = None,
    check_determinism: bool = True,
    mode: Mode = "auto",
    block_size: int | None = None,
    train_mode: bool = False,
) -> FisherOperator:
    """The Fisher matrix of a loss as a linear operator.

    F = Σ_i (1/S) Σ_s J_iᵀ r_is r_isᵀ J_i / denominator [P, P], with J_i = ∂f(x_i)/∂θ [N, P].

    * ``kind="mc"``: r_is = ∂ℓ/∂f at labels drawn from the model's own predictive distribution (classes from
      the softmax, each output of BCE from its sigmoid, N(f, ½) for the squared error), S = ``samples`` draws
      a sample. Its mean over seeds is the GGN (for NLL on log-probabilities: the GGN at the logits); the
      weights of classes, positions and smoothing are those of the GGN. ``seed`` and the order of the batches
      fix the labels, so the operator is one fixed matrix; splitting the data otherwise gives other draws.
    * ``kind="empirical"``: r_i = ∂ℓ_i/∂f at the labels of the data, i.e. F = Σ_i g_i g_iᵀ / denominator with
      the gradient g_i of sample i's own numerator (not divided by n; a class weight enters squared). It is
      not an estimate of the GGN away from a well-specified optimum.

    The denominator is that of the loss over the whole data set (1 for a sum), as in
    :func:`flatkern.operators.hessian`, whose arguments, result and errors these are as well.

    Args:
        model, data, params, reduction, max_memory, forward, check_determinism, mode, block_size, train_mode: as in
            :func:`flatkern.operators.hessian`.
        loss_fn: cross-entropy (also :class:`flatkern.losses.TokenCrossEntropyLoss`), NLL, BCE with logits or
            MSE; for ``kind="empirical"`` also Huber and any callable that is a sum or mean over samples.
        kind: see above.
        seed: of the labels' draws, and of the masks under ``train_mode``.
        samples: draws a sample for ``kind="mc"``.

    Cost: as :func:`flatkern.operators.ggn`. No per-sample gradient is formed.

    Raises:
        TypeError, ValueError: input that cannot be used, naming the argument; no predictive distribution.

    Example:
        >>> import torch
        >>> from flatkern.operators import fisher
        >>> model, x, y = torch.nn.Linear(3, 2), torch.ones(4, 3), torch.tensor([0, 1, 1, 0])
        >>> F = fisher(model, torch.nn.CrossEntropyLoss(), (x, y), kind="mc", seed=1)
        >>> F.shape, bool(torch.equal(F @ torch.ones(8), F @ torch.ones(8)))
        ((8, 8), True)
    """
    return FisherOperator(
        model,
        loss_fn,
        data,
        kind=kind,
        seed=seed,
        samples=samples,
        params=params,
        reduction=reduction,
        max_memory=max_memory,
        forward=forward,
        check_determinism=check_determinism,
        mode=mode,
        block_size=block_size,
        train_mode=train_mode,
    )
