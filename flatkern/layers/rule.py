"""The interface of a layer rule, and the registry of rules by module type."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

__all__ = ["LayerRule", "register", "rule_for"]

_RULES: dict[type[nn.Module], LayerRule] = {}


class LayerRule(ABC):
    """What one layer type adds to Σ_k ‖∂(s_k·f_i)/∂θ‖², without forming a parameter gradient where possible.

    ``inputs`` is the layer's input a [n, ...], ``cotangents`` the gradients g of K scalars with respect to the
    layer's output, [K, n, ...]; axis n is the sample.
    """

    parameters: tuple[str, ...]
    """Names of the module's own parameters that the rule covers."""

    def prepare(self, module: nn.Module, inputs: Tensor, max_memory: int) -> Tensor | None:
        """What :meth:`squared_norms` derives from the inputs alone, to be formed once for all cotangents.

        ``None`` where there is nothing to form, or where it would take more than ``max_memory`` bytes.
        """
        return None

    @abstractmethod
    def squared_norms(
        self,
        module: nn.Module,
        inputs: Tensor,
        cotangents: Tensor,
        wanted: tuple[str, ...],
        max_memory: int,
        prepared: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Σ_k ‖∂(s_k·f_i)/∂p‖² for every parameter p in ``wanted``, float64 [n] each.

        Temporary memory is kept under ``max_memory`` bytes by going through the samples in chunks. ``prepared`` is what
        :meth:`prepare` gave for the same inputs.
        """

    @abstractmethod
    def positions(self, module: nn.Module, inputs: Tensor) -> int:
        """How many positions of one sample share the weight (1 for a dense layer on vectors)."""


def register(module_type: type[nn.Module], rule: LayerRule) -> None:
    """Use ``rule`` for modules of ``module_type`` (and subclasses that do not override ``forward``)."""
    _RULES[module_type] = rule


def rule_for(module: nn.Module) -> LayerRule | None:
    """The rule of a module, ``None`` where there is none or where its ``forward`` is not the registered type's own."""
    if "forward" in vars(module):  # replaced on the instance
        return None
    for kind in type(module).__mro__:
        if kind in _RULES:
            return _RULES[kind] if type(module).forward is kind.forward else None
    return None
