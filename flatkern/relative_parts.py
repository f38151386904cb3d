"""The parts of relative flatness: closed form, roots or signs for the Gauss-Newton part, products for the residual."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from flatkern._loss_roots import with_roots
from flatkern.curvature_rows import CurvatureRows
from flatkern.estimators.group_traces import group_traces
from flatkern.estimators.rounds import in_rounds
from flatkern.freedom import SummedVariance
from flatkern.gradient_rows import GradientRows
from flatkern.hessian_parts import EXACT_UP_TO, why_no_split
from flatkern.last_layer import is_output, is_transposed, last_dense
from flatkern.layers.outer import OuterTerm
from flatkern.layers.term import Term, chunks
from flatkern.linearize import Forward, Linearization, linearizations
from flatkern.loss_data import LossData, separate_loss
from flatkern.losses import Loss, Reduction
from flatkern.operators import LinearOperator, hessian
from flatkern.operators.congruence import Congruence, Mixing
from flatkern.output_forms import row_form
from flatkern.parameter_space import own_term
from flatkern.problem import select_parameters
from flatkern.residual_operator import residual_operator
from flatkern.results import Estimate, standard_error
from flatkern.samples import count_samples, take
from flatkern.signs import draw_signs
from flatkern.verdicts import not_affine

__all__ = ["LayerProblem", "RelativeFlatness", "find_layer", "weighted_norms"]

_DRAWS = 4
_FEW = 3
"""Samples of the run that finds the layer."""


@dataclass(frozen=True)
class RelativeFlatness(Estimate):
    """κ of one layer, as an :class:`Estimate`."""

    layer: str = ""
    """The weight's name."""
    residual: str = ""
    """Why a part of it had to be sampled with Hessian products; empty where none had to."""


