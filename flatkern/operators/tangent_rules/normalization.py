"""Layer norm, group norm, and batch norm with fixed statistics.

x̂ = r (x − μ) over groups of entries, r = 1/σ, P u = u − mean u − x̂ mean(x̂ u):

    ẋ̂ = r P ẋ
    g_x = r P h, h = γ g       ġ_x = r P(ḣ − a r ẋ) − r q g_x − r e x̂

with a = mean(h x̂), q = mean(x̂ ẋ), e = mean(g_x ẋ), since σ̇ = q and P is symmetric.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from flatkern.tape import Op, UnsupportedError

from .rule import Rule, Tangent, lift, register, value


class Groups:
    """How the entries of x fall into groups [rows, size] that are normalized together, and where γ goes."""

    def __init__(self, op: Op, x: Tensor, mean: Tensor, rstd: Tensor) -> None:
        self.shape, self.size = x.shape, x.numel() // max(mean.numel(), 1)
        self.x = x.reshape(-1, self.size)
        self.mean, self.rstd = mean.reshape(-1, 1), rstd.reshape(-1, 1)
        self.unit = ((self.x - self.mean) * self.rstd).view(self.shape)
        layer = "layer_norm" in op.name
        trailing = len(op.args[2 if "backward" in op.name else 1]) if layer else x.ndim - 1
        self.weight_shape = tuple(x.shape[-trailing:]) if layer else (x.shape[1], *[1] * (x.ndim - 2))
        self.summed = list(range(1, x.ndim - trailing + 1)) if layer else [1, *range(3, x.ndim + 1)]

    def weight(self, gamma: Tensor) -> Tensor:
        """γ, ready to multiply values."""
        return gamma.reshape(self.weight_shape)

    def weights(self, tangents: Tensor) -> Tensor:
        """Tangents of γ or β, ready to multiply or be added to [K, *shape]."""
        k = tangents.shape[0]
        return lift(tangents.reshape(k, *self.weight_shape), len(self.shape))

    def total(self, t: Tensor, kind: torch.Size) -> Tensor:
        """[K, *shape] summed over all places where an entry of γ goes, [K, *kind]."""
        return (t.sum(self.summed) if self.summed else t).reshape(t.shape[0], *kind)

    def project(self, u: Tensor) -> Tensor:
        """r P u of [K, *shape]."""
        rows = [
            torch.ops.aten.native_layer_norm_backward(
                one.reshape(-1, self.size),
                self.x,
                [self.size],
                self.mean,
                self.rstd,
                None,
                None,
                [True, False, False],
            )[0]
            for one in u
        ]
        return (torch.stack(rows) if len(rows) > 1 else rows[0]).view(u.shape)

    def mean_of(self, a: Tensor, u: Tensor) -> Tensor:
        """mean(a u) over each group, [K, *shape] → [K, rows, 1]."""
        return (a * u).reshape(u.shape[0], -1, self.size).mean(-1, keepdim=True)

    def add(self, total: Tensor, a: Tensor, by: Tensor) -> None:
        """total −= by · a, with a number ``by`` [K, rows, 1] a group."""
        total.view(total.shape[0], -1, self.size).addcmul_(by, a.view(-1, self.size), value=-1)

    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        return [self.x, self.mean, self.rstd, self.unit]


@register("native_layer_norm", "native_group_norm")
class Normalized(Rule):
    """γ x̂ + β."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        layer = op.name == "native_layer_norm"
        x, mean, rstd = value(op, 0), *(v.tensor for v in op.outputs[1:])  # type: ignore[union-attr]
        self.groups = Groups(op, x, mean, rstd)
        self.gamma_place = 2 if layer else 1
        gamma = value(op, self.gamma_place)
        self.gamma = None if gamma is None else self.groups.weight(gamma)
        self.outputs = self.outputs[:1]

    def constants(self) -> list[Tensor]:
        """See :class:`Rule`."""
        return super().constants() + self.groups.tensors()

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        dx, dgamma, dbeta = (self.at(tangents, p) for p in (0, self.gamma_place, self.gamma_place + 1))
        groups = self.groups
        total: Tangent = None
        if dx is not None:
            total = groups.project(dx)
            if self.gamma is not None:
                total.mul_(self.gamma)
        if dgamma is not None:
            by = groups.weights(dgamma)
            total = groups.unit * by if total is None else total.addcmul_(groups.unit, by)
        if dbeta is not None:
            by = groups.weights(dbeta)
            total = by.expand(-1, *self.shape).contiguous() if total is None else total.add_(by)
        return [total]


