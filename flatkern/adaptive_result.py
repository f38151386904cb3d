"""The result of :func:`flatkern.adaptive_sharpness`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from flatkern.results import Estimate

__all__ = ["AdaptiveSharpness", "Kind"]

Kind = Literal["average", "worst"]


@dataclass(frozen=True)
class AdaptiveSharpness(Estimate):
    """An :class:`Estimate` of one of the four forms; see :func:`adaptive_sharpness` for what ``value`` is."""

    kind: Kind = "average"
    rho: float | None = None
    """``None``: the limit ρ → 0."""
    loss: float | None = None
    """L(θ), where it was computed."""
    slope: float | None = None
    """‖θ∘∇L‖₂ ("worst")."""
    slope_curvature: float | None = None
    """gᵀ(DHD)g / ‖g‖² with g = θ∘∇L ("worst", ρ → 0)."""
    error_bound: float = 0.0
    """A bound on the error of ``value`` ("worst", ρ → 0): half the residual norm of λ_max."""
    exact: tuple[str, ...] = ()
    """Parameters whose part is exact ("average", ρ → 0)."""
    sampled: dict[str, str] = field(default_factory=dict)
    """The others, with the reason."""
    per_layer_stderr: dict[str, float] | None = field(default=None, repr=False)

    def at(self, rho: float) -> tuple[float, float]:
        """("worst", ρ → 0) Lower and upper bound of max ⟨g, τ⟩ + ½ τᵀ(DHD)τ over ‖τ‖₂ ≤ ρ.

        The upper one is ρ‖g‖ + ½ρ² max(λ_max, 0), the lower one ρ‖g‖ + ½ρ² gᵀ(DHD)g/‖g‖² or ½ρ² λ_max, whichever is
        larger. They agree where g = 0, and to first order in ρ.
        """
        if self.slope is None or self.slope_curvature is None:
            raise ValueError("at: only kind='worst' with rho=None has an expansion in rho")
        top = max(self.value, 0.0)
        along = rho * self.slope + 0.5 * rho**2 * self.slope_curvature
        return max(along, rho**2 * top, 0.0), rho * self.slope + rho**2 * top
