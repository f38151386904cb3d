"""All measures of flatness of one model in one call, sharing what can be shared."""

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
from flatkern.estimators.common import check_positive, make_generator
from flatkern.flatness import ggn_trace, gradient_norms
from flatkern.flatness_pass import Sums, one_pass
from flatkern.flatness_table import Flatness, Measure
from flatkern.hessian_parts import EXACT_UP_TO, HessianParts, hessian_parts, why_no_split
from flatkern.linearize import Forward, budget
from flatkern.loss_data import LossData, separate_loss
from flatkern.losses import Reduction
from flatkern.max_eigenvalue import max_eigenvalue
from flatkern.perturbed_loss import PerturbedLoss
from flatkern.problem import ParameterSelection, check_model, differentiation, select_parameters
from flatkern.relative_flatness import relative_flatness
from flatkern.relative_parts import find_layer
from flatkern.results import Estimate, PerSample, standard_error
from flatkern.squared_norms import layer_of
from flatkern.tape import UnsupportedError
from flatkern.traces import hessian_trace
from flatkern.verdicts import not_affine

__all__ = ["QUANTITIES", "flatness"]

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


@differentiation()
def flatness(
    model: nn.Module,
    loss_fn: object,
    data: Any,
    *,
    quantities: str | Sequence[str] | None = None,
    params: ParameterSelection = None,
    layer: str | None = None,
    reduction: Reduction | None = None,
    forward: Forward | None = None,
    rtol: float = DEFAULT_RTOL,
    seed: int | None = None,
    max_memory: int | None = None,
) -> Flatness:
    """Loss, gradient, S_GN, the traces of G and H, λ_max, adaptive and relative flatness: one table with error bars.

    ====================== ======================================================== =================================
    quantity               definition                                               as by
    ====================== ======================================================== =================================
    ``loss``               L(θ), the loss's own normalization
    ``gradient_norm``      ‖∇L‖₂
    ``gradient_norms``     (1/n) Σ_i ‖∂ℓ_i/∂θ‖², ℓ_i a sample's undivided term      :func:`flatkern.gradient_norms`
    ``fisher_trace``       Σ_i ‖∂ℓ_i/∂θ‖² / denominator (empirical Fisher matrix)
    ``sharpness``          S_GN = (1/n) Σ_i ‖∂f(x_i)/∂θ‖_F²                         :func:`flatkern.sharpness`
    ``ggn_trace``          Tr G, the Gauss-Newton matrix                            :func:`flatkern.ggn_trace`
    ``hessian_trace``      Tr H                                                     :func:`flatkern.hessian_trace`
    ``max_eigenvalue``     λ_max(H)                                                 :func:`flatkern.max_eigenvalue`
    ``adaptive_sharpness`` ½ Σ_k θ_k² H_kk                                          :func:`flatkern.adaptive_sharpness`
    ``relative_flatness``  κ of the last dense layer                                :func:`flatkern.relative_flatness`
    ====================== ======================================================== =================================

    With up to 64 outputs a sample everything but the Hessian's own part comes from one pass: N cotangents are pulled
    back to where the parameters enter, and the output Hessian's roots and the loss's gradients are combined there. In
    networks of piecewise linear operations Tr H and the adaptive sharpness then need nothing more. With more outputs
    the functions of the table are called one after another, with their sign sketches.

    Args:
        model, loss_fn, data, params, reduction, forward: as for :func:`flatkern.ggn_trace`; any loss.
        quantities: names from the table (the last column's split by layer comes with them); default all.
        layer: for the relative flatness.
        rtol: relative standard error of what is estimated.
        seed: of all that is drawn; the global generator is never used.
        max_memory: bytes of the working set; default 1 GiB.

    Returns:
        A :class:`Flatness`: ``print`` it, ``result["hessian_trace"].value``, ``.to_dict()``, ``.plot()``. A quantity
        that cannot be had for this model has ``value`` None and a ``reason``.

    Cost: the shared pass (a forward pass, min(N, all cotangents) backward to the layers, one to the parameters), a
    recorded forward pass, and what λ_max (10 to 40 products) and the residuals take; docs/flatness.md has measurements.

    Raises:
        TypeError, ValueError: bad arguments, models and data that no quantity can take.

    Source: the functions named above; docs/flatness.md.

    Example:
        >>> import torch, flatkern as fk
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> data = torch.randn(16, 4), torch.arange(16) % 3
        >>> table = fk.flatness(model, torch.nn.CrossEntropyLoss(), data, seed=0)
        >>> table["hessian_trace"].stderr, table["hessian_trace"].value == table["ggn_trace"].value
        (0.0, True)
    """
    started = time.perf_counter()
    check_model(model)
    check_positive(rtol, "rtol")
    wanted = _wanted(quantities)
    run = _Run(
        model, loss_fn, data, params, layer, reduction, forward, rtol, seed, budget(max_memory), wanted
    )
    measures = {name: run.measure(name) for name in wanted}
    return Flatness(
        measures=measures,
        num_data=run.num_data,
        num_parameters=sum(p.numel() for p in run.parameters.values()),
        seconds=time.perf_counter() - started,
        shared_seconds=run.sums.seconds if run.sums is not None else 0.0,
        notes=tuple(run.notes),
    )


def _wanted(quantities: str | Sequence[str] | None) -> tuple[str, ...]:
    if quantities is None:
        return tuple(QUANTITIES)
    asked = [quantities] if isinstance(quantities, str) else list(quantities)
    for name in asked:
        if name not in QUANTITIES:
            raise ValueError(f"quantities: {name!r} is unknown; expected some of {', '.join(QUANTITIES)}")
    if not asked:
        raise ValueError("quantities: an empty list asks for nothing")
    return tuple(name for name in QUANTITIES if name in asked)


class _Run:
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
        return one_pass(
            self._model, self._loss, self._data, self.parameters, self._forward, self._limit,
            wanted=wanted, layer=layer if self._shares_layer(layer) else None,
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
