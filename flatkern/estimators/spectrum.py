"""A spectral density as quadrature: nodes and weights of each probe, and what can be read from them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flatkern.estimators.common import check_count, check_positive
from flatkern.results import Estimate, standard_error

__all__ = ["SpectralCurve", "SpectralDensity", "merge_close"]

_NEGLIGIBLE = 1e-6
"""Eigenvalues that a node has to stand for to be shown: without re-orthogonalization, rounding adds nodes of
weight 1e-14 and less beside converged ones, too far from them to be merged."""


@dataclass(frozen=True)
class SpectralCurve:
    """A function on a grid with its pointwise standard error over probes (``None`` with one probe)."""

    grid: Tensor
    values: Tensor
    stderr: Tensor | None


@dataclass(frozen=True)
class SpectralDensity:
    """The distribution of the eigenvalues, (1/P) Σ_i δ(λ − λ_i), as k probes see it.

    Everything is float64 on the host. All errors are standard errors over the probes; what m steps cannot
    resolve comes on top.
    """

    nodes: Tensor = field(repr=False)
    """[k, m] ascending a probe; nodes of a probe that rounding cannot tell apart are merged into one."""
    weights: Tensor = field(repr=False)
    """[k, m], each row sums to 1; 0 for nodes merged into another."""
    moments: Tensor
    """[5] estimates of Tr A^j / P, j = 0 to 4."""
    stderr: Tensor | None
    """[5] standard errors of ``moments``; ``None`` with one probe."""
    size: int
    """P, the number of eigenvalues."""
    matvecs: int
    seconds: float
    resolution: float = field(repr=False)
    """Nodes closer than this are one."""
    converged: bool = True
    """Whether all steps that were asked for have been made."""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse NaN and Inf."""
        if not bool(torch.isfinite(self.nodes).all() and torch.isfinite(self.weights).all()):
            raise FloatingPointError("spectral_density: nodes or weights are NaN or Inf")

    def moment(self, degree: int) -> Estimate:
        """Tr A^degree / P with its standard error; each probe's own value is exact up to degree 2 m − 1."""
        check_count(degree, "degree", least=0)
        values = (self.weights * self.nodes**degree).sum(1)
        return Estimate(
            value=float(values.mean()),
            stderr=standard_error(values) or 0.0,
            method="stochastic Lanczos quadrature",
            matvecs=self.matvecs,
            seconds=self.seconds,
            samples=values,
        )

    def merged(self) -> tuple[Tensor, Tensor]:
        """Nodes of all probes as one ascending list with weights that sum to 1, coinciding ones merged; for
        stems.

        A node of weight w stands for about w · ``size`` eigenvalues; those of less than 1e-6 are left out.
        """
        nodes, order = self.nodes.reshape(-1).sort()
        weights = (self.weights / len(self.weights)).reshape(-1)[order]
        nodes, weights = merge_close(nodes[None], weights[None], self.resolution)
        kept = weights[0] * self.size > _NEGLIGIBLE
        return nodes[0][kept], weights[0][kept]

    def density(self, grid: Any = None, sigma: float | None = None) -> SpectralCurve:
        """The density broadened by a Gaussian, Σ_j w_j N(grid; θ_j, σ²), the mean over probes; integrates to
        1.

        Args:
            grid: points; default 512 from 4 σ below the lowest to 4 σ above the highest node.
            sigma: standard deviation of the Gaussian; default 1 % of the distance between the outermost
                nodes.
        """
        width = check_positive(sigma, "sigma") or self._default_sigma()
        points = self._grid(grid, width)
        # one probe at a time: [grid, m] is the largest table
        curves = [
            torch.exp(-0.5 * ((points[:, None] - theta) / width) ** 2) @ (w / (width * (2 * torch.pi) ** 0.5))
            for theta, w in zip(self.nodes, self.weights, strict=True)
        ]
        return _curve(points, curves)

    def cumulative(self, grid: Any = None) -> SpectralCurve:
        """The share of eigenvalues ≤ each grid point, the mean over probes; no broadening."""
        points = self._grid(grid, self._default_sigma())
        curves = [
            (theta <= points[:, None]).to(w) @ w for theta, w in zip(self.nodes, self.weights, strict=True)
        ]
        return _curve(points, curves)

    def plot(
        self, ax: Any = None, *, grid: Any = None, sigma: float | None = None, label: str | None = None
    ) -> Any:
        """Draw the broadened density, logarithmic, with a band of one standard error; returns the axes."""
        if ax is None:
            import matplotlib.pyplot as plt

            ax = plt.subplots()[1]
        curve = self.density(grid, sigma)
        # below a tenth of one eigenvalue at the peak of its Gaussian there is nothing to see
        width = sigma or self._default_sigma()
        floor = 0.1 / (self.size * width * (2 * torch.pi) ** 0.5)
        x, y = curve.grid.numpy(), curve.values.clamp(min=floor).numpy()
        (line,) = ax.semilogy(x, y, label=label)
        if curve.stderr is not None:
            low = (curve.values - curve.stderr).clamp(min=floor).numpy()
            high = (curve.values + curve.stderr).clamp(min=floor).numpy()
            ax.fill_between(x, low, high, color=line.get_color(), alpha=0.25, linewidth=0)
        ax.set_ylim(bottom=floor)
        ax.set_xlabel("eigenvalue")
        ax.set_ylabel("density")
        if label is not None:
            ax.legend()
        return ax

    def _extent(self) -> tuple[float, float]:
        nodes, _ = self.merged()
        return float(nodes[0]), float(nodes[-1])

    def _default_sigma(self) -> float:
        low, high = self._extent()
        # a single eigenvalue has no spread: its own size gives the width, or 1 for a zero operator
        return 0.01 * ((high - low) or abs(high) or 1.0)

    def _grid(self, grid: Any, width: float) -> Tensor:
        if grid is None:
            low, high = self._extent()
            return torch.linspace(low - 4 * width, high + 4 * width, 512, dtype=torch.float64)
        points = torch.as_tensor(grid, dtype=torch.float64).detach().cpu()
        if points.ndim != 1 or len(points) == 0 or not bool(torch.isfinite(points).all()):
            raise ValueError(
                f"grid: expected finite points in one dimension, got shape {tuple(points.shape)}"
            )
        return points


