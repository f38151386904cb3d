"""A model's run and its backward pass as one list of operations: the program that computes a gradient.

What autograd saves for the backward pass comes back as other tensor objects on the same memory. They are recognised by
that memory, so that the backward pass is seen to depend on the forward one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from flatkern.operators.tangent_rules import ignored_places
from flatkern.tape import Op, Recorder, UnsupportedError, Value

__all__ = ["GradientTape", "noting"]

Place = tuple[Any, ...]
CONSTANT = frozenset(
    """
    ceil empty_like fill floor full_like heaviside new_empty new_empty_strided new_full new_ones new_zeros ones_like
    round sgn sign trunc zero zeros_like
    """.split()  # noqa: SIM905
)
"""Operations whose result does not depend on their operands' values, but in places of measure zero."""


class GradientTape(Recorder):
    """Notes a forward and a backward pass.

    In the forward pass a value depends on what autograd says it does (so ``detach`` and ``no_grad`` cut), in the
    backward pass, which runs without a graph of its own, on all that it is computed from.
    """

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        super().__init__({str(i): p for i, p in enumerate(parameters)})
        self._by_place: dict[Place, list[Value]] = {}
        self._by_storage: dict[int, list[Value]] = {}
        self._backward_from: int | None = None  # number of the first operation of the backward pass
        self._first_backward: int | None = None  # and of its first value
        self._unpacked: set[int] = set()  # values that the backward pass has detached
        self.parameters = [self.value_of(p) for p in parameters]

    def settle(self) -> None:
        """Ask autograd which of the latest values it follows."""
        self._settle_all()

    def backward(
        self, output: Tensor, inputs: Sequence[Tensor], seed: Tensor
    ) -> tuple[Value, list[Value | None]]:
        """Note the gradients of ``output`` in ``inputs`` for the cotangent ``seed``; gives its value and theirs."""
        self._settle_all()
        self._backward_from, self._first_backward = len(self.tape.ops), len(self.tape.values)
        cotangent = self.value_of(seed)
        with self:
            found = torch.autograd.grad(output, inputs, seed, allow_unused=True)
        return cotangent, [None if g is None else self.value_of(g) for g in found]

    def active(self, sources: Sequence[Value]) -> frozenset[int]:
        """Indices of the values that depend on the given ones."""
        found = {v.index for v in sources}
        for place, op in enumerate(self.tape.ops):
            forward = self._backward_from is None or place < self._backward_from
            if op.name in CONSTANT:
                continue
            if forward:
                self._check_followed(op)
            ignored = [op.args[i] for i in ignored_places(op) if i < len(op.args)]
            depends = any(v.index in found for v in op.inputs if v not in ignored)
            if not depends:
                continue
            for value in op.outputs:
                if value is None or not value.tensor.is_floating_point():
                    continue
                if value.differentiable or not forward:
                    found.add(value.index)
        return frozenset(found)

    def _check_followed(self, op: Op) -> None:
        # an autograd.Function computes out of autograd's sight, and only its result is differentiable
        followed = [v for v in op.outputs if v is not None and v.differentiable]
        own = any(v.edge is not None and isinstance(v.edge.node, BackwardCFunction) for v in followed)
        if own or (followed and not any(v.differentiable for v in op.inputs)):
            raise UnsupportedError(f"autograd follows the result of {op.name} by a rule of its own")

    # -- values by their memory --------------------------------------------------------------------
    def _new(self, tensor: Tensor, parameter: str | None = None) -> Value:
        value = super()._new(tensor, parameter)
        if tensor.numel():
            self._by_place.setdefault(_place(tensor), []).append(value)
            self._by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append(value)
        return value

    def value_of(self, tensor: Tensor) -> Value:
        """See :class:`Recorder`; what the backward pass unpacks is the forward pass's value."""
        known = super().value_of(tensor)
        if known.index not in self._unpacked or not tensor.requires_grad:
            return known
        # unpacking detaches what was saved, and puts it back into its place in the graph afterwards
        saved = [
            v for v in self._by_place.get(_place(tensor), ()) if v.differentiable and v.index < known.index
        ]
        if not saved:
            raise UnsupportedError("the backward pass reads memory of the forward pass in another shape")
        return saved[-1]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """See :class:`Recorder`."""
        result = super().__torch_dispatch__(func, types, args, kwargs)
        op = self.tape.ops[-1]
        if self._first_backward is not None and op.name == "detach":
            self._unpacked.add(op.output.index)
        return result

    def _unknown(self, tensor: Tensor) -> Value:
        if not tensor.numel():
            return super()._unknown(tensor)
        here = self._by_place.get(_place(tensor), ())
        if tensor.requires_grad:
            here = [v for v in here if v.differentiable]
        elif self._first_backward is None:
            here = ()
        else:
            here = [v for v in here if v.index >= self._first_backward]
        if here:
            return here[-1]
        if self._first_backward is not None and self._hidden(tensor):
            raise UnsupportedError("the backward pass reads memory of the forward pass in another shape")
        return super()._unknown(tensor)

    def _hidden(self, tensor: Tensor) -> bool:
        """Whether it lies in memory of a followed value, and is not known to be unfollowed itself."""
        if self._by_place.get(_place(tensor)):
            return tensor.requires_grad
        return any(v.differentiable for v in self._by_storage.get(tensor.untyped_storage().data_ptr(), ()))

    def _about_to_write(self, tensor: Tensor) -> None:
        for value in self._by_storage.get(tensor.untyped_storage().data_ptr(), ()):
            value.tensor = value.tensor.clone()
        self._by_storage.pop(tensor.untyped_storage().data_ptr(), None)


@contextmanager
def noting(tape: GradientTape | None) -> Iterator[None]:
    """Everything inside belongs to the tape's forward pass; without a tape nothing happens."""
    if tape is None:
        yield
        return
    with tape:
        yield
    tape.settle()


def _place(tensor: Tensor) -> Place:
    storage = tensor.untyped_storage().data_ptr()
    return storage, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype
