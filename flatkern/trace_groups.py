"""The sign sketch of a Gauss-Newton trace by groups of cotangents: between one draw and the exact trace.

With S_i's columns s_ik put into groups, Σ_g ‖J_iᵀ Σ_{k∈g} ε_k s_ik‖² has the mean Σ_k ‖J_iᵀ s_ik‖², and the variance
4 Σ_g Σ_{k<l∈g} ⟨J_iᵀ s_ik, J_iᵀ s_il⟩²: only pairs within a group add to it. One group is the plain sketch, a group a
column is exact. Large columns are kept apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flatkern.losses import Loss

__all__ = ["Groups", "columns_of", "group_columns", "over_bound"]


@dataclass(frozen=True)
class Groups:
    """Columns of every sample by group."""

    alone: int
    """So many first groups are of one column."""
    place: Tensor
    """The group of each column, [n, K]."""
    sums: Tensor
    """Σ_{k∈g} ‖s_k‖², [n, G]."""
    sizes: Tensor
    """Columns of each group, [n, G]."""
    pairs: Tensor
    """Σ_g Σ_{k<l∈g} ‖s_k‖² ‖s_l‖², [n]."""

    def combined(self, columns: Tensor, signs: Tensor) -> Tensor:
        """Σ_{k∈g} ε_k s_k for every group: columns [K, n, *output] and signs [n, K] → [G, n, *output]."""
        k, n = columns.shape[:2]
        chosen = torch.zeros(n, self.sums.shape[1], k, dtype=columns.dtype, device=columns.device)
        chosen.scatter_(1, self.place.unsqueeze(1), signs.to(columns.dtype).unsqueeze(1))
        flat = columns.reshape(k, n, -1).transpose(0, 1)
        return (chosen @ flat).transpose(0, 1).reshape(-1, *columns.shape[1:])


def columns_of(loss: Loss, output: Tensor, target: Tensor) -> Tensor:
    """S_i's columns [K, n, *output], orthogonal within a sample where that is cheap."""
    made = loss.orthogonal or loss.root
    assert made is not None
    return made(output, target)


def group_columns(squares: Tensor, alone: int, count: int) -> Groups:
    """The ``alone`` largest columns are groups of their own; the others make ``count`` groups of about equal sums.

    Equal sums have few cross terms: columns in falling order, each to the group that has least so far.

    Args:
        squares: ‖s_k‖², [n, K].
        alone: fewer than K.
        count: of the other groups, at least 1.
    """
    n, k = squares.shape
    squares = squares.double()
    order = squares.argsort(1, descending=True)
    place = torch.zeros(n, k, dtype=torch.long, device=squares.device)
    place.scatter_(1, order, torch.arange(k, device=squares.device).clamp(max=alone).expand(n, k))
    sums = squares.new_zeros(n, alone + count)
    sums[:, :alone] = squares.gather(1, order[:, :alone])
    sizes, own = torch.zeros_like(sums), sums.square()
    sizes[:, :alone] = 1
    if count == 1:
        sizes[:, alone] = k - alone
        sums[:, alone] = squares.gather(1, order[:, alone:]).sum(1)
        own[:, alone] = squares.gather(1, order[:, alone:]).square().sum(1)
        return Groups(alone, place, sums, sizes, (sums.square() - own).clamp(min=0).sum(1) / 2)
    for column in order[:, alone:].T.unsqueeze(2):
        size, others = squares.gather(1, column), sums[:, alone:]
        # of equal sums the emptier group, so that no group stays empty while another has two
        open_to = others == others.amin(1, keepdim=True)
        least = alone + torch.where(open_to, sizes[:, alone:], float(k)).argmin(1, keepdim=True)
        place.scatter_(1, column, least)
        sums.scatter_add_(1, least, size)
        own.scatter_add_(1, least, size.square())
        sizes.scatter_add_(1, least, torch.ones_like(size))
    return Groups(alone, place, sums, sizes, (sums.square() - own).clamp(min=0).sum(1) / 2)


def over_bound(sizes: Tensor) -> Tensor:
    """c with Var v ≤ c E v² for one draw v = ‖Σ_{k∈g} ε_k g_k‖² of a group of so many columns.

    With G the Gram matrix of the g_k and m = tr G: Var v = 2 (‖G‖_F² − Σ_k G_kk²) ≤ 2 (1 − 1/K) m², as ‖G‖_F ≤ m and
    Σ_k G_kk² ≥ m²/K; E v² = m² + Var v; so Var v ≤ c E v² with c = a/(1 + a), a = 2 (1 − 1/K). It is 0 for one
    column, 1/2 for two and less than 2/3 for all.
    """
    a = 2 * (1 - 1 / sizes.clamp(min=1))
    return a / (1 + a)
