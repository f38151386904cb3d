"""Rules: the per-sample gradient of a parameter from an operation's saved inputs and its output's cotangents.

A rule is registered for an operation of the autograd graph (:func:`register`); everything else takes the exact
fall-back of :mod:`flatkern.per_sample`. docs/layers.md says how to add one.
"""

from flatkern.layers import conv as _conv  # noqa: F401  (each registers its rules)
from flatkern.layers import elementwise as _elementwise  # noqa: F401
from flatkern.layers import embedding as _embedding  # noqa: F401
from flatkern.layers import linear as _linear  # noqa: F401
from flatkern.layers import normalization as _normalization  # noqa: F401
from flatkern.layers.outer import Features, OuterTerm
from flatkern.layers.rule import Cotangent, Layout, Site, register, rule_for
from flatkern.layers.term import DenseTerm, SumTerm, Term

__all__ = [
    "Cotangent",
    "DenseTerm",
    "Features",
    "Layout",
    "OuterTerm",
    "Site",
    "SumTerm",
    "Term",
    "register",
    "rule_for",
]
