"""What the user hands in: a model, its parameters, its data. Checked once, and left exactly as found."""

from __future__ import annotations

import fnmatch
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

__all__ = [
    "DEFAULT_MAX_MEMORY",
    "Batches",
    "Layout",
    "all_finite",
    "call_with",
    "check_input",
    "check_model",
    "check_output",
    "differentiation",
    "is_pair",
    "model_device",
    "pairs_aligned",
    "preserve_state",
    "select_parameters",
]

DEFAULT_MAX_MEMORY = 1 << 30
"""Working-set budget in bytes where ``max_memory`` is not given: 1 GiB."""

ParameterSelection = str | Sequence[str] | None

_BATCH_NORM = (nn.modules.batchnorm._BatchNorm,)
_DROPOUT = (nn.modules.dropout._DropoutNd,)


def select_parameters(model: nn.Module, params: ParameterSelection = None) -> dict[str, nn.Parameter]:
    """Names and tensors of the parameters a quantity is taken over, each tensor once.

    Args:
        model: any module.
        params: ``None`` for all parameters with ``requires_grad``; else a name, a glob (``"layers.*.weight"``)
            or a list of them. Frozen parameters are left out by ``None`` and refused when named exactly.

    Raises:
        ValueError: nothing is selected, a name matches nothing, or a named parameter is frozen.
        TypeError: a selected parameter is complex.
    """
    named = dict(model.named_parameters())  # a tied tensor appears once, under its first name
    chosen = _selected(model, named, params)
    for name, p in chosen.items():
        if p.is_complex():
            raise TypeError(
                f"model: parameter {name!r} is complex, which is not supported; keep it as a real parameter [..., 2] "
                "for torch.view_as_complex, or leave it out with params="
            )
    return chosen


def _selected(
    model: nn.Module, named: Mapping[str, nn.Parameter], params: ParameterSelection
) -> dict[str, nn.Parameter]:
    if params is None:
        chosen = {name: p for name, p in named.items() if p.requires_grad}
        if not chosen:
            raise ValueError(
                "model: it has no parameter with requires_grad=True, so there is nothing to differentiate"
            )
        return chosen
    patterns = [params] if isinstance(params, str) else list(params)
    if not patterns:
        raise ValueError("params: an empty list selects no parameter; leave params out to take all")
    aliases = dict(model.named_parameters(remove_duplicate=False))
    by_identity = {id(p): name for name, p in named.items()}
    chosen = {}
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"params: expected names or globs (str), got {type(pattern).__name__}")
        hits = fnmatch.filter(aliases, pattern)
        if not hits:
            raise ValueError(f"params: {pattern!r} matches no parameter; there are {', '.join(named)}")
        for hit in hits:
            if aliases[hit].requires_grad:
                chosen[by_identity[id(aliases[hit])]] = aliases[hit]
            elif hit == pattern:
                raise ValueError(
                    f"params: {hit!r} is frozen (requires_grad=False); unfreeze it or leave it out"
                )
    if not chosen:
        raise ValueError(f"params: {params!r} selects only frozen parameters")
    return {name: p for name, p in named.items() if name in chosen}


def pairs_aligned(t: Tensor) -> Tensor:
    """A tensor of pairs as ``torch.view_as_complex`` takes it: no pair begins at an odd place of the storage."""
    if t.ndim and t.shape[-1] == 2 and (t.storage_offset() % 2 or any(s % 2 for s in t.stride()[:-1])):
        return t.clone(memory_format=torch.contiguous_format)
    return t


