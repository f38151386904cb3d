"""Tangent programs (the R-operator) against explicit matrices, and when the operators take them."""

import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from explicit import (
    ZOO,
    assert_close,
    explicit_ggn,
    explicit_hessian,
    make,
    twice_differentiable_in_torch,
)
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flatkern import kernels
from flatkern.kernels._select import compiled_available, using
from flatkern.operators import choosing, fisher, ggn, hessian
from flatkern.operators.tangent_rules import pointwise, rule

CE = nn.CrossEntropyLoss()
# what has an operation without a rule: the graphs are kept
WITHOUT = {"pooling", "sequence"}
BUILD = {"hessian": (hessian, explicit_hessian), "ggn": (ggn, explicit_ggn)}


def classes(n):
    return torch.randint(0, 3, (n,), generator=torch.Generator().manual_seed(1))


def ragged(x, y, size=4):
    return [(x[i : i + size], y[i : i + size]) for i in range(0, len(x), size)]


LONG = {"gru two layers both ways", "transformer", "lstm"}
NETWORKS = [
    pytest.param(name, kind, marks=pytest.mark.slow if name in LONG else ())
    for name in ZOO
    if name not in WITHOUT
    for kind in BUILD
]


@pytest.mark.parametrize(("name", "kind"), NETWORKS)
def test_every_network(name, kind):
    build, explicit = BUILD[kind]
    model, x = make(name)
    y = classes(11)
    op = build(model, CE, ragged(x, y), mode="linearized")
    assert (op.info.mode, op.info.kept_batches) == ("linearized", 3)
    expected = explicit(twice_differentiable_in_torch(name, model), CE, x, y)
    assert_close(op.to_dense(), expected)
    v = torch.randn(op.shape[0], 3, dtype=op.dtype)
    before = v.clone()
    image = op @ v
    assert torch.equal(v, before)
    for j in range(3):
        assert_close(image[:, j], op @ v[:, j].clone(), 1e-12)


@pytest.mark.parametrize("name", sorted(WITHOUT))
def test_a_network_without_a_rule_raises_when_it_is_forced_and_keeps_graphs_when_not(name):
    model, x = make(name)
    y = classes(11)
    with pytest.raises(ValueError, match="mode: 'linearized' is not for this model"):
        hessian(model, CE, (x, y), mode="linearized")
    op = hessian(model, CE, (x, y))
    v = torch.randn(op.shape[0], 3, dtype=op.dtype)
    assert_close(op @ v, op.to_dense() @ v)
    assert op.info.mode == "kept"


W = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)