class LayerProblem:
    """One call of :func:`flatkern.relative_flatness`, whose arguments these are."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: object,
        data: Any,
        reduction: Reduction | None,
        forward: Forward | None,
        max_memory: int,
        layer: str | None,
        *,
        rtol: float,
        samples: int | None,
        max_samples: int,
        generator: torch.Generator,
    ) -> None:
        self._model, self._loss_fn, self._data = model, loss_fn, data
        self._reduction, self._forward, self._limit = reduction, forward, max_memory
        self._rtol, self._samples, self._max_samples = rtol, samples, max_samples
        self._generator = generator
        self._loss = separate_loss(loss_fn, reduction)
        self._batches = LossData(model, data, forward)
        ((inputs, _),) = islice(iter(self._batches), 1)
        self._few = take(inputs, slice(0, min(_FEW, count_samples(inputs))))
        self._name = find_layer(model, self._batches, layer)
        self._parameters = select_parameters(model, self._name)
        # labels do not matter: only forward passes and own cotangents are made of it
        self._rows = CurvatureRows(
            model, loss_fn, data,
            params=self._name, reduction=reduction, forward=forward, kind="empirical",
        )  # fmt: skip
        self._survey = self._rows.survey()
        self._transposed, self._direct = self._inspected()

    def _inspected(self) -> tuple[bool, bool]:
        """Whether the weight is kept as [in, out], and whether its layer's output is the model's."""
        run = GradientRows(
            self._model, [(self._few, None)], self._parameters, lambda f, _t, _s: torch.zeros_like(f)[None],
            forward=self._batches.forward, cotangents=1,
        )  # fmt: skip
        (chunk,) = run.chunks(1 << 62)
        terms = chunk.gradients.terms.get(self._name, [])
        turned = is_transposed(chunk.lin, self._name, terms[0]) if len(terms) == 1 else None
        return turned is True, turned is not None and is_output(chunk.lin, self._name)

    @property
    def _weight(self) -> Tensor:
        """W [C, d]."""
        w = self._parameters[self._name].detach()
        return w.mT if self._transposed else w

    def measure(self) -> RelativeFlatness:
        """The closed form, or the Gauss-Newton part and what is left beside it."""
        known = self._closed_form() if self._direct else None
        if known is not None:
            return known
        obstacle = why_no_split(
            self._model, self._loss_fn, self._data, self._reduction, self._forward, self._limit
        )
        if obstacle is not None and not obstacle.can_draw:
            return self._sampled(None, obstacle.reason)
        ggn = self._gauss_newton()
        verdict = not_affine(self._model, self._batches, self._parameters, self._batches.forward, self._limit)
        return self._sampled(ggn, verdict[self._name]) if self._name in verdict else ggn

    def _one_output(self) -> tuple[Tensor, Any]:
        ((inputs, target),) = islice(iter(self._rows), 1)
        return self._rows.evaluate(inputs, target, slice(0, 1))

    def _chunked(self, roots: Callable[[Tensor, Any], Tensor], cotangents: int | None = 1) -> Tensor:
        """Σ_k ‖Wᵀ Γ_ik‖² for cotangents [K, n, *output], float64 [n]."""
        rows = GradientRows(
            self._model, self._rows, self._parameters, lambda f, y, _: roots(f, y),
            forward=self._rows.forward, cotangents=cotangents,
        )  # fmt: skip
        parts = []
        for chunk in rows.chunks(self._limit // 2):
            terms = chunk.gradients.terms.get(self._name, [])
            weight = self._parameters[self._name]
            parts.append(weighted_norms(chunk.lin, terms, self._name, weight, self._limit // 4))
            del chunk, terms
        return torch.cat(parts)

    def _closed_form(self) -> RelativeFlatness | None:
        """Of a layer whose output is the model's."""
        form = row_form(self._loss, self._one_output()[0])
        if form is None:
            return None
        weight, parts = self._weight, []

        def roots(output: Tensor, target: Any, _: int) -> Tensor:
            # the first entry of each position's cotangent carries its form to where the features are
            root = torch.zeros_like(output)
            root[..., 0] = form(output, target, weight).to(root.dtype)
            return root.unsqueeze(0)

        rows = GradientRows(
            self._model, self._rows, self._parameters, roots, forward=self._rows.forward, cotangents=1
        )
        for chunk in rows.chunks(self._limit // 3):  # the form takes some float64 copies of the output
            terms = chunk.gradients.terms.get(self._name, [])
            if len(terms) != 1 or not is_output(chunk.lin, self._name):
                return None  # another batch takes another way
            if is_transposed(chunk.lin, self._name, terms[0]) is not self._transposed:
                return None
            parts.append(_weighted_features(terms[0]))
            del chunk, terms
        return self._exact(torch.cat(parts), "closed form", 0)

    def _gauss_newton(self) -> RelativeFlatness:
        loss = with_roots(self._loss)
        assert loss.root is not None
        assert loss.sketch is not None
        output, _ = self._one_output()
        columns = loss.columns(output)
        needed = 3 * columns * output.numel() * output.element_size()
        if columns <= EXACT_UP_TO and needed <= self._limit:
            values = self._chunked(loss.root, None)
            return self._exact(values, "exact (roots of the output Hessian)", columns)
        run = in_rounds(
            lambda _, count: self._draw(loss, count), lambda values: SummedVariance.of_means(values).stderr,
            lambda values: self._rtol * float(values.mean(0).sum()),
            first=_DRAWS, samples=self._samples, most=self._max_samples,
        )  # fmt: skip
        draws, notes = run.values, run.notes("sign draws", "max_samples")
        found = self._exact(draws.mean(0), f"{len(draws)} sign draws", len(draws))
        error = SummedVariance.of_means(draws).scaled(1 / self._survey.denominator)
        assert found.per_sample is not None
        return replace(
            found,
            stderr=error.stderr,
            sample_stderr=standard_error(found.per_sample, error.stderr),
            dof=error.dof,
            converged=not notes,
            notes=notes,
        )

    def _draw(self, loss: Loss, count: int) -> Tensor:
        """κ's numerator of every draw and sample, float64 [count, n]."""
        assert loss.sketch is not None
        sketch, generator = loss.sketch, self._generator

        def roots(output: Tensor, target: Any) -> Tensor:
            signs = draw_signs(output.shape, generator, output.device, output.dtype)
            return sketch(output, target, signs).unsqueeze(0)

        return torch.stack([self._chunked(roots) for _ in range(count)])

    def _sampled(self, ggn: RelativeFlatness | None, reason: str) -> RelativeFlatness:
        """The residual beside ``ggn``, or all of it, by products."""
        op: LinearOperator
        if ggn is None:
            op = hessian(
                self._model, self._loss_fn, self._data,
                params=self._name, reduction=self._reduction, forward=self._forward, max_memory=self._limit,
            )  # fmt: skip
        else:
            op = residual_operator(
                self._model, self._loss, self._data, [self._name], self._survey.denominator,
                self._batches.forward, self._limit,
            )  # fmt: skip
        factor = self._weight.to(op.dtype)  # [C, d]
        columns = factor.shape[1]
        if factor.shape[0] < columns:  # (W Wᵀ)^½ does as well as W, and has fewer columns
            values, vectors = torch.linalg.eigh(factor @ factor.mT)
            factor = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
        changed = Congruence(op, Mixing(factor, columns, transposed=self._transposed))
        exact = 0.0 if ggn is None else ggn.value
        rest = group_traces(
            changed, {self._name: slice(0, changed.shape[0])},
            rtol=self._rtol, offset=exact, samples=self._samples, max_matvecs=self._max_samples,
            generator=self._generator,
        )  # fmt: skip
        value, stderr = rest.total
        error = SummedVariance()
        error.add(stderr**2, rest.dof)
        if ggn is not None:
            error.add(ggn.stderr**2, ggn.dof)
        drawn = "a product an entry" if rest.exact else f"{len(rest.samples)} Hessian products"
        return RelativeFlatness(
            value=exact + value,
            stderr=error.stderr,
            method=drawn if ggn is None else f"{ggn.method} + residual: {drawn}",
            num_data=self._survey.num_data,
            matvecs=rest.matvecs,
            passes=0 if ggn is None else ggn.passes,
            converged=rest.converged and (ggn is None or ggn.converged),
            notes=rest.notes,
            dof=error.dof,
            layer=self._name,
            residual=reason,
        )

    def _exact(self, values: Tensor, method: str, passes: int) -> RelativeFlatness:
        per_sample = values.double() * (self._survey.num_data / self._survey.denominator)
        return RelativeFlatness(
            value=float(per_sample.mean()),
            sample_stderr=standard_error(per_sample),
            method=method,
            num_data=self._survey.num_data,
            passes=passes,
            per_sample=per_sample,
            layer=self._name,
        )


def find_layer(model: nn.Module, batches: LossData, layer: str | None) -> str:
    """The name of the weight: that of ``layer``, or of the last dense layer."""
    if layer is None:
        parameters = select_parameters(model)
        ((inputs, _),) = islice(iter(batches), 1)
        (lin,) = linearizations(
            model, take(inputs, slice(0, min(_FEW, count_samples(inputs)))), parameters,
            with_input=False, max_memory=1 << 62, cotangents=1, forward=batches.forward,
        )  # fmt: skip
        return last_dense(lin, parameters)
    named = dict(model.named_parameters(remove_duplicate=False))
    name = layer if layer in named else f"{layer}.weight"
    if name not in named:
        raise ValueError(f"layer: {layer!r} is no dense layer and no parameter of the model")
    if named[name].ndim != 2:
        raise ValueError(
            f"layer: {name!r} has shape {tuple(named[name].shape)}; relative flatness is that of a matrix"
        )
    return next(iter(select_parameters(model, name)))


@torch.no_grad()
def _weighted_features(term: Term) -> Tensor:
    """Σ_t q_t ‖a_t‖², float64 [n], with q the first entry of the cotangents."""
    assert isinstance(term, OuterTerm)
    a = term.features(slice(0, term.n))[:, 0].double()  # [n, T, d]
    return (a.square().sum(2) * term.cotangents[0, :, 0, :, 0].double()).sum(1)


def weighted_norms(
    lin: Linearization, terms: Sequence[Term], name: str, parameter: nn.Parameter, max_memory: int
) -> Tensor:
    """Σ_k ‖Wᵀ Γ_ik‖_F² with Γ_ik [C, d] the gradients of a matrix parameter, float64 [n].

    Where Γ = Σ_t g_t a_tᵀ, Wᵀ Γ is the same with Wᵀ g_t: cheap norms again.
    """
    if not terms:
        return torch.zeros(lin.n, dtype=torch.float64, device=parameter.device)
    if len(terms) == 1 and (turned := is_transposed(lin, name, terms[0])) is not None:
        term = terms[0]
        assert isinstance(term, OuterTerm)
        with torch.no_grad():
            changed = term.cotangents @ (parameter.mT if turned else parameter)
            shape = torch.Size((changed.shape[-1], term.sizes[2]))
            return OuterTerm(term.features, changed, shape).squared_norms(max_memory)
    uses = lin.uses.grouped(name) if name in lin.uses.by_parameter else [()]
    return _formed(own_term(parameter, list(zip(uses, terms, strict=True))), parameter.detach(), max_memory)


def _formed(term: Term, weight: Tensor, max_memory: int) -> Tensor:
    total = torch.zeros(term.n, dtype=torch.float64, device=weight.device)
    at_once = max(1, max_memory // (4 * term.gradient_bytes))
    for part in chunks(term.n, at_once // term.k):
        for block in chunks(term.k, at_once // (part.stop - part.start)):
            formed = term.explicit(part, block).detach().double()
            total[part] += (weight.double().mT @ formed).square().sum((0, 2, 3))
    return total