class Layout:
    """Where each parameter lies in a flat vector [P].

    ``slices[name]`` is the parameter's range; :meth:`flatten` and :meth:`unflatten` go both ways.
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self.names: tuple[str, ...] = tuple(parameters)
        self.shapes: dict[str, torch.Size] = {name: p.shape for name, p in parameters.items()}
        self.slices: dict[str, slice] = {}
        start = 0
        for name, p in parameters.items():
            self.slices[name] = slice(start, start + p.numel())
            start += p.numel()
        self.size = start

    def flatten(self, tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> Tensor:
        """Tensors in the parameters' shapes (a mapping by name, or in order) → one vector [P]."""
        parts = [tensors[name] for name in self.names] if isinstance(tensors, Mapping) else list(tensors)
        if len(parts) != len(self.names):
            raise ValueError(f"tensors: expected {len(self.names)}, one a parameter, got {len(parts)}")
        for name, part in zip(self.names, parts, strict=True):
            if part.shape != self.shapes[name]:
                raise ValueError(
                    f"tensors: {name!r} has shape {tuple(part.shape)}, not {tuple(self.shapes[name])}"
                )
        return torch.cat([part.reshape(-1) for part in parts])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector [P], or vectors as rows [k, P] → tensors by name (views), [*shape] or [k, *shape]."""
        if vector.ndim not in (1, 2) or vector.shape[-1] != self.size:
            raise ValueError(f"vector: expected [{self.size}] or [k, {self.size}], got {tuple(vector.shape)}")
        lead = vector.shape[:-1]
        return {
            name: vector[..., self.slices[name]].reshape((*lead, *self.shapes[name])) for name in self.names
        }


class Batches:
    """A pair ``(x, y)`` or any re-iterable of pairs, as something to iterate over more than once.

    A one-shot iterator is refused, as every algorithm here passes over the data several times.
    """

    def __init__(self, data: Any, device: torch.device) -> None:
        self.device = device
        self._source: Iterable[Any]
        if is_pair(data):
            self._source = [data]
        elif isinstance(data, Tensor) or not hasattr(data, "__iter__"):
            raise TypeError(
                f"data: expected a pair (x, y) or an iterable of pairs, got {type(data).__name__}"
            )
        elif hasattr(data, "__next__"):
            raise TypeError("data: a one-shot iterator can be read only once; pass a list or a DataLoader")
        else:
            self._source = data

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        empty = True
        for item in self._source:
            if not is_pair(item):
                raise TypeError(f"data: every batch must be a pair of tensors (x, y), got {_describe(item)}")
            x, y = (_differentiable(t.to(self.device)) for t in item)
            if x.ndim == 0 or len(x) == 0:
                raise ValueError("data: a batch is empty; axis 0 holds the samples and needs at least one")
            if y.ndim > 0 and len(y) != len(x):
                raise ValueError(f"data: x holds {len(x)} samples and y {len(y)}; axis 0 must agree")
            empty = False
            yield x, y
        if empty:
            raise ValueError("data: no batch in it")


def _differentiable(t: Tensor) -> Tensor:
    """A tensor made under ``torch.inference_mode`` cannot be saved for a backward pass; its copy can."""
    return t.clone() if t.is_inference() else t


def is_pair(item: Any) -> bool:
    """Whether it is one batch: two tensors."""
    return isinstance(item, (tuple, list)) and len(item) == 2 and all(isinstance(t, Tensor) for t in item)


def _describe(item: Any) -> str:
    if isinstance(item, (tuple, list)):
        return f"{type(item).__name__} of {len(item)}: {', '.join(type(t).__name__ for t in item)}"
    return type(item).__name__


def call_with(model: nn.Module, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """The model's output with some parameters replaced, named as by :func:`select_parameters`.

    A tensor tied into several modules is replaced in all of them. ``functional_call``'s own tying is not used: with one
    module registered under two names it leaves the replacement in the user's model.
    """
    named = dict(model.named_parameters())
    wanted = {id(named[name]): value for name, value in tensors.items()}
    places = {
        f"{prefix}.{local}" if prefix else local: wanted[id(p)]
        for prefix, module in model.named_modules()  # each module once
        for local, p in module.named_parameters(recurse=False)
        if id(p) in wanted
    }
    return functional_call(model, places, (x,), tie_weights=False)


def model_device(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer; the CPU for a model without any."""
    for tensor in itertools.chain(model.parameters(), model.buffers()):
        return tensor.device
    return torch.device("cpu")


