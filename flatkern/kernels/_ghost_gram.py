"""Inner products of gradients of shared weights for all pairs of samples and cotangents, in float64."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ._checks import check_matrices
from ._ghost_shapes import Form, check_form

SIDE = 256
"""Positions on either side of a tile."""
BLOCK = 512
"""Rows of a product that is symmetric."""


class Inputs(Protocol):
    """A layer's inputs [n, G, T, d_in], formed for some samples at a time."""

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """n, G, T, d_in."""

    def __call__(self, samples: slice) -> Tensor:
        """[n', G, T, d_in]."""


class _There:
    """Inputs that are there already."""

    def __init__(self, a: Tensor) -> None:
        n, t, d = a.shape
        self.shape = n, 1, t, d
        self._a = a.unsqueeze(1)

    def __call__(self, samples: slice) -> Tensor:
        return self._a[samples]


def ghost_gram(
    a: Tensor,
    g: Tensor,
    b: Tensor | None = None,
    h: Tensor | None = None,
    *,
    form: Form = "auto",
    max_memory: int = 1 << 26,
) -> Tensor:
    r"""Σ_{t,s} (g_ikt·h_jls)(a_it·b_js): inner products of a shared weight's gradients Σ_t g_t a_tᵀ, for all pairs.

    The inner-product form of :func:`ghost_norm`; summed over layers, the tangent kernel (NTK). Differentiable; plain
    PyTorch in float64, with no compiled twin.

    Args:
        a: [n, T, d_in], float32 or float64.
        g: cotangents, [K, n, T, d_out], of a's dtype.
        b, h: another set, [m, S, d_in] and [L, m, S, d_out]; ``None``: the same set, and about half
            of the pairs are computed.
        form: ``"explicit"`` forms the gradients, some of their rows at a time; ``"gram"`` takes pairs of samples, by
            tiles of 256 positions; ``"auto"`` takes the cheaper.
        max_memory: bytes for temporaries, as far as one pair (``"gram"``) or one row of all gradients fits into them.

    Returns:
        [n, K, m, L], float64; products in float64 as well, since small eigenvalues are often wanted.

    Cost, in multiply-adds: ``"gram"`` n m (T S (d_in + K d_out) + K L S d_out), ``"explicit"``
        d_in d_out (n K m L + n K T + m L S).

    Raises:
        TypeError: another dtype or layout, or two dtypes.
        ValueError: shapes that do not go together, an unknown form, or only one of b and h.

    Source: Novak, Sohl-Dickstein, Schoenholz, arXiv:2206.08720 (NTK by contractions of layers).

    Example:
        >>> import torch
        >>> a, g = torch.ones(2, 3, 5), torch.ones(1, 2, 3, 4)
        >>> ghost_gram(a, g)[:, 0, :, 0]
        tensor([[180., 180.],
                [180., 180.]], dtype=torch.float64)
    """
    name = "ghost_gram"
    check_form(name, form)
    if (b is None) != (h is None):
        raise ValueError(f"{name}: b and h: expected both of them or neither")
    sets = [("a", a, "g", g)] if b is None or h is None else [("a", a, "g", g), ("b", b, "h", h)]
    for of_inputs, inputs, of_cotangents, cotangents in sets:
        check_matrices(f"{name}: {of_inputs}", inputs, square=False)
        check_matrices(f"{name}: {of_cotangents}", cotangents, square=False)
        if inputs.dtype != a.dtype or cotangents.dtype != a.dtype:
            raise TypeError(f"{name}: {of_cotangents}: expected {a.dtype} everywhere, as a has it")
        if inputs.dim() != 3 or cotangents.dim() != 4 or cotangents.shape[1:3] != inputs.shape[:2]:
            raise ValueError(
                f"{name}: expected {of_inputs} [n, T, d_in] and {of_cotangents} [K, n, T, d_out], got "
                f"{tuple(inputs.shape)} and {tuple(cotangents.shape)}"
            )
        if inputs.shape[2] != a.shape[2] or cotangents.shape[3] != g.shape[3]:
            raise ValueError(f"{name}: {of_inputs} and {of_cotangents}: expected d_in and d_out of a and g")
    left = _There(a)
    right = left if b is None else _There(b)
    return inner_products(left, g.unsqueeze(2), right, (g if h is None else h).unsqueeze(2), max_memory, form)


def inner_products(
    a: Inputs, g: Tensor, b: Inputs, h: Tensor, max_memory: int, form: Form = "auto"
) -> Tensor:
    """[n, K, m, L], of inputs [n, G, T, d_in] and cotangents [K, n, G, T, d_out] in G groups, which are summed over.

    Where both sets are the same objects half of the pairs are computed.
    """
    n, _, t, d_in = a.shape
    m, _, s, _ = b.shape
    k, k_other, d_out = len(g), len(h), g.shape[-1]
    formed = d_in * d_out * (n * k * m * k_other + n * k * t + m * k_other * s)
    paired = n * m * (t * s * (d_in + k * d_out) + k * k_other * s * d_out)
    if form == "explicit" or (form == "auto" and formed <= paired):
        return _by_gradients(a, g, b, h, max_memory)
    return _by_pairs(a, g, b, h, max_memory)


