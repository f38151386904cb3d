"""A part of a tape as a linear map: what its results change by along K tangents of its inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flatkern.operators.gradient_tape import GradientTape
from flatkern.operators.tangent_rules import Move, Rule, rule_for
from flatkern.tape import Value

__all__ = ["TangentProgram"]


@dataclass
class Step:
    """A rule, which of its inputs nothing needs afterwards, and which tangents to let go then."""

    rule: Rule
    owned: list[bool]
    last: list[int]
    target: tuple[int, list[Move]] | None = None
    """Which result it may write in its place, and the moves that come between."""


class TangentProgram:
    """Tangents of ``targets`` [K, *shape] along tangents of ``sources`` [K, *shape], all primals being kept.

    Only operations between the two are in it, each with its rule.
    """

    def __init__(self, tape: GradientTape, sources: Sequence[Value], targets: Sequence[Value | None]) -> None:
        active = tape.active(sources)
        self._sources = [v.index for v in sources]
        self._targets = [None if v is None or v.index not in active else v.index for v in targets]
        needed = {t for t in self._targets if t is not None}
        rules: list[Rule] = []
        for op in reversed(tape.tape.ops):
            if not any(v is not None and v.index in needed and v.index in active for v in op.outputs):
                continue
            rule = rule_for(op, active)
            needed.update(rule.inputs)
            rules.append(rule)
        self._rules = rules[::-1]
        self._introduce()
        self._arrange_images()
        self._plans: dict[tuple[tuple[bool, ...], tuple[int, ...]], list[Step]] = {}

    def _introduce(self) -> None:
        """Tells each rule who takes its output, where that is for the rules alone to settle."""
        consumers: dict[int, list[Rule]] = {}
        for rule in self._rules:
            for i in dict.fromkeys(rule.inputs):
                consumers.setdefault(i, []).append(rule)
        for rule in self._rules:
            if len(rule.outputs) == 1 and rule.outputs[0] not in self._targets:
                rule.meet(consumers.get(rule.outputs[0], []))

    def _arrange_images(self) -> None:
        """Constants that meet images from convolutions get the order of memory that those have."""
        done: dict[int, tuple[Tensor, Tensor]] = {}  # by the address of the original, which is held as well

        def convert(t: Tensor) -> Tensor:
            if t.ndim != 4:
                return t
            key = t.data_ptr()
            if key not in done or done[key][0].shape != t.shape or done[key][0].stride() != t.stride():
                done[key] = t, t.contiguous(memory_format=torch.channels_last)
            return done[key][1]

        images: set[int] = set()
        for rule in self._rules:
            if rule.image_source or (rule.image_path and any(i in images for i in rule.inputs)):
                rule.channels_last(convert)
                images.update(rule.outputs)

    def constants(self) -> list[Tensor]:
        """All tensors that are kept."""
        return [t for rule in self._rules for t in rule.constants()]

    def apply(
        self,
        tangents: Sequence[Tensor | None],
        wanted: Sequence[int],
        places: Sequence[Tensor] | None = None,
    ) -> list[Tensor | None]:
        """Tangents of the wanted targets; ``None`` stands for zeros.

        ``places``: tensors [K, *shape] in which results may be left; such a result is the tensor itself.
        """
        present = tuple(t is not None for t in tangents)
        key = present, tuple(wanted)
        if key not in self._plans:
            self._plans[key] = self._plan(present, wanted)
        slots: dict[int, Tensor | None] = dict(zip(self._sources, tangents, strict=True))
        placed: dict[int, Tensor] = {}
        for step in self._plans[key]:
            rule = step.rule
            inputs = [slots.get(i) for i in rule.inputs]
            if places is not None and step.target is not None:
                which, moves = step.target
                place: Tensor | None = places[which]
                for move in moves:
                    place = None if place is None else move.back(place)
                if place is not None:
                    result = rule.run_into(inputs, place)
                    if result is place:
                        placed[which] = places[which]
                    results: Sequence[Tensor | None] = [result]
                else:
                    results = rule.run(inputs, step.owned)
            else:
                results = rule.run(inputs, step.owned)
            for i in step.last:
                slots[i] = None
            slots.update(zip(rule.outputs, results, strict=True))
        chosen = [self._targets[i] for i in wanted]
        found = [None if t is None else slots.get(t) for t in chosen]
        return [placed.get(j, t) if t is not None else None for j, t in enumerate(found)]

    def _plan(self, present: tuple[bool, ...], wanted: Sequence[int]) -> list[Step]:
        """The steps that these tangents reach and the wanted results need, and how long each tangent lives."""
        reached = {i for i, there in zip(self._sources, present, strict=True) if there}
        forward = []
        for rule in self._rules:
            if any(i in reached for i in rule.inputs):
                reached.update(rule.outputs)
                forward.append(rule)
        targets = {t for i in wanted if (t := self._targets[i]) is not None}
        needed, rules = set(targets), []
        for rule in reversed(forward):
            if any(i in needed for i in rule.outputs):
                needed.update(rule.inputs)
                rules.append(rule)
        rules.reverse()
        group = _sharing(self._sources, rules, reached)
        # never overwritten: the caller's own, and results
        overlapping = [i for rule in rules if rule.overlaps for i in rule.outputs]
        held = {group[i] for i in (*self._sources, *targets, *overlapping) if i in group}
        last_of_group = {group[i]: s for s, rule in enumerate(rules) for i in rule.inputs if i in group}
        last_use = {i: s for s, rule in enumerate(rules) for i in rule.inputs}
        steps = []
        for s, rule in enumerate(rules):
            groups = [group.get(i) for i in rule.inputs]
            owned = [
                g is not None and g not in held and last_of_group[g] == s and groups.count(g) == 1
                for g in groups
            ]
            gone = [i for i in rule.inputs if last_use[i] == s and i not in targets]
            steps.append(Step(rule, owned, gone))
        self._find_places(steps, [self._targets[i] for i in wanted])
        return steps

    def _find_places(self, steps: list[Step], targets: Sequence[int | None]) -> None:
        """Which steps may write a result where it is wanted: those that only moves lead on from."""
        makers = {i: step for step in steps for i in step.rule.outputs}
        uses = Counter(i for step in steps for i in step.rule.inputs)
        for which, target in enumerate(targets):
            moves: list[Move] = []
            if target is None or targets.count(target) > 1 or uses[target]:
                continue
            while (step := makers.get(target)) is not None and isinstance(step.rule, Move):
                moves.append(step.rule)
                target = step.rule.inputs[0]
                if uses[target] != 1:
                    step = None
                    break
            if step is not None and step.rule.takes_place:
                step.target = which, moves


def _sharing(sources: Sequence[int], rules: Sequence[Rule], reached: set[int]) -> dict[int, int]:
    """For each tangent a number that is the same for those which may share memory."""
    group = {i: i for i in sources}
    for rule in rules:
        present = [i in reached for i in rule.inputs]
        for i in rule.outputs:
            group[i] = i
        if not rule.aliases(present):
            continue
        together = {group[i] for i in (*rule.inputs, *rule.outputs) if i in reached}
        name = min(together)
        group = {i: name if g in together else g for i, g in group.items()}
    return group
