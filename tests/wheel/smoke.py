"""What an installed flatkern must do with whatever torch lies beside it; run by `check.py` in a fresh environment.

Prints one line of JSON. Any failure raises.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import flatkern as fk
from flatkern import kernels, native
from flatkern.kernels._select import using

DTYPE = torch.float64


def calls() -> dict[str, Callable[[], Any]]:
    """Every kernel with both implementations, on small operands."""
    random = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=DTYPE, generator=random)

    x, z, t, g = draw(50, 6, 20), draw(7, 12), draw(3, 7, 12), draw(7, 12)
    weight, target = draw(12), torch.arange(7)
    y, image, cotangents = draw(50, 6, 9), draw(3, 2, 5, 5), draw(2, 3, 4, 5, 5)
    gram, beta = x @ x.mT, torch.full((7,), 0.5, dtype=DTYPE)
    return {
        "spd_logdet": lambda: kernels.spd_logdet(gram),
        "gram": lambda: kernels.gram(x),
        "gram_stats": lambda: kernels.gram_stats(x),
        "gram_singular_values": lambda: kernels.gram_singular_values(x),
        "gram_spectrum": lambda: kernels.gram_spectrum(x, 3),
        "rademacher": lambda: kernels.rademacher(3, 2, 1000),
        "normal": lambda: kernels.normal(3, 2, 1000),
        "rademacher_dot": lambda: kernels.rademacher_dot(x[0], 5),
        "lanczos_step": lambda: kernels.lanczos_step(t[0], t[1], t[2], beta),
        "activation_derivatives": lambda: kernels.activation_derivatives(z, "gelu"),
        "activation_jet": lambda: kernels.activation_jet(z, t, "silu"),
        "activation_pullback": lambda: kernels.activation_pullback(z, g, t, t, "tanh"),
        "softmax_curvature": lambda: kernels.softmax_curvature(z.softmax(-1), t, g),
        "cross_entropy_hvp": lambda: kernels.cross_entropy_hvp(z, t),
        "cross_entropy_jet": lambda: kernels.cross_entropy_jet(z, target, t),
        "layer_norm_tangent": lambda: kernels.layer_norm_tangent(z, beta, t, weight),
        "layer_norm_curvature": lambda: kernels.layer_norm_curvature(z, beta, t, g, weight),
        "ghost_norm": lambda: kernels.ghost_norm(x, y),
        "ghost_norm, form gram": lambda: kernels.ghost_norm(x, y, form="gram"),
        "conv_ghost_norm": lambda: kernels.conv_ghost_norm(image, cotangents, (3, 3), padding=1),
        "ghost_gram": lambda: kernels.ghost_gram(x[:5], y[None, :5], x[5:9], y[None, 5:9]),
    }


def compare() -> tuple[int, float]:
    """Compiled and reference results of all kernels: how many agree, and their largest difference."""
    worst = 0.0
    for name, call in calls().items():
        found = []
        for which in ("compiled", "reference"):
            with using(which):
                result = call()
            found.append((result,) if isinstance(result, Tensor) else tuple(result))
        for compiled, reference in zip(*found, strict=True):
            torch.testing.assert_close(
                compiled, reference, rtol=1e-10, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}"
            )
            if compiled.is_floating_point():
                worst = max(worst, float((compiled - reference).abs().max()))
    return len(calls()), worst


def derivative() -> None:
    """A kernel's gradient, tangent and compiled graph."""
    x = torch.randn(4, 3, 8, dtype=DTYPE)
    torch.testing.assert_close(
        torch.func.grad(lambda a: kernels.gram_stats(a).logdet.sum())(x),
        torch.func.grad(lambda a: torch.linalg.slogdet(a @ a.mT).logabsdet.sum())(x),
    )
    tangent = torch.func.jvp(lambda a: kernels.gram_stats(a).logdet, (x,), (x,))[1]
    torch.testing.assert_close(tangent, torch.full((4,), 6.0, dtype=DTYPE))  # of log det s² G at s = 1


def trace(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Tr H and the explicit Hessian's."""
    loss = nn.CrossEntropyLoss()
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]

    def value(flat: Tensor) -> Tensor:
        parts = flat.split([s.numel() for s in shapes])
        params = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        return loss(torch.func.functional_call(model, params, (x,)), y)

    flat = nn.utils.parameters_to_vector(model.parameters()).detach()
    explicit = float(torch.func.hessian(value)(flat).trace())
    found = fk.hessian_trace(model, loss, (x, y), seed=0).value
    if abs(found - explicit) > 1e-9 * abs(explicit):
        raise AssertionError(f"hessian_trace {found}, explicit {explicit}")
    product = fk.hessian(model, loss, (x, y)) @ flat
    torch.testing.assert_close(product, torch.func.hessian(value)(flat) @ flat)
    return found, explicit


def geometry(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """The mean log-volume of the input-output Jacobians, and the explicit one."""
    jacobians = torch.func.vmap(torch.func.jacrev(model))(x).detach()
    explicit = float(torch.linalg.svdvals(jacobians).log().sum(-1).mean())
    found = fk.geometry(model, x).log_volume.mean
    if abs(found - explicit) > 1e-9 * abs(explicit):
        raise AssertionError(f"log_volume {found}, explicit {explicit}")
    return found, explicit


def main() -> None:
    package = Path(fk.__file__).resolve().parent
    if not package.is_relative_to(Path(sys.prefix).resolve()):
        raise AssertionError(f"flatkern is imported from {package}, not from the environment {sys.prefix}")
    info = kernels.active()
    if info.kernels != "compiled":
        raise AssertionError(f"the reference runs: {info.reason}")
    rows = np.random.default_rng(0).standard_normal((5, 3, 8))
    numpy_logdet = native.gram_stats(rows).logdet
    np.testing.assert_allclose(numpy_logdet, np.linalg.slogdet(rows @ rows.transpose(0, 2, 1))[1])
    agree, worst = compare()
    derivative()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).to(DTYPE)
    x, y = torch.randn(20, 6, dtype=DTYPE), torch.arange(20) % 3
    found, explicit = trace(model, x, y)
    volume, explicit_volume = geometry(model, x)
    result = {
        "torch": torch.__version__,
        "torch at build": info.torch_at_build,
        "kernels": f"{info.kernels}, {info.isa}",
        "agree": f"{agree} (to {worst:.0e})",
        "hessian_trace": f"{found:.9f} ({abs(found - explicit):.0e})",
        "log_volume": f"{volume:.9f} ({abs(volume - explicit_volume):.0e})",
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
