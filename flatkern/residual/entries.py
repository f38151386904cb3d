"""Where selected parameters enter a run, and which of their uses are understood."""

from __future__ import annotations

from collections.abc import Mapping

from flatkern.residual.change import Entry
from flatkern.residual.other_changes import Direct, Looked, Scaled
from flatkern.residual.weight_changes import Convolved, Dense
from flatkern.sample_axis import SampleAxis
from flatkern.tape import Op, Tape, UnsupportedError, Value

__all__ = ["find_entries"]

_VIEWS = frozenset(
    {
        "t",
        "transpose",
        "view",
        "permute",
        "unsqueeze",
        "squeeze",
        "expand",
        "detach",
        "alias",
        "_to_copy",
        "repeat",
    }
    | {"reshape", "_reshape_alias", "_unsafe_view", "clone"}
)


def find_entries(
    tape: Tape, wanted: frozenset[str], axes: Mapping[int, SampleAxis]
) -> tuple[list[Entry], dict[str, str]]:
    """The uses of the wanted parameters.

    Returns:
        The entries of all parameters whose every use is understood, and the other parameters with the reason.
    """
    source: dict[int, tuple[str, Value, list[Op]]] = {}  # views of parameters
    uses: dict[str, int] = dict.fromkeys(wanted, 0)
    taken: list[tuple[Op, list[Value]]] = []
    refused: dict[str, str] = {}
    for value in tape.values:
        if value.parameter in wanted and value.parameter is not None:
            source[value.index] = (value.parameter, value, [])
    for op in tape.ops:
        own = [v for v in op.inputs if v.index in source]
        if not own or not any(o is not None and o.differentiable for o in op.outputs):
            continue
        moved = op.name in _VIEWS and len(op.inputs) == 1 and not op.in_place and not _spreads(op, axes)
        if moved or _fixed_rows(op, own, axes):
            name, origin, views = source[own[0].index]
            source[op.output.index] = (name, origin, [*views, op])
            continue
        taken.append((op, own))
        for value in own:
            uses[source[value.index][0]] += 1
    if tape.final.index in source:
        refused[source[tape.final.index][0]] = "it is the output"
    while True:
        entries: list[Entry] = []
        before = len(refused)
        for op, own in taken:
            names = [source[v.index][0] for v in own]
            if any(name in refused for name in names):
                # the whole operation: a product of two parameters would be half taken
                refused.update(
                    {n: f"used together with {', '.join(names)}" for n in names if n not in refused}
                )
                continue
            shared = any(uses[name] > 1 for name in names)
            try:
                entries.append(_entry(op, own, source, axes, shared=shared))
            except UnsupportedError as error:
                refused.update(dict.fromkeys(names, f"{op.name}: {error}"))
        _check_shared(entries, uses, refused)
        if len(refused) == before:
            return entries, refused


def _check_shared(entries: list[Entry], uses: Mapping[str, int], refused: dict[str, str]) -> None:
    # all uses of one parameter must draw the same change: those of a kind do, and tables with dense weights
    kinds: dict[str, set[str]] = {}
    for entry in entries:
        for name in entry.names:
            kind = "Dense" if isinstance(entry, Looked) else type(entry).__name__
            if isinstance(entry, Dense) and name == entry._bias:
                kind = "bias"
            if isinstance(entry, Convolved) and name == entry._bias:
                kind = "bias"
            kinds.setdefault(name, set()).add(kind)
    for name, found in kinds.items():
        if uses[name] > 1 and len(found) > 1:
            refused[name] = "used in several ways"
        if uses[name] > 1 and "Scaled" in found:
            refused[name] = "a norm's parameter with several uses"


def _spreads(op: Op, axes: Mapping[int, SampleAxis]) -> bool:
    """Whether the operation repeats its input for every sample."""
    axis = axes.get(op.output.index)
    if axis is None or op.name not in ("expand", "repeat"):
        return False
    shape = op.args[0].tensor.shape
    place = axis.axis - (op.output.tensor.ndim - len(shape))
    return place < 0 or shape[place] == 1


def _fixed_rows(op: Op, own: list[Value], axes: Mapping[int, SampleAxis]) -> bool:
    """Whether it is a lookup of rows that are the same for all samples: position embeddings."""
    if op.name != "embedding" or len(op.args) > 2 or own != [op.args[0]]:
        return False
    return op.output.index not in axes


def _swaps(view: Op) -> bool:
    return [axis % 2 for axis in view.args[1]] == [1, 0] and len(view.args[1]) == 2


def _entry(
    op: Op,
    own: list[Value],
    source: Mapping[int, tuple[str, Value, list[Op]]],
    axes: Mapping[int, SampleAxis],
    *,
    shared: bool,
) -> Entry:
    axis = axes.get(op.output.index)
    if axis is None:
        raise UnsupportedError("its samples lie on no single axis")

    def named(place: int) -> str | None:
        value = op.args[place] if place < len(op.args) else None
        if not isinstance(value, Value) or value.index not in source:
            return None
        return source[value.index][0]

    def plain(place: int) -> bool:
        return named(place) is None or not source[op.args[place].index][2]

    if op.name in ("addmm", "mm"):
        first = 1 if op.name == "addmm" else 0
        scaled = op.kwargs.get("alpha", 1) != 1 or op.kwargs.get("beta", 1) != 1
        bias = named(0) if first else None
        if named(first) is not None or scaled or (first and bias and not plain(0)):
            raise UnsupportedError("a product of this form")
        if bias and op.args[0].tensor.ndim != 1:
            raise UnsupportedError("a shift of this form")
        weight = named(first + 1)
        views = [] if weight is None else source[op.args[first + 1].index][2]
        # of a matrix, all of these swap its axes
        turned = [v for v in views if v.name in ("t", "transpose") or (v.name == "permute" and _swaps(v))]
        if len(turned) != len(views) or (weight and source[op.args[first + 1].index][1].tensor.ndim != 2):
            raise UnsupportedError("a weight that is reshaped")
        return Dense(op, axis, weight, bias, transposed=len(turned) % 2 == 1, shared=shared)
    if op.name == "convolution" and named(0) is None and plain(1) and plain(2):
        return Convolved(op, axis, named(1), named(2), shared=shared)
    if op.name == "native_layer_norm" and named(0) is None and plain(2) and plain(3):
        return Scaled(op, axis, named(2), named(3), shared=shared)
    if op.name in ("native_group_norm", "native_batch_norm") and named(0) is None and plain(1) and plain(2):
        return Scaled(op, axis, named(1), named(2), shared=shared)
    if op.name == "embedding" and plain(0):
        return Looked(op, axis, str(named(0)), shared=shared)
    if op.name in ("add", "mul", "expand", "repeat") and len(own) == 1:
        name, origin, views = source[own[0].index]
        return Direct(op, axis, name, own[0], views, origin, shared=shared)
    raise UnsupportedError("a parameter used in this way")
