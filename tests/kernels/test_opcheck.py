"""`torch.library.opcheck` of every compiled operator: schema, fake tensors, tracing."""

from __future__ import annotations

import pytest
import torch

from flatkern.kernels._select import compiled_available

from .helpers import spd

pytestmark = pytest.mark.skipif(not compiled_available(), reason="no compiled kernels")
CHECKS = ("test_schema", "test_faketensor", "test_aot_dispatch_static")


def arguments(name: str, dtype: torch.dtype, n: int) -> tuple[torch.Tensor, ...]:
    x = torch.randn(n, 4, 7, dtype=dtype)
    G = spd(n, 4)
    scattered = torch.randn(n, 5, 2, 4, dtype=dtype), torch.randint(-1, 12, (n, 2, 4))
    plane = [6, 5, 4, 3, 1, 1, 0, 0, 1, 1]
    weights = [torch.randn(n, dtype=torch.float64) for _ in range(3)]
    return {
        "spd_logdet": (G.to(dtype),),
        "spd_pullback": (G.to(dtype), torch.randn(n, dtype=dtype)),
        "gram": (x,),
        "gram_stats": (x,),
        "gram_stats_factors": (x.mT,),
        "gram_pullback": (x, G, G, *weights),
        "gram_singular_values": (x, True),
        "gram_singular_vectors": (x,),
        "lq_factor": (x, torch.arange(n) % 2 == 0),
        "scattered_conv_input": (*scattered, torch.randn(2, 3, 3, 4, dtype=dtype), plane),
        "scattered_conv_norms": (*scattered, torch.randn(n, 4, 6, 5, dtype=dtype), 3, 3, plane),
    }[name]


@pytest.mark.parametrize("n", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name",
    [
        "spd_logdet",
        "spd_pullback",
        "gram",
        "gram_stats",
        "gram_stats_factors",
        "gram_pullback",
        "gram_singular_values",
        "gram_singular_vectors",
        "lq_factor",
        "scattered_conv_input",
        "scattered_conv_norms",
    ],
)
def test_opcheck(name, dtype, n):
    operator = getattr(torch.ops.flatkern, name).default
    torch.library.opcheck(operator, arguments(name, dtype, n), test_utils=CHECKS)
