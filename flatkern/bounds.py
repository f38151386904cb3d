"""Both sides of the inequalities that tie volume and sensitivity to flatness, in log space, with their validity."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flatkern.geometry import Geometry, geometry
from flatkern.inequalities import Inequality, all_inequalities, per_layer_inequalities
from flatkern.operator_norm import OperatorNorm, operator_norm
from flatkern.problem import ParameterSelection
from flatkern.results import Estimate

__all__ = ["Bounds", "Inequality", "bounds"]


@dataclass(frozen=True)
class Bounds:
    """The inequalities by name; see :func:`bounds`."""

    inequalities: dict[str, Inequality]
    sharpness: Estimate
    """S_GN, which every right-hand side contains."""
    spectral_norms: dict[str, float] = field(repr=False)
    """‖W_l‖₂ of each layer as the operator that it is, rounded up by its residual."""
    per_layer: dict[str, Inequality] = field(default_factory=dict, repr=False)
    """The reparametrization-invariant inequality of every layer: (1/n) Σ ‖x^l‖² σ_max(∂f/∂x^l)² ≤ ‖W_l‖² (1/n) Σ
    ‖∂f/∂W_l‖_F²."""
    operator_norms: dict[str, OperatorNorm] = field(default_factory=dict, repr=False)
    """The same norms with residuals and certain bounds."""

    def __getitem__(self, name: str) -> Inequality:
        """The inequality called ``name``."""
        return self.inequalities[name]

    def valid(self, name: str) -> Inequality:
        """The inequality ``name`` if it applies, else the one that replaces it (per position), if there is one.

        Raises:
            ValueError: neither applies.
        """
        first = self.inequalities[name]
        if first.applicable:
            return first
        if first.replacement and self.inequalities[first.replacement].applicable:
            return self.inequalities[first.replacement]
        raise ValueError(f"name: {name!r} is not applicable ({first.reason}), and nothing replaces it here")


def bounds(
    model: nn.Module,
    x: Tensor,
    *,
    geometry: Geometry | None = None,
    powers: Sequence[float] = (1, 2),
    params: ParameterSelection = None,
    max_memory: int | None = None,
) -> Bounds:
    """The paper's inequalities between sensitivity, volume and S = S_GN, both sides and all between.

    With W₁ the first layer, ‖·‖₂ the operator norm, g_i = ∂f/∂θ at x_i, J_i = ∂f/∂x at x_i:

    * ``MLS``: A ≤ B ≤ C ≤ D with A = (1/n) Σ σ_max(J_i), B = ‖W₁‖₂ (1/n) Σ ‖∂f/∂W₁‖_F/‖x_i‖,
      C = ‖W₁‖₂ √((1/n) Σ 1/‖x_i‖²) √((1/n) Σ ‖∂f/∂W₁‖_F²), D = ‖W₁‖₂ √((1/n) Σ 1/‖x_i‖²) √S;
    * ``MLS with bias``: the same with ‖x_i‖² + 1 for ‖x_i‖² and (W₁, b₁) for W₁: tighter, and finite at x_i = 0;
    * ``Ma-Ying``: (1/n) Σ σ_max(J_i)^k ≤ (‖W₁‖₂/min ‖x_i‖)^k (1/n) Σ ‖∂f/∂W₁‖_F^k, for k = 1 and the other ``powers``
      (``Ma-Ying k=2``);
    * ``normalized MLS``: (1/n) Σ ‖x_i‖² σ_max(J_i)² ≤ ‖W₁‖₂² (1/n) Σ ‖∂f/∂W₁‖_F², and ``result.per_layer``;
    * ``pointwise dV``: dV_i ≤ (‖J_i‖_F²/N)^{N/2} for every sample;
    * ``LVR``: (1/n) Σ dV_i ≤ N^{−N/2} (1/n) Σ ‖J_i‖_F^N ≤ N^{−N/2} (1/n) Σ (‖W₁‖₂‖∂f/∂W₁‖_F/‖x_i‖)^N ≤
      N^{−N/2} √((1/n) Σ (‖W₁‖₂/‖x_i‖)^{2N}) n^{(N−1)/2} S^{N/2};
    * ``NMLS``: Σ_l (1/n) Σ σ_max(∂f/∂x^l) ≤ (1/n) Σ √(Σ_l ‖W_l‖₂²/‖x_i^l‖²) ‖g_i‖_F ≤
      √((1/n) Σ_i Σ_l ‖W_l‖₂²/‖x_i^l‖²) √S, and ``NMLS with bias``;
    * ``NVR``: Σ_l (1/n) Σ dV_i^l ≤ N^{−N/2} Σ_l (1/n) Σ ‖∂f/∂x^l‖_F^N ≤ N^{−N/2} (1/n) Σ √(Σ_l (‖W_l‖₂/‖x_i^l‖)^{2N})
      ‖g_i‖_F^N ≤ N^{−N/2} √((1/n) Σ_i Σ_l (‖W_l‖₂/‖x_i^l‖)^{2N}) n^{(N−1)/2} S^{N/2}.

    They hold at any θ and for any loss, S being S_GN, never Tr H. All but ``pointwise dV`` need x to enter through one
    dense, unshared, untied W₁ (NMLS and NVR: every layer and its input). Where a condition fails (a skip, a sample of
    norm zero, a frozen weight) the status is ``"not applicable"`` with the reason, and what is on the left is there.

    Where a weight is shared over positions t (convolutions, tokens) the gradients of its copies can cancel, and what
    holds instead has the gradients position by position, P_i = Σ_t ‖∂f/∂z_t‖_F² ‖x_t‖² and G_i = Σ_t ‖∂f/∂z_t‖_F²:
    ``MLS per position``: A ≤ ‖W₁‖ (1/n) Σ √G_i ≤ ‖W₁‖ (1/n) Σ √((P_i + G_i)/(min_t ‖x_t‖² + 1)) ≤
    ‖W₁‖ (1/n) Σ √P_i/min_t ‖x_t‖ ≤ ‖W₁‖ √((1/n) Σ 1/min_t ‖x_t‖²) √((1/n) Σ P_i), with ‖W₁‖ the norm of the convolution
    as an operator; likewise ``normalized MLS``, ``LVR``, ``NMLS`` and ``NVR per position``. Layers on one and the same
    input (queries, keys, values) count as one there, its norm at most √(Σ ‖W‖²). ``inequality.replacement`` names what
    replaces it, ``result.valid(name)`` picks.

    Args:
        model, x, params, max_memory: as for :func:`flatkern.geometry`.
        geometry: the result of ``fk.geometry(model, x)`` at the same θ, to reuse its pass (also of a part of the
            network: x^1 is then what goes into its source).
        powers: the k of Ma-Ying.

    Returns:
        :class:`Bounds`.

    Source:
        Chen, Recanatesi & Shea-Brown, arXiv 2310.01770; Ma & Ying, arXiv 2105.13462.

    Example:
        >>> import torch, flatkern as fk
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> b = fk.bounds(model, torch.randn(16, 6))
        >>> sorted({i.status for i in b.inequalities.values()}), b["MLS"].looseness > 0
        (['holds'], True)
    """
    for k in powers:
        if isinstance(k, bool) or not isinstance(k, (int, float)) or not k > 0:
            raise ValueError(f"powers: expected positive numbers, got {k!r}")
    g = geometry if geometry is not None else _geometry(model, x, params=params, max_memory=max_memory)
    _check_fits(g, model, x)
    slack = max(1e-9, 100 * torch.finfo(g.dtype).eps)  # rounding of the Jacobians, in logarithms
    norms = {name: operator_norm(layer.module, layer.input_shape) for name, layer in g.layers.items()}
    safe = {name: norm.safe for name, norm in norms.items()}
    chains = all_inequalities(g, safe, powers, slack)
    return Bounds(
        inequalities={c.name: c for c in chains},
        sharpness=g.sharpness,
        spectral_norms=safe,
        per_layer=per_layer_inequalities(g, safe, slack),
        operator_norms=norms,
    )


_geometry = geometry  # `bounds` has an argument of that name


def _check_fits(g: Geometry, model: nn.Module, x: Tensor) -> None:
    """Refuse a geometry taken elsewhere.

    Raises:
        ValueError: on other samples, another model, or at other weights.
    """
    if len(g.input_norm_sq) != len(x):
        raise ValueError(f"geometry: it was taken on {len(g.input_norm_sq)} samples, x holds {len(x)}")
    norm_sq = x.detach().reshape(len(x), -1).double().square().sum(1).to(g.input_norm_sq)
    if g.source is None and not torch.allclose(norm_sq, g.input_norm_sq, rtol=1e-6, atol=0):
        raise ValueError("geometry: it was taken on other inputs than x")
    own = {id(m) for m in model.modules()}
    for layer in g.layers.values():
        if id(layer.module) not in own:
            raise ValueError(f"geometry: it was taken on another model (layer {layer.name!r}); measure again")
    if g._watch is not None and g._watch.changed():
        raise ValueError("geometry: it was taken at other weights, buffers or requires_grad; measure again")
