"""Every measure of :func:`flatkern.flatness`, with what several of them need computed once."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from flatkern.adaptive_average import infinitesimal_average
from flatkern.curvature_rows import CurvatureRows
from flatkern.diagonal_traces import diagonal_traces
from flatkern.estimators.common import make_generator
from flatkern.flatness import ggn_trace, gradient_norms
from flatkern.flatness_pass import Sums, one_pass
from flatkern.flatness_table import Measure
from flatkern.hessian_parts import EXACT_UP_TO, HessianParts, hessian_parts, why_no_split
from flatkern.linearize import Forward
from flatkern.loss_data import LossData, separate_loss
from flatkern.losses import Reduction
from flatkern.max_eigenvalue import max_eigenvalue
from flatkern.perturbed_loss import PerturbedLoss
from flatkern.problem import ParameterSelection, select_parameters
from flatkern.relative_flatness import relative_flatness
from flatkern.relative_parts import find_layer
from flatkern.results import Estimate, PerSample, standard_error
from flatkern.squared_norms import layer_of
from flatkern.tape import UnsupportedError
from flatkern.traces import hessian_trace
from flatkern.verdicts import not_affine

__all__ = ["DEFAULT_RTOL", "QUANTITIES", "Measuring"]

DEFAULT_RTOL = 0.05
_MOST = 1000
"""Sign vectors for one quantity."""

QUANTITIES = {
    "loss": "L(θ)",
    "gradient_norm": "‖∇L‖₂",
    "gradient_norms": "(1/n) Σ ‖∂ℓ_i/∂θ‖²",
    "fisher_trace": "Σ ‖∂ℓ_i/∂θ‖² / denominator",
    "sharpness": "S_GN = (1/n) Σ ‖∂f_i/∂θ‖_F²",
    "ggn_trace": "Tr G",
    "hessian_trace": "Tr H",
    "max_eigenvalue": "λ_max(H)",
    "adaptive_sharpness": "½ Σ θ_k² H_kk",
    "relative_flatness": "Σ ⟨w_c, w_c'⟩ Tr H_cc'",
}
"""Names and definitions, in the table's order."""


