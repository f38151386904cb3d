"""A block Lanczos basis of bounded size with full re-orthogonalization and thick restarts."""

from __future__ import annotations

import torch
from torch import Tensor

from flatkern.estimators.common import NotSymmetricError
from flatkern.estimators.gram_schmidt import orthonormalize
from flatkern.estimators.probes import Probes
from flatkern.operators.base import LinearOperator

__all__ = ["LanczosBasis"]

_COLUMNS = {
    "cpu": 1 << 14
}  # columns rotated at a time: no second basis, and on the CPU a piece stays in cache
_MOST_COLUMNS = 1 << 20


class LanczosBasis:
    """Orthonormal rows V in one tensor, the projection T = V A Vᵀ measured entry by entry, and a next block W.

    A Vᵀ = Vᵀ T + Wᵀ B: the first ``known`` rows are V, the ``pending`` rows after them W, still to be
    multiplied with A. T, B and what the host needs to know lie on a small float64 board on the device; a step
    only writes to it, and :meth:`look` reads it. A direction that runs out (an invariant subspace) becomes a
    zero row, which decouples from everything and is cleared away at the next look.

    Source: Wu, Simon, "Thick-restart Lanczos method for large symmetric eigenvalue problems", SIAM J. Matrix
    Anal. Appl. 22 (2000).
    """

    def __init__(self, op: LinearOperator, size: int, block: int, generator: torch.Generator) -> None:
        self._op, self.probes = op, Probes(op, generator)
        self._eps = torch.finfo(op.dtype).eps
        self.size, self.block = size, block
        total = size + block
        self.rows = torch.empty(total, op.shape[0], dtype=op.dtype, device=op.device)
        self.known = self.pending = 0
        self._coupled = 0  # the pending block's images have nothing in common with the rows before this one
        # [:total, :total] T with B below it; last column: which rows are alive; corner: the scale so far
        self._board = torch.zeros(total + 1, total + 1, dtype=torch.float64, device=op.device)
        self._host = torch.zeros(total + 1, total + 1, dtype=torch.float64)
        self.scale = 0.0  # the largest Ritz value or entry that a look has seen: ‖A‖ from below
        self.dropped = 0.0  # residual norms of the pairs whose couplings were cut by fresh starts

    @property
    def full(self) -> bool:
        """Whether there is no room for another step."""
        return self.known >= self._op.shape[0] or self.known + 2 * self.pending > len(self.rows)

    @property
    def complete(self) -> bool:
        """Whether the basis spans the whole space, so that T holds the whole spectrum (after a look)."""
        return self.known == self._op.shape[0]

    # -- on the device: nothing here waits for a value -------------------------------------------------
    def step(self) -> None:
        """Multiply the pending block with A, and make the next one from what is new in the images."""
        n, p, op = self.known, self.pending, self._op
        block, done, end = self.rows[n : n + p], n + p, n + 2 * p
        image = (op @ block[0])[None] if p == 1 else (op @ block.mT).mT
        scale = self._board[-1, -1].to(op.dtype)
        inside, onward = orthonormalize(
            self.rows[:done], image, self.rows[done:end], coupled=self._coupled, scale=scale
        )
        self._board[:done, n:done] = inside
        self._board[done:end, n:done] = onward
        self._board[done:end, -1] = (onward.diagonal() > 0).to(torch.float64)
        seen = torch.maximum(inside.abs().amax(), onward.abs().amax()).double()
        self._board[-1, -1] = torch.maximum(self._board[-1, -1], seen)
        self.known, self._coupled = done, n

    def fill(self, vectors: Tensor | None = None) -> None:
        """Complete the pending block to its full width with random directions, or with given ones [b, P]."""
        first = self.known + self.pending
        if vectors is None:
            count = min(self.block - self.pending, min(len(self.rows), self._op.shape[0]) - first)
            if count <= 0:
                return
            vectors = self.probes.normals(count)
        end = first + len(vectors)
        new = self.rows[first:end]
        for _ in range(2):  # a second time, as almost nothing may be left of the first in a nearly full space
            orthonormalize(self.rows[:first], vectors, new)
            vectors = new.clone()
        self.pending += len(vectors)
        self._coupled = 0
        self._board[first:end, : self.known] = 0
        self._board[first:end, -1] = (torch.linalg.vector_norm(new, dim=1) > 0).to(torch.float64)

    # -- on the host ---------------------------------------------------------------------------------
    def look(self) -> bool:
        """Read the board: the one synchronization. Returns whether some direction had run out.

        Raises:
            FloatingPointError: products gave NaN or Inf.
            NotSymmetricError: two measurements of one entry of T disagree.
        """
        self._host = self._board.to("cpu", copy=True)
        if not bool(torch.isfinite(self._host).all()):
            raise FloatingPointError(
                "eigsh: products with op gave NaN or Inf; look at the weights and the data"
            )
        self.scale = max(self.scale, float(self._host[-1, -1]))
        used = self.known + self.pending
        alive = self._host[:used, -1] > 0
        if bool(alive.all()):
            self._check_symmetry()
            return False
        kept = alive.nonzero()[:, 0].tolist()
        for target, source in enumerate(kept):
            if target != source:
                self.rows[target].copy_(self.rows[source])
        matrix = self._host[kept][:, kept]
        self.known = int(alive[: self.known].sum())
        self.pending = len(kept) - self.known
        self._write(matrix)
        self._check_symmetry()
        return True

    def ritz(self) -> tuple[Tensor, Tensor, Tensor]:
        """Ritz values [n] ascending, coordinates [n, n] as columns, residual norms [n] as T and B have them."""
        n = self.known
        values, coordinates = torch.linalg.eigh(self._host[:n, :n], UPLO="U")
        self.scale = max([self.scale, *values.abs().tolist()])
        return values, coordinates, torch.linalg.vector_norm(self._coupling() @ coordinates, dim=0)

    def vectors(self, coordinates: Tensor) -> Tensor:
        """Ritz vectors as rows [k, P] from coordinates [n, k]."""
        return coordinates.mT.to(self.rows) @ self.rows[: self.known]

    def restart(self, values: Tensor, coordinates: Tensor, *, fresh: bool) -> None:
        """Keep the Ritz vectors of the given values [q] and coordinates [n, q].

        Goes on with the pending block, or (``fresh``) with random vectors: these see what the old start did
        not.
        """
        kept, n, p = len(values), self.known, self.pending
        rotation = coordinates.mT.to(self.rows)
        columns = _COLUMNS.get(self.rows.device.type, _MOST_COLUMNS)
        for start in range(0, self.rows.shape[1], columns):
            piece = self.rows[:, start : start + columns]
            piece[:kept] = rotation @ piece[:n]
        coupling = self._coupling() @ coordinates
        if fresh:
            self.dropped += float(coupling.norm())
            p = 0
        for i in range(p):
            self.rows[kept + i].copy_(self.rows[n + i])
        matrix = torch.zeros(kept + p, kept + p, dtype=torch.float64)
        matrix[range(kept), range(kept)] = values
        matrix[kept:, :kept] = coupling[:p]
        self.known, self.pending = kept, p
        self._write(matrix)
        self.fill()

    def _coupling(self) -> Tensor:
        return self._host[self.known : self.known + self.pending, : self.known]

    def _write(self, matrix: Tensor) -> None:
        """Put a new T with its B on the board, all rows alive."""
        used = len(matrix)
        self._coupled = 0
        board = torch.zeros_like(self._host)
        board[:used, :used] = matrix
        board[:used, -1] = 1
        board[-1, -1] = self.scale
        self._host = board
        self._board.copy_(board)

    def _check_symmetry(self) -> None:
        # what is above the diagonal was measured from A v_j; below it stands what A v_i said
        matrix = self._host[: self.known, : self.known]
        off = float((matrix - matrix.mT).abs().max()) if self.known else 0.0
        if off > (5e-2 if self._eps > 1e-10 else 1e-5) * self.scale + 2 * self.dropped:
            raise NotSymmetricError(
                f"op: it is not symmetric (two measurements of one projected entry differ by {off:.2g}, at a "
                f"scale of {self.scale:.2g}); eigsh needs A = Aᵀ"
            )

    # -- a run that goes on in another process --------------------------------------------------------
    def state(self) -> dict[str, Tensor]:
        """What a later process needs to go on exactly from here."""
        numbers = [self.known, self.pending, self.block, self._coupled, self.scale, self.dropped]
        return {
            "basis": self.rows[: self.known + self.pending],
            "board": self._board,
            "numbers": torch.tensor(numbers, dtype=torch.float64),
            "probes": self.probes.state(),
        }

    def resume(self, state: dict[str, Tensor]) -> None:
        """Take over what :meth:`state` gave."""
        *counts, self.scale, self.dropped = state["numbers"].tolist()
        self.known, self.pending, self.block, self._coupled = (int(count) for count in counts)
        self.rows[: len(state["basis"])] = state["basis"].to(self.rows)
        self._board.copy_(state["board"])
        self._host = state["board"].clone()
        self.probes.resume(state["probes"])
