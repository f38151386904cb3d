"""Principal blocks of operators in parameter space: chosen parameters, and block-diagonal parts."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flatkern.operators.algebra import Composed
from flatkern.operators.base import LinearOperator
from flatkern.problem import Layout

__all__ = ["Block", "BlockDiagonal", "by_layer", "matching_names"]


def matching_names(layout: Layout | None, names: str | Sequence[str], what: str) -> tuple[str, ...]:
    """The layout's names that a name, a glob or a list of them selects, in the layout's order."""
    if layout is None:
        raise ValueError(f"{what}: this operator has no layout, i.e. does not act on named parameters")
    patterns = [names] if isinstance(names, str) else list(names)
    chosen: set[str] = set()
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise TypeError(f"names: expected names or globs (str), got {type(pattern).__name__}")
        hits = fnmatch.filter(layout.names, pattern)
        if not hits:
            raise ValueError(f"names: {pattern!r} matches no parameter; there are {', '.join(layout.names)}")
        chosen.update(hits)
    if not chosen:
        raise ValueError("names: an empty list selects no parameter")
    return tuple(name for name in layout.names if name in chosen)


def by_layer(layout: Layout) -> dict[str, tuple[str, ...]]:
    """Parameters grouped by the module that owns them: ``{"0": ("0.weight", "0.bias"), ...}``."""
    groups: dict[str, list[str]] = {}
    for name in layout.names:
        groups.setdefault(name.rpartition(".")[0], []).append(name)
    return {module: tuple(names) for module, names in groups.items()}


class Block(Composed):
    """A[S, S] for the entries S of some parameters; made by ``op.block(names)``.

    It shares everything with the operator it was taken from: kept graphs, staleness, ``refresh()`` there.
    A curvature operator multiplies with the block alone; any other embeds the vector in zeros.
    """

    layout: Layout

    def __init__(self, base: LinearOperator, names: str | Sequence[str]) -> None:
        base._check_square("block")
        self.names = matching_names(base.layout, names, "block")
        assert base.layout is not None
        shapes = base.layout.shapes
        layout = Layout({name: torch.empty(shapes[name], device="meta") for name in self.names})
        super().__init__(
            (layout.size, layout.size), base.dtype, base.device, symmetric=base.symmetric, layout=layout
        )
        self.base, self.semidefinite = base, base.semidefinite

    def _parts(self) -> tuple[LinearOperator, ...]:
        return (self.base,)

    def _settings(self) -> tuple[Any, ...]:
        return self.names

    def _rows(self, rows: Tensor) -> Tensor:
        return self.base._block_rows(rows, self.names)

    def _adjoint_rows(self, rows: Tensor) -> Tensor:
        return self.base.T._block_rows(rows, self.names)

    def _block_rows(self, rows: Tensor, names: Sequence[str]) -> Tensor:
        return self.base._block_rows(rows, names)


class BlockDiagonal(Composed):
    """The blocks of A on disjoint groups of parameters, zeros elsewhere; made by ``op.block_diagonal()``.

    Attributes:
        blocks: name of the group → its :class:`Block`.
    """

    layout: Layout

    def __init__(self, base: LinearOperator, groups: Mapping[str, str | Sequence[str]] | None = None) -> None:
        base._check_square("block_diagonal")
        if base.layout is None:
            raise ValueError("block_diagonal: this operator has no layout, i.e. does not act on parameters")
        self.blocks = {key: Block(base, names) for key, names in (groups or by_layer(base.layout)).items()}
        seen: set[str] = set()
        for key, block in self.blocks.items():
            twice = seen.intersection(block.names)
            if twice:
                raise ValueError(f"groups: {sorted(twice)[0]!r} is in {key!r} and in a group before it")
            seen.update(block.names)
        super().__init__(base.shape, base.dtype, base.device, symmetric=base.symmetric, layout=base.layout)
        self.base, self.semidefinite = base, base.semidefinite

    def _parts(self) -> tuple[LinearOperator, ...]:
        return tuple(self.blocks.values())

    def _rows(self, rows: Tensor) -> Tensor:
        return self._apply(rows, adjoint=False)

    def _adjoint_rows(self, rows: Tensor) -> Tensor:
        return self._apply(rows, adjoint=True)

    def _apply(self, rows: Tensor, *, adjoint: bool) -> Tensor:
        out = torch.zeros_like(rows)
        for block in self.blocks.values():
            columns = [self.layout.slices[name] for name in block.names]
            part = torch.cat([rows[:, c] for c in columns], dim=1)
            image = block._adjoint_rows(part) if adjoint else block._rows(part)
            for name in block.names:
                out[:, self.layout.slices[name]] = image[:, block.layout.slices[name]]
        return out