class Measuring:
    """One call: what is shared is computed when first asked for."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: object,
        data: Any,
        params: ParameterSelection,
        layer: str | None,
        reduction: Reduction | None,
        forward: Forward | None,
        rtol: float,
        seed: int | None,
        max_memory: int,
        wanted: Sequence[str],
    ) -> None:
        self._model, self._loss_fn, self._data, self._layer = model, loss_fn, data, layer
        self._reduction, self._forward, self._rtol, self._limit = reduction, forward, rtol, max_memory
        self._wanted = frozenset(wanted)
        self._source = make_generator(seed, None, torch.device("cpu"))
        self.parameters = select_parameters(model, params)
        self.notes: list[str] = []
        self._loss = separate_loss(loss_fn, reduction)
        self._same: dict[str, Any] = {
            "params": list(self.parameters), "reduction": reduction, "forward": forward, "max_memory": max_memory
        }  # fmt: skip
        rows = CurvatureRows(
            model, loss_fn, data, params=None, reduction=reduction, forward=forward, kind="empirical"
        )
        ((inputs, target),) = islice(iter(rows), 1)
        self._outputs = rows.evaluate(inputs, target, slice(0, 1))[0].numel()
        obstacle = why_no_split(model, loss_fn, data, reduction, forward, max_memory, EXACT_UP_TO)
        self._apart = "" if obstacle is None else obstacle.reason
        if not self._apart and self._outputs > EXACT_UP_TO:
            self._apart = f"{self._outputs} outputs a sample"
        self.sums = self._shared() if not self._apart else None
        if self._apart:
            self.notes.append(f"no shared pass: {self._apart}")
        self.num_data = self.sums.num_data if self.sums is not None else self._plain.num_data

    # -- what several quantities need ---------------------------------------------------------------
    def _shared(self) -> Sums:
        wanted = {n.removesuffix("_trace") for n in ("ggn_trace", "sharpness") if n in self._wanted}
        if self._wanted & {"adaptive_sharpness"}:
            wanted.add("diagonal")
        if "hessian_trace" in self._wanted and not self._unproven:
            wanted.add("ggn")
        elif "hessian_trace" in self._wanted and self._forward is not None:
            wanted.add("diagonal")
        layer = self._relative_layer
        shared = layer if self._shares_layer(layer) else None
        return one_pass(
            self._model, self._loss, self._data, self.parameters, self._forward, self._limit,
            wanted=wanted, layer=shared,
        )  # fmt: skip

    @cached_property
    def _unproven(self) -> dict[str, str]:
        batches = LossData(self._model, self._data, self._forward)
        return not_affine(self._model, batches, self.parameters, batches.forward, self._limit)

    @cached_property
    def _relative_layer(self) -> str | None:
        """The weight, or ``None`` where there is none (the quantity's own call then says why)."""
        if "relative_flatness" not in self._wanted:
            return None
        try:
            return find_layer(self._model, LossData(self._model, self._data, self._forward), self._layer)
        except ValueError:
            return None

    def _shares_layer(self, layer: str | None) -> bool:
        return layer is not None and layer in self.parameters and layer not in self._unproven

    @cached_property
    def _parts(self) -> HessianParts:
        return hessian_parts(
            self._model, self._loss_fn, self._data, **self._same,
            diagonal=None if self.sums is None else self.sums.diagonal,
            unproven=None if self.sums is None else self._unproven,
            max_columns=EXACT_UP_TO,
        )  # fmt: skip

    @cached_property
    def _plain(self) -> PerturbedLoss:
        return PerturbedLoss(self._model, self._loss_fn, self._data, **self._same)

    @cached_property
    def _gradient(self) -> Tensor:
        if self.sums is not None:
            return self.sums.gradient
        return self._plain.gradient_at(torch.zeros_like(self._plain.theta))[1].double()

    @cached_property
    def _norms(self) -> PerSample:
        if self.sums is not None:
            return self.sums.gradient_norms
        return gradient_norms(self._model, self._loss_fn, self._data, per_layer=True, **self._same)

    def _seed(self) -> int:
        return int(torch.randint(1 << 31, (), generator=self._source))

    # -- quantities ---------------------------------------------------------------------------------
    def measure(self, name: str) -> Measure:
        """One row of the table."""
        started = time.perf_counter()
        make: Callable[[], Measure] = getattr(self, f"_{name}_measure")
        try:
            found = make()
        except (ValueError, TypeError, NotImplementedError, FloatingPointError, UnsupportedError) as error:
            found = Measure(name, QUANTITIES[name], reason=str(error))
        if found.value is not None and not math.isfinite(found.value):
            found = Measure(name, QUANTITIES[name], reason="not finite at this θ; measure in float64")
        return replace(found, seconds=time.perf_counter() - started)

    def _loss_measure(self) -> Measure:
        value = self.sums.loss if self.sums is not None else self._plain.value
        return Measure("loss", QUANTITIES["loss"], value, method="exact")

    def _gradient_norm_measure(self) -> Measure:
        layout = self.sums.layout if self.sums is not None else self._plain.layout
        squares: dict[str, float] = {}
        for name, place in layout.slices.items():
            layer = layer_of(name)
            squares[layer] = squares.get(layer, 0.0) + float(self._gradient[place].square().sum())
        return Measure(
            "gradient_norm",
            QUANTITIES["gradient_norm"],
            sum(squares.values()) ** 0.5,
            method="exact",
            per_layer={layer: value**0.5 for layer, value in squares.items()},
            result=self._gradient,
        )

    def _gradient_norms_measure(self) -> Measure:
        norms = self._norms
        per_layer = {layer: float(v.mean()) for layer, v in (norms.per_layer or {}).items()}
        return Measure(
            "gradient_norms",
            QUANTITIES["gradient_norms"],
            norms.mean,
            sample_stderr=norms.sample_stderr,
            method=norms.method,
            per_layer=per_layer,
            result=norms,
        )

    def _fisher_trace_measure(self) -> Measure:
        denominator = self.sums.denominator if self.sums is not None else self._plain.denominator
        norms = self._norms
        per_sample = norms.values * (len(norms) / denominator)
        return Measure(
            "fisher_trace",
            QUANTITIES["fisher_trace"],
            float(per_sample.mean()),
            sample_stderr=standard_error(per_sample),
            method=norms.method,
            per_layer={layer: float(v.sum()) / denominator for layer, v in (norms.per_layer or {}).items()},
            result=norms,
        )

    def _sharpness_measure(self) -> Measure:
        if self.sums is not None:
            assert self.sums.sharpness is not None
            return _from_estimate("sharpness", self.sums.sharpness)
        # Σ (f − y)² has the output Hessian 2 I, whatever y
        forward = self._forward

        def outputs(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
            output = model(batch[0].clone()) if forward is None else forward(model, batch)[0]
            return output, output.detach()

        found = ggn_trace(
            self._model, nn.MSELoss(reduction="sum"), self._data,
            params=list(self.parameters), forward=outputs, rtol=self._rtol, seed=self._seed(), per_layer=True,
            max_memory=self._limit,
        )  # fmt: skip
        return _from_estimate("sharpness", found, 1 / (2 * (found.num_data or 1)))

    def _ggn_trace_measure(self) -> Measure:
        if self.sums is not None:
            assert self.sums.ggn is not None
            return _from_estimate("ggn_trace", self.sums.ggn)
        found = ggn_trace(
            self._model, self._loss_fn, self._data,
            rtol=self._rtol, seed=self._seed(), per_layer=True, **self._same,
        )  # fmt: skip
        return _from_estimate("ggn_trace", found)

    def _hessian_trace_measure(self) -> Measure:
        if self.sums is not None and not self._unproven:
            assert self.sums.ggn is not None
            found = _from_estimate("hessian_trace", self.sums.ggn)
            return replace(found, method="exact (= Tr G; outputs piecewise affine in every parameter entry)")
        if self._forward is not None or (self.sums is None and self._parts.split):
            return self._hessian_trace_by_products()
        same = {key: value for key, value in self._same.items() if key != "forward"}
        same.update(rtol=self._rtol, seed=self._seed())
        try:
            found_trace = hessian_trace(self._model, self._loss_fn, self._data, per_layer=True, **same)
        except ValueError:  # no split by layer for this model
            found_trace = hessian_trace(self._model, self._loss_fn, self._data, **same)
        measure = _from_estimate("hessian_trace", found_trace)
        return replace(measure, per_layer_stderr=found_trace.per_layer_stderr or {})

    def _hessian_trace_by_products(self) -> Measure:
        generator = torch.Generator().manual_seed(self._seed())
        found = diagonal_traces(
            self._parts, None, rtol=self._rtol, samples=None, max_samples=_MOST, generator=generator
        )
        return Measure(
            "hessian_trace",
            QUANTITIES["hessian_trace"],
            found.value,
            stderr=found.stderr,
            method=found.method if found.converged else f"{found.method}, not converged",
            per_layer=found.per_layer,
            per_layer_stderr=found.per_layer_stderr,
            result=found,
        )

    def _max_eigenvalue_measure(self) -> Measure:
        found = max_eigenvalue(
            self._model, self._loss_fn, self._data, seed=self._seed(), check_determinism=False, **self._same
        )
        how = f"Lanczos, {found.matvecs} products" + ("" if found.converged else ", not converged")
        return Measure(
            "max_eigenvalue",
            QUANTITIES["max_eigenvalue"],
            found.value,
            error_bound=found.error_bound,
            method=how,
            result=found,
        )

    def _adaptive_sharpness_measure(self) -> Measure:
        generator = torch.Generator().manual_seed(self._seed())
        found = infinitesimal_average(self._parts, self._rtol, None, _MOST, generator)
        measure = _from_estimate("adaptive_sharpness", found)
        return replace(measure, per_layer_stderr=found.per_layer_stderr or {})

    def _relative_flatness_measure(self) -> Measure:
        if self.sums is not None and self.sums.relative is not None:
            per_sample = self.sums.relative * (self.sums.num_data / self.sums.denominator)
            return Measure(
                "relative_flatness",
                QUANTITIES["relative_flatness"],
                float(per_sample.mean()),
                sample_stderr=standard_error(per_sample),
                method=f"exact, of {self._relative_layer}",
            )
        found = relative_flatness(
            self._model, self._loss_fn, self._data,
            layer=self._layer, reduction=self._reduction, forward=self._forward, rtol=self._rtol,
            seed=self._seed(), max_memory=self._limit,
        )  # fmt: skip
        measure = _from_estimate("relative_flatness", found)
        return replace(measure, method=f"{found.method}, of {found.layer}")


def _from_estimate(name: str, found: Estimate, factor: float = 1.0) -> Measure:
    over = found.sample_stderr
    method = found.method if found.converged else f"{found.method}, not converged"
    return Measure(
        name,
        QUANTITIES[name],
        factor * found.value,
        stderr=factor * found.stderr,
        sample_stderr=None if over is None else factor * over,
        method=method,
        per_layer={layer: factor * value for layer, value in (found.per_layer or {}).items()},
        result=found,
    )
