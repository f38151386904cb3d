"""What a trace of a matrix function by quadrature says: value, sampling error, and bounds, each apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flatkern.estimators.common import NotDefiniteError
from flatkern.estimators.quadrature import SIGNS, DerivativeSigns, Tridiagonals, check_signs
from flatkern.results import Estimate
from flatkern.student import reaches

__all__ = ["FunctionTrace", "Integrand", "Values"]


@dataclass(frozen=True)
class FunctionTrace(Estimate):
    """Tr f(A) from probes, each by quadrature.

    Two errors beside each other: ``stderr`` is that of sampling, over the probes; ``lower`` and ``upper`` enclose
    what the mean over these very probes would be with exact arithmetic and all steps. A side that is ``proven``
    is a bound (Gauss or Gauss–Radau, to rounding); one that is not is an indication: the value ∓ what the last
    quarter of the steps changed.
    """

    lower: float = float("nan")
    upper: float = float("nan")
    proven: tuple[bool, bool] = (False, False)
    """Whether ``lower`` and ``upper`` are bounds."""
    steps: int = 0
    """Lanczos steps a probe; 0 where the value is exact."""

    def interval(self, level: float = 0.9) -> tuple[float, float]:
        """The interval that covers the truth with probability ``level``: Student's t on both sides of the bracket.

        lower − t · stderr to upper + t · stderr, shifted where the probes' values are skewed as
        :meth:`Estimate.interval <flatkern.results.Estimate.interval>` is.

        Raises:
            ValueError: ``level`` is not between 0 and 1.
        """
        below, above = reaches(level, self.stderr, self.dof, self.skewness)
        return self.lower - below, self.upper + above


@dataclass(frozen=True)
class Values:
    """One number a probe, each [k] float64."""

    value: Tensor
    lower: Tensor
    upper: Tensor

    @staticmethod
    def joined(parts: list[Values]) -> Values:
        """Those of several groups as one."""
        return Values(*(torch.cat([getattr(p, n) for p in parts]) for n in ("value", "lower", "upper")))

    @property
    def width(self) -> float:
        """Mean distance of the two bounds."""
        return float((self.upper - self.lower).mean())


@dataclass(frozen=True)
class Integrand:
    """A function, what is known of its derivatives' signs, and where the spectrum is known to lie."""

    f: Callable[[Tensor], Tensor]
    signs: DerivativeSigns | None
    floor: float | None
    ceiling: float | None
    definite: bool
    eps: float
    """Of the operator's dtype."""

    @property
    def proven(self) -> tuple[bool, bool]:
        """Which sides of the bracket are bounds."""
        sides = {s for s, _ in self._bounds()}
        return ("lower" in sides, "upper" in sides)

    def check_range(self, low: float, high: float) -> None:
        """Refuse eigenvalues or Ritz values that contradict what is claimed.

        Raises:
            NotDefiniteError: not positive although that is needed.
            ValueError: outside ``floor`` and ``ceiling`` by more than rounding.
        """
        largest = max(abs(low), abs(high))
        slack = self._slack(low, high)
        if self.definite and (low < -slack or (low <= 0 and self.floor is None)):
            raise NotDefiniteError(
                f"op: it is not positive definite, its smallest Ritz value is {low:.6g} (the largest {high:.6g}); "
                "take op.shift(delta) or the GGN"
            )
        if self.definite and self.floor is None and low <= 4 * self.eps * largest:
            raise NotDefiniteError(
                f"op: it is singular to rounding, its smallest Ritz value is {low:.6g} beside {high:.6g}; take "
                "op.shift(delta), or float64"
            )
        if self.floor is not None and low < self.floor - slack:
            raise ValueError(
                f"floor: {self.floor:.6g} is no lower bound, the Ritz value {low:.6g} lies below it"
            )
        if self.ceiling is not None and high > self.ceiling + slack:
            raise ValueError(
                f"ceiling: {self.ceiling:.6g} is no upper bound, the Ritz value {high:.6g} lies above"
            )
        if self.signs is not None:
            least = low if self.floor is None else max(low, self.floor)
            check_signs(self.f, SIGNS[self.signs], least, high)

    def evaluate(self, runs: Tridiagonals) -> Values:
        """∫ f of each run's spectral measure, and its bracket."""
        gauss = runs.gauss()
        low, high = float(gauss.nodes.min()), float(gauss.nodes.max())
        self.check_range(low, high)
        value = gauss.integrate(self.f, least=self.floor)
        drift = self._drift(runs, value)
        sides: dict[str, list[Tensor]] = {"lower": [], "upper": []}
        for side, end in self._bounds():
            sides[side].append(value if end is None else self._radau(runs, end, low, high))
        lower = torch.stack(sides["lower"]).amax(0) if sides["lower"] else value - drift
        upper = torch.stack(sides["upper"]).amin(0) if sides["upper"] else value + drift
        lower, upper = (
            torch.minimum(lower, upper),
            torch.maximum(lower, upper),
        )  # equal ones may cross by rounding
        if all(self.proven):
            value = 0.5 * (lower + upper)
        return Values(value, lower, upper)

    def _bounds(self) -> list[tuple[str, str | None]]:
        """(side, where the Radau node lies; None for Gauss) of each bound that the signs give."""
        if self.signs is None:
            return []
        even, odd = SIGNS[self.signs]
        bounds: list[tuple[str, str | None]] = [("lower" if even > 0 else "upper", None)]
        if self.floor is not None:
            bounds.append(("lower" if odd > 0 else "upper", "floor"))
        if self.ceiling is not None:
            bounds.append(("upper" if odd > 0 else "lower", "ceiling"))
        return bounds

    def _slack(self, low: float, high: float) -> float:
        return 64 * self.eps * max(abs(low), abs(high))

    def _radau(self, runs: Tridiagonals, end: str, low: float, high: float) -> Tensor:
        # a node among the Ritz values would push another one out of the spectrum: keep off by rounding size
        slack = self._slack(low, high)
        if end == "floor":
            assert self.floor is not None
            node = min(self.floor, low - slack)
        else:
            assert self.ceiling is not None
            node = max(self.ceiling, high + slack)
        return runs.radau(node).integrate(self.f, least=self.floor)

    def _drift(self, runs: Tridiagonals, value: Tensor) -> Tensor:
        """What the last quarter of the steps changed; 0 for a run that has exhausted its Krylov space."""
        fewer = runs.steps - max(1, runs.steps // 4)
        if fewer:
            change = (runs.truncated(fewer).gauss().integrate(self.f, least=self.floor) - value).abs()
        else:
            change = torch.full_like(value, float("inf"))
        return torch.where(runs.off_diagonal[:, -1] == 0, 0.0, change)