def _curve(points: Tensor, curves: list[Tensor]) -> SpectralCurve:
    table = torch.stack(curves)
    stderr = table.std(0) / len(curves) ** 0.5 if len(curves) > 1 else None
    return SpectralCurve(points, table.mean(0), stderr)


def merge_close(nodes: Tensor, weights: Tensor, resolution: float) -> tuple[Tensor, Tensor]:
    """Merge ascending nodes [k, m] whose neighbours are no farther than ``resolution``, in each row.

    Without re-orthogonalization Lanczos finds a converged eigenvalue again and again; only the copies' total
    weight means something. A group's first node takes its weighted mean and its total weight, the others keep
    weight 0.
    """
    gap = torch.diff(nodes, dim=1, prepend=nodes[:, :1] - 2 * resolution - 1.0)
    group = (gap > resolution).cumsum(1) - 1  # [k, m], the index of a node's group within its row
    total = torch.zeros_like(weights).scatter_add_(1, group, weights)
    # relative to the first node of a group, as means of nearly equal numbers lose nothing this way
    anchor = torch.full_like(nodes, float("inf")).scatter_reduce_(1, group, nodes, "amin")
    drift = torch.zeros_like(nodes).scatter_add_(1, group, weights * (nodes - anchor.gather(1, group)))
    centre = anchor + torch.where(total > 0, drift / total.clamp(min=torch.finfo(total.dtype).tiny), 0.0)
    first = gap > resolution
    return centre.gather(1, group), torch.where(first, total.gather(1, group), 0.0)
