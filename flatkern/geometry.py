"""Representation geometry between two points of a network: volume, sensitivity and dimensionality of its Jacobians."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from torch import Tensor, nn

from flatkern.geometry_assembly import assemble, assemble_products
from flatkern.geometry_job import Job, Size, size_of
from flatkern.geometry_krylov import KrylovSettings
from flatkern.geometry_results import Geometry, LayerGeometry
from flatkern.linearize import budget
from flatkern.operators.staleness import WeightsWatch
from flatkern.problem import (
    ParameterSelection,
    check_input,
    check_model,
    differentiation,
    model_device,
    select_parameters,
)
from flatkern.segment import segment

__all__ = ["Geometry", "LayerGeometry", "geometry"]

Method = Literal["auto", "cotangents", "tangents", "matrix-free"]
_METHODS = ("auto", "cotangents", "tangents", "matrix-free")
_FEW = 128
"""Products a sample up to which an exact way is taken without a look at the matrix-free one."""


@differentiation()
def geometry(
    model: nn.Module,
    x: Tensor,
    layers: str | Sequence[str] | None = None,
    *,
    source: str | None = None,
    target: str | None = None,
    subspace: Tensor | Sequence[int] | None = None,
    method: Method = "auto",
    rtol: float = 0.01,
    max_steps: int = 100,
    probes: int = 4,
    volume_steps: int = 40,
    params: ParameterSelection = None,
    seed: int = 0,
    max_memory: int | None = None,
) -> Geometry:
    """Sharpness, volume, sensitivity and dimensionality of a network or a part of it, from one linearization.

    J_i is the N × M Jacobian of sample i from ``source`` to ``target``. Three ways, told in ``result.method``:

    * ``"cotangents"`` (few outputs): N cotangents a sample are pulled back once. At the layers' outputs they give the
      sharpness by ghost norms, at the layers' inputs their N × N Gram matrices (float64) give σ_max, norm and volume of
      ∂f/∂x^l, and at the source all singular values. Exact. About N + 1 backward passes to the activations, whatever
      the number of layers.
    * ``"tangents"`` (few inputs): M tangents a sample give all singular values of J_i. Exact. About M passes.
    * ``"matrix-free"`` (both large): no Jacobian. Golub–Kahan bidiagonalization of all samples in lockstep gives σ_max
      with a residual; signs outside its Krylov space give ‖J‖_F and the participation ratio (Hutch++); stochastic
      Lanczos quadrature gives log-volume, pseudo-volume and rank, with standard errors. about 2 (steps +
      probes (1 + volume_steps)) passes.

    ``"auto"`` takes an exact way for up to 128 passes, or where it takes no more than the matrix-free one, if a
    sample's Jacobian fits ``max_memory``.

    Args:
        model: any module [n, ...] → [n, ...] whose samples do not interact; left exactly as found.
        x: inputs with the samples on axis 0; floating point, unless ``source`` is a module behind an embedding.
        layers: names or globs of the linear and convolutional layers for which ∂f/∂x^l is wanted (and NMLS summed);
            default all between source and target by cotangents, none in the other ways (where each costs a run of
            Golub–Kahan of its own, for σ_max). A layer called again counts again, as ``name#2``.
        source: a module's name: the derivative is in what goes into it (its first tensor argument), all that depends
            on that tensor included, also what goes around the module; ``name#2`` for its second call. Default: the
            model's input.
        target: a module's name: f is what comes out of it (the first tensor). Default the model's output.
        subspace: measure Qᵀf instead of f: columns [N, r] (their span counts: they are orthonormalized), or indices of
            entries of the flattened output (classes).
        method: see above.
        rtol: matrix-free: stop when every σ_max has a residual within ``rtol`` · σ_max.
        max_steps: matrix-free: the most steps for that.
        probes: matrix-free: signs for norms, dimensionality, volume and sharpness; 0: σ_max only.
        volume_steps: matrix-free: Golub–Kahan steps a probe for the volumes; 0: no volume (NaN).
        params: names or globs of the parameters of the sharpness; default all with ``requires_grad``, ``()`` for none.
        seed: of the random starts and signs.
        max_memory: bytes of the working set; default 1 GiB.

    Returns:
        A :class:`Geometry`, float64 values a sample with means and standard errors over samples. Estimates have an
        error a sample in ``errors`` and their mean's in ``stderr``. A log-volume is −inf where J_i has not rank N: the
        sample is counted in ``rank_deficient`` and the ``notes`` of ``log_volume`` say why (N > M, a bottleneck or a
        softmax in the graph, singular values below 8 √N eps σ_max); ``pseudo_log_volume()`` stands beside it.

    Raises:
        TypeError, ValueError: bad arguments, integer inputs, NaN or Inf, train-mode batch norm or dropout, a random
            forward pass, samples that influence one another, a name that matches nothing, a target that does not
            depend on the source.

    Source:
        Chen, Recanatesi & Shea-Brown, arXiv 2310.01770; Golub & Kahan (1965); Ubaru, Chen & Saad, SIAM J. Matrix Anal.
        Appl. 38 (2017) for the quadrature; Meyer et al., arXiv 2010.09649 (Hutch++).

    Example:
        >>> import torch, flatkern as fk
        >>> model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3))
        >>> g = fk.geometry(model, torch.randn(16, 6))
        >>> list(g.layers), g.singular_values.shape
        (['0', '2'], torch.Size([16, 3]))
        >>> fk.geometry(model, torch.randn(16, 6), source="2", subspace=[0, 1]).singular_values.shape
        torch.Size([16, 2])
    """
    started = time.perf_counter()
    check_model(model)
    check_input(x, differentiable=source is None)
    settings = _settings(method, rtol, max_steps, probes, volume_steps, seed)
    # the parameters' gradients are one quantity among several: a wholly frozen model still has a geometry
    wanted = (params is None and any(p.requires_grad for p in model.parameters())) or (
        params is not None and (isinstance(params, str) or len(params) > 0)
    )
    parameters = select_parameters(model, params) if wanted else {}
    x = x.to(model_device(model))
    x = x.clone() if x.is_inference() else x.detach()
    limit = budget(max_memory)
    with segment(model, source, target) as part:
        size = size_of(model, x, part, subspace)
        way = _way(method, size, settings, limit)
        job = Job(model, x, part, size, layers, settings, limit, seed)
        if way == "cotangents":
            measured, rows = job.by_cotangents(parameters)
            found = assemble(measured, rows, part, started, has_parameters=bool(parameters))
        else:
            measured, products = job.by_products(tangents=way == "tangents")
            sharp = job.sketched_sharpness(parameters) if parameters else None
            found = assemble_products(measured, products, part, settings, sharp, started)
    return replace(found, _watch=WeightsWatch(model))


def _settings(
    method: str, rtol: float, max_steps: int, probes: int, volume_steps: int, seed: int
) -> KrylovSettings:
    if method not in _METHODS:
        raise ValueError(f"method: expected one of {', '.join(map(repr, _METHODS))}, got {method!r}")
    if not 0 < rtol < 1:
        raise ValueError(f"rtol: expected a relative error between 0 and 1, got {rtol!r}")
    numbers = (
        ("max_steps", max_steps, 1),
        ("probes", probes, 0),
        ("volume_steps", volume_steps, 0),
        ("seed", seed, 0),
    )
    for name, value, least in numbers:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}: expected an integer of at least {least}, got {value!r}")
    return KrylovSettings(rtol, max_steps, probes, volume_steps)


def _way(method: Method, size: Size, settings: KrylovSettings, limit: int) -> str:
    if method != "auto":
        return method
    krylov = 2 * (min(settings.max_steps, 30) + settings.probes * (1 + settings.volume_steps))
    most = max(_FEW, krylov)
    fits = 2 * size.outputs * size.inputs * size.entry_bytes <= limit
    if fits and size.outputs <= most:
        return "cotangents"
    return "tangents" if fits and size.inputs <= most else "matrix-free"
