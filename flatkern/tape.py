"""A model's run as a list of its elementary operations (ATen), with every intermediate value.

Recorded below autograd while autograd records as well: each value also knows its place in the autograd graph. What
``detach`` or ``no_grad`` hides from that graph is on the tape all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from flatkern import kernels
from flatkern.attention_form import FunctionForms, attention_forms
from flatkern.kernels._attention import autocast

__all__ = ["Op", "Recorder", "Tape", "UnsupportedError", "Value", "record", "substitute"]


class UnsupportedError(Exception):
    """The model does something that a tape cannot represent."""


@dataclass(eq=False)
class Value:
    """One tensor of the run, at one version."""

    index: int
    tensor: Tensor
    """Detached; shares its storage with the model's own until that is written to. Without data once let go."""
    version: int | None = None
    edge: GradientEdge | None = None
    """Its place in the autograd graph; ``None`` for leaves and constants."""
    differentiable: bool = False
    """Whether autograd follows it; else it is a constant."""
    parameter: str | None = None
    """The parameter's name, for a parameter."""

    def let_go(self) -> None:
        """Leave shape and dtype only."""
        self.tensor = torch.empty_like(self.tensor, device="meta")


@dataclass(eq=False)
class Op:
    """One operation of ATen, or attention as a whole. ``args`` holds :class:`Value` in the places of tensors."""

    func: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Value | None, ...]
    in_place: bool

    @property
    def name(self) -> str:
        """``"addmm"``, ``"gelu"``, ...: without overload and the mark of in-place operations."""
        name: str = getattr(self.func, "overloadpacket", self.func).__name__
        return name[:-1] if self.in_place else name

    @cached_property
    def inputs(self) -> tuple[Value, ...]:
        """All values among the arguments."""
        return tuple(_values((self.args, self.kwargs)))

    @property
    def output(self) -> Value:
        """The first output."""
        assert self.outputs[0] is not None
        return self.outputs[0]

    def run(self, replacement: Callable[[Value], Tensor]) -> tuple[Any, ...]:
        """The operation again, out of place, on other tensors."""
        args, kwargs = substitute((self.args, self.kwargs), replacement)
        if self.in_place:
            args = (args[0].clone(), *args[1:])
        if self.name in ("view", "_unsafe_view"):  # other tensors may have other strides
            return (args[0].reshape(args[1]),)
        result = self.func(*args, **kwargs)
        return tuple(result) if isinstance(result, (tuple, list)) else (result,)


@dataclass(eq=False)
class Tape:
    """The operations of one run in order."""

    ops: list[Op] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    inputs: Value | None = None
    output: Value | None = None
    scalars: set[int] = field(default_factory=set)
    """Indices of values that left the tape as Python numbers."""
    target: Any = None
    """What ``forward`` gave beside the output."""
    bytes: int | None = None
    """Of its values, once they were let go."""

    @property
    def final(self) -> Value:
        """The model's output."""
        assert self.output is not None
        return self.output


def _values(item: Any) -> Iterator[Value]:
    if isinstance(item, Value):
        yield item
    elif isinstance(item, (tuple, list)):
        for part in item:
            yield from _values(part)
    elif isinstance(item, Mapping):
        for part in item.values():
            yield from _values(part)


def substitute(item: Any, replacement: Callable[[Value], Tensor]) -> Any:
    """Arguments with every :class:`Value` replaced."""
    if isinstance(item, Value):
        return replacement(item)
    if isinstance(item, tuple):
        return tuple(substitute(part, replacement) for part in item)
    if isinstance(item, list):
        return [substitute(part, replacement) for part in item]
    if isinstance(item, Mapping):
        return {key: substitute(part, replacement) for key, part in item.items()}
    return item