def dense(n):
    return torch.rand(n, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


LOSSES = {
    "ce": (nn.CrossEntropyLoss(weight=W, label_smoothing=0.2), classes),
    "ce probabilities": (nn.CrossEntropyLoss(weight=W, label_smoothing=0.1), dense),
    "ce ignore": (
        nn.CrossEntropyLoss(reduction="sum"),
        lambda n: torch.where(torch.arange(n) % 3 == 1, -100, classes(n)),
    ),
    "mse": (nn.MSELoss(), dense),
    "bce": (nn.BCEWithLogitsLoss(pos_weight=W), dense),
    "huber": (nn.HuberLoss(delta=0.4), dense),
    "smooth l1": (nn.SmoothL1Loss(beta=0.4, reduction="sum"), dense),
}


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss(name, kind):
    build, explicit = BUILD[kind]
    loss, targets = LOSSES[name]
    model, x = make("mlp tanh")
    op = build(model, loss, DataLoader(TensorDataset(x, targets(11)), batch_size=4), mode="linearized")
    assert_close(op.to_dense(), explicit(model, loss, x, targets(11)))


def test_a_callable_loss_and_a_loss_of_the_models_own():
    model, x = make("mlp tanh")
    y = classes(11)
    expected = explicit_hessian(model, CE, x, y)
    op = hessian(model, lambda o, t: F.cross_entropy(o, t), (x, y), reduction="mean", mode="linearized")
    assert_close(op.to_dense(), expected)
    op = hessian(
        model,
        None,
        [{"x": x, "y": y}],
        forward=lambda m, b: F.cross_entropy(m(b["x"]), b["y"]),
        reduction="mean",
        mode="linearized",
    )
    assert_close(op.to_dense(), expected)


def log_probability_too(output, target):
    """Takes the logarithms of the probabilities for something else beside the classes' loss."""
    y = output.log_softmax(1)
    return F.nll_loss(y, target) + y.square().mean()


def spatial(output, target):
    """Classes on a middle axis."""
    return F.cross_entropy(output.reshape(-1, 3, 1).expand(-1, 3, 2), target[:, None].expand(-1, 2))


@pytest.mark.parametrize("which", ["compiled", "reference"])
@pytest.mark.parametrize(
    ("loss", "taken"),
    [(F.cross_entropy, True), (spatial, True), (log_probability_too, False)],
    ids=["alone", "middle", "beside"],
)
def test_cross_entropy_by_its_kernel_where_nothing_else_takes_the_tangent(monkeypatch, which, loss, taken):
    if which == "compiled" and not compiled_available():
        pytest.skip("no compiled kernels")
    model, x = make("mlp tanh")
    y = classes(11)
    expected = explicit_hessian(model, loss, x, y)
    made = []
    own = kernels.cross_entropy_hvp
    monkeypatch.setattr(kernels, "cross_entropy_hvp", lambda *a, **k: made.append(1) or own(*a, **k))
    op = hessian(model, loss, (x, y), reduction="mean", mode="linearized")
    v = torch.randn(op.shape[0], 3, dtype=op.dtype)
    with using(which):
        for w in (v, v[:, 0]):
            made.clear()
            assert_close(op @ w, expected @ w)
            assert bool(made) == taken


def test_cross_entropy_of_a_model_in_bfloat16():
    model, x = make("mlp tanh")
    model, x = model.bfloat16(), x.bfloat16()
    one, other = (hessian(model, CE, (x, classes(11)), mode=mode) for mode in ("linearized", "kept"))
    v = torch.randn(one.shape[0], 2)
    torch.testing.assert_close(one @ v, other @ v, rtol=0.05, atol=0.02 * float((other @ v).abs().max()))


@pytest.mark.parametrize("kind", ["mc", "empirical"])
def test_fisher_is_that_of_kept_graphs(kind):
    model, x = make("attention")
    data = ragged(x, classes(11))
    one, other = (fisher(model, CE, data, kind=kind, mode=mode) for mode in ("linearized", "kept"))
    assert_close(one.to_dense(), other.to_dense())


@pytest.mark.parametrize("build", [hessian, ggn])
@pytest.mark.parametrize("name", ["layer norm", "batch norm eval", "group norm", "conv", "tied"])
def test_subsets_and_blocks(name, build):
    model, x = make(name)
    y = classes(11)
    op = build(model, CE, ragged(x, y), mode="linearized")
    whole = op.to_dense()
    names = op.layout.names
    for chosen in (names[:1], names[-1:], names[::2], [n for n in names if "bias" in n]):
        places = torch.cat([torch.arange(op.shape[0])[op.layout.slices[n]] for n in chosen])
        expected = whole[places][:, places]
        assert_close(op.block(chosen).to_dense(), expected)
        alone = build(model, CE, ragged(x, y), params=list(chosen), mode="linearized")
        assert_close(alone.to_dense(), expected)


class Applied(nn.Module):
    """A function of a weight [3, 4, 6] and of the samples, as a model."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(3, 4, 6, dtype=torch.float64))

    def forward(self, x):
        image = self.function(torch.tanh(self.weight))
        return x[:, :1] * image.reshape(-1).sin().sum() + (x[:, 1:2] * image.reshape(-1)).square().mean(
            1, True
        )


INDEX = torch.tensor([[0, 2], [1, 1]])
OPERATIONS = {
    "cat": lambda w: torch.cat([w, w.square(), torch.ones(3, 4, 1, dtype=w.dtype)], 2),
    "stack": lambda w: torch.stack([w, w * w[:1]], 1),
    "split": lambda w: w.split([2, 4], 2)[1] * w.split(2, 2)[0].repeat(1, 1, 2),
    "unbind": lambda w: w.unbind(1)[2] * w.unbind(1)[0],
    "select, slice": lambda w: w[1, 1:, ::2] * w[2, :3, 1::2],
    "flip, roll": lambda w: w.flip(-1) * w.roll(1, 2),
    "repeat": lambda w: w.repeat(2, 1, 2) * w.repeat(2, 1, 2).sin(),
    "triangle": lambda w: w.tril(-1) @ w.mT.triu(),
    "pad": lambda w: F.pad(w, (1, 2, 0, 1), value=0.7).exp(),
    "where": lambda w: torch.where(w > 0, w.square(), w.sin()),
    "masked": lambda w: w.masked_fill(torch.arange(6) > 3, -2.0).exp(),
    "index": lambda w: w[INDEX] * w[INDEX.T],
    "index of the middle": lambda w: w[:, INDEX[0]].square(),
    "gather": lambda w: w.gather(2, INDEX.expand(3, 2, 2)).square(),
    "index_select": lambda w: w.index_select(1, INDEX[1]).exp(),
    "diagonal": lambda w: w[:, :, :4].diagonal(0, 1, 2).exp(),
    "expand": lambda w: w[:1].expand(3, 4, 6) * w,
    "transposes": lambda w: w.permute(2, 0, 1).transpose(0, 2).exp(),
    "means": lambda w: w.mean((0, 2)) * w.sum(1).mean(),
    "quotient": lambda w: w / (2 + w[:1]),
    "scalars": lambda w: 3 * (2 - w) / 4 - w.mul(2).add(1, alpha=3),
    "power": lambda w: (w + 3).pow(w[:1]) + (w + 3).pow(2.5),
    "functions": lambda w: (w + 3).log() + w.exp() + (w + 3).sqrt() + w.erf() + (w + 2).rsqrt() + w.abs(),
    "extremes": lambda w: torch.maximum(w, w[:1].roll(1, 2) * 0.7).square() + w.clamp(-0.4, 0.6).exp(),
    "silu, mish": lambda w: F.silu(w) * F.mish(w),
    "gelu": lambda w: F.gelu(w) * F.gelu(w, approximate="tanh"),
    "elu": lambda w: F.elu(w) * F.selu(w) * F.celu(w, 0.3),
    "sigmoids": lambda w: F.logsigmoid(w) * w.sigmoid() * F.softplus(w, 2.0),
    "hard": lambda w: F.hardswish(3 * w) * F.hardtanh(2 * w) * F.hardsigmoid(3 * w),
    "leaky": lambda w: (F.leaky_relu(w, 0.2) * F.relu6(w)).square(),
    "softmax": lambda w: w.softmax(1) * w.log_softmax(0),
    "group norm": lambda w: F.group_norm(w, 2, w[0, :, 0], w[1, :, 1]),
    "layer norm": lambda w: F.layer_norm(w, (4, 6), w[0], w[1]),
    "layer norm of a constant": lambda w: F.layer_norm(
        torch.ones(2, 6, dtype=w.dtype).cumsum(1), (6,), w[0, 0]
    ),
    "average pool": lambda w: F.avg_pool2d(w.square(), 2, 1, 1),
    "adaptive pool": lambda w: F.adaptive_avg_pool2d(w.square(), (2, 3)),
    "max pool": lambda w: F.max_pool2d(w.square()[None], 3, 2, 1),
    "max pool in one dimension": lambda w: F.max_pool1d(w.square(), 2),
    "max pool in three": lambda w: F.max_pool3d(w.square()[None, None], 2),
    "conv": lambda w: F.conv1d(w, w[:2, :, :3], w[0, 0, :2], padding=1, stride=2),
    "groups": lambda w: F.conv1d(w, w[:, :2, :2].reshape(4, 1, -1)[..., :2], groups=4, dilation=2),
    "transposed": lambda w: F.conv_transpose1d(w, w[:2].reshape(4, 3, -1)[..., :2], stride=2),
    "images": lambda w: F.conv2d(w[None], w[:, :3, :2].reshape(2, 3, 3, 1)),
    "products": lambda w: torch.baddbmm(w @ w.mT, w, w.mT, beta=0.5, alpha=2) @ w,
    "matrices": lambda w: torch.addmm(w[0] @ w[1].mT, w[0], w[1].mT, beta=0.5, alpha=2),
    "vectors": lambda w: w[0] @ w[1, 1] * (w[0, 0] @ w[0, 1]),
    "glu": lambda w: F.glu(w) * F.glu(w[..., :2], 2),
    "norms": lambda w: w / w.norm(dim=2, keepdim=True) + torch.logsumexp(w, 1, True),
    "bilinear": lambda w: F.bilinear(w[0], w[1], w[:, :, :].repeat(1, 2, 1)[:, :6]),
    "products and sums along an axis": lambda w: w.cumsum(1) * (w + 2).prod(2, True) * w.var(1, keepdim=True),
    "cast": lambda w: (w.to(torch.float64) * w).square(),
    "detached": lambda w: w.detach() * w + w.detach().square() * w.square(),
    "written to": lambda w: ((w.exp() + w).mul_(2).sub_(1)).relu_(),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name):
    torch.manual_seed(0)
    model = Applied(OPERATIONS[name])
    x, y = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64)
    op = hessian(model, nn.MSELoss(), (x, y), mode="linearized")
    assert op.info.mode == "linearized"
    other = hessian(model, nn.MSELoss(), (x, y), mode="kept")
    assert_close(op.to_dense(), other.to_dense(), 1e-9)
    assert_close(
        ggn(model, nn.MSELoss(), (x, y), mode="linearized").to_dense(),
        ggn(model, nn.MSELoss(), (x, y), mode="kept").to_dense(),
        1e-9,
    )


class Images(nn.Module):
    """Everything that images meet between their first and last convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1, groups=2)
        self.norm, self.leak = nn.BatchNorm2d(4), nn.PReLU(4)
        self.up, self.last = nn.ConvTranspose2d(4, 3, 2, stride=2), nn.Conv2d(3, 3, 1)
        self.norm.running_mean.normal_()
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = F.gelu(self.first(x))
        x = x * torch.sigmoid(x.mean((2, 3), keepdim=True)) + self.leak(self.norm(self.second(x)))
        x = F.max_pool2d(torch.cat([x, x.tanh()], 1), 2).unflatten(1, (2, 4)).sum(1)
        x = F.avg_pool2d(self.last(self.up(x)), 2) + F.max_pool2d(x, 3, 1, 1)[:, :3]
        return x.permute(0, 2, 3, 1).flatten(1).unflatten(1, (-1, 3)).mean(1)


