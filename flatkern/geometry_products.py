"""Geometry through products with the Jacobians: by all M tangents where inputs are few, else matrix-free."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatkern.capture import LayerCall
from flatkern.geometry_krylov import KrylovChunk, KrylovSettings, largest_singular, measure_krylov
from flatkern.geometry_results import LayerGeometry, named_calls
from flatkern.linearize import Linearization
from flatkern.results import PerSample
from flatkern.sample_map import SampleMap
from flatkern.segment import Source
from flatkern.spectra import Spectrum, squared_singular_values
from flatkern.structure import is_sole_consumer

__all__ = ["ProductsChunk", "join_product_layers", "measure_products"]

_TANGENTS_AT_ONCE = 16


@dataclass(frozen=True)
class _LayerChunk:
    name: str
    module: torch.nn.Module
    sigma: Tensor
    residuals: Tensor
    upper: Tensor
    input_norm_sq: Tensor
    sole: bool
    positions: int
    input_shape: torch.Size


@dataclass(frozen=True)
class ProductsChunk:
    """What one chunk of samples adds: a spectrum by tangents, or what iteration gives."""

    spectrum: Spectrum | None
    krylov: KrylovChunk | None
    image_sq: Tensor
    layers: tuple[_LayerChunk, ...]
    outputs: int
    dtype: torch.dtype
    products: int


def measure_products(
    lin: Linearization,
    source: Source,
    calls: Sequence[LayerCall],
    subspace: Tensor | None,
    settings: KrylovSettings,
    generator: torch.Generator,
    *,
    tangents: bool,
) -> ProductsChunk:
    """Measure a chunk of samples linearized in a twice differentiable form with frozen parameters."""
    value = source.value
    jacobians = SampleMap(lin.output, source.edge, value.shape, subspace)
    image = jacobians.push(value.reshape(1, lin.n, -1).to(jacobians.like.dtype))[0]
    spectrum = squared_singular_values(_columns(jacobians)) if tangents else None
    krylov = None if tangents else measure_krylov(jacobians, settings, generator)
    return ProductsChunk(
        spectrum=spectrum,
        krylov=krylov,
        image_sq=image.double().square().sum(1),
        layers=tuple(_layer(lin, call, subspace, settings, generator) for call in calls),
        outputs=jacobians.outputs,
        dtype=lin.output.dtype,
        products=jacobians.products,
    )


def _columns(jacobians: SampleMap) -> Tensor:
    """The Jacobians as rows [n, N, M], column by column."""
    n, m = jacobians.n, jacobians.inputs
    columns = jacobians.like.new_empty(n, m, jacobians.outputs)
    for start in range(0, m, _TANGENTS_AT_ONCE):
        count = min(_TANGENTS_AT_ONCE, m - start)
        units = jacobians.like.new_zeros(count, n, m)
        units[torch.arange(count), :, start + torch.arange(count)] = 1
        columns[:, start : start + count] = jacobians.push(units).transpose(0, 1)
    return columns.mT


def _layer(
    lin: Linearization,
    call: LayerCall,
    subspace: Tensor | None,
    settings: KrylovSettings,
    generator: torch.Generator,
) -> _LayerChunk:
    """σ_max(∂f/∂x^l) by iteration."""
    if call.name in lin.misplaced:
        raise ValueError(
            f"layers: the samples are not on axis 0 of layer {call.name!r}, so it has no Jacobian a sample; leave "
            "it out by naming the layers wanted"
        )
    n, inputs = lin.n, call.checked_inputs()
    zero = torch.zeros(n, dtype=torch.float64)
    sigma, residuals, upper = zero, zero, zero
    if call.input_edge is not None:
        jacobians = SampleMap(lin.output, call.input_edge, inputs.shape, subspace)
        small = min(jacobians.outputs, jacobians.inputs)
        start = torch.randn(n, small, generator=generator, dtype=torch.float64).to(jacobians.like)
        there, back = (
            (jacobians.pull, jacobians.push)
            if jacobians.outputs <= jacobians.inputs
            else (jacobians.push, jacobians.pull)
        )
        top = largest_singular(lambda u: there(u[None])[0], lambda v: back(v[None])[0], start, settings)
        sigma, residuals, upper = top.values, top.residuals, top.upper
    return _LayerChunk(
        name=call.name,
        module=call.module,
        sigma=sigma,
        residuals=residuals,
        upper=upper,
        input_norm_sq=inputs.reshape(n, -1).double().square().sum(1).cpu(),
        sole=is_sole_consumer(lin.output, call),
        positions=call.positions,
        input_shape=inputs.shape[1:],
    )


def join_product_layers(chunks: Sequence[ProductsChunk]) -> dict[str, LayerGeometry]:
    """The layers of all chunks of samples together."""
    called = [(layer.name, layer.module) for layer in chunks[0].layers]
    if any([(layer.name, layer.module) for layer in c.layers] != called for c in chunks):
        raise ValueError(
            "model: it calls its layers in another order for other samples; measure fewer layers"
        )
    layers = {}
    for i, name in enumerate(named_calls([layer_name for layer_name, _ in called])):
        parts = [c.layers[i] for c in chunks]
        module = parts[0].module
        layers[name] = LayerGeometry(
            name=name,
            max_sensitivity=PerSample(
                torch.cat([p.sigma for p in parts]),
                method="Golub–Kahan",
                residuals=torch.cat([p.residuals for p in parts]),
                upper=torch.cat([p.upper for p in parts]),
            ),
            input_norm_sq=torch.cat([p.input_norm_sq for p in parts]),
            weight_gradient_sq=None,
            module=module,
            positions=parts[0].positions,
            sole_consumer=all(p.sole for p in parts),
            input_shape=parts[0].input_shape,
        )
    return layers


def mean_error(errors: Tensor) -> float:
    """The standard error of the mean of n independent estimates with these standard errors."""
    return math.sqrt(float(errors.square().sum())) / len(errors)
