"""Small networks that between them use every way a parameter can enter a model, with inputs for them."""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Functional(nn.Module):
    """Parameters used through functional calls and directly; hooks never see them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 4))
        self.scale = nn.Parameter(torch.randn(5))
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(F.linear(x, self.weight)) * self.scale)


class TiedAcrossModules(nn.Module):
    """One tensor in two different modules, in sequence."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x)))))


class LayerAndFunctional(nn.Module):
    """A layer called as a module and its weight used again through F.linear: the rule alone would miss a term."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.first(x)), self.first.weight)[:, :2]


class Skip(nn.Module):
    """Residual connections, one around the first layer, with in-place activations."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.act(self.a(x))
        return self.head(h + self.act(self.b(h)))


class Unused(nn.Module):
    """A layer that is run without reaching the output, and one that is never run."""

    def __init__(self):
        super().__init__()
        self.a, self.aside, self.never = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(2, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        return torch.sin(self.a(x))


class WritesIntoInput(nn.Module):
    """Works on its input in place."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(2)
        return self.a(x)


class TokenHead(nn.Module):
    """Embedding, token-wise linear layers and a pooled head: integer inputs, shared positions."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4, padding_idx=0)
        self.token, self.norm, self.head = nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.norm(F.silu(self.token(self.table(tokens)))).mean(1))


class SmallAttention(nn.Module):
    """An encoder layer: nn.MultiheadAttention's projections are functional calls."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x).mean(1))


def _mlp(*widths: int, act: type[nn.Module] = nn.Tanh, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for d_in, d_out in itertools.pairwise(widths):
        layers += [nn.Linear(d_in, d_out, bias=bias), act()]
    return nn.Sequential(*layers[:-1])


def _shared_module() -> nn.Sequential:
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, 2))


def _frozen() -> nn.Sequential:
    model = _mlp(4, 5, 5, 3)
    model[2].weight.requires_grad_(False)
    return model


def _vgg() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(4, 6, 3, padding=1, stride=2, bias=False), nn.ReLU(), nn.Flatten(),
        nn.Linear(6 * 3 * 3, 5), nn.Tanh(), nn.Linear(5, 3),
    )  # fmt: skip


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """Name → (float64 model, inputs)."""
    torch.manual_seed(1)
    zoo: dict[str, tuple[nn.Module, Tensor]] = {
        "mlp tanh": (_mlp(6, 8, 8, 3), torch.randn(7, 6)),
        "mlp relu no bias": (_mlp(6, 8, 8, 3, act=nn.ReLU, bias=False), torch.randn(7, 6)),
        "flattened image": (nn.Sequential(nn.Flatten(), *_mlp(12, 5, 3)), torch.randn(5, 3, 2, 2)),
        "token-wise": (nn.Sequential(_mlp(4, 5, 3, act=nn.SiLU), nn.Flatten()), torch.randn(5, 6, 4)),
        "token-wise long": (
            nn.Sequential(nn.Linear(2, 2), nn.Flatten(), nn.Linear(80, 2)),
            torch.randn(3, 40, 2),
        ),
        "square batch": (
            nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Flatten()),
            torch.randn(4, 4, 4),
        ),
        "vgg": (_vgg(), torch.randn(4, 3, 8, 8)),
        "conv1d groups dilation": (
            nn.Sequential(
                nn.Conv1d(4, 6, 3, groups=2, dilation=2, padding=1, padding_mode="circular"),
                nn.GELU(),
                nn.Conv1d(6, 6, 2, groups=6, stride=2),
                nn.Flatten(),
                nn.Linear(18, 2),
            ),
            torch.randn(3, 4, 9),
        ),
        "conv3d": (
            nn.Sequential(
                nn.Conv3d(2, 3, 2, padding="same"), nn.Softplus(), nn.Flatten(), nn.Linear(3 * 27, 2)
            ),
            torch.randn(3, 2, 3, 3, 3),
        ),
        "transposed conv": (
            nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(48, 2)),
            torch.randn(3, 2, 3, 3),
        ),
        "batch norm eval": (
            nn.Sequential(
                nn.Conv2d(2, 3, 2), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2)
            ).eval(),
            torch.randn(4, 2, 3, 3),
        ),
        "group norm": (
            nn.Sequential(nn.Conv2d(2, 4, 2), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)),
            torch.randn(4, 2, 3, 3),
        ),
        "weight norm": (
            nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 2)),
            torch.randn(5, 4),
        ),
        "functional": (Functional(), torch.randn(5, 4)),
        "tied across modules": (TiedAcrossModules(), torch.randn(5, 4)),
        "layer and functional": (LayerAndFunctional(), torch.randn(5, 4)),
        "one module twice": (_shared_module(), torch.randn(5, 4)),
        "skip": (Skip(), torch.randn(5, 4)),
        "unused": (Unused(), torch.randn(5, 4)),
        "frozen weight": (_frozen(), torch.randn(5, 4)),
        "writes into input": (WritesIntoInput(), torch.randn(5, 4)),
        "attention": (SmallAttention().eval(), torch.randn(4, 5, 8)),
        "softmax output": (nn.Sequential(*_mlp(6, 8, 4), nn.Softmax(1)), torch.randn(5, 6)),
        "image output": (nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh()), torch.randn(3, 1, 3, 3)),
        "tokens": (TokenHead(), torch.randint(7, (4, 5))),
    }
    return {name: (m.double(), x.double() if x.is_floating_point() else x) for name, (m, x) in zoo.items()}


NAMES = tuple(networks())


def parameter_jacobian(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """∂f_i/∂p by one autograd call a sample and output: {name: [n, N, |p|]}. The oracle."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    rows: dict[str, list[Tensor]] = {name: [] for name in parameters}
    outputs = 0
    for i in range(len(x)):
        output = model(x[i : i + 1].clone()).flatten()
        outputs = len(output)
        for entry in output:
            grads = torch.autograd.grad(
                entry, list(parameters.values()), retain_graph=True, allow_unused=True
            )
            for (name, p), g in zip(parameters.items(), grads, strict=True):
                rows[name].append((torch.zeros_like(p) if g is None else g).flatten().detach())
    return {name: torch.stack(r).reshape(len(x), outputs, -1) for name, r in rows.items()}


def input_jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """∂f_i/∂x_i, [n, N, M]."""
    rows = []
    for i in range(len(x)):
        point = x[i : i + 1].clone().requires_grad_()
        output = model(point.clone()).flatten()
        rows.append(
            torch.stack([torch.autograd.grad(e, point, retain_graph=True)[0].flatten() for e in output])
        )
    return torch.stack(rows)
