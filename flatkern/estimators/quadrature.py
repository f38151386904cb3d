"""Gauss and Gauss–Radau quadrature of Jacobi matrices, and which of them bound an integral."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

__all__ = ["SIGNS", "DerivativeSigns", "Rule", "Tridiagonals", "check_signs"]

DerivativeSigns = Literal["completely_monotone", "bernstein", "absolutely_monotone"]

SIGNS: dict[str, tuple[int, int]] = {
    "completely_monotone": (1, -1),
    "bernstein": (-1, 1),
    "absolutely_monotone": (1, 1),
}
"""Signs of the derivatives of even order (2 and up) and of odd order."""


@dataclass(frozen=True)
class Rule:
    """Nodes and weights [k, m] of k quadratures; ascending nodes, the weights of a run sum to 1."""

    nodes: Tensor
    weights: Tensor

    def integrate(self, f: Callable[[Tensor], Tensor], *, least: float | None = None) -> Tensor:
        """Σ_j w_j f(θ_j), [k]; nodes below ``least``, which rounding alone can give, are taken there.

        Raises:
            TypeError, ValueError: f does not map a float64 tensor to one of its shape, or is NaN or Inf at a node.
        """
        nodes = self.nodes if least is None else self.nodes.clamp(min=least)
        values = f(nodes.reshape(-1).clone())
        if not isinstance(values, Tensor):
            raise TypeError(f"f: expected a tensor, got {type(values).__name__}; use torch functions")
        if values.shape != (nodes.numel(),) or values.dtype != torch.float64:
            raise ValueError(
                f"f: expected float64 values of shape {[nodes.numel()]}, one a point, got {values.dtype} "
                f"{list(values.shape)}"
            )
        values = values.detach().view_as(nodes)
        wrong = ~torch.isfinite(values) & (self.weights > 0)
        if bool(wrong.any()):
            at, value = float(nodes[wrong][0]), float(values[wrong][0])
            raise ValueError(f"f: its value is {value} at the Ritz value {at:.6g}; it must be finite there")
        return (self.weights * torch.where(self.weights > 0, values, 0.0)).sum(1)


@dataclass(frozen=True)
class Tridiagonals:
    """The Jacobi matrices of k Lanczos runs of m steps, on the host in float64."""

    diagonal: Tensor
    """[k, m]"""
    off_diagonal: Tensor
    """[k, m]; the last column couples to the vector that would come next."""

    @staticmethod
    def of_runs(diagonal: Tensor, off_diagonal: Tensor) -> Tridiagonals:
        """From recurrences of which some went on with zero vectors, once a coupling was 0.

        What follows has weight 0; its entries are set to the first one, a value inside the spectrum, so that a
        function has a value there.
        """
        dead = torch.zeros_like(diagonal, dtype=torch.bool)
        dead[:, 1:] = (off_diagonal[:, :-1] == 0).cumsum(1) > 0
        return Tridiagonals(torch.where(dead, diagonal[:, :1], diagonal), off_diagonal)

    @property
    def steps(self) -> int:
        """The order m."""
        return self.diagonal.shape[1]

    def truncated(self, steps: int) -> Tridiagonals:
        """What the first ``steps`` steps gave."""
        return Tridiagonals(self.diagonal[:, :steps], self.off_diagonal[:, :steps])

    def gauss(self) -> Rule:
        """The m nodes of Gauss quadrature: exact for polynomials of degree up to 2 m − 1."""
        return _rule(self.diagonal, self.off_diagonal[:, :-1])

    def radau(self, node: float | Tensor) -> Rule:
        """The m + 1 nodes of Gauss–Radau quadrature with one at ``node``, outside the Ritz values; degree 2 m.

        ``node`` may be one for each run, [k].

        Source: Golub, "Some modified matrix eigenvalue problems", SIAM Review 15 (1973).
        """
        # pivots of T − node I; the last one is β_m² e_mᵀ (T − node I)⁻¹ e_m turned over
        pivot = self.diagonal[:, 0] - node
        for j in range(1, self.steps):
            pivot = self.diagonal[:, j] - node - self.off_diagonal[:, j - 1].square() / pivot
        last = self.off_diagonal[:, -1]
        added = torch.where(last > 0, node + last.square() / pivot, node)
        return _rule(torch.cat([self.diagonal, added[:, None]], dim=1), self.off_diagonal)


def _rule(diagonal: Tensor, off_diagonal: Tensor) -> Rule:
    matrices = torch.diag_embed(diagonal)
    if off_diagonal.shape[1]:
        matrices = matrices + torch.diag_embed(off_diagonal, offset=1)
        matrices = matrices + torch.diag_embed(off_diagonal, offset=-1)
    nodes, vectors = torch.linalg.eigh(matrices)
    return Rule(nodes, vectors[:, 0].square())


def check_signs(f: Callable[[Tensor], Tensor], signs: tuple[int, int], low: float, high: float) -> None:
    """Refuse a function whose first three divided differences contradict the signs it is said to have.

    Raises:
        ValueError: they do.
    """
    if not high > low:
        return
    points = torch.linspace(low, high, 17, dtype=torch.float64)
    even, odd = signs
    table = f(points.clone())
    if not bool(torch.isfinite(table).all()):
        return  # said where it matters, at a node
    rounding = 64 * torch.finfo(torch.float64).eps * float(table.abs().max())
    for order, sign in ((1, odd), (2, even), (3, odd)):
        table, rounding = table.diff(), 2 * rounding
        if bool((sign * table < -rounding).any()):
            raise ValueError(
                f"bracket: f's differences of order {order} have the other sign between {low:.3g} and {high:.3g}; "
                "the bounds would not hold. Take bracket=None, or another class"
            )