@pytest.mark.parametrize("build", [hessian, ggn])
def test_images_with_their_channels_last_in_memory(build):
    torch.manual_seed(0)
    model, x, y = Images().eval(), torch.randn(3, 2, 8, 6), classes(3)
    v = torch.randn(sum(p.numel() for p in model.parameters()), 3)
    op = build(model, CE, (x, y), mode="linearized")
    image, single = op @ v, op @ v[:, 0]
    exact = build(model.double(), CE, (x.double(), y), mode="kept") @ v.double()
    assert_close(image.double(), exact, 1e-4)
    assert_close(single.double(), exact[:, 0], 1e-4)


def test_a_gradient_cut_by_no_grad_is_a_constant():
    def cut(w):
        with torch.no_grad():
            scale = w.square().sum()
        return w.exp() * scale

    model = Applied(cut)
    data = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64)
    one, other = (hessian(model, nn.MSELoss(), data, mode=mode) for mode in ("linearized", "kept"))
    assert_close(one.to_dense(), other.to_dense())


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return w.square()

    @staticmethod
    def backward(ctx, g):
        return 2 * g * ctx.saved_tensors[0]


def test_a_function_with_a_backward_pass_of_its_own_is_refused():
    data = torch.randn(3, 2, dtype=torch.float64), torch.randn(3, 1, dtype=torch.float64)
    with pytest.raises(ValueError, match="by a rule of its own"):
        hessian(Applied(Doubled.apply), nn.MSELoss(), data, mode="linearized")


