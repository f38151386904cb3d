"""Models as linear maps: Hessian and Gauss-Newton operators, their algebra, adapters for other operators."""

from flatkern.operators.adapters import as_operator
from flatkern.operators.algebra import Adjoint, Identity, Product, Scaled, Sum
from flatkern.operators.base import LinearOperator
from flatkern.operators.curvature import CurvatureOperator, OperatorInfo
from flatkern.operators.ggn_op import GGNOperator, ggn
from flatkern.operators.hessian_op import HessianOperator, hessian
from flatkern.operators.staleness import StaleOperatorError

__all__ = [
    "Adjoint",
    "CurvatureOperator",
    "GGNOperator",
    "HessianOperator",
    "Identity",
    "LinearOperator",
    "OperatorInfo",
    "Product",
    "Scaled",
    "StaleOperatorError",
    "Sum",
    "as_operator",
    "ggn",
    "hessian",
]
