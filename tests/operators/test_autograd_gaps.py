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
from flatkern.operators.substitutes import Substitutes

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


class Ids(nn.Module):
    """A bag of three ids a sample, made of the sign pattern of a real input."""

    def __init__(self):
        super().__init__()
        self.bag = nn.EmbeddingBag(3, 4)
        self.scale = nn.Parameter(torch.ones(4))

    def forward(self, x):
        ids = (x.detach().argmax(-1) % 3).long()
        return torch.tanh(self.bag(ids)) * self.scale + x.mean(1)


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
    "weight_norm": (
        lambda: norm(nn.utils.parametrizations.weight_norm(nn.Linear(6, 6))),
        "wrong yes no no yes",
    ),
    "Hardsigmoid": (lambda: norm(nn.Hardsigmoid()), "no no no yes yes"),
    "EmbeddingBag": (Ids, "no no no no yes"),
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
            verdict = run()
    except (RuntimeError, NotImplementedError):
        return "no"
    return verdict if isinstance(verdict, str) else "yes"


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
        pair = [[torch.randn_like(g) for g in used] for _ in range(2)]
        options = {"retain_graph": True, "allow_unused": True, "is_grads_batched": batched}
        if batched:
            both = torch.autograd.grad(
                used, parameters, [torch.stack(t) for t in zip(*pair, strict=True)], **options
            )
            images = [[None if t is None else t[k] for t in both] for k in (0, 1)]
        else:
            images = [torch.autograd.grad(used, parameters, v, **options) for v in pair]
        where = [i for i, g in enumerate(gradients) if g is not None and g.requires_grad]
        uv, vu = (
            sum(
                (t * images[k][i]).sum()
                for i, t in zip(where, pair[1 - k], strict=True)
                if images[k][i] is not None
            )
            for k in (0, 1)
        )
        return "yes" if abs(uv - vu) <= 1e-3 * abs(uv) + 1e-6 else "wrong"  # a Hessian is symmetric

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
    """In float64 by autograd on the decomposed and substituted forms (which have tests of their own)."""
    parameters = dict(model.named_parameters())
    theta = torch.cat([p.detach().reshape(-1) for p in parameters.values()])

    def value(t):
        pieces = t.split([p.numel() for p in parameters.values()])
        values = {k: v.view(p.shape) for (k, p), v in zip(parameters.items(), pieces, strict=True)}
        return CE(functional_call(model, values, (x,)), y)

    with sdpa_kernel(SDPBackend.MATH), Substitutes():
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


@pytest.mark.parametrize("options", [{}, {"max_memory": 0}, {"mode": "forward"}, {"block_size": 3}])
def test_batch_norm_in_train_mode_works_where_asked_for(options):
    model, x, y = problem("BatchNorm, train")
    model, x = model.double(), x.double()
    expected = exact_hessian(problem("BatchNorm, train")[0].double(), x, y)
    assert_close(hessian(model, CE, (x, y), train_mode=True, **options).to_dense(), expected)


@pytest.mark.parametrize("layer", [nn.Embedding(5, 4, sparse=True), nn.EmbeddingBag(5, 4, mode="max")])
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


BAGS = {
    "rows": ((torch.tensor([[0, 1, 2], [3, 4, 0]]),), {}),
    "padding": ((torch.tensor([[0, 1, 2], [2, 2, 2]]),), {"padding_idx": 2}),
    "negative padding": ((torch.tensor([[0, 1, 4], [3, 4, 0]]),), {"padding_idx": -1}),
    "offsets": ((torch.tensor([0, 1, 2, 3, 4, 0, 1]),), {"offsets": torch.tensor([0, 2, 2, 6])}),
    "last offset": (
        (torch.tensor([0, 1, 2, 3]),),
        {"offsets": torch.tensor([0, 1, 4]), "include_last_offset": True},
    ),
    "weights": (
        (torch.tensor([[0, 1, 2], [3, 4, 0]]),),
        {"per_sample_weights": torch.rand(2, 3, dtype=torch.float64), "mode": "sum"},
    ),
    "largest": ((torch.tensor([[0, 1, 2], [3, 4, 0]]),), {"mode": "max"}),
}


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("name", BAGS)
def test_the_substitute_of_embedding_bag_gives_its_values(name, mode):
    arguments, options = BAGS[name]
    options = {"mode": mode} | options
    weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    expected = F.embedding_bag(arguments[0], weight, **options)
    with Substitutes():
        actual = F.embedding_bag(arguments[0], weight, **options)
    assert_close(actual, expected)
    assert_close(*(torch.autograd.grad(t.sin().sum(), weight)[0] for t in (actual, expected)))


@pytest.mark.parametrize("dim", [0, 1, 2, -1])
def test_the_substitute_of_weight_norm_gives_its_values(dim):
    torch.manual_seed(0)
    v = torch.randn(3, 4, 2, dtype=torch.float64)
    g = torch.rand(torch.norm_except_dim(v, 2, dim).shape, dtype=torch.float64)
    expected = torch._weight_norm(v, g, dim)
    with Substitutes():
        assert_close(torch._weight_norm(v, g, dim), expected)
        assert torch.autograd.gradgradcheck(
            lambda v, g: torch._weight_norm(v, g, dim), (v.requires_grad_(), g.requires_grad_())
        )


def test_the_substitute_of_hardsigmoid_gives_its_values():
    x = torch.linspace(-5, 5, 21, dtype=torch.float64)
    with Substitutes():
        assert_close(F.hardsigmoid(x), torch._C._nn.hardsigmoid(x))
        y = x.clone()
        assert nn.Hardsigmoid(inplace=True)(y) is y
    assert_close(y, torch._C._nn.hardsigmoid(x))


@pytest.mark.parametrize("options", [{}, {"max_memory": 0}, {"mode": "forward"}, {"block_size": 3}])
def test_a_padding_row_is_constant(options):
    model = nn.Sequential(nn.Embedding(5, 4, padding_idx=0), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.tensor([[0, 1, 2], [3, 4, 0]]), torch.tensor([0, 2])
    op = hessian(model, CE, (x, y), **options)
    assert not op.to_dense()[:4].any()
    assert not op.to_dense()[:, :4].any()
    gradient = torch.autograd.grad(CE(model(x), y), list(model.parameters()))
    eps, v = 1e-5, torch.randn(op.shape[0], dtype=torch.float64)
    v[:4] = 0
    with torch.no_grad():
        for p, t in zip(model.parameters(), op.layout.unflatten(v).values(), strict=True):
            p += eps * t
    moved = torch.autograd.grad(CE(model(x), y), list(model.parameters()))
    difference = (op.layout.flatten(moved) - op.layout.flatten(gradient)) / eps
    assert_close(op.refresh() @ v, difference, 1e-3)
