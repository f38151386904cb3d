"""The Hessian and Gauss-Newton operators against explicit matrices: networks × losses × loaders."""

import pytest
import torch
import torch.nn.functional as F
from explicit import (
    ZOO,
    assert_close,
    explicit_ggn,
    explicit_hessian,
    flat,
    make,
    twice_differentiable_in_torch,
    vectors,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flatkern.operators import ggn, hessian


def double(**kwargs):
    return {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}


def class_targets(n):
    return torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(1))


def dense_targets(n):
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def some_ignored(n):
    return torch.where(torch.arange(n) % 3 == 1, -100, class_targets(n))


W = torch.tensor([0.3, 1.0, 2.5])
LOSSES = {
    "ce": (nn.CrossEntropyLoss(), class_targets),
    "ce sum": (nn.CrossEntropyLoss(reduction="sum"), class_targets),
    "ce weights": (nn.CrossEntropyLoss(weight=W.double()), class_targets),
    "ce weights smoothing ignore": (
        nn.CrossEntropyLoss(weight=W.double(), label_smoothing=0.2),
        some_ignored,
    ),
    "ce probabilities": (nn.CrossEntropyLoss(weight=W.double(), label_smoothing=0.1), dense_targets),
    "mse": (nn.MSELoss(), dense_targets),
    "mse sum": (nn.MSELoss(reduction="sum"), dense_targets),
    "bce": (nn.BCEWithLogitsLoss(pos_weight=W.double()), dense_targets),
}
BUILD = {"hessian": (hessian, explicit_hessian), "ggn": (ggn, explicit_ggn)}


def ragged(x, y, size=4):
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("name", ZOO)
def test_every_network(name, kind):
    build, explicit = BUILD[kind]
    model, x = make(name)
    y = class_targets(len(x))
    loss = nn.CrossEntropyLoss(weight=W.double())
    op = build(model, loss, ragged(x, y))
    expected = explicit(twice_differentiable_in_torch(name, model), loss, x, y)
    assert op.shape == expected.shape
    assert op.dtype == torch.float64
    assert_close(op.to_dense(), expected)


def loaders(x, y):
    """The same samples in five ways to hand them in."""
    dataset = TensorDataset(x, y)
    return {
        "pair": (x, y),
        "ragged list": ragged(x, y),
        "loader": DataLoader(dataset, batch_size=4),
        "one by one": DataLoader(dataset, batch_size=1),
        "uneven": [(x[:7], y[:7]), (x[7:], y[7:])],
    }


SUBSETS = {"all": None, "first": 0, "last": -1, "biases": "*bias*", "weights": ["*weight*"]}
CASES = [
    (name, loss, subset, loader)
    for i, name in enumerate(ZOO)
    for j, loss in enumerate(LOSSES)
    for k, subset in enumerate(SUBSETS)
    for m, loader in enumerate(("pair", "ragged list", "loader", "one by one", "uneven"))
    if (i + j + k + m) % 5 == 0 and (k + 2 * j + i) % 5 == 0  # a Latin square: every pair of choices meets
]


def select(model, subset):
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    if isinstance(subset, int):
        return names[subset]
    if subset is None:
        return None
    wanted = ("bias",) if subset == "*bias*" else ("weight",)
    return [n for n in names if any(w in n for w in wanted)] or names


@pytest.mark.slow
@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize(("name", "loss", "subset", "loader"), CASES, ids=lambda v: str(v))
def test_networks_losses_subsets_and_loaders(name, loss, subset, loader, kind):
    build, explicit = BUILD[kind]
    model, x = make(name)
    loss_fn, targets = LOSSES[loss]
    y = targets(len(x))
    op = build(model, loss_fn, loaders(x, y)[loader], params=select(model, SUBSETS[subset]))
    names = [n for n, _ in model.named_parameters()]
    reference = twice_differentiable_in_torch(name, model)
    there = [
        dict(zip(names, [n for n, _ in reference.named_parameters()], strict=True))[n]
        for n in op.layout.names
    ]
    assert_close(op.to_dense(), explicit(reference, loss_fn, x, y, there))


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_in_ragged_batches(name, kind):
    build, explicit = BUILD[kind]
    loss, targets = LOSSES[name]
    model, x = make("mlp tanh", 50)
    y = targets(50)
    expected = explicit(model, loss, x, y)
    loader = DataLoader(TensorDataset(x, y), batch_size=16)  # 16, 16, 16, 2
    for data in ((x, y), ragged(x, y, 16), loader):
        op = build(model, loss, data)
        assert op.num_data == 50
        assert_close(op.to_dense(), expected)


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("max_memory", [0, 9_000, 30_000])
def test_rebuilt_batches_give_what_kept_ones_give(kind, max_memory):
    model, x = make("mlp tanh", 50)
    y = class_targets(50)
    kept = BUILD[kind][0](model, nn.CrossEntropyLoss(), ragged(x, y, 16))
    op = BUILD[kind][0](model, nn.CrossEntropyLoss(), ragged(x, y, 16), max_memory=max_memory)
    assert op.info.kept_bytes <= max_memory
    assert op.info.kept_batches == (4 if max_memory == 30_000 else op.info.kept_batches)
    assert kept.info.kept_batches == 4
    if max_memory == 9_000:
        assert 0 < op.info.kept_batches < 4
    assert_close(op.to_dense(), kept.to_dense(), 1e-12)


