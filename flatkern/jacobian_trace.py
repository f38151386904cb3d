"""Tr Σ_i J_iᵀ H_i J_i from square roots S_i of the H_i: exactly, or by one backward pass a sign sketch.

With S_i S_iᵀ = H_i the trace is Σ_i Σ_k ‖J_iᵀ s_ik‖², a sum of per-sample squared norms: K backward passes. With
independent signs ε_i, E ‖J_iᵀ S_i ε_i‖² is the same by one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flatkern.freedom import LEAST, SummedVariance
from flatkern.linearize import Forward, Linearization, linearizations
from flatkern.problem import check_output, preserve_state
from flatkern.results import Estimate, standard_error
from flatkern.samples import take
from flatkern.signs import draw_signs
from flatkern.squared_norms import SquaredNorms, layer_of, parameter_squared_norms

__all__ = ["Method", "Roots", "Settings", "estimate_trace"]

Method = Literal["auto", "exact", "sketch"]

_EXACT_UP_TO = 64
"""Cotangents up to which the exact way is taken without a look at the sketch."""


@dataclass(frozen=True)
class Roots:
    """What decides the H_i."""

    exact: Callable[[Tensor, Any], Tensor]
    """(output, target) → the columns of S as cotangents [K, n, *output]."""
    sketch: Callable[[Tensor, Any, Tensor], Tensor]
    """(output, target, ε [n, *output]) → S ε."""
    columns: Callable[[Tensor], int]
    """output → K."""
    weight: Callable[[Tensor, Any], float]
    """A batch's part of the denominator."""
    denominator: Callable[[float], float]
    shared: bool = False
    """Whether the columns are the same for all samples."""


