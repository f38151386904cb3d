"""The inequalities of the paper as chains of sides, from a :class:`flatkern.Geometry` and the layers' norms."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from flatkern.geometry_results import Geometry, LayerGeometry
from flatkern.inequality import Inequality, chain, log_mean_exp, log_of, not_applicable
from flatkern.position_inequalities import position_inequalities, shares_weight

__all__ = ["Inequality", "all_inequalities", "per_layer_inequalities"]


def all_inequalities(
    g: Geometry, norms: Mapping[str, float], powers: Sequence[float], slack: float
) -> list[Inequality]:
    """Every inequality, those per position where weights are shared."""
    return [
        *_first_layer(g, norms, powers, slack),
        _pointwise(g, slack),
        *_network(g, norms, slack),
        *position_inequalities(g, norms, slack),
    ]


def per_layer_inequalities(g: Geometry, norms: Mapping[str, float], slack: float) -> dict[str, Inequality]:
    """(1/n) Σ ‖x^l‖² σ_max(∂f/∂x^l)² ≤ ‖W_l‖² (1/n) Σ ‖∂f/∂W_l‖_F² for each layer."""
    found = {}
    for name, layer in g.layers.items():
        left = log_of((layer.input_norm_sq * layer.max_sensitivity.values.square()).mean())
        sides = {"normalized sensitivity": left}
        reason = condition(layer, zeros=False)
        if reason or layer.weight_gradient_sq is None:
            found[name] = not_applicable(name, sides, reason)
        else:
            sides["bound"] = 2 * log_of(norms[name]) + log_of(layer.weight_gradient_sq.mean())
            found[name] = chain(name, sides, slack)
    return found


def condition(layer: LayerGeometry, *, zeros: bool = True, bias: bool = False) -> str:
    """Why a layer does not satisfy what the inequalities need; empty where it does.

    Args:
        layer: the layer.
        zeros: whether inputs of norm 0 are in the way.
        bias: whether the bias's gradient is needed.
    """
    if not isinstance(layer.module, nn.Linear):
        return f"weight sharing: {layer.name!r} is a convolution, gradients of its copies can cancel"
    if layer.positions > 1:
        return f"weight sharing: {layer.name!r} is applied at {layer.positions} positions of a sample"
    if layer.weight_gradient_sq is None:
        return f"the weight of {layer.name!r} is frozen, not selected, or used elsewhere too"
    if bias and layer.bias_gradient_sq is None:
        return f"{layer.name!r} has no bias, or one that is frozen, not selected, or used elsewhere too"
    if not layer.sole_consumer:
        return (
            f"the input of {layer.name!r} reaches the output by other ways too (a skip, or several consumers)"
        )
    count = int((layer.input_norm_sq == 0).sum()) if zeros else 0
    return f"{count} samples have a zero input to {layer.name!r}" if count else ""


def _first_layer(
    g: Geometry, norms: Mapping[str, float], powers: Sequence[float], slack: float
) -> list[Inequality]:
    n, outputs, sigma = len(g.input_norm_sq), g.outputs, g.max_sensitivity.values
    half = outputs / 2
    a = {"A": log_of(sigma.mean())}
    normalized = {"normalized MLS": log_of(g.normalized_mls.value)}
    ma_ying = {k: {"MLS": log_of(sigma.pow(k).mean())} for k in powers}
    lvr = {
        "LVR": log_mean_exp(g.log_volume.values),
        "Frobenius": log_mean_exp(outputs * g.frobenius.values.log()) - half * math.log(outputs),
    }
    first = next((layer for layer in g.layers.values() if layer.takes_model_input), None)
    reason = (
        "x does not enter, unchanged, a linear layer that was measured" if first is None else condition(first)
    )
    whole = "x does not enter, unchanged, a linear layer that was measured" if first is None else condition(
        first, zeros=False, bias=True
    )  # fmt: skip
    names = [_ma_ying_name(k) for k in powers]
    chains: list[Inequality] = []
    if first is None or reason or first.weight_gradient_sq is None:
        shared = first is not None and bool(shares_weight(first) or first.partners)
        chains.append(not_applicable("MLS", a, reason, "MLS per position" if shared else _bias(whole)))
        chains += [not_applicable(name, ma_ying[k], reason) for name, k in zip(names, powers, strict=True)]
        chains.append(
            not_applicable(
                "normalized MLS", normalized, reason, "normalized MLS per position" if shared else ""
            )
        )
        chains.append(not_applicable("LVR", lvr, reason, "LVR per position" if shared else ""))
    else:
        chains += _with_weight(g, first, log_of(norms[first.name]), a, normalized, ma_ying, lvr, slack)
    if first is None or whole or first.weight_gradient_sq is None or first.bias_gradient_sq is None:
        return [*chains, not_applicable("MLS with bias", a, whole)]
    log_w = log_of(norms[first.name])
    more = first.input_norm_sq + 1
    gradient_sq = first.weight_gradient_sq + first.bias_gradient_sq
    inverse = 0.5 * log_of((1 / more).mean())
    sides = {
        **a,
        "B": log_w + log_of((gradient_sq / more).sqrt().mean()),
        "C": log_w + inverse + 0.5 * log_of(gradient_sq.mean()),
        "D": log_w + inverse + 0.5 * log_of(g.sharpness.value),
    }
    assert n == len(more)
    return [*chains, chain("MLS with bias", sides, slack)]


def _bias(whole: str) -> str:
    return "" if whole else "MLS with bias"


def _ma_ying_name(k: float) -> str:
    return "Ma-Ying" if k == 1 else f"Ma-Ying k={k:g}"


def _with_weight(
    g: Geometry, first: LayerGeometry, log_w: float, a: dict[str, float], normalized: dict[str, float],
    ma_ying: Mapping[float, dict[str, float]], lvr: dict[str, float], slack: float,
) -> list[Inequality]:  # fmt: skip
    """Those with ∂f/∂W₁ for a first layer that meets the conditions."""
    n, outputs, norm_sq, gradient_sq = (
        len(g.input_norm_sq),
        g.outputs,
        g.input_norm_sq,
        first.weight_gradient_sq,
    )
    assert gradient_sq is not None
    half, log_s = outputs / 2, log_of(g.sharpness.value)
    inverse = 0.5 * log_of((1 / norm_sq).mean())
    mls = {
        **a,
        "B": log_w + log_of((gradient_sq / norm_sq).sqrt().mean()),
        "C": log_w + inverse + 0.5 * log_of(gradient_sq.mean()),
        "D": log_w + inverse + 0.5 * log_s,
    }
    chains = [chain("MLS", mls, slack)]
    for k, left in ma_ying.items():
        bound = k * (log_w - 0.5 * log_of(norm_sq.min())) + log_of(gradient_sq.pow(k / 2).mean())
        chains.append(chain(_ma_ying_name(k), {**left, "bound": bound}, slack * max(1.0, k)))
    bound = 2 * log_w + log_of(gradient_sq.mean())
    chains.append(chain("normalized MLS", {**normalized, "bound": bound}, slack))
    per_sample = gradient_sq.log() - norm_sq.log()  # log (‖∂f/∂W₁‖²/‖x‖²)
    volumes = {
        **lvr,
        "first layer": outputs * log_w + log_mean_exp(half * per_sample) - half * math.log(outputs),
        "bound": outputs * log_w
        + 0.5 * log_mean_exp(-outputs * norm_sq.log())
        + (outputs - 1) / 2 * math.log(n)
        + half * log_s
        - half * math.log(outputs),
    }
    return [*chains, chain("LVR", volumes, slack * outputs)]


def _pointwise(g: Geometry, slack: float) -> Inequality:
    """dV_i ≤ (‖J_i‖_F²/N)^{N/2}, sample by sample; the sides are means of the logs over samples of full rank."""
    half = g.outputs / 2
    volume = g.log_volume.values
    frobenius = half * (2 * g.frobenius.values.log() - math.log(g.outputs))
    logs = {"dV": volume, "Frobenius": frobenius}
    regular = torch.isfinite(volume)
    if not bool(regular.any()):
        return Inequality(
            "pointwise dV",
            {"dV": -math.inf},
            "holds",
            "every J_i is rank deficient: dV_i = 0",
            per_sample=logs,
        )
    sides = {"dV": float(volume[regular].mean()), "Frobenius": float(frobenius[regular].mean())}
    excess = volume[regular] - frobenius[regular]
    worst = float((excess - slack * g.outputs * frobenius[regular].abs().clamp_min(1)).max())
    if worst > 0:
        i = int(excess.argmax())
        return Inequality(
            "pointwise dV",
            sides,
            "violated",
            f"log dV exceeds its bound by {float(excess[i]):.3g}",
            per_sample=logs,
        )
    return Inequality("pointwise dV", sides, "holds", per_sample=logs)


def _network(g: Geometry, norms: Mapping[str, float], slack: float) -> list[Inequality]:
    """NMLS and NVR, whose conditions are asked of every layer."""
    nmls = {"NMLS": log_of(g.nmls.value)}
    layers = list(g.layers.values())
    nvr = _nvr_left(g, layers)
    if not layers:
        reason = whole = "no linear or convolutional layer was measured"
    else:
        reason = next((r for layer in layers if (r := condition(layer))), "")
        whole = next((r for layer in layers if (r := condition(layer, zeros=False, bias=True))), "")
    gradient_sq = g.sharpness.per_sample
    log_s = log_of(g.sharpness.value)
    found = []
    if reason or gradient_sq is None:
        shared = _holds_per_position(layers)
        replaced = "NMLS per position" if shared else "" if whole else "NMLS with bias"
        found.append(not_applicable("NMLS", nmls, reason, replaced))
        found.append(not_applicable("NVR", nvr, reason, "NVR per position" if shared else ""))
    else:
        w_sq = torch.tensor([norms[layer.name] ** 2 for layer in layers], dtype=torch.float64)
        inputs = torch.stack([layer.input_norm_sq for layer in layers]).cpu()
        found.append(_nmls("NMLS", nmls, (w_sq[:, None] / inputs).sum(0), gradient_sq.cpu(), log_s, slack))
        found.append(_nvr(g, nvr, w_sq.log()[:, None] - inputs.log(), gradient_sq.cpu(), log_s, slack))
    if whole or gradient_sq is None:
        found.append(not_applicable("NMLS with bias", nmls, whole))
    else:
        w_sq = torch.tensor([norms[layer.name] ** 2 for layer in layers], dtype=torch.float64)
        inputs = torch.stack([layer.input_norm_sq for layer in layers]).cpu() + 1
        ratio = (w_sq[:, None] / inputs).sum(0)
        found.append(_nmls("NMLS with bias", nmls, ratio, gradient_sq.cpu(), log_s, slack))
    return found


def _holds_per_position(layers: Sequence[LayerGeometry]) -> bool:
    """Whether shared weights or inputs are among what is in the way, and position by position nothing is."""
    return any(shares_weight(layer) or layer.partners for layer in layers) and all(
        layer.sole_consumer or layer.partners for layer in layers
    )


def _nmls(
    name: str, left: dict[str, float], ratio: Tensor, gradient_sq: Tensor, log_s: float, slack: float
) -> Inequality:
    sides = {
        **left,
        "per sample": log_of((ratio * gradient_sq).sqrt().mean()),
        "bound": 0.5 * log_of(ratio.mean()) + 0.5 * log_s,
    }
    return chain(name, sides, slack)


def _nvr_left(g: Geometry, layers: Sequence[LayerGeometry]) -> dict[str, float]:
    """log NVR and log of Σ_l N^{−N/2} (1/n) Σ ‖∂f/∂x^l‖_F^N, where the layers' volumes were measured."""
    half = g.outputs / 2
    if not layers or any(layer.log_volume is None or layer.frobenius_sq is None for layer in layers):
        return {}
    frobenius = torch.stack(
        [half * layer.frobenius_sq.log() for layer in layers if layer.frobenius_sq is not None]
    )
    return {
        "NVR": g.log_nvr.value,
        "Frobenius": log_mean_exp(torch.logsumexp(frobenius, 0)) - half * math.log(g.outputs),
    }


def _nvr(
    g: Geometry, left: dict[str, float], log_ratio: Tensor, gradient_sq: Tensor, log_s: float, slack: float
) -> Inequality:
    """``log_ratio``: log(‖W_l‖²/‖x_i^l‖²), [L, n]."""
    outputs, n = g.outputs, len(gradient_sq)
    powers = torch.logsumexp(outputs * log_ratio, 0)  # log Σ_l (‖W_l‖/‖x_i^l‖)^{2N}
    shared = -outputs / 2 * math.log(outputs)
    sides = {
        **left,
        "per sample": log_mean_exp(0.5 * powers + outputs / 2 * gradient_sq.log()) + shared,
        "bound": 0.5 * log_mean_exp(powers) + (outputs - 1) / 2 * math.log(n) + outputs / 2 * log_s + shared,
    }
    return chain("NVR", sides, slack * outputs)
