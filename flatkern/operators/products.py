"""Products of one batch's linearization with several vectors: one by one, or several in a pass."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from flatkern.operators.linearization import Linearization

__all__ = [
    "BlockSize",
    "Mode",
    "Parts",
    "accumulate",
    "forward_is_faster",
    "images",
    "images_agree",
    "quiet_batching",
    "resolve_mode",
    "seconds",
]

Mode = str
MODES = ("auto", "kept", "rebuilt", "forward", "linearized")
LARGEST_BLOCK = 8

Apply = Callable[[Tensor], Sequence[Tensor]]
"""The images of a vector [size], or of several [k, size] in one batched pass."""


class Parts:
    """How a flat vector of some of an operator's parameters falls apart into tensors."""

    def __init__(self, parameters: Sequence[Tensor], wanted: Sequence[int], dtype: torch.dtype) -> None:
        self.parameters, self.wanted, self.dtype = parameters, wanted, dtype
        self._chosen = [parameters[i] for i in wanted]
        self._sizes = [p.numel() for p in self._chosen]

    def split(self, vectors: Tensor) -> list[Tensor | None]:
        """[size] or [k, size] → one tensor a parameter of the operator, ``None`` for those not wanted."""
        tangents: list[Tensor | None] = [None] * len(self.parameters)
        lead = vectors.shape[:-1]
        for i, p, piece in zip(self.wanted, self._chosen, vectors.split(self._sizes, dim=-1), strict=True):
            tangent = piece.view(lead + p.shape)
            tangents[i] = tangent if p.dtype == self.dtype else tangent.to(p.dtype)
        return tangents

    def join(self, parts: Sequence[Tensor | None], lead: Sequence[int]) -> list[Tensor]:
        """Images of the wanted parameters, flat, ready for ``torch.cat`` along the last axis."""
        joined = []
        for t, size in zip(parts, self._sizes, strict=True):
            if t is None:
                t = torch.zeros(*lead, size, dtype=self.dtype, device=self._chosen[0].device)
            elif t.dtype != self.dtype:
                t = t.to(self.dtype)
            joined.append(t.reshape(*lead, size))
        return joined

    def places(self, vectors: Tensor) -> list[Tensor]:
        """Where in [size] or [k, size] the images of the wanted parameters lie, flat."""
        return list(vectors.split(self._sizes, dim=-1))


def accumulate(
    total: Tensor,
    linear: Linearization,
    rows: Tensor,
    parts: Parts,
    scale: float,
    *,
    block_size: int,
    fresh: bool = False,
) -> None:
    """total += scale · (linear applied to each row); ``fresh``: total holds nothing yet and is overwritten."""
    step = max(1, block_size)
    for start in range(0, len(rows), step):
        many = step > 1 and len(rows) - start > 1
        block = rows[start : start + step] if many else rows[start]
        out = total[start : start + step] if many else total[start]
        if fresh:
            _write(out, linear, block, parts, scale)
            continue
        pieces = images(linear, block, parts)
        # straight into their places, as a pass over [P] costs as much as the arithmetic of a small layer
        torch._foreach_add_(parts.places(out), pieces, alpha=scale)


def _write(out: Tensor, linear: Linearization, vectors: Tensor, parts: Parts, scale: float) -> None:
    """out = scale · (linear applied to vectors [size] or [k, size])."""
    batched = vectors.ndim == 2
    places = parts.split(out)
    wanted = [t for i in parts.wanted if (t := places[i]) is not None]
    in_place = all(t.dtype == out.dtype for t in wanted)
    with quiet_batching() if batched else nullcontext():
        found = linear.apply(
            parts.split(vectors), parts.wanted, batched=batched, places=wanted if in_place else None
        )
    if any(t is place for t, place in zip(found, wanted, strict=True)):
        for t, place in zip(found, wanted, strict=True):
            if t is None:
                place.zero_()
            elif t is not place:
                place.copy_(t)
    else:
        torch.cat(parts.join(found, vectors.shape[:-1]), dim=-1, out=out)
    if scale != 1.0:
        out.mul_(scale)


def images(linear: Linearization, vectors: Tensor, parts: Parts) -> list[Tensor]:
    """The images of a vector [size], or of several [k, size] in one batched pass."""
    if vectors.ndim == 1:
        return parts.join(linear.apply(parts.split(vectors), parts.wanted), ())
    with quiet_batching():
        return parts.join(linear.apply(parts.split(vectors), parts.wanted, batched=True), (len(vectors),))


