"""Rules: what a layer type contributes to parameter-gradient norms, from its inputs and output cotangents.

A rule is registered for a module type (:func:`register`). It applies to instances of that type and of subclasses that
keep its ``forward``; everything else takes the exact fall-back of :mod:`flatkern.per_sample`.
"""

from flatkern.layers import conv as _conv  # noqa: F401  (registers its rule)
from flatkern.layers import linear as _linear  # noqa: F401
from flatkern.layers.rule import LayerRule, register, rule_for

__all__ = ["LayerRule", "register", "rule_for"]
