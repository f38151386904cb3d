"""The interface of a rule, and the registry of rules by autograd operation.

A rule belongs to an operation of the autograd graph (``"Addmm"``, ``"Convolution"``, ``"NativeLayerNorm"``), not to a
module class: whatever Python code ran, a parameter enters a computation through such an operation, which keeps what
its own backward pass needs. Modules, functional calls, attention's projections and recurrent layers all come down to
the same few.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch.autograd.graph import Node

from flatkern.layers.shared_weight import row_energy
from flatkern.layers.term import Term
from flatkern.scattered import Scattered

__all__ = ["Cotangent", "Layout", "Opened", "Site", "operation", "register", "rule_for"]


@dataclass(frozen=True)
class Layout:
    """Where the samples of a batch lie in a tensor: on one axis, possibly flattened with positions around them.

    The axis has ``outer · n · inner`` entries in this order: ``outer`` is 1 for [n, T] flattened, T for [T, n].
    """

    axis: int
    outer: int = 1

    def samples_first(self, tensor: Tensor, n: int) -> Tensor:
        """[K, *shape] → [K, n, *shape of one sample], the axis keeping the positions of one sample."""
        axis = self.axis + 1
        shape = tensor.shape
        inner = shape[axis] // (self.outer * n)
        split = tensor.reshape(*shape[:axis], self.outer, n, inner, *shape[axis + 1 :])
        return split.movedim(axis + 1, 1).reshape(
            shape[0], n, *shape[1:axis], self.outer * inner, *shape[axis + 1 :]
        )


@dataclass(frozen=True)
class Site:
    """One place where a parameter, or a tensor computed from parameters alone, enters the samples' computation."""

    node: Node
    """The operation; its output 0 is where the cotangent is taken."""
    operand: int
    """Which of the operation's inputs it is."""
    shape: torch.Size
    """Of that input."""
    layout: Layout | None
    """Of the operation's output; ``None``: there is one sample only, and everything is its own."""
    n: int

    def samples_first(self, tensor: Tensor) -> Tensor:
        """[K, *output shape] → [K, n, *output shape of one sample]."""
        return tensor.unsqueeze(1) if self.layout is None else self.layout.samples_first(tensor, self.n)

    @property
    def axis(self) -> int | None:
        """The samples' axis, ``None`` for a single sample."""
        return None if self.layout is None else self.layout.axis


class Cotangent:
    """The gradients of K scalars a sample with respect to one operation's output, [K, *output shape]."""

    def __init__(self, value: Tensor | Scattered, site: Site) -> None:
        self.scattered = value if isinstance(value, Scattered) else None
        """The same, where only some places of a convolution's output have one."""
        self._value = value
        self._site = site

    @cached_property
    def value(self) -> Tensor:
        """[K, *output shape]."""
        return self._value.dense.transpose(0, 1) if isinstance(self._value, Scattered) else self._value

    @cached_property
    def samples_first(self) -> Tensor:
        """[K, n, *output shape of one sample]."""
        return self._site.samples_first(self.value)

    @cached_property
    def energy(self) -> Tensor:
        """‖·‖² of each cotangent and sample, float64 [K, n]; computed once for weight and bias."""
        return row_energy(self.samples_first.flatten(2))


Opened = Callable[[Cotangent], Term]
"""A rule applied to one site: the parameter's per-sample gradient for given cotangents."""
Rule = Callable[[Site], Opened | None]

_RULES: dict[str, Rule] = {}


def operation(node: Node) -> str:
    """``"AddmmBackward0"`` → ``"Addmm"``."""
    return node.name().rstrip("0123456789").removesuffix("Backward")


def register(*operations: str) -> Callable[[Rule], Rule]:
    """Decorator: use a function (site) → (cotangent → term) for these operations of the autograd graph.

    The function reads what the operation has saved (``site.node._saved_...``), and returns ``None`` where it has no
    rule for this operand or setting: the parameter then takes the exact fall-back. See docs/layers.md.
    """

    def add(rule: Rule) -> Rule:
        for name in operations:
            _RULES[name] = rule
        return rule

    return add


def rule_for(node: Node) -> Rule | None:
    """The rule of an operation, if there is one."""
    return _RULES.get(operation(node))