class Recorder(TorchDispatchMode):
    """Notes the operations that run while it is in force."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.tape = Tape()
        self._names = {id(p): name for name, p in parameters.items()}
        self._current: dict[int, Value] = {}
        self._kept: list[Tensor] = []  # ids are those of living objects only
        self._unsettled: list[tuple[Value, Tensor]] = []
        self._off = False

    def value_of(self, tensor: Tensor) -> Value:
        """The value a tensor holds now."""
        known = self._current.get(id(tensor))
        if known is None:
            return self._unknown(tensor)
        if known.version not in (None, _version(tensor)):
            raise UnsupportedError("a tensor was changed in place through one of its views")
        _settle(known, tensor)
        return known

    def _unknown(self, tensor: Tensor) -> Value:
        """The value of a tensor that no operation on the tape has made."""
        return self._new(tensor, self._names.get(id(tensor)))

    def _about_to_write(self, tensor: Tensor) -> None:
        """Save the contents that an operation is going to overwrite."""
        old = self._current[id(tensor)]
        old.tensor = tensor.detach().clone()

    def _new(self, tensor: Tensor, parameter: str | None = None) -> Value:
        value = Value(len(self.tape.values), tensor.detach(), parameter=parameter)
        self.tape.values.append(value)
        self._current[id(tensor)] = value
        self._kept.append(tensor)
        self._unsettled.append((value, tensor))
        return value

    def _arguments(self, item: Any) -> Any:
        if isinstance(item, Tensor):
            return self.value_of(item)
        if isinstance(item, (tuple, list)):
            return type(item)(self._arguments(part) for part in item)
        if isinstance(item, dict):
            return {key: self._arguments(part) for key, part in item.items()}
        return item

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run the operation and note it."""
        kwargs = dict(kwargs or {})
        if self._off:
            return func(*args, **kwargs)
        noted, noted_kwargs = self._arguments(args), self._arguments(kwargs)
        places = [
            (args[i] if i < len(args) else kwargs.get(a.name))
            for i, a in enumerate(func._schema.arguments)
            if a.alias_info is not None and a.alias_info.is_write
        ]
        written: list[Tensor] = [t for t in places if isinstance(t, Tensor)]
        if written:
            self._settle_all()
        for tensor in written:
            self._about_to_write(tensor)
        result = func(*args, **kwargs)
        if isinstance(result, (int, float, bool)):
            self.tape.scalars.update(v.index for v in _values(noted))
        outputs: list[Value | None] = []
        for item in result if isinstance(result, (tuple, list)) else (result,):
            outputs.append(self._new(item) if isinstance(item, Tensor) else None)
        in_place = bool(written) and func._schema.name.endswith("_")
        if written and not in_place and any(v is not None for v in outputs):
            # written to beside the result (running statistics, out=): the result itself is as usual
            for tensor in written:
                self._current.pop(id(tensor), None)
        self.tape.ops.append(Op(func, noted, noted_kwargs, tuple(outputs), in_place))
        return result

    def attention(self, query: Tensor, key: Tensor, value: Tensor, *more: Any, **kwargs: Any) -> Tensor:
        """Attention by query blocks, noted as one operation: its weights T × T are on no tape."""
        args = (*autocast(query, key, value), *more)  # the operation is to be the same outside of autocast
        self._off = True
        try:
            noted = self._arguments(args), self._arguments(kwargs)
            result = kernels.attention(*args, **kwargs)
            self.tape.ops.append(Op(kernels.attention, *noted, (self._new(result),), False))
        finally:
            self._off = False
        return result

    def finish(self, output: Tensor) -> Tape:
        """Edges of values that nothing used, and the output."""
        self.tape.output = self.value_of(output)
        self._settle_all()
        return self.tape

    def _settle_all(self) -> None:
        for value, tensor in self._unsettled:
            if self._current.get(id(tensor)) is value:
                _settle(value, tensor)
        self._unsettled.clear()


def _settle(value: Value, tensor: Tensor) -> None:
    # a result gets its version and its place in the graph only after the recorder has returned
    if value.version is None:
        value.version = _version(tensor)
    if tensor.requires_grad and not value.differentiable:
        value.differentiable = True
        if tensor.grad_fn is not None:
            value.edge = GradientEdge(tensor.grad_fn, tensor.output_nr)


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def record(
    model: nn.Module,
    x: Any,
    parameters: Mapping[str, Tensor],
    forward: Callable[[nn.Module, Any], tuple[Tensor, Any]] | None = None,
) -> tuple[Tape, Tensor]:
    """Run the model and note its operations.

    Args:
        model: left as found by the caller's ``preserve_state``.
        x: inputs, of which the model gets a copy; or a batch that ``forward`` understands.
        parameters: tensors to be recognised, by name.
        forward: (model, batch) → (output, target), instead of calling the model.

    Returns:
        The tape, and the output with its autograd graph.

    Raises:
        UnsupportedError: the run cannot be represented.
    """
    recorder = Recorder(parameters)
    value = None
    if forward is None:
        value = (x.clone() if x.is_inference() else x.detach()).clone()
        recorder.tape.inputs = recorder._new(value)
    recurrent = any(isinstance(m, nn.RNNBase) for m in model.modules())
    with ExitStack() as stack:
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if recurrent:  # fused forms are one operation, and not differentiable twice
            stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(recorder)
        stack.enter_context(FunctionForms(attention_forms(recorder.attention)))
        if forward is None:
            output = model(value)
        else:
            output, recorder.tape.target = forward(model, x)
    if not isinstance(output, Tensor):
        raise UnsupportedError("the model's output is not one tensor")
    return recorder.finish(output), output
