"""The residual by one tangent forward pass a probe: Σ over operations of ⟨ḡ, D²op[ẋ, ẋ]⟩."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flatkern.residual.change import Draws, Entry
from flatkern.residual.chunk import Chunk
from flatkern.residual.curved_rules import Elementwise
from flatkern.residual.linear_rules import FixedStatistics, Linear
from flatkern.residual.rule import Rule
from flatkern.residual.rules import rule_for
from flatkern.sample_axis import SampleAxis
from flatkern.tape import Op, UnsupportedError

__all__ = ["Sites"]


class Sites:
    """Σ_ops ⟨ḡ_op, D²op[ẋ, ẋ]⟩, one tangent forward pass a probe."""

    per_layer = False

    def __init__(self, chunk: Chunk, residual: Tensor, *, local: bool = True) -> None:
        """``residual`` is r, the gradient of the loss's numerator in the output; ``local``: the exact local term.

        Raises:
            UnsupportedError: an operation has no rule.
        """
        self._n = len(chunk.output)
        self._like = chunk.output.detach()
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
        self._cotangents(chunk, residual)
        self._prune(frozen, local)

    def _cotangents(self, chunk: Chunk, residual: Tensor) -> None:
        curved = [s for s in self._steps if s.curved and s.op.output.edge is not None]
        edges = [s.op.output.edge for s in curved if s.op.output.edge is not None]
        if edges and chunk.output.grad_fn is not None:
            found = torch.autograd.grad(chunk.output, edges, residual, allow_unused=True)
            for step, g in zip(curved, found, strict=True):
                step.cotangent = g
                step.axis = chunk.axes.get(step.op.output.index)
                if g is not None and step.axis is None:
                    if bool((g != 0).any()):
                        raise UnsupportedError(f"the samples of {step.op.name} lie on no single axis")
                    step.cotangent = None

    def _prune(self, reached: frozenset[int], local: bool) -> None:
        """Backwards: which tangents matter, and whether those before or after an entry's own change.

        For an elementwise operation right after an entry, E (ż + δz)² = ż² + κ: δz itself is not wanted.
        """
        origin: dict[int, _Step] = {}
        if local:
            for step in self._steps:
                if step.entry is not None and not step.entry.shared:
                    origin[step.op.output.index] = step
        for step in self._steps:
            source = step.op.args[0] if step.op.args else None
            if (
                step.entry is None
                and isinstance(step.rule, (Linear, FixedStatistics))
                and step.op.name in _SAME
            ):
                start = origin.get(getattr(source, "index", -1))
                if start is not None:
                    origin[step.op.output.index] = start
        self._whole: set[int] = set()
        self._before: set[int] = set()
        self._constant = torch.zeros(self._n, dtype=torch.float64, device=self._like.device)
        kept = []
        for step in reversed(self._steps):
            outputs = {o.index for o in step.op.outputs if o is not None}
            inputs = [v.index for v in step.op.inputs if v.index in reached]
            site = step.curved and step.cotangent is not None
            wanted = bool(outputs & self._whole) or bool(outputs & self._before)
            if site and isinstance(step.rule, Elementwise) and inputs[0] in origin:
                step.local = True
                self._before.add(inputs[0])
            elif site:
                self._whole.update(inputs)
            if outputs & self._whole or (step.entry is not None and wanted):
                self._whole.update(inputs)
            if step.entry is None and outputs & self._before:
                self._before.update(i for i in inputs if i in origin)
            if site or wanted:
                kept.append(step)
        self._steps = kept[::-1]
        self._fold_local(origin)

    def _fold_local(self, origin: Mapping[int, _Step]) -> None:
        variances: dict[int, Tensor] = {}
        for step in self._steps:
            if step.entry is not None and step.op.output.index in self._before:
                variances[step.op.output.index] = step.entry.variance().expand(step.entry.output.shape)
            elif step.op.output.index in self._before and step.rule is not None:
                source = step.op.args[0].index
                before = variances.get(source)
                if before is not None and isinstance(step.rule, FixedStatistics):
                    variances[step.op.output.index] = before * step.rule.factor.square()
                elif before is not None:
                    variances[step.op.output.index] = step.rule.push({source: before})
            if step.curved and step.cotangent is not None and isinstance(step.rule, Elementwise):
                assert step.rule.bend is not None
                step.rule.bend = step.rule.bend * step.cotangent
                if step.local:
                    assert step.axis is not None
                    self._constant += step.axis.total(step.rule.bend * variances[step.op.args[0].index])

    @property
    def exact(self) -> bool:
        """Whether nothing is left to draw: every change meets a nonlinearity at its own place only."""
        drawn = any(s.entry is not None and s.op.output.index in self._whole for s in self._steps)
        return not drawn and not any(s.entry is not None and s.entry.shared for s in self._steps)

    def draw(self, generator: torch.Generator) -> Tensor:
        """One unbiased value a sample of Σ over the sampled parameters, float64 [n]."""
        draws = Draws(generator, self._like)
        whole: dict[int, Tensor] = {}
        before: dict[int, Tensor] = {}
        total = self._constant.clone()
        for step in self._steps:
            total_part = step.advance(draws, whole, before, self._whole, self._before)
            if total_part is not None:
                total += total_part
        return total


# operations that leave values where they are, up to an order of axes or a factor a channel
_SAME = frozenset(
    {"view", "_unsafe_view", "reshape", "_reshape_alias", "transpose", "permute", "unsqueeze", "squeeze", "t"}
    | {"clone", "detach", "alias", "native_batch_norm"}
)


@dataclass
class _Step:
    op: Op
    rule: Rule | None
    entry: Entry | None
    cotangent: Tensor | None = None
    axis: SampleAxis | None = None
    local: bool = False

    @property
    def curved(self) -> bool:
        return (self.rule is not None and self.rule.curved) or (self.entry is not None and self.entry.shared)

    def advance(
        self,
        draws: Draws,
        whole: dict[int, Tensor],
        before: dict[int, Tensor],
        want_whole: set[int],
        want_before: set[int],
    ) -> Tensor | None:
        """Push tangents through the operation; its own part of the residual, [n]."""
        index = self.op.output.index
        source = self.op.args[0].index if self.op.args and hasattr(self.op.args[0], "index") else -1
        images: list[Tensor] = []

        def image() -> Tensor:
            if not images:
                assert self.rule is not None
                images.extend(self.rule.push_all(whole))
            return images[0]

        part: Tensor | None = None
        if self.cotangent is not None and self.axis is not None:
            if isinstance(self.rule, Elementwise):
                t = before.get(source) if self.local else whole[source]
                assert self.rule.bend is not None  # times the cotangent
                part = None if t is None else self.axis.total(self.rule.bend * t * t)
            else:
                if self.rule is not None and self.rule.curved:
                    part = self.axis.total(self.cotangent * self.rule.second(whole, image))
                if self.entry is not None and self.entry.shared:
                    turned = self.entry.turn(draws, whole)
                    if turned is not None:
                        cross = 2 * self.axis.total(self.cotangent * turned)
                        part = cross if part is None else part + cross
        if self.entry is not None:
            if index in want_whole or index in want_before:
                base = image() if self.rule is not None else None
                if base is not None and index in want_before:
                    before[index] = base
                if index in want_whole:
                    change = self.entry.change(draws, lambda v: v.tensor)
                    whole[index] = change if base is None else base + change
            return part
        if index in want_before and source in before:
            assert self.rule is not None
            before[index] = self.rule.push({source: before[source]})
        outputs = [o for o in self.op.outputs if o is not None]
        if any(o.index in want_whole for o in outputs):
            image()
            for o, t in zip(outputs, images, strict=False):
                if o.index in want_whole:
                    whole[o.index] = t
        return part
