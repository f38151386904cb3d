"""The probe set: the same samples every time, drawn without moving any generator."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import flatkern as fk
from flatkern.monitor.probe import choose_probe
from tests.monitor.training import LOSS, X, Y, mlp


def test_tensors_are_drawn_without_repetition_and_copied() -> None:
    probe = choose_probe(X, Y, 20, 0)
    rows = [next(i for i, x in enumerate(X) if torch.equal(x, row)) for row in probe.x]
    assert len(set(rows)) == 20
    assert rows != list(range(20))
    assert torch.equal(probe.y, Y[rows])  # type: ignore[arg-type]
    again, other = choose_probe(X, Y, 20, 0), choose_probe(X, Y, 20, 1)
    assert torch.equal(again.x, probe.x)
    assert again.fingerprint == probe.fingerprint != other.fingerprint
    assert choose_probe(X, None, 20, 0).fingerprint != probe.fingerprint
    few = X[:3].clone()
    whole = choose_probe(few, None, 20, 0)
    few.zero_()
    assert torch.equal(whole.x, X[:3])


class Augmented(Dataset[tuple[Tensor, Tensor]]):
    """Counts what is read, and draws noise from two generators."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(X)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        self.read.append(i)
        return X[i] + 0.1 * torch.rand(6) + random.random(), Y[i]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(zip(X, Y, strict=True))


@pytest.mark.parametrize("kind", ["dataset", "loader", "stream", "batches", "inputs alone"])
def test_datasets_and_loaders(kind: str) -> None:
    source = {
        "dataset": TensorDataset(X, Y),
        "loader": DataLoader(TensorDataset(X, Y), 7, shuffle=True),
        "stream": DataLoader(Stream(), 7),
        "batches": [(X[i : i + 7], Y[i : i + 7]) for i in range(0, 60, 7)],
        "inputs alone": [X[i : i + 7] for i in range(0, 60, 7)],
    }[kind]
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    probe = choose_probe(source, None, 20, 0)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert random.getstate() == python_state
    sized = kind in ("dataset", "loader")
    expected = choose_probe(X, Y, 20, 0) if sized else None
    assert torch.equal(probe.x, expected.x if expected else X[:20])
    if kind == "inputs alone":
        assert probe.y is None
    else:
        assert torch.equal(probe.y, expected.y if expected else Y[:20])  # type: ignore[arg-type]


def test_augmented_datasets_give_the_same_probe_whatever_was_drawn_before() -> None:
    data = Augmented()
    first = choose_probe(data, None, 20, 0)
    assert len(data.read) == 20
    torch.rand(5)
    random.random()
    second = choose_probe(DataLoader(data, 4, shuffle=True), None, 20, 0)
    assert first.fingerprint == second.fingerprint


def test_batches_of_another_kind_are_picked() -> None:
    batches = [{"pixels": X, "label": Y}]
    probe = choose_probe(batches, None, 5, 0, lambda b: (b["pixels"], b["label"]))
    assert torch.equal(probe.x, X[:5])
    with pytest.raises(TypeError, match=r"a batch must be a tensor or a pair of tensors.*got dict"):
        fk.Monitor(mlp(), batches)


def test_token_ids_give_sharpness_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Embedding(9, 4), torch.nn.Flatten(), torch.nn.Linear(12, 3))
    tokens = torch.randint(9, (30, 3))
    row = fk.Monitor(model, tokens, samples=30).start().history[0]
    assert row["sharpness"] == pytest.approx(fk.sharpness(model, tokens).value)
    assert "mls" not in row


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[:0],), ValueError, "x: shape .* holds no sample"),
        ((X, Y[:5]), ValueError, r"y: shape \(5,\) for 60 samples in x"),
        ((X, [1, 2]), TypeError, "y: expected a tensor as x is, got list"),
        ((TensorDataset(X, Y), Y), TypeError, "y: x is a TensorDataset, which brings its own targets"),
        ((iter([X]),), TypeError, "x: a one-shot iterator"),
        (([],), ValueError, "x: no batch in it"),
        ((3,), TypeError, "x: expected a tensor .* got int"),
        (({"x": X},), TypeError, "x: expected a tensor .* got dict"),
        ((X, None, LOSS), ValueError, "loss_fn: it needs targets"),
        ((X, Y, "mse"), TypeError, "loss_fn: expected a function, got str"),
    ],
)
def test_bad_data(arguments: tuple[object, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fk.Monitor(mlp(), *arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("samples", [0, -1, 2.0, True])
def test_bad_sizes(samples: object) -> None:
    with pytest.raises(ValueError, match="samples: expected a positive whole number"):
        fk.Monitor(mlp(), X, samples=samples)  # type: ignore[arg-type]