def clock(monkeypatch, program_wins):
    """Times of a trial by decree: the first of each pair is the graphs'."""
    turns = iter(range(10**6))

    def seconds(run):
        run()
        first = next(turns) % 2 == 0
        return 1.0 if first == program_wins else 0.1

    monkeypatch.setattr(choosing, "seconds", seconds)


@pytest.mark.parametrize("build", [hessian, ggn])
def test_programs_replace_graphs_where_they_are_faster(build, monkeypatch):
    model, x = make("mlp tanh")
    data = ragged(x, classes(11))
    dense_matrix = build(model, CE, data, mode="kept").to_dense()
    clock(monkeypatch, program_wins=True)
    op = build(model, CE, data)
    assert op.info.mode == "kept"
    v = torch.randn(op.shape[0], 5, dtype=op.dtype)
    assert_close(op @ v, dense_matrix @ v)
    assert op.info.mode == "linearized"
    assert op.info.kept_bytes == build(model, CE, data, mode="linearized").info.kept_bytes
    assert_close(op @ v[:, 0], dense_matrix @ v[:, 0])
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.1)
    op.refresh()
    assert op.info.mode == "linearized"
    assert_close(op @ v, build(model, CE, data, mode="kept").to_dense() @ v)


def test_single_vectors_are_tried_after_some_of_them(monkeypatch):
    model, x = make("mlp tanh")
    clock(monkeypatch, program_wins=True)
    op = hessian(model, CE, (x, classes(11)))
    v = torch.randn(op.shape[0], dtype=op.dtype)
    expected = op @ v
    for _ in range(choosing.SINGLES - 1):
        op @ v
    assert op.info.mode == "kept"
    assert_close(op @ v, expected)
    assert op.info.mode == "linearized"


