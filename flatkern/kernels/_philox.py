"""Philox 4x32-10 and what is made of its words, in plain PyTorch: the same bits as the compiled kernels.

Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). Words are int64 tensors that hold
32 bits. The normal numbers are computed in float32 by single operations in a fixed order, as csrc/common/philox.h does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["NORMALS", "NORMALS_PER_BLOCK", "SIGNS", "SIGNS_PER_BLOCK", "normals", "philox", "signs"]

SIGNS, NORMALS = 0, 1
SIGNS_PER_BLOCK, NORMALS_PER_BLOCK = 128, 4
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROOT_HALF_BITS = 0x3F3504F3  # float32 bits of √½


def philox(seed: int, rows: Tensor, blocks: Tensor, stream: int) -> list[Tensor]:
    """Four words of each (row, block), broadcast."""
    c = [blocks & _WORD, blocks >> 32 & _WORD, rows & _WORD, (rows >> 32 & _WORD) ^ (stream << 31)]
    k0, k1 = seed & _WORD, seed >> 32 & _WORD
    for _ in range(10):
        high0, low0 = _product(c[0], _MULTIPLIERS[0])
        high1, low1 = _product(c[2], _MULTIPLIERS[1])
        c = [high1 ^ c[1] ^ k0, low1, high0 ^ c[3] ^ k1, low0]
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return c


def _product(a: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """High and low word of a · m, by halves so that nothing exceeds 63 bits."""
    low = (a & 0xFFFF) * m
    high = (a >> 16) * m + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | (low & 0xFFFF)


def signs(words: list[Tensor]) -> Tensor:
    """±1 as int64: the 128 bits of each block along a new last axis, a set bit for −1."""
    bits = torch.arange(32, device=words[0].device)
    return 1 - 2 * torch.cat([word[..., None] >> bits & 1 for word in words], dim=-1)


def normals(words: list[Tensor]) -> Tensor:
    """Standard normal numbers in float32: four of each block along a new last axis (Box and Muller, 1958)."""
    return torch.stack([*_pair(words[0], words[1]), *_pair(words[2], words[3])], dim=-1)


def _radius(x: Tensor) -> Tensor:
    """√(−2 log u) with u = x / 2³², and ½ / 2³² for x = 0."""
    y = (x >> 16).float() * 65536.0 + (x & 0xFFFF).float()
    shifted = torch.where(x == 0, 0.5, y).view(torch.int32) - _ROOT_HALF_BITS
    m = ((shifted & 0x007FFFFF) + _ROOT_HALF_BITS).view(torch.float32)
    s = (m - 1.0) / (m + 1.0)
    z = s * s
    p = torch.full_like(z, 2 / 9)
    for coefficient in (2 / 7, 2 / 5, 2 / 3):
        p = p * z + coefficient
    p = p * z * s
    e = ((shifted >> 23) - 32).float()
    log = e * 0.693359375 + ((p + e * -2.12194440054690583e-4) + s * 2.0)
    # torch's own root in float32 is not always the nearest number
    return (log * -2.0).clamp_min(0.0).double().sqrt().float()


def _pair(x0: Tensor, x1: Tensor) -> tuple[Tensor, Tensor]:
    r = _radius(x0)
    t = ((x1 & 0x3FFFFFFF) - 0x20000000).float() * (math.pi / 2**31)
    z = t * t
    c = torch.full_like(z, -1 / 3628800)
    for coefficient in (1 / 40320, -1 / 720, 1 / 24, -0.5, 1.0):
        c = c * z + coefficient
    s = torch.full_like(z, 1 / 362880)
    for coefficient in (-1 / 5040, 1 / 120, -1 / 6):
        s = s * z + coefficient
    s = s * z * t + t
    quadrant = x1 >> 30
    odd = quadrant % 2 == 1
    first = torch.where((quadrant == 1) | (quadrant == 2), -r, r) * torch.where(odd, s, c)
    second = torch.where(quadrant >= 2, -r, r) * torch.where(odd, c, s)
    return first, second
