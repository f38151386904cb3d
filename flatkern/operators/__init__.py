"""Models as linear maps: Hessian, Gauss-Newton, Fisher, Jacobian; their algebra; adapters for others."""

from flatkern.operators.adapters import as_operator
from flatkern.operators.algebra import Adjoint, Identity, Product, Scaled, Sum
from flatkern.operators.base import LinearOperator
from flatkern.operators.blocks import Block, BlockDiagonal
from flatkern.operators.curvature import CurvatureOperator
from flatkern.operators.fisher_op import FisherOperator, fisher
from flatkern.operators.ggn_op import GGNOperator, ggn
from flatkern.operators.hessian_op import HessianOperator, hessian, hvp
from flatkern.operators.jacobian_op import JacobianOperator, jacobian
from flatkern.operators.linearization import OperatorInfo
from flatkern.operators.staleness import StaleOperatorError

__all__ = [
    "Adjoint",
    "Block",
    "BlockDiagonal",
    "CurvatureOperator",
    "FisherOperator",
    "GGNOperator",
    "HessianOperator",
    "Identity",
    "JacobianOperator",
    "LinearOperator",
    "OperatorInfo",
    "Product",
    "Scaled",
    "StaleOperatorError",
    "Sum",
    "as_operator",
    "fisher",
    "ggn",
    "hessian",
    "hvp",
    "jacobian",
]
