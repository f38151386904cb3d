"""Chunks of samples put together into a :class:`flatkern.Geometry`."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flatkern.geometry_krylov import CONFIDENCE, QUADRATURE_FLOOR, KrylovChunk, KrylovSettings
from flatkern.geometry_products import ProductsChunk, join_product_layers, mean_error
from flatkern.geometry_results import Geometry, mean_of
from flatkern.geometry_rows import RowsChunk, join_layers
from flatkern.results import Estimate, PerSample
from flatkern.segment import Segment
from flatkern.spectra import Spectrum, rank_tolerance

__all__ = ["Measured", "assemble", "assemble_products"]


@dataclass
class Measured:
    """What every chunk of samples tells, whatever the way."""

    input_norms: list[Tensor] = field(default_factory=list)
    inputs: int = 0
    bound: tuple[int, str] = (0, "")
    dtype: torch.dtype = torch.float32

    def add(self, norms: Tensor, bound: tuple[int, str], dtype: torch.dtype, inputs: int) -> None:
        """One more chunk: ‖x_i‖² and the graph's bound on the rank."""
        if not self.input_norms or bound[0] > self.bound[0]:  # it must hold for all samples
            self.bound = bound
        self.input_norms.append(norms)
        self.inputs, self.dtype = inputs, dtype

    @property
    def input_norm_sq(self) -> Tensor:
        """‖x_i‖² of all samples."""
        return torch.cat(self.input_norms)


def assemble(
    measured: Measured, chunks: Sequence[RowsChunk], part: Segment, started: float, *, has_parameters: bool
) -> Geometry:
    """From rows: everything is exact."""
    spectrum = Spectrum.concatenate([c.spectrum for c in chunks])
    layers = join_layers(chunks)
    outputs, seconds = chunks[0].outputs, time.perf_counter() - started
    notes = list(dict.fromkeys(note for c in chunks for note in c.notes))
    if not has_parameters:
        notes.append("all parameters are frozen or left out: sharpness is 0 by definition")
    sigmas = [layer.max_sensitivity.values for layer in layers.values()]
    nmls = torch.stack(sigmas).sum(0) if sigmas else torch.zeros_like(spectrum.top)
    sharpness = mean_of(torch.cat([c.gradient_sq for c in chunks]), seconds)
    image_sq = torch.cat([c.image_sq for c in chunks])
    return _exact(
        measured,
        spectrum,
        outputs,
        part,
        layers,
        notes,
        sharpness,
        nmls,
        image_sq,
        seconds,
        "cotangents",
        outputs,
    )


def assemble_products(
    measured: Measured,
    chunks: Sequence[ProductsChunk],
    part: Segment,
    settings: KrylovSettings,
    sharpness: Estimate | None,
    started: float,
) -> Geometry:
    """From all tangents, or from iteration."""
    layers = join_product_layers(chunks)
    seconds = time.perf_counter() - started
    image_sq = torch.cat([c.image_sq for c in chunks]).cpu()
    outputs, passes = chunks[0].outputs, max(c.products for c in chunks)
    notes = []
    sigmas = [layer.max_sensitivity.values for layer in layers.values()]
    nmls = torch.stack(sigmas).sum(0) if sigmas else torch.full_like(image_sq, math.nan)
    if not sigmas:
        notes.append("NMLS: no layer was measured; name the layers wanted (each costs a run of its own)")
    if sharpness is None:
        notes.append("sharpness: not measured (no parameters, or probes=0)")
        sharpness = Estimate(math.nan, method="not measured", num_data=len(image_sq))
    spectra = [c.spectrum for c in chunks if c.spectrum is not None]
    if spectra:
        spectrum = Spectrum.concatenate(spectra)
        return _exact(
            measured,
            spectrum,
            outputs,
            part,
            layers,
            notes,
            sharpness,
            nmls,
            image_sq,
            seconds,
            "tangents",
            passes,
        )
    found = KrylovChunk.concatenate([c.krylov for c in chunks if c.krylov is not None])
    return _iterated(
        measured, found, outputs, part, layers, notes, sharpness, nmls, image_sq, seconds, settings, passes
    )


def _exact(
    measured: Measured, spectrum: Spectrum, outputs: int, part: Segment, layers: dict, notes: list[str],
    sharpness: Estimate, nmls: Tensor, image_sq: Tensor, seconds: float, method: str, passes: int,
) -> Geometry:  # fmt: skip
    inputs, norm_sq = measured.inputs, measured.input_norm_sq
    bound, reason = _bound(measured, outputs)
    volume = spectrum.log_volume(None)
    if bound < outputs:
        everything = torch.ones_like(volume.values, dtype=torch.bool)
        volume = PerSample(torch.full_like(volume.values, -math.inf), everything, notes=(reason,))
        notes.append(reason)
    elif volume.rank_deficient:
        ranks = spectrum.rank()[volume.degenerate]
        reason = (
            f"{volume.rank_deficient} of {len(volume)} samples have a singular value at or below "
            f"{spectrum.tolerance:.3g} of the largest (numerical rank {int(ranks.min())} to {int(ranks.max())} of "
            f"{outputs}): their log-volume is −inf"
        )
        volume = PerSample(volume.values, volume.degenerate, notes=(reason,))
        notes.append(reason)
    return Geometry(
        sharpness=sharpness,
        log_volume=volume,
        max_sensitivity=PerSample(spectrum.top),
        local_dimensionality=spectrum.participation_ratio(),
        mls=mean_of(spectrum.top, seconds, passes=passes),
        nmls=mean_of(nmls, seconds, passes=passes),
        normalized_mls=mean_of(norm_sq * spectrum.top.square(), seconds, passes=passes),
        singular_values=spectrum.singular_values,
        layers=layers,
        input_norm_sq=norm_sq,
        outputs=outputs,
        inputs=inputs,
        dtype=measured.dtype,
        seconds=seconds,
        notes=tuple(notes),
        frobenius=PerSample(spectrum.energy.sqrt()),
        iimls=mean_of(image_sq / inputs, seconds),
        method=method,
        passes=passes,
        rank_bound=bound,
        source=part.source,
        target=part.target,
        _spectrum=spectrum,
    )


