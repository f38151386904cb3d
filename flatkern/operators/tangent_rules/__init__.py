"""Rules for the tangents of elementary operations, K tangents at a time; one file a kind."""

from . import (
    convolution,
    dense,
    indexing,
    losses,
    normalization,
    other,
    pointwise,
    pooling,
    shapes,
    softmax,
    sums,
)
from .rule import Rule, ignored_places, rule_for
from .shapes import Move

__all__ = ["KINDS", "Move", "Rule", "ignored_places", "rule_for"]

KINDS = (
    convolution,
    dense,
    indexing,
    losses,
    normalization,
    other,
    pointwise,
    pooling,
    shapes,
    softmax,
    sums,
)
"""Loading these modules registers their rules."""
