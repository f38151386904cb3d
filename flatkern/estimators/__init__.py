"""Algorithms over any linear operator: trace, diagonal, eigenpairs, spectral density."""

from flatkern.estimators.common import NotSymmetricError
from flatkern.estimators.diagonal import Diagonal, diagonal
from flatkern.estimators.eigenpairs import Eigenpairs, eigsh
from flatkern.estimators.slq import spectral_density
from flatkern.estimators.spectrum import SpectralCurve, SpectralDensity
from flatkern.estimators.stochastic_trace import trace

__all__ = [
    "Diagonal",
    "Eigenpairs",
    "NotSymmetricError",
    "SpectralCurve",
    "SpectralDensity",
    "diagonal",
    "eigsh",
    "spectral_density",
    "trace",
]
