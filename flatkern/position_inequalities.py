"""What holds where a weight is shared: the same inequalities with the gradients position by position.

∂f/∂x^l = (∂f/∂z) A_l with A_l the layer as a linear operator, so ‖∂f/∂x^l‖₂ ≤ ‖A_l‖₂ √G with G = Σ_t ‖∂f/∂z_t‖_F²; and
G ≤ (P + G)/(min_t ‖x_t‖² + 1) ≤ P/min_t ‖x_t‖² with P = Σ_t ‖∂f/∂z_t‖_F² ‖x_t‖², the squared norm of the gradient in
weights that no two positions share. No parameter need be selected or trainable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from flatkern.geometry_results import Geometry, LayerGeometry
from flatkern.inequality import Inequality, chain, log_mean_exp, log_of, not_applicable

__all__ = ["position_inequalities", "shares_weight"]


def position_inequalities(g: Geometry, norms: Mapping[str, float], slack: float) -> list[Inequality]:
    """``MLS``, ``normalized MLS``, ``LVR``, ``NMLS`` and ``NVR per position``.

    Where some layer shares its weight over positions, or its input with other layers.
    """
    layers = list(g.layers.values())
    if not any(shares_weight(layer) or layer.partners for layer in layers):
        return []
    first = next((layer for layer in layers if layer.takes_model_input), None)
    return [*_first(g, first, norms, slack), *_all(g, layers, norms, slack)]


def shares_weight(layer: LayerGeometry) -> bool:
    """Whether the layer is a convolution, or dense and applied at several positions."""
    return layer.positions > 1 or not isinstance(layer.module, nn.Linear)


def _condition(layer: LayerGeometry) -> str:
    if layer.output_gradient_sq is None:
        return (
            f"no gradients were measured at the output of {layer.name!r}; take fk.geometry(..., "
            "method='cotangents')"
        )
    if not layer.sole_consumer and not layer.partners:
        return (
            f"the input of {layer.name!r} reaches the output by other ways too (a skip, or several consumers)"
        )
    return ""


def _group(g: Geometry, layer: LayerGeometry) -> list[LayerGeometry]:
    """The layer with those that share its input: as one layer, with their weights stacked."""
    return [layer, *(g.layers[name] for name in layer.partners)]


def _norm(g: Geometry, layer: LayerGeometry, norms: Mapping[str, float]) -> float:
    """‖A_l‖₂; of stacked weights at most √(Σ ‖A‖₂²)."""
    return math.sqrt(sum(norms[each.name] ** 2 for each in _group(g, layer)))


def _positions(g: Geometry, layer: LayerGeometry) -> tuple[Tensor, Tensor, Tensor]:
    """G, P and min_t ‖x_t‖², [n] each."""
    group = _group(g, layer)
    energy = [each.output_gradient_sq for each in group if each.output_gradient_sq is not None]
    weighted = [each.position_gradient_sq for each in group if each.position_gradient_sq is not None]
    least = [each.least_position_norm_sq for each in group if each.least_position_norm_sq is not None]
    return torch.stack(energy).sum(0), torch.stack(weighted).sum(0), torch.stack(least).min(0).values


def _first(
    g: Geometry, first: LayerGeometry | None, norms: Mapping[str, float], slack: float
) -> list[Inequality]:
    sigma, outputs = g.max_sensitivity.values, g.outputs
    half = outputs / 2
    a = {"A": log_of(sigma.mean())}
    normalized = {"normalized MLS": log_of(g.normalized_mls.value)}
    lvr = {
        "LVR": log_mean_exp(g.log_volume.values),
        "Frobenius": log_mean_exp(outputs * g.frobenius.values.log()) - half * math.log(outputs),
    }
    reason = (
        "x does not enter, unchanged, a linear layer that was measured"
        if first is None
        else _condition(first)
    )
    if first is None or reason:
        return [
            not_applicable("MLS per position", a, reason),
            not_applicable("normalized MLS per position", normalized, reason),
            not_applicable("LVR per position", lvr, reason),
        ]
    log_w = log_of(_norm(g, first, norms))
    energy, weighted, least = _positions(g, first)
    sides = {
        **a,
        "output gradients": log_w + log_of(energy.sqrt().mean()),
        "positions with bias": log_w + log_of(((weighted + energy) / (least + 1)).sqrt().mean()),
    }
    why = ""
    if bool((least > 0).all()):
        sides["positions"] = log_w + log_of((weighted / least).sqrt().mean())
        sides["bound"] = log_w + 0.5 * log_of((1 / least).mean()) + 0.5 * log_of(weighted.mean())
    else:
        why = f"{int((least == 0).sum())} samples have a position where x is zero: the last sides would be infinite"
        sides["bound"] = (
            log_w + 0.5 * log_of((1 / (least + 1)).mean()) + 0.5 * log_of((weighted + energy).mean())
        )
    invariant = {**normalized, "bound": 2 * log_w + log_of((g.input_norm_sq * energy).mean())}
    volumes = {
        **lvr,
        "output gradients": outputs * log_w + log_mean_exp(half * energy.log()) - half * math.log(outputs),
    }
    return [
        chain("MLS per position", sides, slack, why),
        chain("normalized MLS per position", invariant, slack),
        chain("LVR per position", volumes, slack * outputs),
    ]


def _all(
    g: Geometry, layers: list[LayerGeometry], norms: Mapping[str, float], slack: float
) -> list[Inequality]:
    half, outputs = g.outputs / 2, g.outputs
    nmls = {"NMLS": log_of(g.nmls.value)}
    measured = layers and all(layer.log_volume is not None for layer in layers)
    nvr = {"NVR": g.log_nvr.value} if measured else {}
    reason = "no linear or convolutional layer was measured" if not layers else ""
    reason = reason or next((r for layer in layers if (r := _condition(layer))), "")
    if reason:
        return [
            not_applicable("NMLS per position", nmls, reason),
            not_applicable("NVR per position", nvr, reason),
        ]
    positions = [_positions(g, layer) for layer in layers]
    w = torch.tensor([_norm(g, layer, norms) for layer in layers], dtype=torch.float64)[:, None]
    energy, weighted, least = (torch.stack([p[j] for p in positions]).cpu() for j in range(3))
    whole, more = weighted + energy, least + 1
    ratio, total = (w.square() / more).sum(0), whole.sum(0)
    sides = {
        **nmls,
        "output gradients": log_of((w * energy.sqrt()).sum(0).mean()),
        "positions with bias": log_of((w * (whole / more).sqrt()).sum(0).mean()),
        "per sample": log_of((ratio * total).sqrt().mean()),
        "bound": 0.5 * log_of(ratio.mean()) + 0.5 * log_of(total.mean()),
    }
    logs = torch.logsumexp(outputs * w.log() + half * energy.log(), 0)
    volumes = {**nvr, "output gradients": log_mean_exp(logs) - half * math.log(outputs)}
    return [chain("NMLS per position", sides, slack), chain("NVR per position", volumes, slack * outputs)]
