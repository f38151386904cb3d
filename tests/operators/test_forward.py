"""Batches that are not pairs, models with a loss of their own, and the check that two passes agree."""

import random
from collections import UserDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from explicit import assert_close, explicit_ggn, explicit_hessian, make
from test_curvature_exact import class_targets, dense_targets
from torch import nn
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset

from flatkern.losses import TokenCrossEntropyLoss
from flatkern.operators import fisher, ggn, hessian, hvp

CE = nn.CrossEntropyLoss()


class Language(nn.Module):
    """In the manner of Hugging Face: keyword arguments, an output object, a loss where labels are given."""

    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(6, 3, padding_idx=0), nn.Linear(3, 4)

    def forward(self, input_ids, attention_mask=None, labels=None):
        h = self.table(input_ids)
        if attention_mask is not None:
            h = h * attention_mask.unsqueeze(-1)
        logits = self.head(torch.tanh(h.cumsum(1)))
        loss = None if labels is None else F.cross_entropy(logits.movedim(-1, 1), labels)
        return SimpleNamespace(logits=logits, loss=loss)


def batches():
    torch.manual_seed(0)
    out = []
    for n in (3, 3, 1):
        ids, labels = torch.randint(0, 6, (n, 5)), torch.randint(0, 4, (n, 5))
        labels[0, 3:] = -100
        out.append({"input_ids": ids, "attention_mask": (ids > 0).double(), "labels": labels})
    return out


