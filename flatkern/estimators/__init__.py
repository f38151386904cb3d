"""Algorithms over any linear operator: trace, diagonal, eigenpairs, density, log-determinant, linear solves."""

from flatkern.estimators.common import NotDefiniteError, NotSymmetricError
from flatkern.estimators.diagonal import Diagonal, diagonal
from flatkern.estimators.eigenpairs import Eigenpairs, eigsh
from flatkern.estimators.function_trace import FunctionTrace
from flatkern.estimators.linear_solve import Solution, solve
from flatkern.estimators.log_determinant import logdet
from flatkern.estimators.matrix_function import trace_function
from flatkern.estimators.slq import spectral_density
from flatkern.estimators.spectrum import SpectralCurve, SpectralDensity
from flatkern.estimators.stochastic_trace import trace

__all__ = [
    "Diagonal",
    "Eigenpairs",
    "FunctionTrace",
    "NotDefiniteError",
    "NotSymmetricError",
    "Solution",
    "SpectralCurve",
    "SpectralDensity",
    "diagonal",
    "eigsh",
    "logdet",
    "solve",
    "spectral_density",
    "trace",
    "trace_function",
]
