"""Explicit float64 curvature matrices by other means than the operators use, and small networks to try."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrize


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
        jacobian = torch.autograd.functional.jacobian(lambda t: call(t).reshape(-1), theta)
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


class Last(nn.Module):
    """The last position of a recurrent layer over two steps of two features."""

    def __init__(self, kind, **options):
        super().__init__()
        self.rnn = kind(2, 3, batch_first=True, **options)

    def forward(self, x):
        return self.rnn(x.unflatten(1, (2, 2)))[0][:, -1, :3]


class Heads(nn.Module):
    """Multi-head attention of its own queries on a causal mask, with the averaged weights used as well."""

    def __init__(self):
        super().__init__()
        self.mix = nn.MultiheadAttention(2, 1, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        steps = x.unflatten(1, (2, 2))
        mask = nn.Transformer.generate_square_subsequent_mask(2, dtype=x.dtype)
        mixed, weights = self.mix(steps, steps, steps, attn_mask=mask)
        return self.head(torch.cat([mixed.flatten(1), weights.flatten(1)[:, 2:]], 1))


class Branching(nn.Module):
    """Control flow that depends on the data, a loop, a buffer, and a parameter used directly."""

    def __init__(self):
        super().__init__()
        self.step = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.head = nn.Linear(4, 3)
        self.register_buffer("offset", torch.linspace(0, 1, 4))

    def forward(self, x):
        for i in range(3):
            x = torch.tanh(self.step(x)) * self.scale**i + self.offset
            if i == 1 and bool((x > 0).any()):
                x = torch.where(x > 0.5, x.square(), x)
        return self.head(x)


class Residual(nn.Module):
    """A gated residual block with a bilinear layer."""

    def __init__(self):
        super().__init__()
        self.inner, self.gate, self.head = nn.Linear(4, 8), nn.PReLU(4), nn.Bilinear(4, 4, 3)

    def forward(self, x):
        return self.head(x + F.glu(self.inner(x)), self.gate(x))


class LowRank(nn.Module):
    """A frozen weight with a trainable product of two factors added to it."""

    def __init__(self):
        super().__init__()
        self.base = nn.Linear(4, 3)
        self.base.requires_grad_(False)
        self.down, self.up = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(3, 2))

    def forward(self, x):
        return torch.tanh(self.base(x) + x @ self.down.mT @ self.up.mT)


def _pooling():
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)),
        nn.ConvTranspose2d(1, 2, 2, stride=2),
        nn.AvgPool2d(2),
        nn.Hardswish(inplace=True),
        nn.Conv2d(2, 4, 2, padding=1, padding_mode="circular", groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def _sequence():
    return nn.Sequential(
        nn.Embedding(5, 4, padding_idx=0),
        Transposed(),
        nn.Conv1d(4, 3, 2, dilation=2),
        nn.InstanceNorm1d(3),
        nn.Flatten(),
        nn.Linear(12, 3),
    )


class Transposed(nn.Module):
    def forward(self, x):
        return x.mT.repeat(1, 1, 2)


class NormedRows(nn.Module):
    """What torch's weight norm computes; torch's own has a wrong second derivative."""

    def forward(self, length, direction):
        return direction * (length / direction.norm(dim=1, keepdim=True))

    def right_inverse(self, weight):
        return weight.norm(dim=1, keepdim=True), weight


def _weight_norm(make=nn.utils.parametrizations.weight_norm):
    return nn.Sequential(make(nn.Linear(4, 5)), nn.Softplus(), nn.Linear(5, 3))


def _normed_rows():
    def add(layer):
        parametrize.register_parametrization(layer, "weight", NormedRows(), unsafe=True)
        return layer

    return _weight_norm(add)


def _bag():
    return nn.Sequential(nn.EmbeddingBag(5, 4, mode="mean", padding_idx=2), nn.Hardsigmoid(), nn.Linear(4, 3))


class Bag(nn.Module):
    """What ``_bag`` computes, of functions that torch differentiates twice."""

    def __init__(self):
        super().__init__()
        self.layers = _bag()

    def forward(self, tokens):
        kept = (tokens != 2).unsqueeze(-1).double()
        mean = (self.layers[0].weight[tokens] * kept).sum(1) / kept.sum(1).clamp_min(1)
        return self.layers[2](F.relu6(mean + 3) / 6)


# networks that torch differentiates twice not at all, or wrongly, and equals that it does
EQUALS = {"weight norm": _normed_rows, "bag": Bag}


def _transformer():
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True)
    return nn.Sequential(nn.Embedding(5, 4), layer, nn.Flatten(), nn.Linear(12, 3))


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
    "rms norm": (
        lambda: nn.Sequential(nn.Linear(4, 5), nn.RMSNorm(5), nn.Mish(), nn.Linear(5, 3)),
        vectors,
    ),
    "lstm": (lambda: Last(nn.LSTM), vectors),
    "gru two layers both ways": (lambda: Last(nn.GRU, num_layers=2, bidirectional=True), vectors),
    "rnn relu": (lambda: Last(nn.RNN, nonlinearity="relu"), vectors),
    "heads": (Heads, vectors),
    "branching": (Branching, vectors),
    "residual": (Residual, vectors),
    "low rank": (LowRank, vectors),
    "pooling": (_pooling, vectors),
    "sequence": (_sequence, tokens),
    "weight norm": (_weight_norm, vectors),
    "bag": (_bag, tokens),
    "attention": (Attention, tokens),
    "transformer": (_transformer, tokens),
    "transformer eval": (lambda: _transformer().eval(), tokens),
}


def make(name, n=11):
    torch.manual_seed(3)
    factory, inputs = ZOO[name]
    return factory().double(), inputs(n)


def twice_differentiable_in_torch(name, model):
    """The model, or for the names in EQUALS one of the same values that torch differentiates twice."""
    if name not in EQUALS:
        return model
    equal = EQUALS[name]().double()
    for p, q in zip(equal.parameters(), model.parameters(), strict=True):
        p.data.copy_(q.data)
    return equal
