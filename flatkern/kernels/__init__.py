"""Kernels over torch tensors: log-determinants and Gram matrices, ghost norms, random probes, a Lanczos step,
attention, and activations, softmax, cross-entropy and layer norms with their second-order terms.

Every operator is an ordinary differentiable function (`grad`, `jvp`, `vmap`, second order, `torch.compile`),
and has two implementations with the same results: a pure-PyTorch reference and a compiled one (SIMD on the
CPU, CUDA where it was built); `attention` has the latter for CUDA only and no third derivatives, `ghost_gram` the
former only.
`FLATKERN_KERNELS=auto|compiled|reference`, read at import, chooses; `active()` says what was chosen and why.
`flatkern.native` offers the kernels over NumPy arrays.
"""

from ._activation_jets import (
    ActivationDerivatives,
    Jet,
    Pullback,
    activation_derivatives,
    activation_jet,
    activation_pullback,
)
from ._attention import attention
from ._ghost_gram import ghost_gram
from ._ghost_norm import conv_ghost_norm, ghost_norm
from ._gram import gram
from ._gram_spectrum import GramSpectrum, gram_singular_values, gram_spectrum
from ._gram_stats import GramStats, gram_stats
from ._lanczos_step import LanczosStep, lanczos_step
from ._norm_jets import layer_norm_curvature, layer_norm_tangent
from ._probes import normal, rademacher, rademacher_dot
from ._select import KernelInfo, active
from ._softmax_jets import CrossEntropyJet, cross_entropy_hvp, cross_entropy_jet, softmax_curvature
from ._spd_logdet import spd_logdet

__all__ = [
    "ActivationDerivatives",
    "CrossEntropyJet",
    "GramSpectrum",
    "GramStats",
    "Jet",
    "KernelInfo",
    "LanczosStep",
    "Pullback",
    "activation_derivatives",
    "activation_jet",
    "activation_pullback",
    "active",
    "attention",
    "conv_ghost_norm",
    "cross_entropy_hvp",
    "cross_entropy_jet",
    "ghost_gram",
    "ghost_norm",
    "gram",
    "gram_singular_values",
    "gram_spectrum",
    "gram_stats",
    "lanczos_step",
    "layer_norm_curvature",
    "layer_norm_tangent",
    "normal",
    "rademacher",
    "rademacher_dot",
    "softmax_curvature",
    "spd_logdet",
]
