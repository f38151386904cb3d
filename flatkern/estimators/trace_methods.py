"""Carrying out a planned trace estimate: from vectors and products to values, offset and name."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from flatkern.estimators.common import NotSymmetricError, require_finite
from flatkern.estimators.decay import is_symmetric
from flatkern.estimators.hutchinson import exact_trace, quadratic_forms
from flatkern.estimators.probes import Probes
from flatkern.estimators.sampling_run import Run
from flatkern.estimators.sketch import Sketch
from flatkern.estimators.trace_plan import Plan
from flatkern.estimators.xnystrace import smallest_ritz_value, xnystrace_values
from flatkern.estimators.xtrace import xtrace_products, xtrace_values

__all__ = ["Outcome", "carry_out", "refuse_indefinite", "sketch_forms"]


@dataclass(frozen=True)
class Outcome:
    """Values whose mean is the estimate, on the host, and the covariance of two of them (0: independent)."""

    method: str
    values: Tensor
    covariance: float = 0.0
    exact: bool = False

    @property
    def independent(self) -> bool:
        """Whether the values are independent of each other."""
        return not self.exact and self.method in ("hutchinson", "hutch++")

    @property
    def stderr(self) -> float:
        """Standard error of the mean: √(s²/k + the covariance of two values, where that is positive)."""
        if self.exact:
            return 0.0
        return math.sqrt(float(self.values.var()) / len(self.values) + max(0.0, self.covariance))


def carry_out(run: Run, probes: Probes, plan: Plan, sketch: Sketch | None) -> Outcome | None:
    """The estimate a plan describes; ``None`` where an interruption left fewer than two values.

    Raises:
        FloatingPointError: products gave NaN or Inf.
        ValueError: XNysTrace on an operator that is not positive semi-definite.
    """
    if plan.method == "exact":
        total = exact_trace(run)
        return (
            None
            if run.interrupted
            else Outcome("exact", require_finite(total.cpu(), "trace")[None], exact=True)
        )
    if plan.method == "hutchinson":
        return _outcome(plan.method, quadratic_forms(run, probes, plan.forms))
    assert sketch is not None
    sketch.grow(plan.vectors)
    if run.interrupted:
        return None
    size, eps = run.op.shape[1], torch.finfo(run.op.dtype).eps
    finite = torch.isfinite(sketch.images_gram).all()
    if plan.method == "xnystrace":
        return _nystrom(sketch, size, eps)
    if plan.method == "xtrace":
        coefficients, overlaps, compressed, tested = xtrace_products(run, sketch)
        if run.interrupted:
            return None
        values, covariance = xtrace_values(
            torch.nan_to_num(coefficients),
            overlaps,
            compressed,
            tested,
            sketch.vectors_gram.diagonal(),
            size,
            eps,
        )
        finite = finite & torch.isfinite(compressed).all() & torch.isfinite(tested).all()
        return _outcome(plan.method, torch.where(finite, values, torch.nan), covariance)
    basis, offset = _captured(run, sketch)
    if run.interrupted:
        return None
    return _outcome(plan.method, offset + quadratic_forms(run, probes, plan.forms, basis=basis))


def sketch_forms(sketch: Sketch) -> Outcome | None:
    """What is there when a run is interrupted early: the forms of the sketch's own vectors."""
    norms = sketch.vectors_gram.diagonal()
    size = sketch.vectors()[0].shape[1] if len(sketch) else 0
    return _outcome("hutchinson", size * sketch.forms.diagonal() / norms)


def _outcome(method: str, values: Tensor, covariance: Tensor | None = None) -> Outcome | None:
    if len(values) < 2:
        return None
    shared = 0.0 if covariance is None else float(covariance)
    return Outcome(method, require_finite(values.cpu(), "trace"), shared)


def _nystrom(sketch: Sketch, size: int, eps: float) -> Outcome | None:
    require_finite(sketch.forms.cpu(), "trace")
    values, covariance, flag = xnystrace_values(sketch, size, eps)
    if int(flag) or not is_symmetric(sketch.forms, eps):
        refuse_indefinite(sketch)
    return _outcome("xnystrace", values, covariance)


def refuse_indefinite(sketch: Sketch) -> NoReturn:
    """Say why XNysTrace cannot be used."""
    if not is_symmetric(sketch.forms, torch.finfo(sketch.vectors()[0].dtype).eps):
        raise NotSymmetricError("op: it is not symmetric, which xnystrace needs; use method='xtrace'")
    lowest = smallest_ritz_value(sketch.forms, sketch.vectors_gram)
    raise ValueError(
        "method: xnystrace needs a symmetric positive semi-definite operator, and the smallest Ritz value of this one "
        f"is {lowest:.3g}; use method='xtrace' or 'auto' (or -op where op is negative semi-definite)"
    )


def _captured(run: Run, sketch: Sketch) -> tuple[Tensor, Tensor]:
    """Q and Tr QᵀAQ: the first half of Hutch++, one product a vector."""
    basis, _ = sketch.basis()
    entries = run.array("captured", (len(basis),), torch.float64)
    for block in run.blocks("range", len(basis)):
        if not block.known:
            image = (run.op @ basis[block.span].mT).mT
            entries[block.span] = (basis[block.span].double() * image.double()).sum(1)
    return basis, entries.sum()
