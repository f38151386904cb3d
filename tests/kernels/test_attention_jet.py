"""Tangent and second-order term of attention by blocks, against derivatives of torch's decomposed form in float64."""

from __future__ import annotations

import pytest
import torch
from torch.func import jvp

from flatkern.kernels import _attention_layout
from flatkern.kernels._attention_jet import LinearizedAttention
from tests.kernels.test_attention import CASES, decomposed


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks and chunks at these sizes."""
    monkeypatch.setattr(_attention_layout, "ROWS", 3)
    monkeypatch.setattr(_attention_layout, "CAUSAL_ROWS", 2)
    monkeypatch.setattr(_attention_layout, "BATCH_BYTES", 320)


@pytest.mark.parametrize("absent", [(), (0,), (1,), (2,), (0, 1), (1, 2), (0, 2), (3,), (0, 1, 2)])
@pytest.mark.parametrize("name", CASES)
def test_equals_the_decomposed_form(name: str, absent: tuple[int, ...]) -> None:
    torch.manual_seed(3)
    tensors, options = CASES[name]()
    along = [None if i in absent else torch.randn_like(t) for i, t in enumerate(tensors)]
    line = [torch.zeros_like(t) if d is None else d for t, d in zip(tensors, along, strict=True)]

    def out(step: torch.Tensor) -> torch.Tensor:
        # −inf stays: a step of it would be NaN
        moved = [torch.where(t.isinf(), t, t + step * d) for t, d in zip(tensors, line, strict=True)]
        return decomposed(*moved, **options)

    zero, one = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    value = out(zero)
    first, second = jvp(lambda s: jvp(out, (s,), (one,))[1], (zero,), (one,))
    g = torch.randn_like(value)
    at = LinearizedAttention(*tensors, **options)
    along += [None] * (4 - len(along))
    moved, bent = at.jet(g, *along)
    torch.testing.assert_close(moved, first, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(at.tangent(*along), first, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(bent, (g * second).sum(-1), rtol=1e-11, atol=1e-12)


def test_float32_is_as_near_as_the_decomposed_form() -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 40, 8, dtype=torch.float64) for _ in range(7)]
    exact, single = LinearizedAttention(*tensors[:3]), LinearizedAttention(*[t.float() for t in tensors[:3]])
    for wide, narrow in zip(
        exact.jet(tensors[6], *tensors[3:6]),
        single.jet(*[t.float() for t in (tensors[6], *tensors[3:6])]),
        strict=True,
    ):
        assert float((wide - narrow).abs().max()) < 3e-6 * float(wide.abs().max())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tensors = [torch.randn(2, 3, 40, 8).to(dtype) for _ in range(7)]
    mask = torch.randn(40, 40).to(dtype)
    half, single = (
        LinearizedAttention(*(t.to(d) for t in (*tensors[:3], mask))) for d in (dtype, torch.float32)
    )
    moved, bent = half.jet(tensors[6], *tensors[3:6])
    image, second = single.jet(*(t.float() for t in (tensors[6], *tensors[3:6])))
    assert moved.dtype == half.tangent(*tensors[3:6]).dtype == dtype
    torch.testing.assert_close(moved, image.to(dtype))
    torch.testing.assert_close(bent, second)