@register("native_layer_norm_backward", "native_group_norm_backward")
class NormalizedBackward(Rule):
    """(g, x, γ) → the gradients in x, γ and β."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        layer = op.name == "native_layer_norm_backward"
        self.g, x = value(op, 0), value(op, 1)
        mean, rstd, gamma = (value(op, p) for p in ((3, 4, 5) if layer else (2, 3, 4)))
        self.gamma_place = 5 if layer else 4
        groups = self.groups = Groups(op, x, mean, rstd)
        self.gamma = None if gamma is None else groups.weight(gamma)
        h = self.g if self.gamma is None else self.g * self.gamma
        self.gx = groups.project(h.unsqueeze(0))[0]
        # a r, a number a group
        self.shift = (h * groups.unit).reshape(-1, groups.size).mean(-1, keepdim=True) * groups.rstd
        self.found = [v is not None and v.index in active for v in op.outputs]
        self.kind = torch.Size(()) if gamma is None else gamma.shape

    def constants(self) -> list[Tensor]:
        """See :class:`Rule`."""
        return super().constants() + self.groups.tensors()

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        dg, dx, dgamma = (self.at(tangents, p) for p in (0, 1, self.gamma_place))
        results = [self._input, self._gamma, self._beta]
        return [f(dg, dx, dgamma) for f, here in zip(results, self.found, strict=True) if here]

    def _input(self, dg: Tangent, dx: Tangent, dgamma: Tangent) -> Tangent:
        groups = self.groups
        u: Tangent = None
        if dg is not None:
            u = dg * self.gamma if self.gamma is not None else dg.clone() if dx is not None else dg
        if dgamma is not None:
            by = groups.weights(dgamma)
            u = self.g * by if u is None else u.addcmul_(self.g, by)
        if dx is None:
            return None if u is None else groups.project(u)
        if u is None:
            u = torch.zeros_like(dx)
        u = u.contiguous()  # the groups are views of it
        flat = dx.reshape(dx.shape[0], -1, groups.size)
        u.view(flat.shape).addcmul_(self.shift, flat, value=-1)
        total = groups.project(u)
        groups.add(total, self.gx, groups.mean_of(groups.unit, dx) * groups.rstd)
        groups.add(total, groups.unit, groups.mean_of(self.gx, dx) * groups.rstd)
        return total

    def _gamma(self, dg: Tangent, dx: Tangent, dgamma: Tangent) -> Tangent:
        groups = self.groups
        total: Tangent = None if dg is None else dg * groups.unit
        if dx is not None:
            change = groups.project(dx)
            total = change.mul_(self.g) if total is None else total.addcmul_(change, self.g)
        return None if total is None else groups.total(total, self.kind)

    def _beta(self, dg: Tangent, dx: Tangent, dgamma: Tangent) -> Tangent:
        return None if dg is None else self.groups.total(dg, self.kind)


@register("native_batch_norm", "_native_batch_norm_legit_no_training", "cudnn_batch_norm")
class FixedStatistics(Rule):
    """γ (x − m)/√(v + ε) + β with given m and v."""

    image_path = True

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        if op.name != "_native_batch_norm_legit_no_training" and op.args[5]:
            raise UnsupportedError("no tangent rule for batch norm with batch statistics")
        eps = op.args[6 if op.name == "_native_batch_norm_legit_no_training" else 7]
        x, gamma, mean, variance = (value(op, p) for p in (0, 1, 3, 4))
        self.axes = (-1, *[1] * (x.ndim - 2))
        inverse = (variance + eps).rsqrt().reshape(self.axes)
        self.unit = (x - mean.reshape(self.axes)) * inverse if self.has(1) else None
        self.factor = inverse if gamma is None else inverse * gamma.reshape(self.axes)
        self.outputs = self.outputs[:1]

    def channels_last(self, convert: Callable[[Tensor], Tensor]) -> None:
        """See :class:`Rule`."""
        self.unit = None if self.unit is None else convert(self.unit)

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        dx, dgamma, dbeta = (self.at(tangents, p) for p in range(3))
        total: Tangent = None if dx is None else dx * self.factor
        if dgamma is not None:
            assert self.unit is not None
            by = dgamma.reshape(len(dgamma), 1, *self.axes)
            total = by * self.unit if total is None else total.addcmul_(by, self.unit)
        if dbeta is not None:
            by = dbeta.reshape(len(dbeta), 1, *self.axes)
            total = by.expand(-1, *self.shape).contiguous() if total is None else total.add_(by)
        return [total]


@register("native_batch_norm_backward")
class FixedStatisticsBackward(Rule):
    """Gradients in x, γ and β."""

    image_path = True

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        if op.args[7]:
            raise UnsupportedError("no tangent rule for batch norm with batch statistics")
        self.g, x, gamma, mean, variance = (value(op, p) for p in range(5))
        self.axes = (-1, *[1] * (x.ndim - 2))
        self.inverse = (variance + op.args[8]).rsqrt().reshape(self.axes)
        self.unit = (x - mean.reshape(self.axes)) * self.inverse
        self.factor = self.inverse if gamma is None else self.inverse * gamma.reshape(self.axes)
        self.summed = [1, *range(3, x.ndim + 1)]
        self.found = [v is not None and v.index in active for v in op.outputs]

    def channels_last(self, convert: Callable[[Tensor], Tensor]) -> None:
        """See :class:`Rule`."""
        self.g, self.unit = convert(self.g), convert(self.unit)

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        dg, dx, dgamma = (self.at(tangents, p) for p in range(3))
        results: list[Tangent] = [None] * 3
        if self.found[0]:
            total: Tangent = None if dg is None else dg * self.factor
            if dgamma is not None:
                part = self.g * self.inverse * dgamma.reshape(len(dgamma), 1, *self.axes)
                total = part if total is None else total.add_(part)
            results[0] = total
        if self.found[1]:
            total = None if dg is None else dg * self.unit
            if dx is not None:
                part = dx * (self.g * self.inverse)
                total = part if total is None else total.add_(part)
            results[1] = None if total is None else total.sum(self.summed)
        if self.found[2]:
            results[2] = None if dg is None else dg.sum(self.summed)
        return [r for r, here in zip(results, self.found, strict=True) if here]
