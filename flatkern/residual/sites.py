"""The residual by one tangent forward pass a probe: Σ over operations of ⟨ḡ, D²op[ẋ, ẋ]⟩."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from flatkern.residual.change import Draws, Entry
from flatkern.residual.chunk import Chunk
from flatkern.residual.elementwise import Elementwise
from flatkern.residual.rule import Rule
from flatkern.residual.rules import rule_for
from flatkern.residual.spreads import Spreads
from flatkern.sample_axis import SampleAxis
from flatkern.tape import Op, UnsupportedError, Value

__all__ = ["Sites"]

WORTH = 0.1
"""A change of the layer before is left out of a tangent where its part is at least this much of the layer's own."""


class Sites:
    """Σ_ops ⟨ḡ_op, D²op[ẋ, ẋ]⟩, one tangent forward pass a probe."""

    per_layer = False

    def __init__(self, chunk: Chunk, residual: Tensor, *, local: bool = True) -> None:
        """``residual`` is r, the gradient of the loss's numerator in the output; ``local``: closed forms where known.

        What the probes do not need of the chunk's values and graph is let go.

        Raises:
            UnsupportedError: an operation has no rule.
        """
        self._n = len(chunk.output)
        self._like = chunk.output.new_empty(0)
        entry_of = {id(e.op): e for e in chunk.entries}
        ops, reached = chunk.active_ops
        self._steps: list[_Step] = []
        frozen = frozenset(reached)
        for op in ops:
            entry = entry_of.get(id(op))
            active = frozenset(v.index for v in op.inputs if v.index in frozen)
            rule = rule_for(op, active) if active else None
            if active and rule is None:
                raise UnsupportedError(f"no rule for {op.name}")
            if entry is not None and active and isinstance(rule, Elementwise):
                raise UnsupportedError(f"{op.name} of a parameter")
            self._steps.append(_Step(op, rule, entry))
        parts = [part for s in self._steps for part in (s.rule, s.entry) if part is not None]
        kept = {v.index for part in parts for v in part.keeps()}
        if all(s.op.output.index in chunk.axes for s in self._steps if s.curved):
            # nothing more can be refused
            read = {v.index for s in self._steps if s.rule is not None for v in s.rule.reads()}
            self._let_go(chunk, chunk.tape.values, kept | read)
        self._cotangents(chunk, residual)
        for value in chunk.tape.values:
            value.edge = None  # the graph below the first site still has what it saved
        self._constant = torch.zeros(self._n, dtype=torch.float64, device=self._like.device)
        self._close(local, chunk, kept)
        self._plan()

    @staticmethod
    def _let_go(chunk: Chunk, values: Iterable[Value], kept: set[int]) -> None:
        chunk.output = torch.empty_like(chunk.output, device="meta")
        for value in values:
            if value.parameter is None and value.index not in kept:
                value.let_go()

    def _cotangents(self, chunk: Chunk, residual: Tensor) -> None:
        curved = [s for s in self._steps if s.curved and s.op.output.edge is not None]
        edges = [s.op.output.edge for s in curved if s.op.output.edge is not None]
        root = chunk.tape.final.edge
        if edges and root is not None:
            found = torch.autograd.grad(root, edges, residual, allow_unused=True)
            g: Tensor | None
            for step, g in zip(curved, found, strict=True):
                step.axis = chunk.axes.get(step.op.output.index)
                if g is not None and step.axis is None:
                    if bool((g != 0).any()):
                        raise UnsupportedError(f"the samples of {step.op.name} lie on no single axis")
                    g = None
                step.cotangent, step.site = g, g is not None

    def _close(self, local: bool, chunk: Chunk, kept: set[int]) -> None:
        """Forwards: which changes reach what, and at each site those whose part has a closed form."""
        spreads = Spreads()
        self._reach = spreads.reach
        read_last = self._read_last(chunk)
        for place, step in enumerate(self._steps):
            rule = step.rule
            if rule is not None and step.site and rule.curved:
                assert step.cotangent is not None
                rule.fold(step.cotangent)
                if step.entry is None or not step.entry.shared:
                    step.cotangent = None  # the rule has it
                if local:
                    self._close_at(step, rule, spreads)
            if rule is not None:
                rule.prepare()
            step.bit = 0 if step.entry is None else 1 << place
            spreads.advance(step.op, rule, step.entry, step.bit)
            for value in read_last[place]:
                spreads.forget(value.index)
            self._let_go(chunk, read_last[place], kept)

    def _read_last(self, chunk: Chunk) -> list[list[Value]]:
        """For every step the values that no later one has to do with."""
        last: dict[int, int] = {}
        for place, step in enumerate(self._steps):
            last.update((v.index, place) for v in (*step.op.inputs, *step.op.outputs) if v is not None)
        found: list[list[Value]] = [[] for _ in self._steps]
        for value in chunk.tape.values if self._steps else ():
            found[last.get(value.index, 0)].append(value)
        return found

    def _close_at(self, step: _Step, rule: Rule, spreads: Spreads) -> None:
        source = step.op.inputs[0].index
        own: dict[int, Tensor] = {}
        mixed: dict[int, Tensor] = {}
        for change, spread in spreads.at(source).items():
            expected = rule.expected(spread)
            if expected is not None:
                (mixed if spread.mixed else own)[change] = expected
        everything = sum(own) + sum(mixed) == self._reach.get(source, 0)
        if own and mixed and not everything:
            # leaving the mixed ones out takes a product of its own a probe
            sizes = [sum(float(e.abs().sum()) for e in part.values()) for part in (own, mixed)]
            if sizes[1] < WORTH * sizes[0]:
                mixed = {}
        assert step.axis is not None
        for change, expected in {**own, **mixed}.items():
            step.closed |= change
            self._constant += step.axis.total(expected)

    def _plan(self) -> None:
        """Backwards: which tangents are wanted, each with the changes that are left out of it."""
        self._wanted: dict[int, set[int]] = {}
        kept = []
        for step in reversed(self._steps):
            if step.site and step.rule is not None and step.rule.curved:
                self._want(step, step.closed)
            if step.site and step.entry is not None and step.entry.shared:
                self._want(step, 0)
            for left_out in sorted(self._wanted_of(step)):
                self._want(step, left_out | step.bit)
            if step.site or self._wanted_of(step):
                kept.append(step)
        self._steps = kept[::-1]
        last: dict[Key, _Step] = {}
        for step in self._steps:
            for value in step.op.inputs:
                for left_out in self._wanted.get(value.index, ()):
                    last[value.index, left_out] = step
        for key, step in last.items():
            step.done.append(key)

    def _wanted_of(self, step: _Step) -> set[int]:
        return set().union(*(self._wanted.get(o.index, ()) for o in step.op.outputs if o is not None))

    def _want(self, step: _Step, left_out: int) -> None:
        for value in step.op.inputs:
            reach = self._reach.get(value.index, 0)
            if reach & ~left_out:
                self._wanted.setdefault(value.index, set()).add(left_out & reach)

    @property
    def exact(self) -> bool:
        """Whether nothing is left to draw: every change's part has a closed form."""
        drawn = any(s.bit & ~left_out for s in self._steps for left_out in self._wanted_of(s))
        return not drawn and not any(s.site and s.entry is not None and s.entry.shared for s in self._steps)

    def draw(self, generator: torch.Generator) -> Tensor:
        """One unbiased value a sample of Σ over the sampled parameters, float64 [n]."""
        draws = Draws(generator, self._like)
        tangents: dict[Key, Tensor] = {}
        total = self._constant.clone()
        for step in self._steps:
            if step.site:
                part = step.second(draws, partial(self._inputs, step, tangents))
                if part is not None:
                    total += part
            self._push(step, draws, tangents)
            for key in step.done:
                tangents.pop(key, None)
        return total

    def _inputs(self, step: _Step, tangents: Mapping[Key, Tensor], left_out: int) -> dict[int, Tensor]:
        """The tangents of an operation's inputs with some changes left out; those that are 0 are absent."""
        found = {}
        for value in step.op.inputs:
            key = value.index, left_out & self._reach.get(value.index, 0)
            if key in tangents:
                found[value.index] = tangents[key]
        return found

    def _push(self, step: _Step, draws: Draws, tangents: dict[Key, Tensor]) -> None:
        outputs = [o for o in step.op.outputs if o is not None]
        images: dict[int, tuple[Tensor, ...]] = {}
        for left_out in sorted(self._wanted_of(step)):
            base = left_out | step.bit
            if base not in images:
                inputs = self._inputs(step, tangents, base)
                images[base] = step.rule.push_all(inputs) if inputs and step.rule is not None else ()
            found = images[base]
            if step.bit & ~left_out:
                assert step.entry is not None
                moved = step.entry.change(draws, lambda v: v.tensor, found[0] if found else None)
                found = (moved, *found[1:])
            for value, tangent in zip(outputs, found, strict=False):
                if left_out in self._wanted.get(value.index, ()):
                    tangents[value.index, left_out] = tangent


