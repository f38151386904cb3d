"""Operators of models with attention take the form by query blocks, and are the explicit matrices in every mode."""

import pytest
import torch
import torch.nn.functional as F
from explicit import assert_close, explicit_ggn, explicit_hessian
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatkern import attention_form, kernels
from flatkern.kernels import _attention_layout
from flatkern.operators import ggn, hessian, jacobian
from flatkern.operators.forms import twice_differentiable

CE = nn.CrossEntropyLoss()


class Plain(nn.Module):
    """Self-attention as models of Hugging Face call it: by name, with a mask or causal, with grouped heads."""

    def __init__(self, kind):
        super().__init__()
        self.q, self.kv, self.kind = nn.Linear(4, 8), nn.Linear(4, 8), kind
        self.bias = nn.Parameter(torch.randn(5, 5)) if kind == "learned" else None

    def forward(self, x):
        q = self.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
        k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        options = {"enable_gqa": True}
        if self.kind == "causal":
            options["is_causal"] = True
        elif self.kind == "boolean":
            options["attn_mask"] = torch.ones(5, 5, dtype=torch.bool).triu()
        elif self.kind == "learned":
            options["attn_mask"] = self.bias
        mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)
        return mixed.transpose(1, 2).flatten(2).mean(1)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        padding = torch.zeros(len(x), 5, dtype=torch.bool)
        padding[:, 3:] = True
        return self.mix(x, x, x, key_padding_mask=padding, need_weights=False)[0].mean(1)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 3, dropout=0.0, batch_first=True)

    def forward(self, x):
        return self.layer(x).mean(1)


MODELS = {
    "plain": lambda: Plain("plain"),
    "causal": lambda: Plain("causal"),
    "boolean mask": lambda: Plain("boolean"),
    "learned bias": lambda: Plain("learned"),
    "nn.MultiheadAttention": Heads,
    "nn.TransformerEncoderLayer": Encoder,
    "nn.TransformerEncoderLayer, eval": lambda: Encoder().eval(),
}


@pytest.fixture
def calls(monkeypatch):
    """Any size goes by blocks, several of them; counts how often."""
    count = []
    original = kernels.attention

    def counted(*args, **kwargs):
        count.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(attention_form, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(attention_form, "LEAST_CAUSAL_WEIGHTS", 0)
    monkeypatch.setattr(kernels, "attention", counted)
    monkeypatch.setattr(_attention_layout, "ROWS", 2)
    monkeypatch.setattr(_attention_layout, "CAUSAL_ROWS", 2)
    return count


def problem(name):
    torch.manual_seed(0)
    return MODELS[name]().double(), torch.randn(4, 5, 4).double(), torch.tensor([0, 1, 2, 3])


@pytest.mark.parametrize("name", MODELS)
def test_operators_are_the_explicit_matrices(name, calls):
    model, x, y = problem(name)
    with sdpa_kernel(SDPBackend.MATH):
        H, G = explicit_hessian(model, CE, x, y), explicit_ggn(model, CE, x, y)
    V = torch.randn(len(H), 4, dtype=torch.float64)
    for options in ({}, {"block_size": 3}, {"mode": "rebuilt"}, {"mode": "forward"}):
        calls.clear()
        assert_close(hessian(model, CE, (x, y), **options) @ V, H @ V)
        assert calls
    for options in ({}, {"block_size": 3}, {"mode": "rebuilt"}):
        calls.clear()
        assert_close(ggn(model, CE, (x, y), **options) @ V, G @ V)
        assert calls


@pytest.mark.parametrize("name", MODELS)
def test_jacobians(name, calls, monkeypatch):
    model, x, _ = problem(name)
    blocks = [jacobian(model, x, wrt=wrt).to_dense() for wrt in ("params", "input")]
    assert calls
    monkeypatch.setattr(attention_form, "LEAST_WEIGHTS", 10**9)
    monkeypatch.setattr(attention_form, "LEAST_CAUSAL_WEIGHTS", 10**9)
    calls.clear()
    for ours, wrt in zip(blocks, ("params", "input"), strict=True):
        assert_close(ours, jacobian(model, x, wrt=wrt).to_dense())
    assert not calls


def test_long_sequences_take_the_blocks_and_short_ones_do_not(monkeypatch):
    count = []
    original = kernels.attention
    monkeypatch.setattr(kernels, "attention", lambda *a, **k: count.append(len(a[0])) or original(*a, **k))

    def run(length, **options):
        q = torch.randn(1, length, 2)
        count.clear()
        with twice_differentiable(nn.Identity()):
            out = F.scaled_dot_product_attention(q, q, q, **options)
        assert out.shape == q.shape
        return bool(count)

    assert not run(256)
    assert run(256, is_causal=True)
    assert run(320)
    assert not run(320, dropout_p=0.1)
    with pytest.raises(RuntimeError):  # torch's own refusal
        run(320, is_causal=True, attn_mask=torch.ones(320, 320, dtype=torch.bool))
    q = torch.randn(1, 320, 2)
    count.clear()
    F.scaled_dot_product_attention(q, q, q)
    assert not count


def test_autocast_gives_what_torch_gives(calls):
    q, k, v = (torch.randn(2, 5, 4) for _ in range(3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with twice_differentiable(nn.Identity()):
            ours = F.scaled_dot_product_attention(q, k, v)
        theirs = F.scaled_dot_product_attention(q, k, v)
    assert calls
    assert ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)


def test_kept_graphs_hold_no_weights():
    model, length = Plain("plain"), 400
    x, y = torch.randn(1, length, 4), torch.tensor([0])
    kept = hessian(model, CE, (x, y), check_determinism=False).info.kept_bytes
    assert 0 < kept < 4 * length * length * 4 / 2