@pytest.mark.parametrize("kind", BUILD)
def test_a_callable_loss(kind):
    build, explicit = BUILD[kind]
    model, x = make("mlp tanh", 10)
    y = dense_targets(10)

    def huber_like(output, target):
        return ((output - target).square() + 1).sqrt().sum(1).mean()

    op = build(model, huber_like, ragged(x, y), reduction="mean")
    assert_close(op.to_dense(), explicit(model, huber_like, x, y))
    assert op.denominator == 10


@pytest.mark.parametrize("kind", BUILD)
def test_a_loss_linear_in_the_output(kind):
    build, explicit = BUILD[kind]
    model, x = make("mlp tanh", 6)

    def linear(output, target):
        return (output * target).sum()

    op = build(model, linear, (x, dense_targets(6)), reduction="sum")
    assert_close(op.to_dense(), explicit(model, linear, x, dense_targets(6)))


@pytest.mark.parametrize("kind", BUILD)
def test_spatial_outputs(kind):
    build, explicit = BUILD[kind]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Tanh(), nn.Conv2d(2, 3, 1)).double()
    x, y = torch.randn(5, 1, 3, 3, dtype=torch.float64), torch.randint(0, 3, (5, 3, 3))
    y[0, 0] = y[3, 1, 1] = -100
    loss = nn.CrossEntropyLoss(weight=W.double(), label_smoothing=0.1)
    assert_close(build(model, loss, ragged(x, y, 2)).to_dense(), explicit(model, loss, x, y))


@pytest.mark.parametrize("params", ["0.weight", ["2.*"], ["*.bias"]])
@pytest.mark.parametrize("kind", BUILD)
def test_parameter_subsets(kind, params):
    build, explicit = BUILD[kind]
    model, x = make("mlp tanh")
    y = class_targets(len(x))
    op = build(model, nn.CrossEntropyLoss(), (x, y), params=params)
    assert_close(op.to_dense(), explicit(model, nn.CrossEntropyLoss(), x, y, op.layout.names))


def test_tied_weights_count_once_and_unused_ones_are_zero():
    model, _ = make("tied")
    data = (vectors(5), class_targets(5))
    assert hessian(model, nn.CrossEntropyLoss(), data).shape[0] == flat(model.parameters()).numel()
    model, _ = make("unused")
    op = hessian(model, nn.CrossEntropyLoss(), data)
    for name in ("idle.weight", "idle.bias"):
        assert not op.to_dense()[op.layout.slices[name]].any()


def test_only_unused_parameters_give_a_zero_operator():
    model, x = make("unused")
    for build in (hessian, ggn):
        op = build(model, nn.CrossEntropyLoss(), (x, class_targets(len(x))), params="idle.*")
        assert not op.to_dense().any()


def test_the_operator_follows_the_function_and_not_the_last_batch():
    model, x = make("mlp tanh")
    op = hessian(
        model,
        lambda o, t: F.cross_entropy(o, t, reduction="sum"),
        ragged(x, class_targets(11)),
        reduction="sum",
    )
    assert op.denominator == 1.0
    total = sum(
        explicit_hessian(model, nn.CrossEntropyLoss(reduction="sum"), a, b)
        for a, b in ragged(x, class_targets(11))
    )
    assert_close(op.to_dense(), total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("build", [hessian, ggn])
def test_low_precision_sums_in_float32(dtype, build):
    model, x = make("mlp tanh", 32)
    y = class_targets(32)
    expected = build(model, nn.CrossEntropyLoss(), (x, y)).to_dense()
    op = build(model.to(dtype), nn.CrossEntropyLoss(), ragged(x.to(dtype), y, 5))
    assert op.dtype == torch.float32
    dense = op.to_dense()
    assert dense.dtype == torch.float32
    error = (dense.double() - expected).norm() / expected.norm()
    assert error < {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 1e-5}[dtype]


def test_blocks_are_columns_and_are_not_copied():
    model, x = make("mlp tanh")
    op = hessian(model, nn.CrossEntropyLoss(), (x, class_targets(11)))
    rows = torch.randn(3, op.shape[0], dtype=torch.float64)
    image = op @ rows.mT
    assert image.shape == (op.shape[0], 3)
    assert image.mT.is_contiguous()
    for j in range(3):
        assert torch.allclose(image[:, j], op @ rows[j], rtol=1e-12, atol=1e-15)
    assert op.info.products == 6
