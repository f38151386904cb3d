"""Attention as one operation of the recorded run: the same residual as decomposed, no T × T on the tape."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatkern as fk
from flatkern import attention_form
from flatkern.affine import custom_function, degrees
from flatkern.kernels import _attention_layout
from flatkern.residual import Sites, Twice, double_backward, linearize, sites
from flatkern.sample_axis import footprint, sample_axes
from flatkern.tape import record
from tests.core.curved_networks import Block
from tests.core.explicit_diagonals import hessian_diagonal
from tests.core.networks import CrossAttention, TinyGPT
from tests.core.test_hessian_trace import Keyed

CE = nn.CrossEntropyLoss()


class Heads(nn.Module):
    """Grouped heads, with the mask that ``kind`` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.kv, self.head = nn.Linear(4, 8), nn.Linear(4, 8), nn.Linear(8, 3)
        self.bias = nn.Parameter(torch.randn(5, 5)) if kind == "learned" else None

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
        k, v = (t.unflatten(-1, (2, 2)).transpose(1, 2) for t in self.kv(x).chunk(2, -1))
        mask: Tensor | None = None
        if self.kind == "boolean":
            mask = torch.ones(5, 5, dtype=torch.bool).triu()
        elif self.kind == "padding":
            mask = (x[..., 0] > -1)[:, None, None]
        elif self.bias is not None:
            mask = self.bias
        elif self.kind == "of the input":
            mask = q.mean((1, 3))[:, None, None, :].tanh()
        causal = self.kind == "causal"
        mixed = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, enable_gqa=True)
        return self.head(torch.tanh(mixed.transpose(1, 2).flatten(2).mean(1)))


class WeighedByValues(nn.Module):
    """One layer makes values and mask; queries and keys are the data."""

    def __init__(self) -> None:
        super().__init__()
        self.v, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        v = self.v(x)
        return self.head(F.scaled_dot_product_attention(x, x, v, v[..., :1].mT.expand(-1, 5, -1)).mean(1))


class Half(Heads):
    """The attention under autocast."""

    def __init__(self) -> None:
        super().__init__("plain")
        self.float()

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 2)).transpose(1, 2)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).flatten(2)
            return self.head(mixed).float().tanh().mean(1)


class SequenceFirst(nn.Module):
    """Has the samples on axis 1 inside."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(4, 2), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.transpose(0, 1)
        return self.head(torch.tanh(self.attention(h, h, h, need_weights=False)[0])).sum(0)


MODELS = {
    "plain": lambda: Heads("plain"),
    "causal": lambda: Heads("causal"),
    "boolean mask": lambda: Heads("boolean"),
    "padding mask": lambda: Heads("padding"),
    "learned bias": lambda: Heads("learned"),
    "mask of the input": lambda: Heads("of the input"),
    "values in the mask": WeighedByValues,
    "encoder layer": Block,
    "learned queries": CrossAttention,
    "sequence first": SequenceFirst,
    "tied language model": TinyGPT,
}


def problem(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(5)
    model = MODELS[name]().double()
    if name == "tied language model":
        return model, torch.randint(11, (4, 5)), torch.randint(11, (4, 5))
    width = {"encoder layer": 5, "learned queries": 6}.get(name, 4)
    length = 4 if name == "encoder layer" else 5
    return model, torch.randn(4, length, width, dtype=torch.float64), torch.arange(4) % 2


def loss_of(name: str) -> nn.Module:
    return fk.losses.TokenCrossEntropyLoss() if name == "tied language model" else CE


@pytest.fixture
def by_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any length goes by blocks, several of them."""
    monkeypatch.setattr(attention_form, "LEAST_WEIGHTS", 0)
    monkeypatch.setattr(attention_form, "LEAST_CAUSAL_WEIGHTS", 0)
    monkeypatch.setattr(_attention_layout, "ROWS", 2)
    monkeypatch.setattr(_attention_layout, "CAUSAL_ROWS", 2)


