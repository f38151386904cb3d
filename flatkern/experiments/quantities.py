"""The quantities shown: their names, symbols and definitions, in one place for figures, tables and the legend."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flatkern.experiments.training import Run

__all__ = ["CORRELATED", "PANELS", "QUANTITIES", "Quantity", "final_value"]


@dataclass(frozen=True)
class Quantity:
    """Something measured, as people read it."""

    key: str
    """Column of measurements.csv; bounds are stored there as decimal logarithms (``log10_``)."""
    title: str
    symbol: str
    definition: str
    """One or two plain sentences."""
    log_axis: bool = False

    @property
    def axis(self) -> str:
        """Axis label."""
        return f"{self.title}, {self.symbol}" if self.symbol else self.title


_ALL = (
    Quantity(
        "train_loss",
        "train loss",
        "L",
        "L = mean over the training set of ½‖f(x) − y‖², with y the one-hot label. "
        "Training minimizes nn.MSELoss, which is L·2/10.",
        log_axis=True,
    ),
    Quantity(
        "train_mse",
        "train MSE",
        "",
        "nn.MSELoss on the training set: the mean of (f − y)² over samples and outputs.",
    ),
    Quantity(
        "test_accuracy", "test accuracy", "", "Share of test images whose largest output is the right class."
    ),
    Quantity(
        "nmls",
        "NMLS",
        "Σₗ mean σₘₐₓ(∂f/∂xˡ)",
        "Network maximum local sensitivity: the mean largest singular value of the derivative of the outputs with "
        "respect to a layer's input, summed over all layers.",
    ),
    Quantity(
        "sqrt_sharpness",
        "sharpness",
        "√S",
        "S = mean of ‖∂f/∂θ‖² (squared Frobenius norm of the derivative with respect to all parameters). At a perfect "
        "fit it is the trace of the Hessian of L: large S is a sharp minimum, small S a flat one. Drawn as its root.",
    ),
    Quantity(
        "log_volume_top3",
        "log volume (top 3)",
        "ln σ₁ + ln σ₂ + ln σ₃",
        "Mean of the sum of the natural logs of the three largest singular values of J = ∂f/∂x: how much a small ball "
        "of inputs is stretched along its three most stretched directions. Lower is more compressed.",
    ),
    Quantity(
        "log_volume",
        "log volume (all)",
        "½ ln det JJᵀ",
        "Mean of the sum of ln σⱼ over all singular values of J = ∂f/∂x, one an output: the log of the local "
        "volumetric ratio.",
    ),
    Quantity(
        "mls",
        "MLS",
        "mean σₘₐₓ(J)",
        "Maximum local sensitivity: the mean largest singular value of J = ∂f/∂x, i.e. how much the outputs move at "
        "most for a unit change of the input.",
    ),
    Quantity(
        "log_local_dimensionality",
        "log local dimension",
        "ln d",
        "d = (Tr C)²/Tr C² with C = JJᵀ, averaged over samples: the effective number of directions (1 to the number of "
        "outputs) in which outputs move. Drawn as ln d. It does not change with scale, so flatness does not bound it.",
    ),
    Quantity(
        "local_dimensionality",
        "local dimension",
        "d",
        "d = (Tr C)²/Tr C² with C = JJᵀ, averaged over samples: the effective number of directions (1 to the number of "
        "outputs) in which outputs move.",
    ),
    Quantity("generalization_gap", "generalization gap", "", "Test loss minus train loss, both as L."),
    Quantity(
        "log10_mls_d",
        "bound D on MLS",
        "‖W₁‖₂ √(mean 1/‖x‖²) √S",
        "The right end of the chain A ≤ B ≤ C ≤ D whose left end A is MLS: what flatness alone allows.",
    ),
    Quantity(
        "log10_nmls_bound",
        "bound on NMLS",
        "√(mean Σₗ ‖Wₗ‖₂²/‖xˡ‖²) √S",
        "What flatness allows NMLS to be.",
    ),
    Quantity(
        "loss",
        "loss",
        "L",
        "The loss on all samples given: the sum over batches of its numerators over that of its denominators.",
        log_axis=True,
    ),
    Quantity(
        "ggn_trace",
        "Tr GGN",
        "Σᵢ Tr(JᵢᵀHᵢJᵢ) / n",
        "Trace of the Gauss-Newton matrix of the loss: Jᵢ = ∂f/∂θ at sample i, Hᵢ the loss's second derivative in the "
        "outputs; divided by what the loss itself divides by.",
    ),
    Quantity("hessian_trace", "Tr H", "Σₖ ∂²L/∂θₖ²", "Trace of the Hessian of the loss."),
    Quantity(
        "max_eigenvalue",
        "λ_max",
        "λ₁(∂²L/∂θ²)",
        "Largest eigenvalue of the Hessian of the loss; what edge-of-stability work calls sharpness.",
    ),
    Quantity("gradient_norm", "gradient norm", "‖∇L‖₂", "Norm of the gradient of the loss."),
    Quantity(
        "fisher_trace",
        "Tr empirical Fisher",
        "Σᵢ ‖∂ℓᵢ/∂θ‖² / n",
        "Trace of the empirical Fisher matrix: the samples' squared gradient norms over what the loss divides by.",
    ),
    Quantity(
        "adaptive_sharpness",
        "adaptive sharpness",
        "½ Σₖ θₖ² Hₖₖ",
        "Curvature in units of each weight's own size: how the loss rises on average under small relative changes.",
    ),
    Quantity(
        "relative_flatness",
        "relative flatness",
        "Σ ⟨w_c, w_c'⟩ Tr H_cc'",
        "Curvature of the last dense layer weighed by its own weights; rescaling the layers does not change it.",
    ),
    Quantity(
        "gradient_norms",
        "gradient norms",
        "mean ‖∂ℓᵢ/∂θ‖²",
        "Mean over samples of the squared norm of each sample's own gradient (of its term before the loss divides).",
    ),
    Quantity(
        "sharpness",
        "S",
        "mean ‖∂f/∂θ‖²",
        "Mean over samples of the squared Frobenius norm of the derivative of the outputs with respect to all "
        "parameters; at a perfect fit the trace of the Hessian of ½‖f − y‖².",
    ),
    Quantity(
        "normalized_mls",
        "normalized MLS",
        "mean ‖x‖² σₘₐₓ(J)²",
        "MLS in a form that rescaling the layers of a bias-free ReLU network does not change.",
    ),
    Quantity(
        "relative_flatness",
        "relative flatness",
        "(2/N) ‖W‖² mean ‖z‖²",
        "Relative flatness of the last linear layer (Petzka et al. 2021) of the mean squared error: W its weights, z "
        "its input, N the number of outputs. Small is flat.",
    ),
    Quantity(
        "adaptive_sharpness",
        "adaptive sharpness",
        "Σₖ θₖ² ∂²L/∂θₖ²",
        "Sharpness in which every parameter is measured by its own size (Andriushchenko et al. 2023, small radius).",
        log_axis=True,
    ),
)
QUANTITIES = {q.key: q for q in _ALL}
PANELS = ("train_loss", "nmls", "sqrt_sharpness", "log_volume_top3", "mls", "log_local_dimensionality")
"""The six panels, in the paper's order."""
CORRELATED = (
    "sqrt_sharpness",
    "log_volume_top3",
    "mls",
    "nmls",
    "local_dimensionality",
    "generalization_gap",
    "log10_mls_d",
    "log10_nmls_bound",
    "relative_flatness",
)
"""What the correlation study compares across runs."""


def final_value(run: Run, key: str) -> float:
    """A quantity of a trained network; bounds as themselves, not as the logarithms they are stored in."""
    value = run.final(key)
    return math.pow(10.0, value) if key.startswith("log10_") else value
