"""What torch's autograd cannot do for which layer, and that the operators work there or say why not.

The table of docs/autograd-gaps.md is the one below; a torch version that closes or opens a gap fails here.
"""

import re
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from explicit import assert_close
from torch import nn
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from flatkern.operators import ggn, hessian, jacobian

PAGE = Path(__file__).parents[2] / "docs" / "autograd-gaps.md"
CE = nn.CrossEntropyLoss()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(4, 12)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2).mean(1)


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.mix = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.mix(x, x, x, need_weights=False)[0].mean(1)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.rnn = kind(4, 4, batch_first=True)

    def forward(self, x):
        return self.rnn(x)[0][:, -1]


class Mean(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x).mean(1)


def norm(layer):
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 6), layer, nn.Linear(6, 4))


def pooled():
    return nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv2d(1, 2, 2, padding=1), nn.MaxPool2d(2), nn.Flatten()
    )


def encoder():
    return nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)


# name → (factory, whether plain torch can: double backward, the same batched over vectors, forward over reverse,
# forward JVP, vmap(jacrev) on inputs)
TABLE = {
    "scaled_dot_product_attention": (Attention, "no no no no yes"),
    "MultiheadAttention": (Heads, "no no no no yes"),
    "TransformerEncoderLayer, train": (lambda: Mean(encoder()), "no no no no yes"),
    "TransformerEncoderLayer, eval": (lambda: Mean(encoder()).eval(), "no no no no yes"),
    "GroupNorm": (lambda: norm(nn.GroupNorm(2, 6)), "yes no yes yes yes"),
    "LayerNorm": (lambda: norm(nn.LayerNorm(6)), "yes yes yes yes yes"),
    "RMSNorm": (lambda: norm(nn.RMSNorm(6)), "yes yes yes yes yes"),
    "MaxPool2d": (pooled, "yes yes yes yes yes"),
    "BatchNorm, eval": (lambda: norm(nn.BatchNorm1d(6)).eval(), "yes yes yes yes yes"),
    "BatchNorm, train": (lambda: norm(nn.BatchNorm1d(6)), "yes yes no no no"),
    "GRU": (lambda: Recurrent(nn.GRU), "yes yes yes yes no"),
    "LSTM": (lambda: Recurrent(nn.LSTM), "yes yes no no yes"),
}
COLUMNS = ("double backward", "batched", "forward over reverse", "forward JVP", "vmap(jacrev) on inputs")


def problem(name):
    torch.manual_seed(0)
    model = TABLE[name][0]()
    return model, torch.randn(5, 3, 4), torch.tensor([0, 1, 2, 3, 1])


def works(run):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            run()
    except (RuntimeError, NotImplementedError):
        return "no"
    return "yes"


def measured(name):
    """The five columns in plain torch, at its default settings."""
    model, x, y = problem(name)
    values = {k: p.detach() for k, p in model.named_parameters()}
    ones = {k: torch.ones_like(p) for k, p in values.items()}
    loss = lambda v: CE(functional_call(model, v, (x,)), y)  # noqa: E731

    def double_backward(batched):
        parameters = list(model.parameters())
        gradients = torch.autograd.grad(CE(model(x), y), parameters, create_graph=True, allow_unused=True)
        used = [g for g in gradients if g is not None and g.requires_grad]
        vectors = [torch.ones(2, *g.shape) if batched else torch.ones_like(g) for g in used]
        torch.autograd.grad(used, parameters, vectors, allow_unused=True, is_grads_batched=batched)

    return " ".join(
        works(run)
        for run in (
            lambda: double_backward(False),
            lambda: double_backward(True),
            lambda: jvp(grad(loss), (values,), (ones,)),
            lambda: jvp(lambda v: functional_call(model, v, (x,)), (values,), (ones,)),
            lambda: vmap(jacrev(lambda t: functional_call(model, values, (t[None],))[0]))(x),
        )
    )


@pytest.mark.parametrize("name", TABLE)
def test_the_table_is_true_of_this_torch(name):
    assert measured(name) == TABLE[name][1]


