"""nn.Linear with any number of leading dimensions: z_t = W a_t + b at every position t."""

from __future__ import annotations

from torch import Tensor, nn

from flatkern.layers.rule import LayerRule, register
from flatkern.layers.shared_weight import bias_squared_norms, row_energy, weight_squared_norms

__all__ = ["LinearRule"]


class LinearRule(LayerRule):
    """‖∂(s·f)/∂W‖² = ‖Σ_t g_t a_tᵀ‖² (= ‖g‖² ‖a‖² for one position), ‖∂(s·f)/∂b‖² = ‖Σ_t g_t‖²."""

    parameters = ("weight", "bias")

    def squared_norms(
        self,
        module: nn.Module,
        inputs: Tensor,
        cotangents: Tensor,
        wanted: tuple[str, ...],
        max_memory: int,
        prepared: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """See :class:`LayerRule`."""
        k, n = cotangents.shape[:2]
        a = inputs.reshape(n, -1, inputs.shape[-1])
        g = cotangents.reshape(k, n, -1, cotangents.shape[-1])
        if g.shape[2] == 1:  # the two share ‖g‖²
            energy = row_energy(g).sum((0, 2))
            both = {"weight": energy * row_energy(a).sum(1), "bias": energy}
            return {name: both[name] for name in wanted}
        norms = {}
        if "weight" in wanted:
            norms["weight"] = weight_squared_norms(a, g, max_memory)
        if "bias" in wanted:
            norms["bias"] = bias_squared_norms(g)
        return norms

    def positions(self, module: nn.Module, inputs: Tensor) -> int:
        """The product of the dimensions between the sample's and the features'."""
        return inputs.shape[1:-1].numel() if inputs.ndim > 2 else 1


register(nn.Linear, LinearRule())
