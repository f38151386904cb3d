"""The residual Σ_i r_i·∇²f_i on a chunk of samples: what the Hessian's trace has beyond the Gauss-Newton part.

Two ways to the quadratic form uᵀ∇²(r·f)u of one joint random change u at every entry: sites, where every operation has
a tangent rule; and a double backward pass through the recorded operations, for all others, which also splits the value
by layer.
"""

from flatkern.residual.chunk import Chunk, linearize
from flatkern.residual.double_backward import Twice
from flatkern.residual.sites import Sites

__all__ = ["Chunk", "Sites", "Twice", "linearize"]