def test_the_page_shows_the_table():
    text = PAGE.read_text(encoding="utf-8")
    rows = {
        cells[0]: cells[1:6]
        for line in text.splitlines()
        if (cells := [c.strip() for c in line.strip("| ").split("|")])[0] in TABLE
    }
    assert {name: " ".join(cells) for name, cells in rows.items()} == {n: t for n, (_, t) in TABLE.items()}
    version = re.search(r"torch (\d+\.\d+)", text)
    assert version is not None


def exact_hessian(model, x, y):
    """In float64 by autograd on the decomposed forms."""
    parameters = dict(model.named_parameters())
    theta = torch.cat([p.detach().reshape(-1) for p in parameters.values()])

    def value(t):
        pieces = t.split([p.numel() for p in parameters.values()])
        values = {k: v.view(p.shape) for (k, p), v in zip(parameters.items(), pieces, strict=True)}
        return CE(functional_call(model, values, (x,)), y)

    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(value, theta)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [n for n in TABLE if n != "BatchNorm, train"])
def test_operators_work_on_every_row(name, dtype):
    model, x, y = problem(name)
    settings = torch.backends.mkldnn.enabled, torch.backends.cuda.flash_sdp_enabled()
    double, x64 = model.double(), x.double()
    expected = exact_hessian(double, x64, y)
    outputs = jacobian(double, x64).to_dense()
    inputs = jacobian(double, x64, wrt="input").to_dense()
    v = torch.randn(len(expected), 3, dtype=dtype)
    rtol = 1e-10 if dtype == torch.float64 else 2e-4
    model, x = model.to(dtype), x.to(dtype)
    for options in ({}, {"block_size": 3}, {"max_memory": 0}, {"mode": "forward"}):
        op = hessian(model, CE, (x, y), **options)
        assert_close((op @ v).double(), expected @ v.double(), rtol)
    assert torch.linalg.eigvalsh(ggn(model, CE, (x, y)).to_dense()).min() > -1e-5
    J = jacobian(model, x)
    assert_close((J @ v).double(), outputs @ v.double(), rtol)
    assert_close((jacobian(model, x, wrt="input").to_dense()).double(), inputs, rtol)
    assert settings == (torch.backends.mkldnn.enabled, torch.backends.cuda.flash_sdp_enabled())


@pytest.mark.parametrize("build", [hessian, ggn])
def test_batch_norm_in_train_mode_says_what_to_do(build):
    model, x, y = problem("BatchNorm, train")
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        build(model, CE, (x, y))


@pytest.mark.parametrize("layer", [nn.Embedding(5, 4, sparse=True), nn.EmbeddingBag(5, 4)])
@pytest.mark.parametrize("kind", ["hessian", "ggn", "jacobian"])
def test_embeddings_without_second_derivatives_say_what_to_do(kind, layer):
    model = nn.Sequential(layer, nn.Flatten(), nn.LazyLinear(3))
    x, y = torch.tensor([[0, 1, 2], [3, 4, 0]]), torch.tensor([0, 1])
    model(x)
    build = {
        "hessian": lambda **o: hessian(model, CE, (x, y), **o),
        "ggn": lambda **o: ggn(model, CE, (x, y), **o),
        "jacobian": lambda **o: jacobian(model, x, **o),
    }[kind]
    with pytest.raises(ValueError, match="params="):
        build()
    assert torch.isfinite(build(params="2.*").to_dense()).all()


def test_a_padding_row_is_constant():
    model = nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.tensor([[0, 1, 2], [3, 4, 0]]), torch.tensor([0, 2])
    op = hessian(model, CE, (x, y))
    assert not op.to_dense()[:4].any()
    gradient = torch.autograd.grad(CE(model(x), y), list(model.parameters()))
    eps, v = 1e-5, torch.randn(op.shape[0], dtype=torch.float64)
    v[:4] = 0
    with torch.no_grad():
        for p, t in zip(model.parameters(), op.layout.unflatten(v).values(), strict=True):
            p += eps * t
    moved = torch.autograd.grad(CE(model(x), y), list(model.parameters()))
    difference = (op.layout.flatten(moved) - op.layout.flatten(gradient)) / eps
    assert_close(op.refresh() @ v, difference, 1e-3)
