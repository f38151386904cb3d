"""Which tangent rule an operation (ATen) has."""

from __future__ import annotations

from flatkern.residual.attention import Attention
from flatkern.residual.curved_rules import Normalized, Product, Quotient, Softmax
from flatkern.residual.elementwise import Elementwise
from flatkern.residual.linear_rules import Choose, Fill, FixedStatistics, Linear, Pick, Sum
from flatkern.residual.rule import Rule
from flatkern.tape import Op, Value

__all__ = ["rule_for"]

_LINEAR = frozenset(
    """
    _adaptive_avg_pool2d _adaptive_avg_pool3d _reshape_alias _to_copy _unsafe_view alias as_strided avg_pool2d
    avg_pool3d cat clone cumsum detach diagonal expand flip gather index index_select mean movedim neg permute
    pixel_shuffle reflection_pad1d reflection_pad2d repeat replication_pad1d replication_pad2d reshape roll select
    slice split split_with_sizes squeeze stack sum t transpose tril triu unbind unfold unsqueeze upsample_bilinear2d
    upsample_linear1d upsample_nearest1d upsample_nearest2d view where im2col col2im unsafe_split
    """.split()  # noqa: SIM905
)
_ELEMENTWISE = frozenset(
    """
    abs celu clamp clamp_max clamp_min cos elu erf exp expm1 gelu hardshrink hardsigmoid hardswish hardtanh leaky_relu
    log log1p mish reciprocal relu rsqrt selu sigmoid silu sin softplus softshrink sqrt square tanh threshold
    """.split()  # noqa: SIM905
)
_RULES: dict[str, type[Rule]] = {
    **dict.fromkeys(_LINEAR, Linear),
    **dict.fromkeys(_ELEMENTWISE, Elementwise),
    **dict.fromkeys(("add", "sub"), Sum),
    **dict.fromkeys(("mul", "mm", "bmm", "addmm", "baddbmm", "mv", "convolution"), Product),
    **dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax"), Softmax),
    **dict.fromkeys(("native_layer_norm", "native_group_norm"), Normalized),
    **dict.fromkeys(("constant_pad_nd", "masked_fill"), Fill),
    **dict.fromkeys(("maximum", "minimum"), Choose),
    **dict.fromkeys(("max_pool2d_with_indices", "max_pool3d_with_indices"), Pick),
    "attention": Attention,
    "div": Quotient,
    "native_batch_norm": FixedStatistics,
}
# these have a rule in their first argument only
_FIRST_ONLY = frozenset(_ELEMENTWISE | (_LINEAR - {"cat", "stack", "where"}))


def rule_for(op: Op, active: frozenset[int]) -> Rule | None:
    """The rule of an operation whose inputs ``active`` have tangents; ``None`` where there is none."""
    name = op.name
    kind = _RULES.get(name)
    if name == "pow" and isinstance(op.args[0], Value) and not isinstance(op.args[1], Value):
        kind = Elementwise
    if name in ("max", "min") and len(op.args) > 1 and len(op.outputs) == 2:
        kind = Pick
    if kind is None:
        return None
    inputs = [v for v in op.inputs if v.index in active]
    first = op.args[0]
    alone = name in _FIRST_ONLY or kind in (Elementwise, Softmax, Normalized, FixedStatistics, Fill, Pick)
    if alone and any(v is not first for v in inputs):
        return None
    if name == "where" and op.args[0] in inputs:
        return None
    if name == "native_batch_norm" and op.args[5]:
        return None
    if name == "convolution" and any(v is not first for v in inputs):
        return None
    if name == "div" and op.kwargs.get("rounding_mode") is not None:
        return None
    return kind(op, active)