def _bound(measured: Measured, outputs: int) -> tuple[int, str]:
    """An upper bound on the rank, and why it lies below N (empty where it does not)."""
    narrow, where = measured.bound
    bound = min(narrow, outputs, measured.inputs)
    if outputs > measured.inputs and bound == measured.inputs:
        return bound, f"N = {outputs} outputs exceed M = {bound} inputs: det J Jᵀ = 0, log-volume −inf"
    if bound < outputs:
        return (
            bound,
            f"rank ≤ {bound} < N = {outputs}, as all goes through {where}: det J Jᵀ = 0, log-volume −inf",
        )
    return bound, ""


def _iterated(
    measured: Measured, found: KrylovChunk, outputs: int, part: Segment, layers: dict, notes: list[str],
    sharpness: Estimate, nmls: Tensor, image_sq: Tensor, seconds: float, settings: KrylovSettings, passes: int,
) -> Geometry:  # fmt: skip
    inputs, norm_sq = measured.inputs, measured.input_norm_sq.cpu()
    size = min(outputs, inputs)
    tolerance = rank_tolerance(size, measured.dtype)
    bound, reason = _bound(measured, outputs)
    unfinished = int((~found.converged).sum())
    if unfinished:
        notes.append(
            f"σ_max: {unfinished} of {len(found.sigma)} samples have a residual above rtol = {settings.rtol:g} after "
            f"{settings.max_steps} steps; raise max_steps"
        )
    upper = (
        f"upper: with probability {CONFIDENCE} over the random starts, for all samples of a chunk together"
    )
    deficient = found.deficient if bound == outputs else torch.ones_like(found.deficient)
    if bound == outputs and bool(deficient.any()):
        reason = (
            f"{int(deficient.sum())} of {len(deficient)} samples have a singular value at or below {tolerance:.3g} of "
            "the largest (a Ritz value shows it): their log-volume is −inf"
        )
    if reason:
        notes.append(reason)
    how = f"stochastic Lanczos quadrature, {settings.probes} probes of {settings.volume_steps} steps"
    measured_volume = settings.probes > 0 and settings.volume_steps > 0
    about = (
        f"values: Gauss quadrature, never too small for a probe; lower: Gauss–Radau, if no singular value is below "
        f"{max(tolerance, QUADRATURE_FLOOR):.3g} of the largest; errors: of the probes"
        if measured_volume
        else "not estimated: volume_steps = 0 or probes = 0"
    )
    volume = PerSample(
        torch.where(deficient, -math.inf, found.volume),
        deficient,
        method=how,
        stderr=mean_error(found.volume_error[~deficient]) if bool((~deficient).any()) else 0.0,
        seconds=seconds,
        notes=(reason,) if bool(deficient.all()) else tuple(filter(None, (reason, about))),
        errors=found.volume_error,
        lower=torch.where(deficient, -math.inf, found.volume_lower),
        upper=None,
    )
    pseudo_note = (
        f"singular values above {tolerance:.3g} of the largest, as far as {settings.volume_steps} steps tell them "
        "from 0"
    )
    ranks = found.rank.clamp(max=bound)
    return Geometry(
        sharpness=sharpness,
        log_volume=volume,
        max_sensitivity=PerSample(
            found.sigma, method="Golub–Kahan", notes=(upper,), lower=found.sigma, upper=found.upper,
            residuals=found.residuals,
        ),
        local_dimensionality=PerSample(
            found.participation, found.participation <= 0 if settings.probes else None, method="signs",
            stderr=mean_error(found.participation_error), errors=found.participation_error,
        ),
        mls=mean_of(found.sigma, seconds, passes=passes, method="Golub–Kahan"),
        nmls=mean_of(nmls, seconds, method="Golub–Kahan"),
        normalized_mls=mean_of(norm_sq * found.sigma.square(), seconds, passes=passes, method="Golub–Kahan"),
        singular_values=found.leading,
        layers=layers,
        input_norm_sq=norm_sq,
        outputs=outputs,
        inputs=inputs,
        dtype=measured.dtype,
        seconds=seconds,
        notes=tuple(notes),
        frobenius=PerSample(
            found.energy.sqrt(), method="signs", errors=found.energy_error / (2 * found.energy.sqrt()),
            stderr=mean_error(found.energy_error / (2 * found.energy.sqrt())),
        ),
        iimls=mean_of(image_sq / inputs, seconds),
        method="matrix-free",
        passes=passes,
        rank_bound=bound,
        source=part.source,
        target=part.target,
        pseudo_volume=PerSample(
            found.pseudo, method=how, stderr=mean_error(found.pseudo_error), notes=(pseudo_note,),
            errors=found.pseudo_error,
        ) if measured_volume else None,
        ranks=PerSample(
            ranks, method=how, stderr=mean_error(found.rank_error), notes=(pseudo_note,), errors=found.rank_error
        ) if measured_volume else None,
    )  # fmt: skip