def _by_gradients(a: Inputs, g: Tensor, b: Inputs, h: Tensor, max_memory: int) -> Tensor:
    """Gradients formed for some of the outputs at a time."""
    (n, groups, _, d_in), m = a.shape, b.shape[0]
    rows, columns = n * len(g), m * len(h)
    same = a is b and g is h
    at_once = max(1, max_memory // max(1, 16 * groups * d_in * (rows + columns)))
    blocks: list[Tensor] = []
    for first in range(0, g.shape[-1], at_once):
        left = _formed(a, g[..., first : first + at_once])
        right = left if same else _formed(b, h[..., first : first + at_once])
        for i, block in enumerate(left.split(BLOCK)):
            # of the same set, blocks on and above the diagonal
            against = right[i * BLOCK :].mT if same else right.mT
            if first == 0:
                blocks.append(block @ against)
            else:
                blocks[i] = torch.addmm(blocks[i], block, against)
        del left, right
    if not blocks:
        return torch.zeros(n, len(g), m, len(h), dtype=torch.float64, device=g.device)
    if same:
        for i in range(len(blocks) - 1, 0, -1):
            above = [blocks[j][:, (i - j) * BLOCK : (i - j + 1) * BLOCK].mT for j in range(i)]
            blocks[i] = torch.cat([*above, blocks[i]], 1)
    return torch.cat(blocks).reshape(n, len(g), m, len(h))


def _formed(a: Inputs, g: Tensor) -> Tensor:
    """Σ_t g_t a_tᵀ, [n K, G d_out d_in] in float64."""
    n = g.shape[1]
    formed = g.mT.double() @ a(slice(0, n)).double()  # [K, n, G, d_out, d_in]
    return formed.flatten(2).transpose(0, 1).flatten(0, 1)


def _by_pairs(a: Inputs, g: Tensor, b: Inputs, h: Tensor, max_memory: int) -> Tensor:
    """Pairs of samples, tile by tile: Σ_t (a_t·b_s) g_t for all cotangents, then its products with h_s."""
    (n, groups, t, d_in), (m, _, s, _) = a.shape, b.shape
    k, k_other, d_out = len(g), len(h), g.shape[-1]
    same = a is b and g is h
    tall, wide = min(t, SIDE), min(s, SIDE)
    pair = 8 * groups * (tall * wide + 2 * wide * k * d_out)
    single = 8 * groups * (t * (d_in + k * d_out) + s * (d_in + k_other * d_out))
    at_once = max(1, int((max_memory / (2 * max(pair, single, 1))) ** 0.5))
    if same:  # so that most blocks lie on one side of the diagonal
        at_once = min(at_once, -(-n // 8))
    blocks: list[list[Tensor]] = []
    for i, rows in enumerate(range(0, n, at_once)):
        part = slice(rows, rows + at_once)
        left, tops = a(part), g[:, part]
        blocks.append([])
        for j, columns in enumerate(range(0, m, at_once)):
            if same and j < i:
                blocks[i].append(blocks[j][i].permute(2, 3, 0, 1))
                continue
            other = slice(columns, columns + at_once)
            blocks[i].append(_block(left, tops, b(other), h[:, other]))
    if not blocks or not blocks[0]:
        return torch.zeros(n, k, m, k_other, dtype=torch.float64, device=g.device)
    return torch.cat([torch.cat(row, 2) for row in blocks])


def _block(a: Tensor, g: Tensor, b: Tensor, h: Tensor) -> Tensor:
    total: Tensor | None = None
    for right, bottoms in zip(b.split(SIDE, 2), h.split(SIDE, 3), strict=True):
        mixed: Tensor | None = None
        wide = right.double().unsqueeze(0)  # [1, j, G, s, d_in]
        for left, tops in zip(a.split(SIDE, 2), g.split(SIDE, 3), strict=True):
            rows = tops.double().permute(1, 2, 3, 0, 4).flatten(3).unsqueeze(1)  # [i, 1, G, t, K d_out]
            part = (wide @ left.double().unsqueeze(1).mT) @ rows
            mixed = part if mixed is None else mixed + part
        if mixed is None:
            mixed = wide.new_zeros(len(a), *wide.shape[1:4], len(g) * g.shape[-1])
        shared = mixed.unflatten(4, (len(g), g.shape[-1]))
        found = torch.einsum("ijgskd,ljgsd->ikjl", shared, bottoms.double())
        total = found if total is None else total + found
    assert total is not None  # split gives one part even of nothing
    return total