def test_graphs_stay_where_they_are_faster(monkeypatch):
    model, x = make("mlp tanh")
    clock(monkeypatch, program_wins=False)
    op = hessian(model, CE, (x, classes(11)))
    before = op.info.kept_bytes
    op @ torch.randn(op.shape[0], 5, dtype=op.dtype)
    assert (op.info.mode, op.info.kept_bytes) == ("kept", before)


def test_a_program_that_disagrees_is_not_taken(monkeypatch):
    model, x = make("mlp tanh")
    clock(monkeypatch, program_wins=True)
    monkeypatch.setitem(pointwise._TWICE, "tanh_backward", lambda g, y: g * (1 - 0.9 * y.square()))
    op = hessian(model, CE, (x, classes(11)))
    expected = hessian(model, CE, (x, classes(11)), mode="kept").to_dense()
    v = torch.randn(op.shape[0], 5, dtype=op.dtype)
    assert_close(op @ v, expected @ v)
    assert op.info.mode == "kept"


class Failing(pointwise.Pointwise):
    def __init__(self, op, active):
        if type(self).early:
            raise TypeError("early")
        super().__init__(op, active)

    def run(self, tangents, owned):
        raise IndexError("late")


@pytest.mark.parametrize("early", [True, False])
def test_a_rule_that_fails_leaves_the_graphs(early, monkeypatch):
    monkeypatch.setattr(Failing, "early", early, raising=False)
    monkeypatch.setitem(rule._RULES, "tanh", Failing)
    model, x = make("mlp tanh")
    op = hessian(model, CE, (x, classes(11)))
    v = torch.randn(op.shape[0], 5, dtype=op.dtype)
    assert_close(op @ v, explicit_hessian(model, CE, x, classes(11)) @ v)
    assert op.info.mode == "kept"


class Shuffled:
    """Other batches in every pass."""

    def __init__(self, x, y):
        self.x, self.y, self.passes = x, y, 0

    def __iter__(self):
        self.passes += 1
        order = torch.randperm(len(self.x), generator=torch.Generator().manual_seed(self.passes))
        yield from ragged(self.x[order], self.y[order])


def test_graphs_stay_where_the_data_are_other_ones_when_read_again(monkeypatch):
    model, x = make("mlp tanh")
    y = classes(11)
    clock(monkeypatch, program_wins=True)
    op = hessian(model, CE, Shuffled(x, y), check_determinism=False)
    v = torch.randn(op.shape[0], 5, dtype=op.dtype)
    assert_close(op @ v, explicit_hessian(model, CE, x, y) @ v)
    assert op.info.mode == "kept"


