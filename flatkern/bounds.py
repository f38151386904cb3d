"""Both sides of the inequalities that tie volume and sensitivity to flatness, in log space, with their validity."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flatkern.geometry import Geometry, LayerGeometry, geometry
from flatkern.problem import ParameterSelection
from flatkern.results import Estimate

__all__ = ["Bounds", "Inequality", "bounds"]


@dataclass(frozen=True)
class Inequality:
    """A chain of sides, each at most the next, as natural logarithms (they span many decades)."""

    name: str
    sides: dict[str, float]
    """Natural logs of the sides, from left to right; those that need a missing condition are absent."""
    status: str
    """``"holds"``, ``"violated"`` or ``"not applicable"``."""
    reason: str = ""
    """Why it is not applicable, or which side is violated and by how much."""

    @property
    def looseness(self) -> float:
        """log(last side) − log(first side); divide by log 10 for decades. NaN where not applicable."""
        values = list(self.sides.values())
        if not self.applicable:
            return math.nan
        return 0.0 if values[0] == values[-1] else values[-1] - values[0]  # both may be log 0

    @property
    def applicable(self) -> bool:
        """Whether the conditions of the inequality are met."""
        return self.status != "not applicable"


@dataclass(frozen=True)
class Bounds:
    """The inequalities by name: ``"MLS"``, ``"Ma-Ying"``, ``"normalized MLS"``, ``"LVR"`` and ``"NMLS"``."""

    inequalities: dict[str, Inequality]
    sharpness: Estimate
    """S_GN, which every right-hand side contains."""
    spectral_norms: dict[str, float] = field(repr=False)
    """‖W_l‖₂ of the dense layers involved."""

    def __getitem__(self, name: str) -> Inequality:
        """The inequality called ``name``."""
        return self.inequalities[name]


def bounds(
    model: nn.Module,
    x: Tensor,
    *,
    geometry: Geometry | None = None,
    params: ParameterSelection = None,
    max_memory: int | None = None,
) -> Bounds:
    """The paper's inequalities between sensitivity, volume and S = S_GN, both sides and all between.

    With W₁ the first layer, ‖·‖₂ the spectral norm, g_i = ∂f/∂θ at x_i, J_i = ∂f/∂x at x_i:

    * ``MLS``: A ≤ B ≤ C ≤ D with A = (1/n) Σ σ_max(J_i), B = ‖W₁‖₂ (1/n) Σ ‖∂f/∂W₁‖_F/‖x_i‖,
      C = ‖W₁‖₂ √((1/n) Σ 1/‖x_i‖²) √((1/n) Σ ‖∂f/∂W₁‖_F²), D = ‖W₁‖₂ √((1/n) Σ 1/‖x_i‖²) √S;
    * ``Ma-Ying``: A ≤ (‖W₁‖₂/min ‖x_i‖) (1/n) Σ ‖∂f/∂W₁‖_F;
    * ``normalized MLS``: (1/n) Σ ‖x_i‖² σ_max(J_i)² ≤ ‖W₁‖₂² (1/n) Σ ‖∂f/∂W₁‖_F²;
    * ``LVR``: (1/n) Σ dV_i ≤ N^{−N/2} (1/n) Σ ‖J_i‖_F^N ≤ N^{−N/2} (1/n) Σ (‖W₁‖₂‖∂f/∂W₁‖_F/‖x_i‖)^N ≤
      N^{−N/2} √((1/n) Σ (‖W₁‖₂/‖x_i‖)^{2N}) n^{(N−1)/2} S^{N/2};
    * ``NMLS``: Σ_l (1/n) Σ σ_max(∂f/∂x^l) ≤ (1/n) Σ √(Σ_l ‖W_l‖₂²/‖x_i^l‖²) ‖g_i‖_F ≤
      √((1/n) Σ_i Σ_l ‖W_l‖₂²/‖x_i^l‖²) √S.

    They hold at any θ and for any loss, S being S_GN, never Tr H. The first four need x to enter through one dense,
    unshared, untied W₁; NMLS needs that of every layer and its input. Where a condition fails (weight sharing in
    convolutions and sequences, skips, a sample of norm zero, a frozen weight) the status is ``"not applicable"`` with
    the reason, and the statistic on the left is still given.

    Args:
        model, x, params, max_memory: as for :func:`flatkern.geometry`.
        geometry: the result of ``fk.geometry(model, x)`` at the same θ, to reuse its pass.

    Returns:
        :class:`Bounds`.

    Source:
        Chen, Recanatesi & Shea-Brown, arXiv 2310.01770; Ma & Ying, arXiv 2105.13462.

    Example:
        >>> import torch, flatkern as fk
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> b = fk.bounds(model, torch.randn(16, 6))
        >>> [i.status for i in b.inequalities.values()]
        ['holds', 'holds', 'holds', 'holds', 'holds']
    """
    g = geometry if geometry is not None else _geometry(model, x, params=params, max_memory=max_memory)
    if len(g.input_norm_sq) != len(x):
        raise ValueError(f"geometry: it was taken on {len(g.input_norm_sq)} samples, x holds {len(x)}")
    if not torch.allclose(_norm_sq(x).to(g.input_norm_sq), g.input_norm_sq, rtol=1e-6, atol=0):
        raise ValueError("geometry: it was taken on other inputs than x")
    own = {id(m) for m in model.modules()}
    for layer in g.layers.values():
        weight = layer.module.weight
        if id(layer.module) not in own or (
            isinstance(weight, Tensor) and weight._version != layer.weight_version
        ):
            raise ValueError(
                f"geometry: it was taken on another model or at other weights (layer {layer.name!r}); measure again"
            )
    slack = max(1e-9, 100 * torch.finfo(g.dtype).eps)  # rounding of the Jacobians, in logarithms
    norms = {
        name: _spectral_norm(layer.module.weight)
        for name, layer in g.layers.items()
        if isinstance(layer.module, nn.Linear)
    }
    chains = [*_first_layer(g, norms, slack), _network(g, norms, slack)]
    return Bounds({c.name: c for c in chains}, g.sharpness, norms)


_geometry = geometry  # `bounds` has an argument of that name


def _spectral_norm(weight: Tensor) -> float:
    """‖W‖₂ exactly, by the smaller Gram matrix in float64."""
    w = weight.detach().double()
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    return float(torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt())


def _norm_sq(x: Tensor) -> Tensor:
    return x.detach().reshape(len(x), -1).double().square().sum(1)


def _log(value: Tensor | float) -> float:
    number = float(value)
    return math.log(number) if number > 0 else -math.inf


def _log_mean_exp(logs: Tensor) -> float:
    return float(torch.logsumexp(logs, 0)) - math.log(len(logs))


def _chain(name: str, sides: dict[str, float], slack: float) -> Inequality:
    values = list(sides.items())
    for (left, a), (right, b) in itertools.pairwise(values):
        if a > b + slack * max(1.0, abs(b)) and a != -math.inf:
            return Inequality(name, sides, "violated", f"log {left} exceeds log {right} by {a - b:.3g}")
    return Inequality(name, sides, "holds")


def _layer_condition(layer: LayerGeometry) -> str:
    """Why a layer does not satisfy what the inequalities need; empty where it does."""
    if not isinstance(layer.module, nn.Linear):
        return f"weight sharing: {layer.name!r} is a convolution, gradients of its copies can cancel"
    if layer.positions > 1:
        return f"weight sharing: {layer.name!r} is applied at {layer.positions} positions of a sample"
    if layer.weight_gradient_sq is None:
        return f"the weight of {layer.name!r} is frozen, not selected, or used elsewhere too"
    if not layer.sole_consumer:
        return (
            f"the input of {layer.name!r} reaches the output by other ways too (a skip, or several consumers)"
        )
    zeros = int((layer.input_norm_sq == 0).sum())
    return f"{zeros} samples have a zero input to {layer.name!r}" if zeros else ""


def _first_layer(g: Geometry, norms: dict[str, float], slack: float) -> list[Inequality]:
    n, outputs, sigma = len(g.input_norm_sq), g.outputs, g.max_sensitivity.values
    log_energy = g.singular_values.square().sum(1).log()  # log ‖J_i‖_F²
    half = outputs / 2
    mls, normalized = _log(sigma.mean()), _log(g.normalized_mls.value)
    frobenius = _log_mean_exp(half * log_energy) - half * math.log(outputs)
    lvr = _log_mean_exp(g.log_volume.values)
    first = next((layer for layer in g.layers.values() if layer.takes_model_input), None)
    reason = (
        "x does not enter, unchanged, a linear layer that was measured"
        if first is None
        else _layer_condition(first)
    )
    if first is None or reason or first.weight_gradient_sq is None:
        volume = {"LVR": lvr, "Frobenius": frobenius}
        return [
            Inequality("MLS", {"A": mls}, "not applicable", reason),
            Inequality("Ma-Ying", {"MLS": mls}, "not applicable", reason),
            Inequality("normalized MLS", {"normalized MLS": normalized}, "not applicable", reason),
            Inequality("LVR", volume, "not applicable", reason),
        ]
    log_w, norm_sq, gradient_sq = (
        _log(norms[first.name]),
        g.input_norm_sq,
        first.weight_gradient_sq,
    )
    log_inverse = 0.5 * _log((1 / norm_sq).mean())
    log_s = _log(g.sharpness.value)
    per_sample = gradient_sq.log() - norm_sq.log()  # log (‖∂f/∂W₁‖²/‖x‖²)
    return [
        _chain(
            "MLS",
            {
                "A": mls,
                "B": log_w + _log((gradient_sq / norm_sq).sqrt().mean()),
                "C": log_w + log_inverse + 0.5 * _log(gradient_sq.mean()),
                "D": log_w + log_inverse + 0.5 * log_s,
            },
            slack,
        ),
        _chain(
            "Ma-Ying",
            {"MLS": mls, "bound": log_w - 0.5 * _log(norm_sq.min()) + _log(gradient_sq.sqrt().mean())},
            slack,
        ),
        _chain(
            "normalized MLS",
            {"normalized MLS": normalized, "bound": 2 * log_w + _log(gradient_sq.mean())},
            slack,
        ),
        _chain(
            "LVR",
            {
                "LVR": lvr,
                "Frobenius": frobenius,
                "first layer": outputs * log_w + _log_mean_exp(half * per_sample) - half * math.log(outputs),
                "bound": outputs * log_w
                + 0.5 * _log_mean_exp(-outputs * norm_sq.log())
                + (outputs - 1) / 2 * math.log(n)
                + half * log_s
                - half * math.log(outputs),
            },
            slack * outputs,
        ),
    ]


def _network(g: Geometry, norms: dict[str, float], slack: float) -> Inequality:
    left = {"NMLS": _log(g.nmls.value)}
    layers: Sequence[LayerGeometry] = list(g.layers.values())
    if not layers:
        return Inequality("NMLS", left, "not applicable", "no linear or convolutional layer was measured")
    for layer in layers:
        reason = _layer_condition(layer)
        if reason:
            return Inequality("NMLS", left, "not applicable", reason)
    ratio = torch.stack([norms[layer.name] ** 2 / layer.input_norm_sq for layer in layers]).sum(0)
    gradient_sq = g.sharpness.per_sample
    assert gradient_sq is not None
    return _chain(
        "NMLS",
        {
            **left,
            "per sample": _log((ratio * gradient_sq).sqrt().mean()),
            "bound": 0.5 * _log(ratio.mean()) + 0.5 * _log(g.sharpness.value),
        },
        slack,
    )
