"""flatkern: how flat a loss is, how compressed a representation is, cheaply and with error bars.

Public names are exported here and nowhere else; see the README for a tour and each docstring for formula and cost.
"""

from importlib.metadata import PackageNotFoundError, version

from flatkern import kernels, losses
from flatkern.adaptive import AdaptiveSharpness, adaptive_sharpness
from flatkern.bounds import Bounds, Inequality, bounds
from flatkern.estimators import (
    Diagonal,
    Eigenpairs,
    FunctionTrace,
    Solution,
    SpectralDensity,
    diagonal,
    eigsh,
    logdet,
    solve,
    spectral_density,
    trace,
    trace_function,
)
from flatkern.flatness import ggn_trace, gradient_norms, sharpness
from flatkern.flatness_report import flatness
from flatkern.flatness_table import Flatness, Measure
from flatkern.geometry import Geometry, LayerGeometry, geometry
from flatkern.ggn_eigenvalues import GGNSpectrum, ggn_spectrum
from flatkern.ggn_entries import GGNEntries, ggn_diagonal, ggn_matrix
from flatkern.hessian_diagonal import HessianDiagonal, hessian_diagonal
from flatkern.kronecker import KFAC, kfac
from flatkern.max_eigenvalue import MaxEigenvalue, max_eigenvalue
from flatkern.monitor import Monitor
from flatkern.operators import LinearOperator, fisher, ggn, hessian, hvp, jacobian
from flatkern.planning import Plan, plan
from flatkern.relative_flatness import RelativeFlatness, relative_flatness
from flatkern.results import Estimate, HessianTrace, PerSample
from flatkern.tangent_kernel import ntk
from flatkern.traces import hessian_trace
from flatkern.volume import local_dimensionality, log_volume, max_sensitivity

try:
    __version__ = version("flatkern")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "KFAC",
    "AdaptiveSharpness",
    "Bounds",
    "Diagonal",
    "Eigenpairs",
    "Estimate",
    "Flatness",
    "FunctionTrace",
    "GGNEntries",
    "GGNSpectrum",
    "Geometry",
    "HessianDiagonal",
    "HessianTrace",
    "Inequality",
    "LayerGeometry",
    "LinearOperator",
    "MaxEigenvalue",
    "Measure",
    "Monitor",
    "PerSample",
    "Plan",
    "RelativeFlatness",
    "Solution",
    "SpectralDensity",
    "__version__",
    "adaptive_sharpness",
    "bounds",
    "diagonal",
    "eigsh",
    "fisher",
    "flatness",
    "geometry",
    "ggn",
    "ggn_diagonal",
    "ggn_matrix",
    "ggn_spectrum",
    "ggn_trace",
    "gradient_norms",
    "hessian",
    "hessian_diagonal",
    "hessian_trace",
    "hvp",
    "jacobian",
    "kernels",
    "kfac",
    "local_dimensionality",
    "log_volume",
    "logdet",
    "losses",
    "max_eigenvalue",
    "max_sensitivity",
    "ntk",
    "plan",
    "relative_flatness",
    "sharpness",
    "solve",
    "spectral_density",
    "trace",
    "trace_function",
]