def check_model(model: nn.Module, *, train_mode: bool = False) -> None:
    """Refuse what makes the samples of a batch depend on one another or on chance, unless ``train_mode`` allows it.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: batch norm with batch statistics, or dropout in train mode.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    for name, p in model.named_parameters():
        if isinstance(p, nn.parameter.UninitializedParameter):
            raise ValueError(
                f"model: lazy parameter {name!r} has no shape yet; call the model once on a batch first"
            )
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            raise ValueError(
                f"model: embedding {name!r} has max_norm, so a forward pass rewrites its weights; renormalize them "
                "once and set max_norm to None"
            )
        if train_mode:
            continue
        if isinstance(module, _BATCH_NORM) and module.running_mean is None:
            raise ValueError(
                f"model: batch norm {name!r} keeps no running statistics, so a sample's output depends on its batch"
            )
        if not module.training:
            continue
        if isinstance(module, _BATCH_NORM):
            raise ValueError(
                f"model: batch norm {name!r} is in train mode, where a sample's output depends on its batch; "
                "call model.eval() first"
            )
        if isinstance(module, _DROPOUT) and module.p > 0:
            raise ValueError(
                f"model: dropout {name!r} is in train mode, so outputs are random; call model.eval() first"
            )


def all_finite(x: Tensor) -> bool:
    """Whether a real floating-point tensor holds neither NaN nor Inf.

    The least and the largest entry show both: one read, where ``isfinite(x).all()`` writes a mask (27 times as long).
    """
    return x.numel() == 0 or bool(torch.isfinite(torch.stack(x.detach().aminmax())).all())


def check_input(x: Tensor, *, differentiable: bool, name: str = "x") -> None:
    """Refuse inputs with no samples, non-finite entries, or (where a Jacobian is needed) no gradient."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor with the samples on axis 0, got {type(x).__name__}")
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"{name}: shape {tuple(x.shape)} holds no sample; axis 0 holds the samples")
    if differentiable and not x.is_floating_point():
        raise TypeError(
            f"{name}: dtype {x.dtype} has no gradient, so there is no input Jacobian; convert it (x.float()), or "
            "for token ids measure from the embedding's output on (fk.geometry(..., source=the module behind it))"
        )
    if x.is_floating_point() and not all_finite(x):
        raise ValueError(f"{name}: it holds NaN or Inf")


def check_output(model: nn.Module, output: Any, n: int) -> Tensor:
    """Refuse outputs that are not one tensor of n samples, or not finite (naming the bad parameter)."""
    if not isinstance(output, Tensor):
        raise TypeError(
            f"model: its output must be one tensor, got {type(output).__name__}; wrap the model, or say "
            "forward=(model, batch) -> (output, target) where that is an argument"
        )
    if output.ndim == 0 or output.shape[0] != n:
        raise ValueError(
            f"model: output shape {tuple(output.shape)} does not start with the number of samples, {n}"
        )
    if not output.is_floating_point():
        raise TypeError(f"model: output dtype {output.dtype} is not a real floating-point type")
    if output.numel() == 0:
        raise ValueError(f"model: output shape {tuple(output.shape)} holds no entry")
    if not all_finite(output):
        for name, p in model.named_parameters():
            if not all_finite(p):
                raise ValueError(f"model: parameter {name!r} holds NaN or Inf")
        raise ValueError(
            "model: its output holds NaN or Inf on this input although all parameters are finite (overflow?)"
        )
    return output


@contextmanager
def differentiation() -> Iterator[None]:
    """Gradients on, whatever mode the caller is in (``no_grad``, ``inference_mode``); their mode is restored."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def preserve_state(model: nn.Module, *, allow_random: bool = False) -> Iterator[None]:
    """Leave RNG states, buffers and ``requires_grad`` exactly as they were, on errors too.

    Raises:
        ValueError: (unless ``allow_random``) the block drew random numbers, i.e. the model's forward pass is
            random, whatever the reason; the RNG state is restored all the same.
    """
    device = model_device(model)
    cpu_state = torch.get_rng_state()
    gpu_state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    bound = [(m, name, b) for m in model.modules() for name, b in m._buffers.items() if b is not None]
    distinct = {id(b): b for _, _, b in bound}
    buffers = [(b, b._version, b.detach().clone()) for b in distinct.values()]
    drew = False
    try:
        yield
    finally:
        if not torch.equal(torch.get_rng_state(), cpu_state):
            drew = True
            torch.set_rng_state(cpu_state)
        if gpu_state is not None and not torch.equal(torch.cuda.get_rng_state(device), gpu_state):
            drew = True
            torch.cuda.set_rng_state(gpu_state, device)
        for module, name, buffer in bound:  # a forward may also put another tensor in its place
            module._buffers[name] = buffer
        with torch.no_grad():
            for buffer, version, value in buffers:
                if buffer._version != version:
                    buffer.copy_(value)
    if drew and not allow_random:
        raise ValueError(
            "model: its forward pass draws random numbers (dropout, noise, sampling), so derivatives would be those "
            "of one draw; call model.eval() or remove the noise"
        )