def test_graphs_stay_where_the_programs_would_not_fit(monkeypatch):
    model, x = make("layer norm")
    data = ragged(x, classes(11))
    clock(monkeypatch, program_wins=True)
    full = hessian(model, CE, data).info.kept_bytes
    op = hessian(model, CE, data, max_memory=full)
    op @ torch.randn(op.shape[0], 5, dtype=op.dtype)
    assert (op.info.mode, op.info.kept_batches) == ("kept", 3)


def test_batches_beyond_the_budget_are_rebuilt_beside_programs():
    model, x = make("conv")
    y = classes(11)
    full = hessian(model, CE, ragged(x, y), mode="linearized").info.kept_bytes
    op = hessian(model, CE, ragged(x, y), mode="linearized", max_memory=int(0.8 * full))
    assert 0 < op.info.kept_batches < 3
    assert op.info.kept_bytes <= 0.8 * full
    assert_close(op.to_dense(), explicit_hessian(model, CE, x, y))


@pytest.mark.parametrize("first", ["linearized", "kept"])
def test_an_engine_is_taken_over(first):
    model, x = make("mlp tanh")
    data = ragged(x, classes(11))
    one, other = hessian(model, CE, data, mode=first), hessian(model, CE, data)
    one @ torch.randn(one.shape[0], 5, dtype=one.dtype)
    other._use_engine(one._engine())
    assert (other.info.mode, other.info.block_size) == (first, one.info.block_size)
    v = torch.randn(one.shape[0], 5, dtype=one.dtype)
    assert torch.equal(one @ v, other @ v)
    assert other.info.mode == first


def test_a_frozen_engine_stays_as_it_is_until_it_is_given_back(monkeypatch):
    model, x = make("mlp tanh")
    clock(monkeypatch, program_wins=True)
    op = hessian(model, CE, (x, classes(11)))
    v = torch.randn(op.shape[0], 5, dtype=op.dtype)
    whole, before = 2 * op, (2 * op)._engine()
    whole._freeze_engine()
    whole @ v
    assert op.info.mode == "kept"
    whole._use_engine(before)
    whole @ v
    assert op.info.mode == "linearized"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision(dtype):
    model, x = make("mlp tanh", 32)
    y = classes(32)
    expected = hessian(model, CE, (x, y)).to_dense()
    op = hessian(model.to(dtype), CE, (x.to(dtype), y), mode="linearized")
    assert op.dtype == torch.float32
    error = (op.to_dense().double() - expected).norm() / expected.norm()
    assert error < (1e-5 if dtype == torch.float32 else 3e-2)


def test_nothing_of_the_model_changes_and_stale_weights_raise():
    model, x = make("batch norm eval")
    before = {k: v.clone() for k, v in model.state_dict().items()}
    op = hessian(model, CE, (x, classes(11)), mode="linearized")
    op @ torch.randn(op.shape[0], 3, dtype=op.dtype)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        model[0].weight.add_(0.1)
    with pytest.raises(RuntimeError, match="refresh"):
        op @ torch.ones(op.shape[0], dtype=op.dtype)


SCRIPT = """
import ctypes, gc, json
import torch
from torch import nn
from flatkern.operators import hessian

def resident():
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * 4096 / 2**20

libc = ctypes.CDLL(None)
gc.collect(); gc.disable()
torch.set_num_threads(1)
model = nn.Sequential(nn.Linear(20, 400), nn.Tanh(), nn.Linear(400, 400), nn.Tanh(), nn.Linear(400, 5))
data = [(torch.randn(2000, 20), torch.randint(0, 5, (2000,))) for _ in range(6)]
CE = nn.CrossEntropyLoss()
warm = hessian(model, CE, data[:1], mode="linearized"); warm @ torch.ones(warm.shape[0], 2); del warm
before = resident()
op = hessian(model, CE, data, mode="linearized")
op @ torch.ones(op.shape[0], 2)
held, kept = resident() - before, op.info.kept_bytes / 2**20
del op
print(json.dumps({"held": held, "kept": kept, "after": resident() - before}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_programs_hold_what_they_say_and_memory_is_back_after_deletion():
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300, check=True
    )
    seen = json.loads(run.stdout)
    assert seen["held"] > 0.8 * seen["kept"] > 50  # MiB
    assert seen["held"] < 1.3 * seen["kept"] + 20
    assert seen["after"] < 0.1 * seen["kept"]