Key = tuple[int, int]
"""A tangent: the index of its value, and the changes left out of it, as bits."""


@dataclass
class _Step:
    op: Op
    rule: Rule | None
    entry: Entry | None
    cotangent: Tensor | None = None
    axis: SampleAxis | None = None
    site: bool = False
    """Whether it adds to the residual."""
    bit: int = 0
    """Of the change that comes in here."""
    closed: int = 0
    """Changes whose part of the second derivative here is in the constant."""
    done: list[Key] = field(default_factory=list)
    """Tangents that nothing after this step needs."""

    @property
    def curved(self) -> bool:
        return (self.rule is not None and self.rule.curved) or (self.entry is not None and self.entry.shared)

    def second(self, draws: Draws, inputs: Callable[[int], dict[int, Tensor]]) -> Tensor | None:
        """⟨ḡ, D²⟩ by sample, float64 [n]; ``inputs`` gives tangents with some changes left out."""
        assert self.axis is not None
        part: Tensor | None = None
        rule = self.rule
        if rule is not None and rule.curved:
            own = inputs(self.closed)
            bent = rule.contracted(own, lambda: rule.push(own)) if own else None
            if bent is not None:
                part = self.axis.total(bent)
        if self.entry is not None and self.entry.shared:
            turned = self.entry.turn(draws, inputs(0))
            if turned is not None:
                assert self.cotangent is not None
                cross = 2 * self.axis.dot(self.cotangent, turned)
                part = cross if part is None else part + cross
        return part
