"""Where Tr H = Tr GGN exactly: parameters in whose every single entry the outputs are piecewise affine.

H_kk − (JᵀH_L J)_kk = Σ_i Σ_c ∂ℓ_i/∂f_c · ∂²f_c/∂θ_k², so the two have one diagonal entry where every output is
(piecewise) affine in the scalar θ_k with all other entries fixed. That is read off the autograd graph of a run: a
degree in {0, 1, ∞} a parameter and node. A leaf has 1; linear and piecewise-linear operations keep it; sums,
concatenations and choices take the largest; products add; everything else makes ∞ of 1. It is a statement about the
almost-everywhere Hessian, the one autograd computes: kinks are not seen.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from flatkern.graph import in_order
from flatkern.kernels._attention_autograd import is_attention
from flatkern.tape import Tape

__all__ = ["Degree", "custom_function", "degrees", "hidden_parameters"]


@dataclass(frozen=True)
class Degree:
    """How the outputs depend on one parameter."""

    value: float
    """0 (they do not), 1 (affine in each entry, piecewise) or ``inf`` (not proven)."""
    reason: str = ""
    """Why it is not proven: the operation that spoiled it."""

    @property
    def proven(self) -> bool:
        """Whether the second derivative of every output in every single entry is 0 almost everywhere."""
        return self.value <= 1


# linear in all their differentiable inputs together, or piecewise so: degrees are kept, the largest counts
_KEEP = frozenset(
    """
    Abs AdaptiveAvgPool1D AdaptiveAvgPool2D AdaptiveAvgPool3D AdaptiveMaxPool2D AdaptiveMaxPool3D Add Alias Amax Amin
    AsStrided AvgPool2D AvgPool3D Block Cat Clamp ClampMax ClampMin Clone Col2Im ConstantPadNd Copy Cummax Cummin Cumsum
    Diagonal DiagonalScatter Embedding Expand Flip Gather Hardshrink Hardsigmoid Hardtanh Im2Col Index IndexAdd
    IndexSelect Kthvalue LeakyRelu MaskedFill MaskedScatter MaskedSelect Max MaxPool2DWithIndices MaxPool3DWithIndices
    Maximum Mean Median Min Minimum MkldnnMaxPool2D Nanmean Nansum Neg Permute PixelShuffle PixelUnshuffle
    ReflectionPad1D ReflectionPad2D ReflectionPad3D Relu Repeat ReplicationPad1D ReplicationPad2D ReplicationPad3D
    ReshapeAlias Roll Rot90 Rsub Scatter ScatterAdd Select SelectScatter Slice SliceScatter Softshrink Sort Split
    SplitWithSizes Squeeze Stack Sub Sum T Threshold ToCopy Topk Trace Transpose Tril Triu Unbind Unfold UnsafeSplit
    UnsafeSplitWithSizes UnsafeView Unsqueeze UpsampleBicubic2D UpsampleBilinear2D UpsampleLinear1D UpsampleNearest1D
    UpsampleNearest2D UpsampleNearest3D UpsampleNearestExact1D UpsampleNearestExact2D UpsampleNearestExact3D
    UpsampleTrilinear3D View ViewAs Where MaxUnpool2D MaxUnpool3D ChannelShuffle IndexFill Movedim Zero Fill
    """.split()  # noqa: SIM905
)
# positions of the arguments with a derivative: (those multiplied with each other, those added to the product)
_PRODUCTS: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "Addbmm": ((1, 2), (0,)),
    "Addcmul": ((1, 2), (0,)),
    "Addmm": ((1, 2), (0,)),
    "Addmv": ((1, 2), (0,)),
    "Addr": ((1, 2), (0,)),
    "Baddbmm": ((1, 2), (0,)),
    "Bmm": ((0, 1), ()),
    "Convolution": ((0, 1), (2,)),
    "CudnnConvolution": ((0, 1), ()),
    "Dot": ((0, 1), ()),
    "Linear": ((0, 1), (2,)),
    "MiopenConvolution": ((0, 1), (2,)),
    "MkldnnConvolution": ((0, 1), (2,)),
    "Mm": ((0, 1), ()),
    "Mul": ((0, 1), ()),
    "Mv": ((0, 1), ()),
    "PreluKernel": ((0, 1), ()),
    "WeightNormInterface": ((1,), ()),  # the magnitude g; the direction v has no place in it
}
# scaled and shifted after a nonlinear map of input 0: (weights, shifts)
_NORMALIZED: Mapping[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "NativeLayerNorm": ((1,), (2,)),
    "NativeGroupNorm": ((1,), (2,)),
    "FusedRmsNorm": ((1,), ()),
}
_BATCH_NORMS = ("NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")
# softmax(q kᵀ) v: linear in v alone
_ATTENTION = "ScaledDotProduct"

_Masks = tuple[int, int]
"""Parameters of degree at least 1, and those of degree ∞, as bits."""


def _operation(node: Node) -> str:
    return node.name().rstrip("0123456789").removesuffix("Backward")


def degrees(
    output: Tensor, parameters: Mapping[str, Tensor], hidden: Mapping[str, str] | None = None
) -> dict[str, Degree]:
    """The degree of ``output`` in each parameter, by one walk over its autograd graph.

    Args:
        output: a model's output.
        parameters: leaves, by name.
        hidden: parameters that also act where autograd does not see them, with the reason
            (:func:`hidden_parameters`); they count as not proven.

    Returns:
        A :class:`Degree` for every parameter. An operation that is not known to be (piecewise) affine gives ``inf``
        and is named in ``reason``: never a wrong proof, sometimes a missing one.

    Cost: about 0.3 ms for an MLP; all parameters share the walk.

    Example:
        >>> import torch
        >>> from flatkern.affine import degrees
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.ReLU(), torch.nn.Linear(3, 1))
        >>> found = degrees(model(torch.ones(1, 2)), dict(model.named_parameters()))
        >>> all(degree.proven for degree in found.values())
        True
    """
    names = list(parameters)
    bit = {id(p): 1 << i for i, p in enumerate(parameters.values())}
    reasons: dict[int, str] = {}
    masks: dict[Node, _Masks] = {}
    for node in in_order(output.grad_fn):
        if hasattr(node, "variable"):
            masks[node] = (bit.get(id(node.variable), 0), 0)
            continue
        known = masks.get
        inputs = [(0, 0) if n is None else known(n, (0, 0)) for n, _ in node.next_functions]
        reached, spoiled = _combine(node, inputs)
        fresh = spoiled
        for _, before in inputs:
            fresh &= ~before
        while fresh:  # each parameter is spoiled for the first time only a few times
            low = fresh & -fresh
            reasons.setdefault(low.bit_length() - 1, _operation(node))
            fresh ^= low
        masks[node] = (reached, spoiled)
    reached, spoiled = masks[output.grad_fn] if output.grad_fn is not None else (0, 0)
    if output.grad_fn is None and id(output) in bit:
        reached = bit[id(output)]
    result = {}
    for i, name in enumerate(names):
        if hidden and name in hidden:
            result[name] = Degree(math.inf, hidden[name])
        elif spoiled >> i & 1:
            result[name] = Degree(math.inf, f"not affine after {reasons.get(i, 'an operation')}")
        else:
            result[name] = Degree(float(reached >> i & 1))
    return result


def _combine(node: Node, inputs: list[_Masks]) -> _Masks:
    reached = spoiled = 0
    for have, lost in inputs:
        reached |= have
        spoiled |= lost
    if not reached:
        return 0, 0
    if isinstance(node, BackwardCFunction) and not is_attention(node):
        return reached, reached  # its name may be that of a known operation
    name = _operation(node)
    if name in _KEEP:
        return reached, spoiled
    return reached, spoiled | _spoiled_by(node, name, inputs, reached)


def _spoiled_by(node: Node, name: str, inputs: list[_Masks], reached: int) -> int:
    """Parameters of degree ≥ 1 that this operation brings to ∞."""

    def have(place: int) -> int:
        return inputs[place][0] if place < len(inputs) else 0

    if name == "WeightNormInterface":
        return have(0)
    if name in _PRODUCTS and len(inputs) >= max(sum(_PRODUCTS[name], ())) + 1:
        return _twice([have(place) for place in _PRODUCTS[name][0]])
    if name == "Div":
        return have(1)
    if name == "Lerp":  # start + w (end − start)
        return (have(0) | have(1)) & have(2)
    if name in _NORMALIZED:
        return have(0)
    if name in _BATCH_NORMS and getattr(node, "_saved_training", True) is False:
        return _twice([have(0), have(1)])
    if name.startswith(_ATTENTION) or is_attention(node):
        beside = 0  # all but the value
        for place in range(len(inputs)):
            beside |= have(place) if place != 2 else 0
        return beside
    if name == "EmbeddingBag":
        return _twice([have(0), have(1)])
    return reached


def _twice(factors: list[int]) -> int:
    once = both = 0
    for mask in factors:
        both |= once & mask
        once |= mask
    return both


def custom_function(output: Tensor) -> str:
    """The first custom ``autograd.Function`` in the graph, whose derivatives its operations do not tell; or ``""``.

    Attention by query blocks is known.
    """
    for node in in_order(output.grad_fn):
        if isinstance(node, BackwardCFunction) and not is_attention(node):
            return f"the custom autograd function {node.name()}"
    return ""


def hidden_parameters(tape: Tape) -> dict[str, str]:
    """Parameters whose values reach the output on a way that autograd does not see, with the reason.

    ``detach``, ``.data``, ``no_grad`` and ``.item()`` make constants of values that depend on a parameter. The tape,
    which lies below autograd, shows them. Integers and booleans (comparisons, indices) do not count: they are constant
    almost everywhere.
    """
    seen: dict[int, frozenset[str]] = {}
    hidden: dict[int, frozenset[str]] = {}
    nothing: frozenset[str] = frozenset()
    for value in tape.values:
        if value.parameter is not None:
            seen[value.index] = frozenset({value.parameter})
    left: frozenset[str] = nothing
    for op in tape.ops:
        reach = nothing.union(*(seen.get(v.index, nothing) | hidden.get(v.index, nothing) for v in op.inputs))
        veiled = nothing.union(*(hidden.get(v.index, nothing) for v in op.inputs))
        if not any(op.outputs) and reach and any(v.index in tape.scalars for v in op.inputs):
            left |= nothing.union(
                *(
                    seen.get(v.index, nothing) | hidden.get(v.index, nothing)
                    for v in op.inputs
                    if v.tensor.is_floating_point()
                )
            )
        for out in op.outputs:
            if out is None or not (out.tensor.is_floating_point() or out.tensor.is_complex()):
                continue
            if not out.differentiable:
                hidden[out.index] = reach
            else:
                seen[out.index], hidden[out.index] = reach, veiled
    found = hidden.get(tape.final.index, nothing) | left
    return dict.fromkeys(
        found, "its value is also used where autograd does not follow (detach, no_grad, item)"
    )
