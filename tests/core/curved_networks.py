"""Small networks for the degree rule and the residual: adversarial ones, and one for each way of being smooth."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Lambda(nn.Module):
    """Layers by name, and a function (module, x) → output."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], **parts: object) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(part) if isinstance(part, Tensor) else part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Block(nn.Module):
    """Embedding of patches or tokens, class token, positions, pre-LN encoder layer, norm, head."""

    def __init__(self, *, tokens: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 8, padding_idx=0) if tokens else nn.Linear(5, 8)
        self.cls = nn.Parameter(torch.randn(1, 1, 8))
        self.position = nn.Parameter(torch.randn(1, 5, 8))
        self.encoder = nn.TransformerEncoderLayer(
            8, 2, 12, dropout=0.0, batch_first=True, norm_first=True, activation="gelu"
        )
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = torch.cat([self.cls.expand(len(h), -1, -1), h], 1) + self.position
        return self.head(self.norm(self.encoder(h))[:, 0])


class Recurrent(nn.Module):
    """A recurrent layer and a head on its last state."""

    def __init__(self, kind: type[nn.RNNBase], **options: object) -> None:
        super().__init__()
        self.cell, self.head = kind(3, 4, batch_first=True, **options), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Tower(torch.autograd.Function):
    """The identity with a gradient of its own."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, g: Tensor) -> Tensor:
        return g * 2


def _mlp(act: type[nn.Module], *, d: int = 4, last: nn.Module | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d, 5), act(), nn.Linear(5, 4), last or act(), nn.Linear(4, 3))


def _deep(act: type[nn.Module], *, bias: bool = True) -> nn.Sequential:
    """Four hidden layers."""
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.Linear(4, 4, bias=bias), act()]
    return nn.Sequential(*layers, nn.Linear(4, 3))


def _lin(a: int = 4, b: int = 4) -> nn.Linear:
    return nn.Linear(a, b)


def _qkv(m: nn.Module, x: Tensor) -> Tensor:
    q, k, v = m.q(x), m.k(x), m.v(x)
    return m.head((torch.softmax(q @ k.mT, -1) @ v).mean(1))


def piecewise_affine() -> dict[str, tuple[nn.Module, Tensor]]:
    """Networks in which every parameter is to be proven."""
    torch.manual_seed(3)
    x4 = torch.randn(5, 4)
    image = torch.randn(4, 2, 6, 6)
    return {
        "relu mlp": (_mlp(nn.ReLU), x4),
        "leaky relu": (_mlp(nn.LeakyReLU), x4),
        "prelu": (_mlp(nn.PReLU), x4),
        "hardtanh": (_mlp(nn.Hardtanh), x4),
        "abs": (Lambda(lambda m, x: m.b(m.a(x).abs()), a=_lin(), b=_lin(4, 3)), x4),
        "maxout": (
            Lambda(lambda m, x: m.c(torch.maximum(m.a(x), m.b(x))), a=_lin(), b=_lin(), c=_lin(4, 3)),
            x4,
        ),
        "conv": (
            nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
                nn.Conv2d(4, 4, 3, groups=2),
                nn.ReLU(),
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.Linear(4, 3),
            ),
            image,
        ),
        "batch norm, eval": (
            nn.Sequential(
                nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
            ).eval(),
            image,
        ),
        "siamese": (
            Lambda(lambda m, x: m.b(m.a(x).relu() + m.a(x.flip(1)).relu()), a=_lin(), b=_lin(4, 3)),
            x4,
        ),
        "skip": (Lambda(lambda m, x: m.b(x + m.a(x).relu()), a=_lin(), b=_lin(4, 3)), x4),
        "scalar gate": (
            Lambda(lambda m, x: m.b(m.g * m.a(x).relu()), a=_lin(), b=_lin(4, 3), g=torch.randn(())),
            x4,
        ),
        "bilinear first layer": (
            Lambda(lambda m, x: m.c(m.a(x) * m.b(x)), a=_lin(), b=_lin(), c=_lin(4, 3)),
            x4,
        ),
        "lora": (
            Lambda(
                lambda m, x: m.c(F.linear(x, m.w + m.b @ m.a).relu()),
                w=torch.randn(4, 4),
                a=torch.randn(2, 4),
                b=torch.randn(4, 2),
                c=_lin(4, 3),
            ),
            x4,
        ),
        "linear attention": (
            Lambda(
                lambda m, x: m.head((m.q(x) @ m.k(x).mT @ m.v(x)).mean(1)),
                q=_lin(),
                k=_lin(),
                v=_lin(),
                head=_lin(4, 3),
            ),
            torch.randn(3, 5, 4),
        ),
        "data squared": (Lambda(lambda m, x: m.b(m.a(x * x).relu()), a=_lin(), b=_lin(4, 3)), x4),
        "layer norm of the data": (
            nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)),
            x4,
        ),
        "exact kinks": (
            nn.Sequential(nn.Linear(4, 5, bias=False), nn.ReLU(), nn.Linear(5, 3)),
            x4 * (x4 > 0),
        ),
        "hardsigmoid": (_mlp(nn.Hardsigmoid), x4),
        "transposed conv": (
            nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 3)),
            image,
        ),
        "embedding": (
            Lambda(
                lambda m, t: m.b(m.a(m.e(t)).relu().mean(1)),
                e=nn.Embedding(7, 4, padding_idx=0),
                a=_lin(),
                b=_lin(4, 3),
            ),
            torch.randint(7, (4, 5)),
        ),
        "index and pad": (
            Lambda(lambda m, x: m.b(F.pad(m.a(x), (1, 1)).relu()[:, [0, 2, 3, 5]]), a=_lin(), b=_lin(4, 3)),
            x4,
        ),
    }


def not_affine() -> dict[str, tuple[nn.Module, Tensor, tuple[str, ...]]]:
    """Networks with the parameters (globs) that must not be proven."""
    torch.manual_seed(4)
    x4, seq = torch.randn(5, 4), torch.randn(3, 5, 4)
    return {
        "gelu branch": (
            Lambda(lambda m, x: m.b(m.a(x).relu() + F.gelu(m.c(x))), a=_lin(), b=_lin(4, 3), c=_lin()),
            x4,
            ("c.*",),
        ),
        "weight norm": (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.ReLU(), nn.Linear(4, 3)),
            x4,
            ("0.parametrizations.weight.original1",),
        ),
        "tied in sequence": (
            Lambda(lambda m, x: m.b(m.a(m.a(x).relu()).relu()), a=_lin(), b=_lin(4, 3)),
            x4,
            ("a.weight",),
        ),
        "W W x": (Lambda(lambda m, x: m.b(x @ (m.w @ m.w)), w=torch.randn(4, 4), b=_lin(4, 3)), x4, ("w",)),
        "rnn": (Recurrent(nn.RNN, nonlinearity="relu"), torch.randn(4, 3, 3), ("cell.weight_hh_l0",)),
        "squared parameter": (
            Lambda(lambda m, x: m.b(m.a(x).relu()) * m.s**2, a=_lin(), b=_lin(4, 3), s=torch.randn(3)),
            x4,
            ("s",),
        ),
        "softmax attention": (
            Lambda(_qkv, q=_lin(), k=_lin(), v=_lin(), head=_lin(4, 3)),
            seq,
            ("q.*", "k.weight"),
        ),
        "glu": (
            Lambda(lambda m, x: m.c(F.glu(m.b(m.a(x).relu()))), a=_lin(), b=_lin(4, 8), c=_lin(4, 3)),
            x4,
            ("a.*",),
        ),
        "gated after a layer": (
            Lambda(lambda m, x: m.d((h := m.a(x).relu()) * m.b(h)), a=_lin(), b=_lin(), d=_lin(4, 3)),
            x4,
            ("a.*",),
        ),
        "squared relu": (Lambda(lambda m, x: m.b(m.a(x).relu() ** 2), a=_lin(), b=_lin(4, 3)), x4, ("a.*",)),
        "hardswish": (_mlp(nn.Hardswish), x4, ("0.*", "2.*")),
        "temperature": (
            Lambda(lambda m, x: m.b(m.a(x).relu()) / m.t, a=_lin(), b=_lin(4, 3), t=torch.tensor(1.3)),
            x4,
            ("t",),
        ),
        "layer norm": (
            nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 3)),
            x4,
            ("0.*",),
        ),
        "rms norm": (nn.Sequential(nn.Linear(4, 4), nn.RMSNorm(4), nn.ReLU(), nn.Linear(4, 3)), x4, ("0.*",)),
        "group norm": (
            nn.Sequential(nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.ReLU(), nn.Linear(4, 3)),
            x4,
            ("0.*",),
        ),
        "log softmax": (
            nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3), nn.LogSoftmax(1)),
            x4,
            ("0.*", "2.*"),
        ),
        "standardized weight": (
            Lambda(
                lambda m, x: m.b(F.linear(x, m.w - m.w.mean(1, keepdim=True)) / m.w.std()),
                w=torch.randn(4, 4),
                b=_lin(4, 3),
            ),
            x4,
            ("w",),
        ),
    }


def smooth() -> dict[str, tuple[nn.Module, Tensor]]:
    """Networks with a residual to be sampled."""
    torch.manual_seed(5)
    x4, image = torch.randn(6, 4), torch.randn(4, 2, 6, 6)
    return {
        "tanh mlp": (_mlp(nn.Tanh), x4),
        "gelu mlp": (_mlp(nn.GELU), x4),
        "deep tanh mlp": (_deep(nn.Tanh), x4),
        "deep gelu mlp": (_deep(nn.GELU), x4),
        "deep silu mlp without bias": (_deep(nn.SiLU, bias=False), x4),
        "deep, token-wise, padded": (
            Lambda(
                lambda m, x: m.c(F.pad(m.a(F.gelu(m.b(torch.tanh(m.e(x))))).sigmoid(), (0, 0, 1, 0)).mean(1)),
                e=_lin(),
                b=_lin(),
                a=_lin(),
                c=_lin(4, 3),
            ),
            torch.randn(3, 5, 4),
        ),
        "two ways to one place": (
            Lambda(
                lambda m, x: m.d(torch.tanh((h := m.a(x)) + m.c(F.silu(m.b(torch.tanh(h)))))),
                a=_lin(),
                b=_lin(),
                c=_lin(),
                d=_lin(4, 3),
            ),
            x4,
        ),
        "split, scaled, joined": (
            Lambda(
                lambda m, x: m.d(
                    torch.tanh(
                        m.c(torch.cat([(p := F.gelu(m.b(F.silu(m.a(x)))).chunk(2, 1))[1], -2.5 * p[0]], 1))
                    )
                ),
                a=_lin(),
                b=_lin(),
                c=_lin(),
                d=_lin(4, 3),
            ),
            x4,
        ),
        "layer norms in a row": (
            nn.Sequential(
                nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 5), nn.GELU(), nn.LayerNorm(5), nn.Linear(5, 3)
            ),
            torch.randn(3, 4, 4).mean(1),
        ),
        "silu without bias": (
            nn.Sequential(
                nn.Linear(4, 5, bias=False),
                nn.SiLU(),
                nn.Linear(5, 5, bias=False),
                nn.SiLU(),
                nn.Linear(5, 3),
            ),
            x4,
        ),
        "softplus and elu": (_mlp(nn.Softplus, last=nn.ELU()), x4),
        "mish and hardswish": (_mlp(nn.Mish, last=nn.Hardswish()), x4),
        "in place": (
            nn.Sequential(
                nn.Linear(4, 5), nn.SiLU(inplace=True), nn.Linear(5, 4), nn.ELU(inplace=True), nn.Linear(4, 3)
            ),
            x4,
        ),
        "squared relu": (
            Lambda(lambda m, x: m.c(m.b(m.a(x).relu() ** 2).relu() ** 2), a=_lin(), b=_lin(), c=_lin(4, 3)),
            x4,
        ),
        "conv": (
            nn.Sequential(
                nn.Conv2d(2, 4, 3, padding=1),
                nn.SiLU(),
                nn.Conv2d(4, 4, 3, stride=2, groups=2, dilation=1),
                nn.GELU(),
                nn.MaxPool2d(2),
                nn.Flatten(),
                nn.Linear(4, 3),
            ),
            image,
        ),
        "conv, batch norm, average": (
            nn.Sequential(
                nn.Conv2d(2, 3, 3, padding=1, padding_mode="replicate"),
                nn.BatchNorm2d(3),
                nn.Tanh(),
                nn.AvgPool2d(2),
                nn.Conv2d(3, 3, 2),
                nn.BatchNorm2d(3),
                nn.GELU(),
                nn.Flatten(),
                nn.Linear(12, 3),
            ).eval(),
            image,
        ),
        "conv 1d": (
            nn.Sequential(
                nn.Conv1d(2, 4, 3), nn.Tanh(), nn.Conv1d(4, 3, 2), nn.GELU(), nn.Flatten(), nn.Linear(9, 3)
            ),
            torch.randn(4, 2, 6),
        ),
        "group norm": (
            nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3)),
            image,
        ),
        "layer norm": (
            nn.Sequential(
                nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 3)
            ),
            x4,
        ),
        "rms norm": (
            nn.Sequential(nn.Linear(4, 6), nn.RMSNorm(6), nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 3)),
            x4,
        ),
        "token-wise": (
            nn.Sequential(
                nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.SiLU(), nn.Flatten(), nn.Linear(9, 3)
            ),
            torch.randn(5, 3, 4),
        ),
        "square batch": (
            nn.Sequential(
                nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.SiLU(), nn.Flatten(), nn.Linear(16, 3)
            ),
            torch.randn(4, 4, 4),
        ),
        "transformer": (Block(), torch.randn(4, 4, 5)),
        "transformer of tokens": (Block(tokens=True), torch.randint(7, (4, 4))),
        "post-norm encoder": (
            Lambda(
                lambda m, x: m.head(m.e(x).mean(1)),
                e=nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True),
                head=_lin(4, 3),
            ).eval(),
            torch.randn(3, 4, 4),
        ),
        "attention": (Lambda(_qkv, q=_lin(), k=_lin(), v=_lin(), head=_lin(4, 3)), torch.randn(3, 5, 4)),
        "tied in sequence": (
            Lambda(lambda m, x: m.b(torch.tanh(m.a(torch.tanh(m.a(x))))), a=_lin(), b=_lin(4, 3)),
            x4,
        ),
        "lora": (
            Lambda(
                lambda m, x: m.h(F.silu(m.w(x) + x @ m.a.T @ m.b.T)),
                w=_lin(),
                a=torch.randn(2, 4),
                b=torch.randn(4, 2),
                h=_lin(4, 3),
            ),
            x4,
        ),
        "scale, shift, temperature": (
            Lambda(
                lambda m, x: m.b(torch.tanh(m.a(x) * m.s + m.t)) / m.z,
                a=_lin(),
                b=_lin(4, 3),
                s=torch.randn(4),
                t=torch.randn(4),
                z=torch.tensor(1.4),
            ),
            x4,
        ),
        "swiglu": (
            Lambda(
                lambda m, x: m.d(F.silu(m.b(h := torch.tanh(m.a(x)))) * m.c(h)),
                a=_lin(),
                b=_lin(),
                c=_lin(),
                d=_lin(4, 3),
            ),
            x4,
        ),
        "rnn": (Recurrent(nn.RNN), torch.randn(4, 3, 3)),
        "lstm": (Recurrent(nn.LSTM), torch.randn(4, 3, 3)),
        "gru": (Recurrent(nn.GRU), torch.randn(4, 3, 3)),
        "weight product": (
            Lambda(lambda m, x: m.b(torch.tanh(x @ (m.w @ m.w))), w=torch.randn(4, 4) / 2, b=_lin(4, 3)),
            x4,
        ),
        "log softmax": (nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3), nn.LogSoftmax(1)), x4),
        "vector norm": (
            Lambda(lambda m, x: m.b((h := m.a(x)) / h.norm(dim=1, keepdim=True)), a=_lin(), b=_lin(4, 3)),
            x4,
        ),
        "clamped by tensors": (
            Lambda(
                lambda m, x: m.c(torch.tanh(torch.clamp(m.b(torch.tanh(m.a(x))), x.abs() - 1, x.exp()))),
                a=_lin(),
                b=_lin(),
                c=_lin(4, 3),
            ),
            x4,
        ),
        "the data divided": (
            Lambda(
                lambda m, x: m.c(x / (2 + torch.sin(m.b(torch.tanh(m.a(x)))))),
                a=_lin(),
                b=_lin(),
                c=_lin(4, 3),
            ),
            x4,
        ),
    }
