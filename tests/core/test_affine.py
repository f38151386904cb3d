"""The degree rule: what is proven is true, entry by entry; what must not be proven is not."""

from __future__ import annotations

import fnmatch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flatkern.affine import degrees, hidden_parameters
from flatkern.tape import UnsupportedError, record
from tests.core.curved_networks import Lambda, Tower, not_affine, piecewise_affine, smooth
from tests.core.explicit_diagonals import ggn_diagonal, hessian_diagonal

torch.set_num_threads(1)
NETWORKS = {
    **{f"affine: {k}": (m, x, ()) for k, (m, x) in piecewise_affine().items()},
    **{f"not: {k}": v for k, v in not_affine().items()},
    **{f"smooth: {k}": (m, x, ()) for k, (m, x) in smooth().items()},
}


def proven(model: nn.Module, x: Tensor) -> dict[str, bool]:
    parameters = dict(model.named_parameters())
    tape, output = record(model, x, parameters)
    found = degrees(output, parameters, hidden_parameters(tape))
    assert all(d.proven or d.reason for d in found.values())
    return {name: d.proven for name, d in found.items()}


@pytest.mark.parametrize("name", NETWORKS)
def test_proven_means_equal_diagonals(name: str) -> None:
    model, x, forbidden = NETWORKS[name]
    model = model.double()
    x = x.double() if x.is_floating_point() else x
    y = torch.arange(len(x)) % 3
    loss = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64), label_smoothing=0.1)
    whole, part = hessian_diagonal(model, loss, x, y), ggn_diagonal(model, loss, x, y)
    for key, holds in proven(model, x).items():
        if holds:
            torch.testing.assert_close(whole[key], part[key], rtol=1e-9, atol=1e-12)
        assert holds or not name.startswith("affine"), key
        if any(fnmatch.fnmatch(key, pattern) for pattern in forbidden):
            assert not holds, key
            harmless = name in (
                "not: gelu branch",
                "not: log softmax",
            )  # some entries, and before cross-entropy
            assert harmless or (whole[key] - part[key]).abs().max() > 1e-9  # a real danger


def test_last_values_and_projection_of_attention_are_proven() -> None:
    model, x, _ = NETWORKS["not: softmax attention"]
    assert {k for k, v in proven(model.double(), x.double()).items() if v} >= {
        "v.weight", "v.bias", "head.weight", "head.bias",
    }  # fmt: skip


def _hidden_cases() -> dict[str, object]:
    def no_grad(m: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = m.a(x).norm()
        return m.a(x) * scale

    return {
        "detach": lambda m, x: m.a(x) * m.a(x).detach(),
        "data": lambda m, x: m.a(x) * m.a.weight.data.sum(),
        "no_grad": no_grad,
        "item": lambda m, x: m.a(x) * m.a.weight.sum().item(),
        "straight-through rounding": lambda m, x: m.a(x) + (m.a(x).round() - m.a(x)).detach(),
        "rounding": lambda m, x: m.a(x).round() + x,
        "custom function": lambda m, x: Tower.apply(m.a(x)),
        "in-place on a view": lambda m, x: _write(m.a(x)),
    }


def _write(h: Tensor) -> Tensor:
    h = h.clone()
    h[:, 0].mul_(h[:, 1].clone())
    return h


@pytest.mark.parametrize("name", _hidden_cases())
def test_never_through_what_autograd_does_not_follow(name: str) -> None:
    model = Lambda(_hidden_cases()[name], a=nn.Linear(4, 4)).double()
    parameters = dict(model.named_parameters())
    x = torch.randn(3, 4, dtype=torch.float64)
    if name == "in-place on a view":  # no tape of it, and unknown to the rule
        with pytest.raises(UnsupportedError):
            record(model, x, parameters)
        assert not degrees(model(x), parameters)["a.weight"].proven
    else:
        assert not proven(model, x)["a.weight"]


def test_conditions_and_indices_do_not_count() -> None:
    model = Lambda(lambda m, x: torch.where(m.a(x) > 0, m.a(x), 0.1 * m.a(x)), a=nn.Linear(4, 4))
    assert all(proven(model, torch.randn(3, 4)).values())
    model = Lambda(lambda m, x: m.a(x) * (m.a(x) > 0).float(), a=nn.Linear(4, 4))
    assert all(proven(model, torch.randn(3, 4)).values())


def test_batch_norm_in_train_mode_is_not_proven() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 3)).train()
    found = degrees(model(torch.randn(5, 4)), dict(model.named_parameters()))
    assert not found["0.weight"].proven
    assert not found["1.weight"].proven
    assert found["3.weight"].proven


def test_fused_attention_node() -> None:
    q, k, v = (nn.Parameter(torch.randn(1, 2, 3, 4)) for _ in range(3))
    found = degrees(F.scaled_dot_product_attention(q, k, v), {"q": q, "k": k, "v": v})
    assert [found[n].proven for n in "qkv"] == [False, False, True]


def test_unused_parameter_has_degree_zero() -> None:
    used, unused = nn.Linear(2, 2), nn.Linear(2, 2)
    found = degrees(used(torch.ones(1, 2)), {"a": used.weight, "b": unused.weight})
    assert (found["a"].value, found["b"].value) == (1, 0)
