"""Operations that are left to torch's own forward mode, one tangent after another."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from flatkern.tape import Op, Value, substitute

from .rule import Rule, Tangent, register


@register(
    "glu", "glu_backward", "linalg_vector_norm", "norm", "_trilinear", "prod", "cumsum", "cumprod", "logsumexp", "var",
    "std",
)  # fmt: skip
class ForwardMode(Rule):
    """Dual numbers through the operation itself; the primal is computed anew for every tangent."""

    def __init__(self, op: Op, active: frozenset[int]) -> None:
        super().__init__(op, active)
        self.func = op.func
        self.primals = [next(v for v in op.inputs if v.index == i).tensor for i in self.inputs]

        def placed(v: Value) -> Tensor | _Place:
            return _Place(self.inputs.index(v.index)) if v.index in self.inputs else v.tensor

        self.args = [placed(a) if isinstance(a, Value) else a for a in op.args]
        self.kwargs = substitute(op.kwargs, lambda v: v.tensor)

    def run(self, tangents: Sequence[Tangent], owned: Sequence[bool]) -> Sequence[Tangent]:
        """See :class:`Rule`."""
        k = next(len(t) for t in tangents if t is not None)
        rows = []
        for i in range(k):
            with forward_ad.dual_level():
                duals = [
                    p if t is None else forward_ad.make_dual(p, t[i].contiguous())
                    for p, t in zip(self.primals, tangents, strict=True)
                ]
                image = self.func(
                    *(duals[a.position] if isinstance(a, _Place) else a for a in self.args), **self.kwargs
                )
                tangent = forward_ad.unpack_dual(image).tangent
                rows.append(torch.zeros_like(image) if tangent is None else tangent)
        return [torch.stack(rows)]


class _Place:
    """Stands for the input at a position."""

    def __init__(self, position: int) -> None:
        self.position = position
