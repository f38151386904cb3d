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


class CrossAttention(nn.Module):
    """Queries of learned tokens against the sequence: split projections, key and value of one input."""

    def __init__(self):
        super().__init__()
        self.queries = nn.Parameter(torch.randn(1, 2, 6))
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True, add_bias_kv=True)
        self.norm, self.head = nn.RMSNorm(6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        q = self.queries.expand(len(x), -1, -1)
        mixed, _ = self.attention(q, x, x, need_weights=False)
        return self.head(self.norm(mixed + q)[:, 0])


class SequenceFirst(nn.Module):
    """Attention and a recurrence that have the samples on axis 1 inside."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.transpose(0, 1)
        return self.head(torch.tanh(self.attention(h, h, h)[0])).sum(0)


class Recurrent(nn.Module):
    """A recurrent layer's last state."""

    def __init__(self, layer: nn.RNNBase):
        super().__init__()
        self.layer = layer
        self.head = nn.Linear(layer.hidden_size * (2 if layer.bidirectional else 1), 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x)[0][:, -1])


class TinyGPT(nn.Module):
    """A pre-norm block with causal attention, weights as [in, out], and the token table as its head."""

    def __init__(self, vocabulary: int = 11, width: int = 6, length: int = 5, tied: bool = True):
        super().__init__()
        self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Parameter(0.5 * torch.randn(width, 3 * width))
        self.qkv_bias = nn.Parameter(0.1 * torch.randn(3 * width))
        self.up, self.down = nn.Linear(width, 8), nn.Linear(8, width, bias=False)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        n, length = tokens.shape
        h = self.tokens(tokens) + self.places(torch.arange(length, device=tokens.device))
        a = self.norm1(h)
        qkv = torch.addmm(self.qkv_bias, a.view(-1, a.shape[-1]), self.qkv).view(n, length, -1)
        q, k, v = (part.view(n, length, 2, -1).transpose(1, 2) for part in qkv.chunk(3, -1))
        h = h + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(h + self.down(F.gelu(self.up(self.norm2(h)))))


class LowRank(nn.Module):
    """W₀ x + B A x, as two layers or merged into one weight."""

    def __init__(self, merged: bool):
        super().__init__()
        self.base = nn.Linear(5, 4)
        self.base.weight.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 5)), nn.Parameter(torch.randn(4, 2))
        self.head, self.merged = nn.Linear(4, 3), merged

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            z = F.linear(x, self.base.weight + 0.5 * self.b @ self.a, self.base.bias)
        else:
            z = self.base(x) + 0.5 * (x @ self.a.T) @ self.b.T
        return self.head(torch.tanh(z))


class Siamese(nn.Module):
    """One encoder on two halves of the input, and its transposed weight as a decoder."""

    def __init__(self):
        super().__init__()
        self.encoder, self.bias = nn.Linear(4, 3), nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.encoder(x[:, :4])) * torch.tanh(self.encoder(x[:, 4:]))
        return F.linear(h, self.encoder.weight.T, self.bias)


class Direct(nn.Module):
    """Parameters added, multiplied, divided by, sliced, squared, and as a matrix on the left."""

    def __init__(self):
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.rand(4) + 1), nn.Parameter(torch.randn(3, 1))
        self.places, self.temperature = nn.Parameter(torch.randn(1, 5, 4)), nn.Parameter(torch.tensor(1.3))
        self.mix, self.vector = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(6))
        self.kept = nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        h = (x * self.scale - self.shift) / self.temperature + self.places[:, : x.shape[1]]
        h = torch.tanh(h / self.scale) * F.softplus(self.scale)
        mixed = (self.mix @ h.mT).flatten(1)  # [n, 2·3]
        return torch.stack([mixed @ self.vector, torch.sin(mixed + self.kept[:6]) @ self.kept.square()], 1)


class Frames(nn.Module):
    """A convolution on frames folded into the batch axis, and its transposed partner with the same weight."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 2)
        self.norm = nn.InstanceNorm2d(2, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        n, frames = x.shape[:2]
        h = self.norm(self.conv(x.flatten(0, 1).unsqueeze(1)))
        h = F.conv_transpose2d(torch.tanh(h), self.conv.weight, stride=2)
        return h.reshape(n, frames, -1).mean((1, 2)).unsqueeze(1)


class Bags(nn.Module):
    """Token bags by sum and by mean, with a padding token and weights."""

    def __init__(self):
        super().__init__()
        self.mean = nn.EmbeddingBag(7, 3, padding_idx=2)
        self.sum = nn.EmbeddingBag(7, 3, mode="sum")
        self.head = nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        weights = torch.linspace(0.5, 1.5, tokens.shape[1], dtype=self.head.weight.dtype)
        weights = weights.expand(tokens.shape).contiguous()
        return self.head(torch.tanh(self.mean(tokens)) + self.sum(tokens, per_sample_weights=weights).sin())


class ClassToken(nn.Module):
    """Patches by convolution, a class token and places, pre-norm attention, the class token's head."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(1, 8, 2, stride=2)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 8)), nn.Parameter(torch.randn(1, 5, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.patch(x).flatten(2).transpose(1, 2)
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1) + self.places
        return self.head(self.block(h)[:, 0])


