"""Algorithms over any linear operator: trace, eigenpairs, spectral density."""

from flatkern.estimators.common import NotSymmetricError
from flatkern.estimators.eigenpairs import Eigenpairs, eigsh
from flatkern.estimators.slq import spectral_density
from flatkern.estimators.spectrum import SpectralCurve, SpectralDensity
from flatkern.estimators.stochastic_trace import trace

__all__ = [
    "Eigenpairs",
    "NotSymmetricError",
    "SpectralCurve",
    "SpectralDensity",
    "eigsh",
    "spectral_density",
    "trace",
]
