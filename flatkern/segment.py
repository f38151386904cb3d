"""A part of a network: from the input or what goes into a module, to what comes out of a module or the output.

While :func:`segment` is in force the model itself ends at ``target`` (a hook hands out that module's output), so that
all that takes a model measures the part. The graph of each run knows where ``source`` stands in it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["Segment", "Source", "segment"]


@dataclass(frozen=True)
class Source:
    """What the source module got in one run."""

    value: Tensor
    """A copy, [n, ...]: the module may work in place."""
    edge: GradientEdge


@dataclass
class Segment:
    """Where a part of a model begins and ends."""

    source: str | None
    """A module's name, ``name#2`` for its second call: its first tensor input. ``None``: the model's input."""
    target: str | None
    """A module's name: its (first tensor) output. ``None``: the model's output."""
    _runs: Any = field(default_factory=WeakIdKeyDictionary, repr=False)
    _captured: Source | None = field(default=None, repr=False)
    _ended: Tensor | None = field(default=None, repr=False)

    @property
    def whole(self) -> bool:
        """Whether it is the whole model."""
        return self.source is None and self.target is None

    def source_of(self, output: Tensor) -> Source:
        """The source of the run that gave this output."""
        found: Source | None = self._runs.get(output)
        if found is None:
            raise ValueError(f"source: {self.source!r} was not called in a run of the model")
        return found


@contextmanager
def segment(model: nn.Module, source: str | None, target: str | None) -> Iterator[Segment]:
    """Let ``model`` end at ``target`` while the block runs, and note what ``source`` gets.

    Raises:
        TypeError, ValueError: a name that is no module's; (in a run) a module that is not called, or whose input or
            output is no tensor.
    """
    part = Segment(source, target)
    with ExitStack() as stack:
        if not part.whole:
            modules = dict(model.named_modules())
            begin = _lookup(modules, "source", source)
            end = _lookup(modules, "target", target)
            calls: Counter[str] = Counter()

            def start(*_: Any) -> None:
                calls.clear()
                part._captured = part._ended = None

            def take_source(_m: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
                calls["source"] += 1
                if begin is not None and calls["source"] == begin[1]:
                    part._captured = _capture(_first_tensor([args, kwargs], "source", source))

            def take_target(_m: nn.Module, _args: Any, output: Any) -> None:
                calls["target"] += 1
                if end is not None and calls["target"] == end[1]:
                    part._ended = _first_tensor(output, "target", target)

            def finish(_m: nn.Module, _args: Any, output: Any) -> Any:
                captured, ended = part._captured, part._ended
                part._captured = part._ended = None
                if end is not None and ended is None:
                    raise ValueError(f"target: {target!r} was not called in a run of the model")
                result = output if ended is None else ended
                if captured is not None and isinstance(result, Tensor):
                    part._runs[result] = captured
                return result

            stack.callback(model.register_forward_pre_hook(start).remove)
            if begin is not None:
                stack.callback(begin[0].register_forward_pre_hook(take_source, with_kwargs=True).remove)
            if end is not None:
                stack.callback(end[0].register_forward_hook(take_target).remove)
            stack.callback(model.register_forward_hook(finish).remove)
        yield part


def _lookup(modules: Mapping[str, nn.Module], what: str, name: str | None) -> tuple[nn.Module, int] | None:
    """The module and the number of its call."""
    if name is None:
        return None
    if not isinstance(name, str):
        raise TypeError(f"{what}: expected a module's name (str), got {type(name).__name__}")
    path, _, number = name.partition("#")
    if not path or path not in modules or (number and not (number.isdigit() and int(number) > 0)):
        known = [n for n in modules if n]
        shown = ", ".join(known[:30]) + (f", ... ({len(known)} in all)" if len(known) > 30 else "")
        raise ValueError(f"{what}: {name!r} is no module of the model; there are {shown}")
    return modules[path], int(number or 1)


def _first_tensor(item: Any, what: str, name: str | None) -> Tensor:
    found = next(_tensors(item), None)
    if found is None or not found.is_floating_point():
        kind = "no tensor" if found is None else f"dtype {found.dtype}"
        raise TypeError(f"{what}: {name!r} has {kind} there, so there is no Jacobian; take another module")
    return found


def _tensors(item: Any) -> Iterator[Tensor]:
    if isinstance(item, Tensor):
        yield item
    elif isinstance(item, Mapping):
        for part in item.values():
            yield from _tensors(part)
    elif isinstance(item, (tuple, list)):
        for part in item:
            yield from _tensors(part)


def _capture(tensor: Tensor) -> Source:
    if not tensor.requires_grad:
        if isinstance(tensor, nn.Parameter) or tensor.is_inference():
            raise ValueError("source: its input is not computed from the samples")
        tensor.requires_grad_()  # what nothing differentiable leads to is a leaf; its later users see the change
    return Source(tensor.detach().clone(), get_gradient_edge(tensor))
