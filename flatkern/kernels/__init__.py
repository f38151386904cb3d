"""Kernels over torch tensors: log-determinants and Gram matrices, random probes, a Lanczos step, attention.

Every operator is an ordinary differentiable function (`grad`, `jvp`, `vmap`, second order, `torch.compile`),
and has two implementations with the same results: a pure-PyTorch reference and a compiled one (SIMD on the
CPU, CUDA where it was built); `attention` has the former only, and no third derivatives.
`FLATKERN_KERNELS=auto|compiled|reference`, read at import, chooses; `active()` says what was chosen and why.
`flatkern.native` offers the small matrices' kernels over NumPy arrays.
"""

from ._attention import attention
from ._gram import gram
from ._gram_stats import GramStats, gram_stats
from ._lanczos_step import LanczosStep, lanczos_step
from ._probes import normal, rademacher, rademacher_dot
from ._select import KernelInfo, active
from ._spd_logdet import spd_logdet

__all__ = [
    "GramStats",
    "KernelInfo",
    "LanczosStep",
    "active",
    "attention",
    "gram",
    "gram_stats",
    "lanczos_step",
    "normal",
    "rademacher",
    "rademacher_dot",
    "spd_logdet",
]
