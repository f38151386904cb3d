"""Explicit float64 curvature matrices by other means than the operators use, and small networks to try."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.attention import SDPBackend, sdpa_kernel


def flat(parameters):
    return torch.cat([p.detach().reshape(-1) for p in parameters])


def function_of(model, names, x):
    """θ [P] → the model's output, θ taking the place of the named parameters."""
    shapes = {name: dict(model.named_parameters())[name].shape for name in names}

    def call(theta):
        pieces = theta.split([s.numel() for s in shapes.values()])
        replaced = {n: t.view(s) for (n, s), t in zip(shapes.items(), pieces, strict=True)}
        return functional_call(model, replaced, (x,))

    return call


def names_of(model):
    return [name for name, p in model.named_parameters() if p.requires_grad]


def explicit_hessian(model, loss_fn, x, y, names=None):
    names = names or names_of(model)
    call = function_of(model, names, x)
    theta = flat([dict(model.named_parameters())[n] for n in names])
    with sdpa_kernel(SDPBackend.MATH):
        return torch.autograd.functional.hessian(lambda t: loss_fn(call(t), y), theta)


def explicit_ggn(model, loss_fn, x, y, names=None):
    names = names or names_of(model)
    call = function_of(model, names, x)
    theta = flat([dict(model.named_parameters())[n] for n in names])
    with sdpa_kernel(SDPBackend.MATH):
        output = call(theta).detach()
        jacobian = jacrev(lambda t: call(t).reshape(-1))(theta)
    curvature = torch.autograd.functional.hessian(
        lambda f: loss_fn(f.view(output.shape), y), output.reshape(-1)
    )
    return jacobian.T @ curvature @ jacobian


def assert_close(actual, expected, rtol=1e-10):
    scale = expected.abs().max().clamp(min=1e-30)
    assert (actual - expected).abs().max() <= rtol * scale


class Tied(nn.Module):
    """One weight used twice in sequence, registered under two names."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.idle = nn.Linear(2, 2)
        self.used = nn.Linear(4, 3)

    def forward(self, x):
        return self.used(x).sin()


class Attention(nn.Module):
    """Tokens → embedding → attention block → one class score a sample."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.qkv = nn.Linear(4, 12)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        x = self.embedding(tokens)
        q, k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.head(self.norm(x + mixed)).mean(1)


def _frozen():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    model[0].weight.requires_grad_(False)
    return model


def _batch_norm():
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.GELU(), nn.Linear(5, 3))
    model[1].running_mean.normal_()
    model[1].running_var.uniform_(0.5, 2)
    return model.eval()


def _conv():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv2d(1, 2, 2, padding=1),
        nn.SiLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2, 3),
    )


def _transformer():
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Embedding(5, 4), layer, nn.Flatten(), nn.Linear(12, 3))


def _lstm():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.LSTM(2, 3, batch_first=True)

        def forward(self, x):
            return self.rnn(x.unflatten(1, (2, 2)))[0][:, -1]

    return Last()


def tokens(n):
    return torch.randint(0, 5, (n, 3))


def vectors(n):
    return torch.randn(n, 4, dtype=torch.float64)


ZOO = {
    "mlp tanh": (lambda: nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)), vectors),
    "mlp relu in place": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(inplace=True), nn.Linear(6, 3)),
        vectors,
    ),
    "linear": (lambda: nn.Linear(4, 3), vectors),
    "conv": (_conv, vectors),
    "tied": (Tied, vectors),
    "frozen": (_frozen, vectors),
    "unused": (Unused, vectors),
    "batch norm eval": (_batch_norm, vectors),
    "group norm": (
        lambda: nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.ELU(), nn.Linear(6, 3)),
        vectors,
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)),
        vectors,
    ),
    "lstm": (_lstm, vectors),
    "attention": (Attention, tokens),
    "transformer": (_transformer, tokens),
    "transformer eval": (lambda: _transformer().eval(), tokens),
}


def make(name, n=11):
    torch.manual_seed(3)
    factory, inputs = ZOO[name]
    return factory().double(), inputs(n)
