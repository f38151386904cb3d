"""Rows of per-sample gradients over all parameters, formed a few samples at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from flatkern.gradient_gram import Gradients
from flatkern.layers.term import chunks

__all__ = ["explicit_rows"]


def explicit_rows(
    gradients: Gradients, parameters: Mapping[str, Tensor], max_memory: int
) -> Iterator[Tensor]:
    """γ_ik over the flat parameters, float64 [n' K, P] with k fastest, within ``max_memory`` bytes.

    Args:
        gradients: with all parameters in their own space (``formed`` all of them).
        parameters: in the order of the flat vector.
        max_memory: bytes.
    """
    size = sum(p.numel() for p in parameters.values())
    terms = [t for found in gradients.terms.values() for t in found]
    own = max((t.gradient_bytes for t in terms), default=0)
    step = max(1, max_memory // (gradients.k * (8 * size + 2 * own)))
    device = next(iter(parameters.values())).device
    for part in chunks(gradients.n, step):
        count = (part.stop - part.start) * gradients.k
        rows = torch.zeros(count, size, dtype=torch.float64, device=device)
        place = 0
        for name, p in parameters.items():
            for term in gradients.terms.get(name, ()):
                formed = term.explicit(part, slice(0, gradients.k))  # [K, n', *shape]
                rows[:, place : place + p.numel()] += formed.transpose(0, 1).reshape(count, p.numel())
            place += p.numel()
        yield rows