@dataclass(frozen=True)
class Settings:
    """How to go about it."""

    method: Method = "auto"
    rtol: float = 0.02
    samples: int | None = None
    seed: int = 0
    per_layer: bool = False
    per_parameter: bool = False
    max_memory: int = 1 << 30

    def __post_init__(self) -> None:
        if self.method not in ("auto", "exact", "sketch"):
            raise ValueError(f"method: expected 'auto', 'exact' or 'sketch', got {self.method!r}")
        if not 0 < self.rtol < 1:
            raise ValueError(f"rtol: expected a relative error between 0 and 1, got {self.rtol!r}")
        if self.samples is not None and (
            not isinstance(self.samples, int) or self.samples is True or self.samples < 1
        ):
            raise ValueError(f"samples: expected a number of draws of at least 1, got {self.samples!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool) or self.seed < 0:
            raise ValueError(f"seed: expected an integer of at least 0, got {self.seed!r}")


@dataclass(frozen=True)
class _Problem:
    model: nn.Module
    batches: Iterable[tuple[Any, Any]]
    """(inputs, target); the target is ``None`` where ``forward`` gives it."""
    parameters: dict[str, nn.Parameter]
    forward: Forward | None
    roots: Roots
    settings: Settings

    def chunks(self, cotangents: int | None) -> Iterator[tuple[Linearization, Any]]:
        """Linearizations of all batches, with their targets."""
        for inputs, target in self.batches:
            for lin in linearizations(
                self.model,
                inputs,
                self.parameters,
                with_input=False,
                max_memory=self.settings.max_memory,
                cotangents=cotangents,
                own_roots=not self.roots.shared,
                forward=self.forward,
            ):
                yield (
                    lin,
                    lin.target
                    if self.forward is not None
                    else (None if target is None else target[lin.samples]),
                )
                del lin

    def one_output(self) -> Tensor:
        """Of a single sample."""
        inputs, _ = next(iter(self.batches))
        first = take(inputs, slice(0, 1))
        with preserve_state(self.model), torch.no_grad():
            if self.forward is not None:
                return self.forward(self.model, first)[0]
            return check_output(self.model, self.model(first.clone()), 1)


def estimate_trace(
    model: nn.Module,
    batches: Iterable[tuple[Any, Any]],
    parameters: dict[str, nn.Parameter],
    roots: Roots,
    settings: Settings,
    forward: Forward | None = None,
) -> Estimate:
    """The trace over all batches, by the method asked for or by the cheaper one."""
    started = time.perf_counter()
    problem = _Problem(model, batches, parameters, forward, roots, settings)
    if settings.method == "exact":
        _check_exact(problem.one_output(), problem)
        return _exact(problem, started)
    if settings.method == "auto":
        output = problem.one_output()
        columns = roots.columns(output)
        feasible = _exact_bytes(output, columns, roots.shared) <= settings.max_memory
        if columns <= _EXACT_UP_TO and feasible:
            return _exact(problem, started)
        return _sketch(problem, started, columns if feasible and settings.samples is None else None)
    return _sketch(problem, started, None)


def _exact_bytes(output: Tensor, columns: int, shared: bool) -> int:
    """Of the cotangents of one sample."""
    return (1 if shared else 3) * columns * output.numel() * output.element_size()


def _check_exact(output: Tensor, problem: _Problem) -> None:
    columns = problem.roots.columns(output)
    needed = _exact_bytes(output, columns, problem.roots.shared)
    if needed > problem.settings.max_memory:
        raise ValueError(
            f"method: 'exact' needs {columns} cotangents of {output.numel()} entries a sample ({needed / 2**30:.3g} "
            "GiB, more than max_memory); use method='sketch'"
        )


class _Total:
    """Sums over chunks of samples of one draw, or of all cotangents."""

    def __init__(self) -> None:
        self.parts: list[Tensor] = []
        self.by_parameter: dict[str, Tensor] = {}
        self.notes: dict[str, None] = {}

    def add(self, norms: SquaredNorms, share: float = 1.0) -> None:
        for name, values in norms.by_parameter.items():
            added = share * values.sum()
            self.by_parameter[name] = self.by_parameter[name] + added if name in self.by_parameter else added
        self.notes.update(dict.fromkeys(norms.notes))


def _exact(problem: _Problem, started: float) -> Estimate:
    total, weight, columns = _Total(), 0.0, 0
    for lin, target in problem.chunks(None):
        output = lin.output.detach()
        weight += problem.roots.weight(output, target)
        roots = problem.roots.exact(output, target)
        columns = max(columns, len(roots))
        norms = parameter_squared_norms(problem.model, lin, roots, problem.parameters)
        total.parts.append(norms.total)
        total.add(norms)
        del lin, roots, norms
    return _result(
        problem, started, torch.cat(total.parts), total, problem.roots.denominator(weight),
        method="exact (ghost norms)", passes=columns,
    )  # fmt: skip


@dataclass
class _Draws:
    """What is known after some draws."""

    values: Tensor
    """‖J_iᵀ S_i ε_i‖² of every draw and sample, float64 [k, n]."""
    weight: float
    total: _Total

    @property
    def variance(self) -> SummedVariance:
        """Of Σ_i mean_k."""
        return SummedVariance.of_means(self.values)

    def wanted(self, rtol: float) -> int:
        """How many draws the relative error asks for, and how many it takes to know the error."""
        size, draws, variance = float(self.values.mean(0).sum()), len(self.values), self.variance
        if size == 0:
            return draws
        needed = draws * variance.value / (rtol * size) ** 2
        known = 1 + ceil((draws - 1) * LEAST / variance.freedom)
        return max(draws, int(needed * 1.1) + 1, known)


def _sketch(problem: _Problem, started: float, columns: int | None) -> Estimate:
    settings = problem.settings
    generator = torch.Generator().manual_seed(settings.seed)
    draws = _draw(problem, generator, settings.samples or 2)
    for _ in range(4):  # the error itself is an estimate: looked at again after every round
        if settings.samples is not None:
            break
        wanted = draws.wanted(settings.rtol)
        if wanted == len(draws.values):
            break
        if columns is not None and wanted - len(draws.values) >= columns:
            return _exact(problem, started)
        more = _draw(problem, generator, wanted - len(draws.values))
        share = len(more.values) / wanted
        for name, value in more.total.by_parameter.items():
            draws.total.by_parameter[name] = (1 - share) * draws.total.by_parameter[name] + share * value
        draws = _Draws(torch.cat([draws.values, more.values]), draws.weight, draws.total)
    denominator = problem.roots.denominator(draws.weight)
    if len(draws.values) < 2:
        draws.total.notes["one draw has no standard error of its own: take samples=2 or more"] = None
    size, error = float(draws.values.mean(0).sum()), draws.variance
    return _result(
        problem, started, draws.values.mean(0), draws.total, denominator,
        method="sign sketch (ghost norms)", passes=len(draws.values), stderr=error.stderr / denominator,
        dof=error.dof,
        samples=draws.values.sum(1) / denominator,
        converged=settings.samples is not None or error.stderr <= settings.rtol * size,
    )  # fmt: skip


def _draw(problem: _Problem, generator: torch.Generator, count: int) -> _Draws:
    total, weight, parts = _Total(), 0.0, []
    for lin, target in problem.chunks(1):
        output = lin.output.detach()
        weight += problem.roots.weight(output, target)
        values = []
        for _ in range(count):
            signs = draw_signs(output.shape, generator, output.device)
            root = problem.roots.sketch(output, target, signs).unsqueeze(0)
            norms = parameter_squared_norms(problem.model, lin, root, problem.parameters)
            values.append(norms.total)
            total.add(norms, 1 / count)
        parts.append(torch.stack(values))
        del lin, norms, root
    return _Draws(torch.cat(parts, 1), weight, total)


def _result(
    problem: _Problem,
    started: float,
    values: Tensor,
    total: _Total,
    denominator: float,
    *,
    method: str,
    passes: int,
    stderr: float = 0.0,
    dof: int | None = None,
    samples: Tensor | None = None,
    converged: bool = True,
) -> Estimate:
    n = len(values)
    per_sample = values * (n / denominator)  # so that the value is their mean
    value = float(per_sample.mean())
    if value != value or value in (float("inf"), -float("inf")):
        raise ValueError(
            "model: the gradients overflow or are NaN at this θ; measure in float64 (model.double())"
        )
    by_parameter = {name: float(v) / denominator for name, v in total.by_parameter.items()}
    layers: dict[str, float] = {}
    for name, part in by_parameter.items():
        layers[layer_of(name)] = layers.get(layer_of(name), 0.0) + part
    return Estimate(
        value=value,
        stderr=stderr,
        sample_stderr=standard_error(per_sample, stderr),
        method=method,
        num_data=n,
        passes=passes,
        seconds=time.perf_counter() - started,
        converged=converged,
        samples=samples,
        per_sample=per_sample,
        per_layer=layers if problem.settings.per_layer else None,
        per_parameter=by_parameter if problem.settings.per_parameter else None,
        notes=tuple(total.notes),
        dof=dof,
    )