def drawn(name: str, monkeypatch: pytest.MonkeyPatch, *, long: bool) -> list[Tensor]:
    model, x, _ = problem(name)
    parameters = dict(model.named_parameters())
    chunk = linearize(model, x, parameters, *sample_axes(model, x, parameters))
    assert any(op.name == "attention" for op in chunk.tape.ops) == long
    r = torch.randn(chunk.output.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    other = linearize(model, x, parameters, *sample_axes(model, x, parameters))
    ways = Sites(chunk, r, local=False), Twice(other, r)  # Sites lets go of a chunk's values
    for module in (sites, double_backward):
        monkeypatch.setattr(module, "Draws", Keyed)
    found = []
    for Keyed.probe in range(2):
        found += [way.draw(torch.Generator()) for way in ways]
    return found


@pytest.mark.parametrize("name", MODELS)
def test_both_ways_equal_the_decomposed_form(
    name: str, monkeypatch: pytest.MonkeyPatch, by_blocks: None
) -> None:
    blocked = drawn(name, monkeypatch, long=True)
    monkeypatch.setattr(attention_form, "LEAST_WEIGHTS", 10**9)
    monkeypatch.setattr(attention_form, "LEAST_CAUSAL_WEIGHTS", 10**9)
    plain = drawn(name, monkeypatch, long=False)
    for first, second in ((0, 1), (2, 3)):
        torch.testing.assert_close(blocked[first], blocked[second], rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(plain[first], plain[second], rtol=1e-9, atol=1e-11)
    assert float(blocked[0].abs().sum()) > 0


def test_autocast(monkeypatch: pytest.MonkeyPatch, by_blocks: None) -> None:
    torch.manual_seed(0)
    model, x, r = Half(), torch.randn(4, 5, 4), torch.randn(4, 3)
    parameters = {name: p for name, p in model.named_parameters() if name.startswith("q.")}
    for module in (sites, double_backward):
        monkeypatch.setattr(module, "Draws", Keyed)
    found = []
    for least in (0, 10**9):
        monkeypatch.setattr(attention_form, "LEAST_WEIGHTS", least)
        for way in (lambda c: Sites(c, r, local=False), lambda c: Twice(c, r)):
            chunk = linearize(model, x, parameters, *sample_axes(model, x, parameters))
            assert any(op.name == "attention" for op in chunk.tape.ops) == (least == 0)
            found.append(way(chunk).draw(torch.Generator()))
    assert float(found[0].abs().min()) > 0
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=0.03, atol=0.03 * float(found[0].abs().max()))


@pytest.mark.parametrize("name", MODELS)
def test_unbiased(name: str, by_blocks: None) -> None:
    model, x, y = problem(name)
    loss = loss_of(name)
    true = sum(float(d.sum()) for d in hessian_diagonal(model, loss, x, y).values())
    found = fk.hessian_trace(model, loss, (x, y), samples=160, seed=4)
    assert "residual" in found.method
    assert abs(found.value - true) < 4.5 * found.stderr, (found, true)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_proven_does_not_change(name: str, monkeypatch: pytest.MonkeyPatch, by_blocks: None) -> None:
    model, x, _ = problem(name)
    parameters = dict(model.named_parameters())
    verdicts = []
    for least in (0, 10**9):
        monkeypatch.setattr(attention_form, "LEAST_WEIGHTS", least)
        monkeypatch.setattr(attention_form, "LEAST_CAUSAL_WEIGHTS", least)
        tape, output = record(model, x, parameters)
        assert any(op.name == "attention" for op in tape.ops) == (least == 0)
        assert custom_function(output) == ""
        verdicts.append({n: d.proven for n, d in degrees(output, parameters).items()})
    # in the decomposed form values are affine as well, whatever the form of the product
    assert verdicts[0] == verdicts[1]


def test_a_function_of_that_name_is_not_known() -> None:
    class _Attention(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.exp()

        @staticmethod
        def backward(ctx: object, g: Tensor) -> Tensor:
            return g

    model = nn.Linear(3, 3)
    output = _Attention.apply(model(torch.ones(2, 3)))
    assert "_Attention" in custom_function(output)
    assert not any(d.proven for d in degrees(output, dict(model.named_parameters())).values())


def test_no_weights_of_all_pairs_on_the_tape() -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=True)
    parameters = dict(model.named_parameters())
    sizes = [footprint(record(model, torch.randn(1, t, 8), parameters)[0]) for t in (512, 1024)]
    assert sizes[1] < 2.1 * sizes[0]
    assert sizes[1] < 1024 * 1024 * 4


def test_left_as_found_when_it_fails(monkeypatch: pytest.MonkeyPatch, by_blocks: None) -> None:
    model, x, _ = problem("plain")

    def broken(*_args: object, **_kwargs: object) -> Tensor:
        raise RuntimeError("broken")

    monkeypatch.setattr(fk.kernels, "attention", broken)
    with pytest.raises(RuntimeError, match="broken"):
        record(model, x, dict(model.named_parameters()))
    torch.manual_seed(0)
    assert F.scaled_dot_product_attention(*[torch.randn(1, 400, 2)] * 3).shape == (1, 400, 2)
