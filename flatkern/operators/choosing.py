"""Whether the kept batches of an operator are better served by their tangent programs than by autograd's graphs."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from flatkern.operators.linearization import Linearization
from flatkern.operators.products import LARGEST_BLOCK, BlockSize, Parts, images, images_agree, seconds

__all__ = ["ProgramTrial", "program_block"]

SINGLES = 8
"""So many single products are done before programs are tried for single vectors: a trial costs about as much."""
GAIN = 0.95
SHORT = 0.05
"""Seconds below which a measurement is repeated more often."""


def program_block(asked: int | None, limit: int) -> BlockSize:
    """The block size for tangent programs."""
    block = BlockSize(asked, gain=0.97)
    block.limit = limit
    return block


class ProgramTrial:
    """When to try, and how it went.

    A program is taken where it gives the same image and clearly saves time on the vectors at hand.
    """

    def __init__(self) -> None:
        self._tried = 0  # the most vectors at once that programs were tried on
        self.refused = False
        """Whether the model has no program, or a wrong one."""

    def due(self, vectors: int, products: int) -> bool:
        """Whether to try before ``vectors`` further products, after ``products`` of them."""
        if self.refused or min(vectors, LARGEST_BLOCK) <= self._tried:
            return False
        return vectors > 1 or products >= SINGLES

    def faster(
        self,
        graph: Linearization,
        program: Linearization,
        rows: Tensor,
        parts: Parts,
        graph_block: BlockSize,
        block: BlockSize,
    ) -> bool:
        """Whether the program takes clearly less time for these rows [k, P]; each way in blocks of its own size."""
        rows = rows[:LARGEST_BLOCK]
        self._tried = len(rows)
        try:
            image = images(program, rows[0], parts)
        except Exception:  # whatever goes wrong on this way, there is another
            self.refused = True
            return False
        if not images_agree(image, images(graph, rows[0], parts)):
            self.refused = True
            return False
        ways = [(graph, graph_block), (program, block)]
        steps = [b.size(partial(images, linear, parts=parts), rows) for linear, b in ways]

        def a_vector(which: int) -> float:
            """Seconds a vector of one pass, or of two single ones."""
            linear, step = ways[which][0], steps[which]
            few = rows[: max(step, 2)]

            def run() -> None:
                for start in range(0, len(few), step):
                    images(linear, few[start : start + step] if step > 1 else few[start], parts)

            return seconds(run) / len(few)

        # in turns, and no more often than the answer is worth: many runs are a few hundred products
        turns = [(a_vector(0), a_vector(1)) for _ in range(2)]
        if max(turns[0]) < SHORT:
            turns += [(a_vector(0), a_vector(1)) for _ in range(2)]
        with_graph, with_program = (min(times) for times in zip(*turns, strict=True))
        return with_program < GAIN * with_graph