def rule_networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """Name → (float64 model, inputs): every operation that has a rule, in every setting."""
    torch.manual_seed(2)

    def flat(*layers: nn.Module) -> nn.Sequential:
        return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(2))

    def conv(layer: nn.Module, *size: int) -> tuple[nn.Module, Tensor]:
        model, x = flat(layer, nn.Tanh()), torch.randn(3, layer.in_channels, *size)
        model(x)
        return model, x

    bn = nn.BatchNorm2d(3)
    bn.running_mean, bn.running_var = torch.randn(3), torch.rand(3) + 0.5
    images = torch.randn(3, 4, 3, 3)
    zoo: dict[str, tuple[nn.Module, Tensor]] = {
        "conv1d reflect": conv(nn.Conv1d(2, 4, 3, padding=2, padding_mode="reflect", stride=2), 6),
        "conv2d uneven": conv(
            nn.Conv2d(4, 6, (2, 3), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2), 5, 7
        ),
        "conv2d replicate": conv(nn.Conv2d(2, 2, 3, padding=1, padding_mode="replicate", bias=False), 4, 4),
        "conv3d groups": conv(nn.Conv3d(2, 4, 2, groups=2, stride=2, padding=1, dilation=2), 4, 4, 4),
        "depthwise": conv(nn.Conv2d(3, 6, 3, groups=3, padding="same"), 4, 4),
        "transposed 1d": conv(nn.ConvTranspose1d(2, 4, 3, stride=2, padding=1, output_padding=1), 5),
        "transposed 2d": conv(nn.ConvTranspose2d(4, 4, (2, 3), stride=2, groups=2, dilation=2), 3, 3),
        "transposed 3d": conv(nn.ConvTranspose3d(2, 2, 2, stride=2, bias=False), 2, 2, 2),
        "layer norm": (flat(nn.Linear(4, 6), nn.LayerNorm((2, 6)), nn.SiLU()), torch.randn(3, 2, 4)),
        "layer norm no bias": (flat(nn.LayerNorm(4, bias=False), nn.Tanh()), torch.randn(3, 2, 4)),
        "norms without affine": (
            flat(
                nn.Conv2d(4, 4, 2),
                nn.GroupNorm(2, 4, affine=False),
                nn.LayerNorm(2, elementwise_affine=False),
            ),
            images,
        ),
        "batch norm": (flat(nn.Conv2d(4, 3, 2), bn, nn.Tanh()).eval(), images),
        "batch norm 1d": (flat(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh()).eval(), torch.randn(4, 4)),
        "group norm": (flat(nn.GroupNorm(2, 4), nn.Tanh()), images),
        "instance norm": (flat(nn.InstanceNorm2d(4, affine=True), nn.Tanh()), images),
        "rms norm": (flat(nn.Linear(4, 6), nn.RMSNorm(6), nn.Tanh()), torch.randn(3, 2, 4)),
        "prelu": (flat(nn.Conv2d(4, 3, 2), nn.PReLU(3), nn.Flatten(), nn.PReLU()), images),
        "four axes": (flat(nn.Linear(3, 2), nn.Tanh()), torch.randn(3, 2, 2, 2, 3)),
        "bilinear": (nn.Sequential(nn.Linear(4, 4), _Twice(nn.Bilinear(4, 4, 2))), torch.randn(3, 4)),
        "cross attention": (CrossAttention(), torch.randn(3, 4, 6)),
        "sequence first": (SequenceFirst(), torch.randn(3, 5, 4)),
        "rnn": (Recurrent(nn.RNN(3, 4, 2, batch_first=True)), torch.randn(3, 5, 3)),
        "lstm": (Recurrent(nn.LSTM(3, 4, batch_first=True, bidirectional=True)), torch.randn(3, 4, 3)),
        "gru": (Recurrent(nn.GRU(3, 4, batch_first=True)), torch.randn(3, 4, 3)),
        "gpt tied": (TinyGPT(), torch.randint(11, (3, 5))),
        "gpt untied": (TinyGPT(tied=False), torch.randint(11, (3, 4))),
        "lora": (LowRank(merged=False), torch.randn(4, 5)),
        "lora merged": (LowRank(merged=True), torch.randn(4, 5)),
        "siamese": (Siamese(), torch.randn(4, 8)),
        "direct": (Direct(), torch.randn(4, 3, 4)),
        "frames": (Frames(), torch.randn(3, 3, 3, 3)),
        "bags": (Bags(), torch.randint(7, (4, 5))),
        "class token": (ClassToken(), torch.randn(3, 1, 4, 4)),
    }
    for model, x in zoo.values():
        model(x)  # lazy layers get their shapes
        for module in model.modules():  # not the ones and zeros of the defaults
            if isinstance(getattr(module, "weight", None), nn.Parameter) and module.weight.ndim == 1:
                nn.init.uniform_(module.weight, 0.5, 1.5)
    return {name: (m.double(), x.double() if x.is_floating_point() else x) for name, (m, x) in zoo.items()}


class _Twice(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, torch.tanh(x))


RULE_NAMES = tuple(rule_networks())
