"""What :func:`flatkern.geometry` returns."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from flatkern.operators.staleness import WeightsWatch
from flatkern.results import Estimate, PerSample, standard_error
from flatkern.spectra import Spectrum

__all__ = ["Geometry", "LayerGeometry"]


@dataclass(frozen=True)
class LayerGeometry:
    """One linear or convolutional layer z_t = W x_t + b: how the output f depends on its input x^l and its weight."""

    name: str
    max_sensitivity: PerSample
    """σ_max(∂f/∂x^l), [n]."""
    input_norm_sq: Tensor = field(repr=False)
    """‖x^l‖², float64 [n]."""
    weight_gradient_sq: Tensor | None = field(repr=False)
    """‖∂f/∂W_l‖_F², float64 [n]; ``None`` where the weight is not selected, frozen, or used elsewhere too."""
    module: nn.Module = field(repr=False)
    positions: int = 1
    """Positions of a sample that share the weight; 1 for a dense layer on vectors."""
    sole_consumer: bool = True
    """Whether f depends on x^l through this layer alone."""
    takes_model_input: bool = False
    """Whether x^l is the source (the model's input), at most reshaped."""
    log_volume: PerSample | None = field(default=None, repr=False)
    """log of the volumetric ratio of x^l → f, ½ log det of the Gram matrix of ∂f/∂x^l, [n]."""
    frobenius_sq: Tensor | None = field(default=None, repr=False)
    """‖∂f/∂x^l‖_F², float64 [n]."""
    bias_gradient_sq: Tensor | None = field(default=None, repr=False)
    """‖∂f/∂b_l‖_F², float64 [n]; ``None`` where there is no such bias, or as for the weight."""
    output_gradient_sq: Tensor | None = field(default=None, repr=False)
    """Σ_t ‖∂f/∂z_t‖_F², float64 [n]."""
    position_gradient_sq: Tensor | None = field(default=None, repr=False)
    """Σ_t ‖∂f/∂z_t‖_F² ‖x_t‖², float64 [n]: what ‖∂f/∂W‖_F² would be if no two positions shared the weight."""
    least_position_norm_sq: Tensor | None = field(default=None, repr=False)
    """min_t ‖x_t‖², float64 [n]; x_t is the patch for a convolution (of one group, where there are several)."""
    partners: tuple[str, ...] = ()
    """The other layers that take the same x^l, where with this one they are all that does (queries, keys, values)."""
    input_shape: torch.Size = field(default_factory=torch.Size)
    """Of one sample."""

    @property
    def mls(self) -> float:
        """(1/n) Σ_i σ_max(∂f/∂x^l at x_i)."""
        return self.max_sensitivity.mean


@dataclass(frozen=True)
class Geometry:
    """All quantities of one call; f has N entries a sample, x has M, J_i = ∂f/∂x at x_i is N × M.

    f is the target (of the chosen output subspace, where one was given) and x the source.
    """

    sharpness: Estimate
    """S_GN = (1/n) Σ ‖∂f_i/∂θ‖_F²."""
    log_volume: PerSample
    """log dV_i = ½ log det J_i J_iᵀ, [n]. ``notes`` say why where it is −inf."""
    max_sensitivity: PerSample
    """σ_max(J_i), [n]; by iteration a Ritz value, which is never too large, with ``residuals`` and ``upper``."""
    local_dimensionality: PerSample
    """(Tr C)²/Tr(C²) with C = J_i J_iᵀ, [n], between 1 and N."""
    mls: Estimate
    """(1/n) Σ σ_max(J_i)."""
    nmls: Estimate
    """Σ_l (1/n) Σ_i σ_max(∂f/∂x^l at x_i), over the layers measured."""
    normalized_mls: Estimate
    """(1/n) Σ ‖x_i‖² σ_max(J_i)²."""
    singular_values: Tensor = field(repr=False)
    """σ_j(J_i), descending, float64 [n, min(N, M)]; by iteration the leading ones that have converged, [n, c]."""
    layers: dict[str, LayerGeometry] = field(repr=False)
    input_norm_sq: Tensor = field(repr=False)
    """‖x_i‖², float64 [n]."""
    outputs: int = 0
    """N, the number of output entries a sample."""
    inputs: int = 0
    """M, the number of input entries a sample."""
    dtype: torch.dtype = torch.float32
    """The precision the Jacobians were computed in."""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()
    frobenius: PerSample = field(default_factory=lambda: PerSample(torch.empty(0)), repr=False)
    """‖J_i‖_F, [n]."""
    iimls: Estimate = field(default_factory=lambda: Estimate(math.nan), repr=False)
    """(1/n) Σ ‖J_i x_i‖²/M: the input-invariant MLS, of whatever nonlinearity the model ends with."""
    method: str = "cotangents"
    """``"cotangents"`` (exact, by N cotangents), ``"tangents"`` (exact, by M tangents) or ``"matrix-free"``."""
    passes: int = 0
    """Products with J_i or J_iᵀ a sample, one backward pass each."""
    rank_bound: int = 0
    """An upper bound on the rank of J_i read off the graph: min(N, M), or the narrowest place all paths go through."""
    source: str | None = None
    target: str | None = None
    pseudo_volume: PerSample | None = field(default=None, repr=False)
    """By iteration only: the estimate that :meth:`pseudo_log_volume` returns."""
    ranks: PerSample | None = field(default=None, repr=False)
    """By iteration only: the estimate that :attr:`rank` returns."""
    _spectrum: Spectrum | None = field(repr=False, default=None)
    _watch: WeightsWatch | None = field(repr=False, default=None)
    """Of the model's weights, by which it is noticed when they change."""

    def top_log_volume(self, rank: int) -> PerSample:
        """Σ_{j ≤ rank} log σ_j(J_i): the log-volume of the ``rank`` largest directions (the published curves: 3).

        Raises:
            ValueError: ``rank`` is not in 1 … min(N, M), or (by iteration) not so many singular values converged.
        """
        if self._spectrum is not None:
            return self._spectrum.log_volume(rank)
        found = self.singular_values.shape[1]
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= found:
            raise ValueError(
                f"rank: {found} singular values have converged, so it must be an integer from 1 to {found}, got "
                f"{rank!r}; ask for a smaller rtol or more max_steps, or for method='cotangents'"
            )
        return PerSample(self.singular_values[:, :rank].log().sum(1), method=self.max_sensitivity.method)

    def pseudo_log_volume(self, threshold: float | None = None) -> PerSample:
        """½ log of the pseudo-determinant: Σ log σ_j(J_i) over the σ_j > ``threshold`` · σ_max(J_i), [n].

        Args:
            threshold: relative to σ_max; default the rank tolerance 8 √N eps of the Jacobian's precision (stated in
                the result's ``notes``). By iteration only the default can be had.
        """
        if self._spectrum is not None:
            return self._spectrum.pseudo_log_volume(threshold)
        if self.pseudo_volume is None or threshold is not None:
            raise ValueError(
                "threshold: the matrix-free way estimates the pseudo-determinant at its default threshold only, and "
                "with volume_steps > 0; take method='cotangents' for another"
            )
        return self.pseudo_volume

    @property
    def rank(self) -> PerSample:
        """Numerical rank of J_i: how many σ_j exceed 8 √N eps σ_max; estimated in the matrix-free way."""
        if self._spectrum is not None:
            return PerSample(self._spectrum.rank().double())
        if self.ranks is None:
            raise ValueError("rank: the matrix-free way estimates it with volume_steps > 0 only")
        return self.ranks

    @property
    def stable_rank(self) -> PerSample:
        """‖J_i‖_F²/σ_max(J_i)², [n]; 0 (and marked) for a Jacobian that is zero."""
        return _ratio(self.frobenius.values.square(), self.max_sensitivity.values.square())

    @property
    def condition_number(self) -> PerSample:
        """σ_max(J_i)/σ_min(J_i) over the min(N, M) singular values, [n]; inf (and marked) where rank deficient.

        Raises:
            ValueError: by iteration, which does not find σ_min.
        """
        if self._spectrum is None:
            raise ValueError(
                "condition_number: the matrix-free way does not find the smallest singular value"
            )
        values, deficient = self._spectrum.condition_numbers()
        return PerSample(values, deficient)

    @property
    def log_lvr(self) -> Estimate:
        """log LVR, LVR = (1/n) Σ dV_i; a sample of deficient rank adds 0. ``sample_stderr``: that of LVR over LVR."""
        return log_mean(self.log_volume.values)

    @property
    def log_nvr(self) -> Estimate:
        """log NVR, NVR = Σ_l (1/n) Σ_i dV_i^l with the volumetric ratio of x^l → f, over the layers measured.

        Raises:
            ValueError: no layer was measured, or not its volume (which the matrix-free way does not give).
        """
        volumes = [layer.log_volume for layer in self.layers.values()]
        known = [v.values for v in volumes if v is not None]
        if not known or len(known) != len(volumes):
            raise ValueError("log_nvr: no layer's volume was measured; take method='cotangents', and layers")
        return log_mean(torch.logsumexp(torch.stack(known), 0))


def log_mean(logs: Tensor) -> Estimate:
    """log of the mean of exp(logs) [n]; the error over samples is that of the mean, relative to it."""
    top = float(logs.max())
    if top == -math.inf:
        return Estimate(-math.inf, num_data=len(logs), per_sample=logs)
    scaled = (logs - top).exp()
    error = standard_error(scaled)
    return Estimate(
        math.log(float(scaled.mean())) + top,
        sample_stderr=None if error is None else error / float(scaled.mean()),
        num_data=len(logs),
        per_sample=logs,
    )


def mean_of(values: Tensor, seconds: float, *, passes: int = 1, method: str = "exact") -> Estimate:
    """The mean over samples [n] as an :class:`Estimate`."""
    return Estimate(
        float(values.mean()),
        sample_stderr=standard_error(values),
        method=method,
        num_data=len(values),
        passes=passes,
        seconds=seconds,
        per_sample=values,
    )


def _ratio(above: Tensor, below: Tensor) -> PerSample:
    zero = below <= 0
    return PerSample(torch.where(zero, 0.0, above / torch.where(zero, 1.0, below)), zero)


def named_calls(names: Sequence[str]) -> list[str]:
    """``["a", "b", "a"]`` → ``["a", "b", "a#2"]``."""
    seen: dict[str, int] = {}
    out = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        out.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return out