def to_logits(model, batch):
    return model(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"]


def own_loss(model, batch):
    loss = model(batch["input_ids"], batch["attention_mask"], batch["labels"]).loss
    return loss, (batch["labels"] >= 0).sum()


def whole():
    return {k: torch.cat([b[k] for b in batches()]) for k in batches()[0]}


class AsPair(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, x):
        return self.inner(x, (x > 0).double()).logits.movedim(-1, 1)


@pytest.mark.parametrize("max_memory", [None, 0])
@pytest.mark.parametrize("wrap", [dict, UserDict], ids=["dict", "mapping"])
def test_dict_batches(wrap, max_memory):
    torch.manual_seed(1)
    model = Language().double()
    x, y = whole()["input_ids"], whole()["labels"]
    data = [wrap(b) for b in batches()]
    for build, explicit in ((hessian, explicit_hessian), (ggn, explicit_ggn)):
        op = build(model, TokenCrossEntropyLoss(), data, forward=to_logits, max_memory=max_memory)
        expected = explicit(AsPair(model), CE, x, y)
        assert op.num_data == 7
        assert op.denominator == (y >= 0).sum()
        assert_close(op.to_dense(), expected)
        assert_close(
            build(model, TokenCrossEntropyLoss(), wrap(whole()), forward=to_logits).to_dense(), expected
        )
    drawn = fisher(model, TokenCrossEntropyLoss(), data, forward=to_logits, kind="empirical")
    assert torch.linalg.eigvalsh(drawn.to_dense()).min() > -1e-12


@pytest.mark.parametrize("max_memory", [None, 0])
def test_a_model_with_a_loss_of_its_own(max_memory):
    torch.manual_seed(1)
    model = Language().double()
    expected = explicit_hessian(AsPair(model), CE, whole()["input_ids"], whole()["labels"])
    op = hessian(model, None, batches(), forward=own_loss, reduction="mean", max_memory=max_memory)
    assert op.num_data == 7
    assert_close(op.to_dense(), expected)
    v = torch.ones(op.shape[0], dtype=torch.float64)
    assert_close(hvp(model, None, batches(), v, forward=own_loss, reduction="mean"), expected @ v)
    # without a weight a batch weighs as its samples; here two batches of three and one of one
    plain = hessian(
        model,
        None,
        batches(),
        forward=lambda m, b: own_loss(m, b)[0],
        reduction="mean",
        max_memory=max_memory,
    )
    parts = [explicit_hessian(AsPair(model), CE, b["input_ids"], b["labels"]) for b in batches()]
    assert_close(plain.to_dense(), (3 * parts[0] + 3 * parts[1] + parts[2]) / 7)
    added = hessian(model, None, batches(), forward=lambda m, b: own_loss(m, b)[0], reduction="sum")
    assert_close(added.to_dense(), sum(parts))


def test_tuples_and_targets_of_any_kind():
    model, x = make("mlp tanh", 6)
    y, w = dense_targets(6), torch.rand(6, dtype=torch.float64)

    def weighted(output, target):
        y, w = target
        return ((output - y).square().sum(1) * w).sum()

    op = hessian(model, weighted, [(x, y, w)], forward=lambda m, b: (m(b[0]), (b[1], b[2])), reduction="sum")
    expected = explicit_hessian(model, lambda o, _: weighted(o, (y, w)), x, y)
    assert_close(op.to_dense(), expected)


def test_bad_forwards_are_named():
    model, x = make("mlp tanh", 6)
    pair = (x, class_targets(6))

    def writes(m, b):
        b[0].mul_(2)
        return m(b[0]), b[1]

    for loss, options, error, text in (
        (CE, {"forward": 3}, TypeError, "forward"),
        (CE, {"forward": lambda m, b: m(b[0])}, ValueError, "forward"),
        (CE, {"forward": writes}, ValueError, "in place"),
        (None, {}, ValueError, "loss_fn"),
        (None, {"forward": lambda m, b: CE(m(b[0]), b[1])}, ValueError, "reduction"),
        (None, {"forward": lambda m, b: m(b[0]), "reduction": "mean"}, ValueError, "forward"),
        (None, {"forward": lambda m, b: m(b[0]).log().sum(), "reduction": "sum"}, ValueError, "NaN"),
    ):
        with pytest.raises(error, match=text):
            hessian(model, loss, (pair[0].clone(), pair[1]), **options)
    for build in (ggn, fisher):
        with pytest.raises(ValueError, match=r"fk\.hessian"):
            build(model, None, pair, forward=lambda m, b: CE(m(b[0]), b[1]), reduction="mean")
    for data, error in (
        ({"a": "text"}, TypeError),
        (3, TypeError),
        ({"a": x[:0]}, ValueError),
        ([], ValueError),
    ):
        with pytest.raises(error, match="data"):
            hessian(model, CE, data, forward=lambda m, b: (m(b), b))


def test_the_user_s_input_is_not_written_to():
    model, x = nn.Sequential(nn.ReLU(inplace=True), nn.Linear(4, 3)).double(), torch.randn(6, 4).double()
    kept = x.clone()
    op = hessian(model, CE, (x, class_targets(6)), max_memory=0)
    op @ torch.ones(op.shape[0], dtype=torch.float64)
    assert torch.equal(x, kept)


class Augmented(Dataset):
    """The same samples with other noise in every pass, drawn as asked for."""

    def __init__(self, draw):
        self.draw = draw

    def __len__(self):
        return 20

    def __getitem__(self, i):
        return torch.full((4,), float(i), dtype=torch.float64) / 20 + self.draw(), i % 3


@pytest.mark.parametrize("max_memory", [None, 0])
@pytest.mark.parametrize(
    "draw",
    [lambda: torch.rand(4, dtype=torch.float64), lambda: np.random.rand(), random.random],  # noqa: NPY002
    ids=["torch", "numpy", "python"],
)
def test_augmentation_is_noticed_and_generators_are_restored(draw, max_memory):
    model, _ = make("mlp tanh")
    data = DataLoader(Augmented(draw), batch_size=6)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    with pytest.raises(ValueError, match="augmentation"):
        hessian(model, CE, data, max_memory=max_memory)
    op = hessian(model, CE, data, max_memory=max_memory, check_determinism=False)
    op @ torch.ones(op.shape[0], dtype=torch.float64)
    assert torch.equal(states[0], torch.get_rng_state())
    assert np.array_equal(states[1], np.random.get_state()[1])  # noqa: NPY002
    assert states[2] == random.getstate()


@pytest.mark.parametrize("own", [False, True])
def test_shuffling_matters_where_batches_are_rebuilt_only(own):
    model, x = make("mlp tanh", 20)
    y = class_targets(20)
    generator = torch.Generator().manual_seed(0) if own else None
    state = generator.get_state() if own else None
    data = DataLoader(TensorDataset(x, y), batch_size=6, shuffle=True, generator=generator)
    v = torch.ones(51, dtype=torch.float64)
    assert_close(hessian(model, CE, data) @ v, hessian(model, CE, (x, y)) @ v)
    with pytest.raises(ValueError, match="shuffling"):
        hessian(model, CE, data, max_memory=0)
    if own:
        assert torch.equal(state, generator.get_state())


def test_random_samples_are_noticed():
    model, x = make("mlp tanh", 20)
    dataset = TensorDataset(x, class_targets(20))
    for options in (
        {"sampler": RandomSampler(dataset, replacement=True)},
        {"shuffle": True, "drop_last": True},
    ):
        with pytest.raises(ValueError, match="second pass"):
            hessian(model, CE, DataLoader(dataset, batch_size=6, **options))


def test_a_random_model_is_noticed_whatever_it_draws_from():
    class Noise(nn.Linear):
        def forward(self, x):
            return super().forward(x) + random.random()

    state = random.getstate()
    random.seed(0)  # two draws that differ by more than the check's tolerance
    with pytest.raises(ValueError, match="two forward passes"):
        hessian(Noise(4, 3).double(), CE, (make("linear", 6)[1], class_targets(6)))
    random.setstate(state)
