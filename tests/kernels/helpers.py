"""What the tests of the kernels share: both implementations, random matrices, the float64 oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from flatkern.kernels._select import compiled_available

both = pytest.mark.parametrize(
    "which",
    [
        "reference",
        pytest.param(
            "compiled", marks=pytest.mark.skipif(not compiled_available(), reason="no compiled kernels")
        ),
    ],
)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])


def spd(n: int, c: int, condition: float = 10.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random symmetric positive definite matrices with a given condition number, [n, c, c]."""
    Q = torch.linalg.qr(torch.randn(n, c, c, dtype=torch.float64)).Q
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), c, dtype=torch.float64)
    G = Q * values @ Q.mT
    return ((G + G.mT) / 2).to(dtype)


def rows(n: int, c: int, d: int, condition: float = 10.0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random matrices [n, c, d], c <= d, whose rows have a given condition number."""
    U = torch.linalg.qr(torch.randn(n, c, c, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(n, d, c, dtype=torch.float64)).Q
    values = torch.logspace(0, -torch.tensor(condition).log10().item(), c, dtype=torch.float64)
    return (U * values @ V.mT).to(dtype)


def oracle_logdet(G: Tensor) -> Tensor:
    """By L D Lᵀ in the widest floating-point type there is, for inputs of float64 as well."""
    a = G.double().numpy().astype(np.longdouble)
    total = np.zeros(a.shape[0], dtype=np.longdouble)
    for k in range(a.shape[-1]):
        pivot, column = a[:, k, k].copy(), a[:, k + 1 :, k].copy()
        total += np.log(pivot)
        a[:, k + 1 :, k + 1 :] -= column[:, :, None] * (column / pivot[:, None])[:, None, :]
    return torch.from_numpy(total.astype(np.float64))


def oracle_rows_logdet(x: Tensor) -> Tensor:
    """log det(x xᵀ) from the singular values in float64: it never sees the squared condition number."""
    return 2 * torch.linalg.svdvals(x.double()).log().sum(-1)
