"""Small batched kernels over torch tensors: log-determinants, Gram matrices and their statistics, attention.

Every operator is an ordinary differentiable function (`grad`, `jvp`, `vmap`, second order, `torch.compile`),
and has two implementations with the same results: a pure-PyTorch reference and a compiled one (SIMD on the
CPU, CUDA where it was built); `attention` has the former only, and no third derivatives.
`FLATKERN_KERNELS=auto|compiled|reference`, read at import, chooses; `active()` says what was chosen and why.
`flatkern.native` offers the small matrices' kernels over NumPy arrays.
"""

from ._attention import attention
from ._gram import gram
from ._gram_spectrum import GramSpectrum, gram_singular_values, gram_spectrum
from ._gram_stats import GramStats, gram_stats
from ._select import KernelInfo, active
from ._spd_logdet import spd_logdet

__all__ = [
    "GramSpectrum",
    "GramStats",
    "KernelInfo",
    "active",
    "attention",
    "gram",
    "gram_singular_values",
    "gram_spectrum",
    "gram_stats",
    "spd_logdet",
]
