"""The bookkeeping of a run of products: its count, its bar, its checkpoint, its interruption."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from flatkern.estimators.checkpoint import Checkpoint
from flatkern.estimators.common import rows_per_block
from flatkern.estimators.interrupt import Interruptible
from flatkern.operators.base import LinearOperator

__all__ = ["Block", "Run"]


@dataclass(frozen=True)
class Block:
    """Products ``start`` to ``stop`` of a stage; ``known`` where an earlier process has made them."""

    start: int
    stop: int
    known: bool

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def span(self) -> slice:
        """As an index."""
        return slice(self.start, self.stop)


class Run:
    """Products with one operator, made in blocks, in named stages.

    What the products give is kept in arrays that belong to the run. A resumed run goes through the same steps
    with the same random vectors, drawn anew, and finds the arrays filled as far as the earlier one came; all
    decisions follow from the arrays, so the results are the same bit by bit.
    """

    def __init__(
        self, op: LinearOperator, bar: tqdm, checkpoint: Checkpoint, stop: Interruptible, max_matvecs: int
    ) -> None:
        self.op = op
        self.matvecs = 0
        self.max_matvecs = max_matvecs
        self._bar, self._checkpoint, self._stop = bar, checkpoint, stop
        self._earlier: dict[str, Tensor] = checkpoint.state or {}
        checkpoint.state = None
        self._arrays: dict[str, Tensor] = {}
        self._done: dict[str, int] = {}

    @property
    def left(self) -> int:
        """Products that ``max_matvecs`` still allows."""
        return self.max_matvecs - self.matvecs

    @property
    def interrupted(self) -> bool:
        """Whether the user asked to stop."""
        return self._stop.requested

    def seed(self, chosen: int | None) -> int | None:
        """The seed of this run: where none was given and a checkpoint is written, one that it keeps."""
        if chosen is None:
            drawn = torch.Generator().seed() & (1 << 62) - 1
            chosen = int(self.array("seed", (), torch.int64, drawn))
        return chosen

    def array(self, name: str, shape: Sequence[int], dtype: torch.dtype, fill: float = 0) -> Tensor:
        """A tensor that the checkpoint keeps, as the earlier run left it or filled with one value."""
        earlier = self._earlier.pop(name, None)
        if earlier is not None:
            self._arrays[name] = earlier.to(self.op.device)
        else:
            self._arrays[name] = torch.full(tuple(shape), fill, dtype=dtype, device=self.op.device)
        return self._arrays[name]

    def blocks(self, stage: str, total: int) -> Iterator[Block]:
        """The blocks of a stage of ``total`` products; the loop's body makes those that are not known.

        Ends early when the user asks to stop.
        """
        counted = self._earlier.pop(f"{stage}.done", None)
        known = 0 if counted is None else int(counted)
        size = rows_per_block(self.op)
        for start in range(0, total, size):
            if self.interrupted:
                return
            block = Block(start, min(start + size, total), known=start < known)
            yield block
            self._done[stage] = block.stop
            self.matvecs += len(block)
            self._bar.update(len(block))
            if not block.known and (self._checkpoint.due() or self.interrupted):
                self.save()

    def expect(self, matvecs: int) -> None:
        """Tell the bar how many products there will be."""
        self._bar.total = matvecs
        self._bar.refresh()

    def save(self) -> None:
        """Write the state, where a checkpoint was asked for."""
        counts = {f"{stage}.done": torch.tensor(done) for stage, done in self._done.items()}
        self._checkpoint.save(**{**self._earlier, **self._arrays, **counts})
