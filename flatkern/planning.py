"""What a call would cost, before it runs."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from flatkern.allocation import AllocationMeter
from flatkern.estimators.common import row_bytes, square_operator
from flatkern.estimators.footprint import FOOTPRINTS
from flatkern.measured_calls import MEASURED, measured
from flatkern.operators import fisher, ggn, hessian
from flatkern.operators.base import LinearOperator
from flatkern.operators.batches import OperatorData
from flatkern.problem import DEFAULT_MAX_MEMORY, model_device

__all__ = ["Plan", "plan"]

_OPERATORS: tuple[Callable[..., Any], ...] = (hessian, ggn, fisher)


@dataclass(frozen=True)
class Plan:
    """What one call would take."""

    what: str
    passes: int
    """Passes over the data: products times one each for an operator over data, the passes of making one, or cotangents
    and probes a sample."""
    matvecs: int
    """Products with the operator; 0 for making an operator."""
    bytes: int
    """Tensors at the peak, beside what there is already."""
    seconds: float
    at_most: bool
    """Whether these are bounds, because the data decide how far the call goes."""
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        most = "at most " if self.at_most else ""
        text = (
            f"{self.what}: {most}{self.matvecs} products, {self.passes} passes, {most}{self.bytes / 2**20:.0f} MiB, "
            f"{most}{self.seconds:.2g} s"
        )
        return "\n".join([text, *self.notes])


def plan(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Plan:
    """Passes, bytes and time of ``fn(*args, **kwargs)``, without running it.

    For ``fk.trace``, ``diagonal``, ``eigsh``, ``spectral_density``, ``logdet``, ``trace_function`` and ``solve``: the
    products the arguments ask for (where a tolerance decides, the most that ``max_matvecs`` allows), the vectors kept,
    and memory and time of a product, measured on two products with the operator. For ``fk.hessian``, ``ggn`` and
    ``fisher``: graph and time of the first batch, measured, times the number of batches. For ``fk.sharpness``,
    ``ggn_trace``, ``gradient_norms``, ``hessian_trace``, ``geometry`` and ``kfac``: the call itself on a few samples,
    carried over to all of them by the code's own plan of chunks.

    Args:
        fn: one of these functions.
        args, kwargs: what it would be called with.

    Returns:
        A :class:`Plan`; ``print`` it. Bytes are those of tensors; what an operation allocates inside itself is not
        seen, nor is vector work beside the products in ``seconds``.

    Cost: two or three products with the operator, two runs of the first batch, or two or three runs of at most 32
    samples (4 where no more fit).

    Raises:
        TypeError, ValueError: a function there is no plan for; arguments it does not take.

    Example:
        >>> import torch, flatkern as fk
        >>> p = fk.plan(fk.spectral_density, torch.eye(1000), probes=4, steps=10)
        >>> p.matvecs, p.at_most
        (40, False)
    """
    try:
        bound = inspect.signature(fn).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(
            f"plan: {getattr(fn, '__name__', fn)} does not take these arguments: {error}"
        ) from None
    bound.apply_defaults()
    if fn in FOOTPRINTS:
        return _estimator(fn, dict(bound.arguments))
    if fn in _OPERATORS:
        return _operator(fn, dict(bound.arguments))
    if fn in MEASURED:
        found = measured(fn, dict(bound.arguments))
        return Plan(
            what=fn.__name__,
            passes=found.passes,
            matvecs=found.matvecs,
            bytes=found.bytes,
            seconds=found.seconds,
            at_most=False,
            notes=found.notes,
        )
    known = ", ".join(sorted(f.__name__ for f in (*FOOTPRINTS, *_OPERATORS, *MEASURED)))
    raise ValueError(f"fn: there is no plan for {getattr(fn, '__name__', fn)!r}; there is one for {known}")


def _estimator(fn: Callable[..., Any], arguments: dict[str, Any]) -> Plan:
    op = square_operator(arguments["op"])
    need = FOOTPRINTS[fn](op, arguments)
    columns = max(1, min(need.columns, need.matvecs))
    op._expect(need.matvecs)
    product_bytes, seconds = _product(op, columns)
    batches = getattr(getattr(op, "info", None), "batches", 0)
    return Plan(
        what=fn.__name__,
        passes=need.matvecs if batches else 0,
        matvecs=need.matvecs,
        bytes=int(need.vectors * row_bytes(op)) + product_bytes,
        seconds=seconds * math.ceil(need.matvecs / columns),
        at_most=need.at_most,
        notes=() if batches else ("the operator's data, if there are any, are not known",),
    )


def _product(op: LinearOperator, columns: int) -> tuple[int, float]:
    """Peak bytes and seconds of one product with so many columns."""
    generator = torch.Generator(op.device).manual_seed(0)
    rows = torch.empty(columns, op.shape[1], dtype=op.dtype, device=op.device).normal_(generator=generator)
    vectors = rows[0] if columns == 1 else rows.mT
    op @ vectors  # the first one may choose a block size
    start = time.perf_counter()
    op @ vectors
    if op.device.type == "cuda":
        torch.cuda.synchronize(op.device)
    seconds = time.perf_counter() - start
    with AllocationMeter() as meter:
        op @ vectors
    return meter.peak, seconds


def _operator(fn: Callable[..., Any], arguments: dict[str, Any]) -> Plan:
    data, forward = arguments["data"], arguments["forward"]
    source = OperatorData(data, model_device(arguments["model"]), forward)
    first = list(islice(iter(source), 1))
    batches = len(data) if hasattr(data, "__len__") and not source.single else 1
    options = {**arguments, "data": first, "check_determinism": False, "max_memory": 1 << 62}
    fn(**options)  # the first is slower
    start = time.perf_counter()
    with AllocationMeter() as meter:
        op = fn(**options)
    seconds = time.perf_counter() - start
    graph, limit = op.info.kept_bytes, arguments["max_memory"]
    budget = DEFAULT_MAX_MEMORY if limit is None else limit
    kept = min(batches, budget // max(graph, 1)) * graph
    del op
    passes = 2 if arguments["check_determinism"] else 1
    whole = kept == batches * graph
    return Plan(
        what=fn.__name__,
        passes=passes,
        matvecs=0,
        bytes=kept + meter.peak - (graph if whole else 0),
        seconds=seconds * batches,
        at_most=False,
        notes=(
            f"{kept // max(graph, 1)} of {batches} batches kept, {graph / 2**20:.0f} MiB of graph each",
            "measured on the first batch; the others are taken to be as large",
        ),
    )
