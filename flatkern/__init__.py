"""flatkern: how flat a loss is, how compressed a representation is, cheaply and with error bars.

Public names are exported here and nowhere else; see the README for a tour and each docstring for formula and cost.
"""

from importlib.metadata import PackageNotFoundError, version

from flatkern import kernels
from flatkern.bounds import Bounds, Inequality, bounds
from flatkern.estimators import (
    Diagonal,
    Eigenpairs,
    SpectralDensity,
    diagonal,
    eigsh,
    spectral_density,
    trace,
)
from flatkern.flatness import ggn_trace, sharpness
from flatkern.geometry import Geometry, LayerGeometry, geometry
from flatkern.operators import LinearOperator, fisher, ggn, hessian, hvp, jacobian
from flatkern.results import Estimate, PerSample
from flatkern.volume import local_dimensionality, log_volume, max_sensitivity

try:
    __version__ = version("flatkern")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Bounds",
    "Diagonal",
    "Eigenpairs",
    "Estimate",
    "Geometry",
    "Inequality",
    "LayerGeometry",
    "LinearOperator",
    "PerSample",
    "SpectralDensity",
    "__version__",
    "bounds",
    "diagonal",
    "eigsh",
    "fisher",
    "geometry",
    "ggn",
    "ggn_trace",
    "hessian",
    "hvp",
    "jacobian",
    "kernels",
    "local_dimensionality",
    "log_volume",
    "max_sensitivity",
    "sharpness",
    "spectral_density",
    "trace",
]