@contextmanager
def quiet_batching() -> Iterator[None]:
    """No warning where an op without a batching rule is looped over: it is slower, which the timing sees."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        yield


class BlockSize:
    """How many vectors go into one pass: as asked for, or timed on the vectors themselves.

    Ops without a batching rule make the batched pass fail, and the answer 1.

    Args:
        asked: the size, or ``None`` for measuring.
        gain: several vectors go into one pass where that takes less than this share of the time.

    Attributes:
        chosen: the present answer; ``None`` before there was a product with several vectors.
        limit: the most vectors whose working set fits into memory.
    """

    def __init__(self, asked: int | None, gain: float = 0.9) -> None:
        if asked is not None and (not isinstance(asked, int) or isinstance(asked, bool) or asked < 1):
            raise ValueError(f"block_size: expected an integer of at least 1 or None, got {asked!r}")
        self._measure, self._gain = asked is None, gain
        self.chosen, self.limit, self._tried = asked, 1, 1

    def fix(self, size: int) -> None:
        """Take a size chosen earlier."""
        self._measure, self.chosen, self._tried = False, size, LARGEST_BLOCK

    def size(self, apply: Apply, rows: Tensor) -> int:
        """The size for these rows [k, P]; measured where more of them come than were tried before."""
        most = (
            min(len(rows), LARGEST_BLOCK, self.limit) if self._measure else min(len(rows), self.chosen or 1)
        )
        if most > self._tried and (self._measure or self._tried == 1):
            self._tried = most
            if self._measure:
                self.chosen = _faster_size(apply, rows[:most], self._gain)
            elif not _can_batch(apply, rows[:2]):
                self.chosen = 1
        return self.chosen or 1


def _can_batch(apply: Apply, rows: Tensor) -> bool:
    """Whether the batched pass works, and gives what single ones give: torch's rules have gaps of both kinds."""
    try:
        first = [image[0] for image in apply(rows)]
    except (RuntimeError, NotImplementedError):
        return False
    return images_agree(first, apply(rows[0]))


def images_agree(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Whether two images are the same but for rounding."""
    a, b = torch.cat([t.double() for t in first]), torch.cat([t.double() for t in second])
    low = any(t.dtype not in (torch.float32, torch.float64) for t in first)
    tolerance = 0.2 if low else torch.finfo(first[0].dtype).eps ** 0.5
    return bool((a - b).norm() <= tolerance * b.norm())


def _faster_size(apply: Apply, rows: Tensor, gain: float) -> int:
    if not _can_batch(apply, rows):  # a first pass is slower: it is not timed
        return 1

    def alone() -> None:
        for row in rows[:2]:
            apply(row)

    alone()
    # in turns, so that other work on the machine hits both
    turns = [(seconds(alone) / 2, seconds(lambda: apply(rows)) / len(rows)) for _ in range(2)]
    single, batched = (min(times) for times in zip(*turns, strict=True))
    return len(rows) if batched < gain * single else 1


def forward_is_faster(
    rebuild: Callable[[], Linearization],
    without_graph: Callable[[], Linearization | None],
    rows: Tensor,
    parts: Parts,
) -> bool:
    """Whether forward over reverse takes clearly less time for these vectors than building the graph anew.

    It must give the same image as well: torch has tangents that are silently wrong.
    """

    def run(make: Callable[[], Linearization | None]) -> list[Tensor]:
        linear = make()
        assert linear is not None
        first, *_ = [images(linear, row, parts) for row in rows[:LARGEST_BLOCK]]
        return first

    try:
        image = run(without_graph)  # a first pass is slower
    except (RuntimeError, NotImplementedError):  # an op without a tangent
        return False
    if not images_agree(image, run(rebuild)):
        return False
    # in turns, so that other work on the machine hits both
    turns = [(seconds(lambda: run(without_graph)), seconds(lambda: run(rebuild))) for _ in range(2)]
    with_tangents, with_graph = (min(times) for times in zip(*turns, strict=True))
    return with_tangents < 0.9 * with_graph


def seconds(run: Callable[[], object]) -> float:
    """Wall seconds of a call, with a CUDA device's work finished."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def resolve_mode(mode: str, max_memory: int, *, forward_supported: bool) -> int:
    """The budget for kept graphs under a mode; refuses unknown and unsupported ones."""
    if mode not in MODES:
        raise ValueError(f"mode: expected one of {', '.join(map(repr, MODES))}, got {mode!r}")
    if mode == "forward" and not forward_supported:
        raise ValueError(
            "mode: 'forward' (forward over reverse) is for fk.hessian on pairs (x, y) without forward=; use 'auto'"
        )
    return 0 if mode in ("rebuilt", "forward") else max_memory
