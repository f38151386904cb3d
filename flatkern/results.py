"""Result objects: a value, its error, how it was obtained and what it cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

from flatkern.student import reaches

__all__ = ["Estimate", "HessianTrace", "PerSample"]


@dataclass(frozen=True)
class Estimate:
    """One number with its error bars.

    Two errors are kept apart and never merged:

    * ``stderr``: the estimator's own standard error, 0.0 when the value is exact for the given data;
    * ``sample_stderr``: the standard error of the mean over the ``num_data`` samples, i.e. how far the value
      may move with other samples of the same kind; ``None`` where it is not known.

    ``float(estimate)`` gives the value.
    """

    value: float
    stderr: float = 0.0
    sample_stderr: float | None = None
    method: str = "exact"
    num_data: int | None = None
    matvecs: int = 0
    passes: int = 0
    seconds: float = 0.0
    converged: bool = True
    samples: Tensor | None = field(default=None, repr=False)
    """The individual probe values of a stochastic estimate, [k]."""
    per_sample: Tensor | None = field(default=None, repr=False)
    """One value a data sample, [n], float64, whose (weighted) mean is ``value``."""
    per_layer: Mapping[str, float] | None = field(default=None, repr=False)
    """The value split by layer, where it is a sum over layers and the split was asked for."""
    per_parameter: Mapping[str, float] | None = field(default=None, repr=False)
    """Likewise by parameter."""
    notes: tuple[str, ...] = ()
    dof: int | None = None
    """Degrees of freedom of ``stderr``, where it was itself estimated: independent values less one, or fewer where
    these have a heavy tail."""
    skewness: float = 0.0
    """Estimated skewness of the estimator's error, by which the interval is shifted."""

    def __float__(self) -> float:
        return self.value

    def interval(self, level: float = 0.90) -> tuple[float, float]:
        """The interval value ± t · stderr that covers the estimator's target ``level`` of the time.

        t is Student's quantile with ``dof`` degrees of freedom (the normal one where there is no ``dof``); for a
        skewed error both ends move by skewness · (1 + 2 t²)/6 · stderr (Johnson, 1978); for an exact value both
        ends are the value. It is about ``stderr`` alone: what other data would give is not in it.

        Raises:
            ValueError: ``level`` is not between 0 and 1.

        Example:
            >>> from flatkern import Estimate
            >>> low, high = Estimate(value=10.0, stderr=1.0, dof=15).interval(0.90)
            >>> round(low, 3), round(high, 3)
            (8.247, 11.753)
        """
        below, above = reaches(level, self.stderr, self.dof, self.skewness)
        return self.value - below, self.value + above


@dataclass(frozen=True)
class HessianTrace(Estimate):
    """An :class:`Estimate` that also says which parameters were exact, and why the others were not."""

    exact: tuple[str, ...] = ()
    """Parameters whose part is exact: the outputs are piecewise affine in each of their entries."""
    sampled: Mapping[str, str] = field(default_factory=dict)
    """The other parameters, with the reason."""
    per_layer_stderr: Mapping[str, float] | None = field(default=None, repr=False)
    """The estimator's standard error of each layer's part."""


@dataclass(frozen=True)
class PerSample:
    """One number a sample, [n] (float64), with the mean over samples.

    Samples for which the quantity degenerates (a rank-deficient Jacobian has the log-volume −inf) are marked in
    ``degenerate``; they stay in ``values`` and are left out of ``mean`` and ``sample_stderr``.
    """

    values: Tensor
    degenerate: Tensor | None = field(default=None, repr=False)
    """bool [n]; ``None``: no sample is."""
    method: str = "exact"
    stderr: float = 0.0
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    per_layer: Mapping[str, Tensor] | None = field(default=None, repr=False)
    """``values`` split by layer, [n] each, where they are sums over layers and the split was asked for."""
    errors: Tensor | None = field(default=None, repr=False)
    """Where the values are estimates: the estimator's own standard error of each, [n]; ``stderr`` is their mean's."""
    lower: Tensor | None = field(default=None, repr=False)
    """A bound from below for each value, [n], where there is one beside the value; what it rests on is in ``notes``."""
    upper: Tensor | None = field(default=None, repr=False)
    """Likewise from above."""
    residuals: Tensor | None = field(default=None, repr=False)
    """For singular values found by iteration: a singular value lies within this distance, [n]."""

    @property
    def rank_deficient(self) -> int:
        """How many samples are degenerate."""
        return 0 if self.degenerate is None else int(self.degenerate.sum())

    @property
    def regular(self) -> Tensor:
        """The values of the non-degenerate samples."""
        return self.values if self.degenerate is None else self.values[~self.degenerate]

    @property
    def mean(self) -> float:
        """Mean over the non-degenerate samples; that of all (e.g. −inf) where there is none."""
        kept = self.regular if len(self.regular) else self.values
        return float(kept.mean())

    @property
    def sample_stderr(self) -> float | None:
        """Standard error of ``mean`` over the samples: sd/√n; ``None`` with fewer than two samples."""
        return standard_error(self.regular)

    def __len__(self) -> int:
        return len(self.values)


def standard_error(values: Tensor, own: float = 0.0) -> float | None:
    """Standard error of the mean of independent values [n] over their population: √(s²/n − own²).

    Args:
        values: [n].
        own: standard error that the mean has because each value is an estimate; it is in the spread and taken out.

    ``None`` with fewer than two values, and where ``own`` is not known (NaN).
    """
    if len(values) < 2 or own != own:
        return None
    return max(float(values.double().var()) / len(values) - own**2, 0.0) ** 0.5
