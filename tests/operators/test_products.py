"""Several vectors, modes, precision: the choice of how never changes what."""

import pytest
import torch
from explicit import ZOO, assert_close, explicit_hessian, make, twice_differentiable_in_torch
from test_curvature_exact import class_targets, ragged
from torch import nn

from flatkern.operators import fisher, ggn, hessian, jacobian, products

CE = nn.CrossEntropyLoss()
BUILD = {"hessian": hessian, "ggn": ggn, "fisher": fisher}
NO_BATCHING = {"group norm"}  # torch has no batching rule for its double backward


def block(size, k=5):
    return torch.randn(k, size, dtype=torch.float64, generator=torch.Generator().manual_seed(5)).mT


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("name", ZOO)
def test_batched_passes_give_what_single_ones_give(name, kind):
    model, x = make(name)
    data = ragged(x, class_targets(len(x)))
    one = BUILD[kind](model, CE, data, block_size=1, mode="kept")
    many = BUILD[kind](model, CE, data, block_size=3, mode="kept")
    v = block(one.shape[0])
    expected = torch.stack([one @ column for column in v.T], dim=1)
    assert_close(one @ v, expected, 1e-12)
    assert_close(many @ v, expected, 1e-12)
    if kind == "hessian":
        assert many.info.block_size == (1 if name in NO_BATCHING else 3)
    assert_close(BUILD[kind](model, CE, data) @ v, expected, 1e-12)


@pytest.mark.parametrize("name", ZOO)
def test_every_mode_gives_the_same(name):
    model, x = make(name)
    y = class_targets(len(x))
    expected = explicit_hessian(twice_differentiable_in_torch(name, model), CE, x, y)
    v = block(len(expected), 2)
    for mode in ("kept", "rebuilt", "auto"):
        op = hessian(model, CE, ragged(x, y), mode=mode, max_memory=0)
        assert_close(op @ v, expected @ v)
    assert op.info.mode in ("rebuilt", "forward")
    op = hessian(model, CE, ragged(x, y), mode="forward")
    assert_close(op @ v, expected @ v)
    assert op.info.kept_batches == 0
    part = op.layout.names[0]
    rows = op.layout.slices[part]
    assert_close(op.block(part) @ v[rows], expected[rows, rows] @ v[rows])


def test_info_says_what_was_chosen():
    model, x = make("mlp tanh")
    op = hessian(model, CE, ragged(x, class_targets(11)))
    assert (op.info.mode, op.info.block_size) == ("kept", None)
    op @ block(op.shape[0])
    assert op.info.block_size in (1, 2, 4, 5)
    op @ block(op.shape[0], 12)
    assert op.info.block_size in (1, 2, 4, 5, 8)
    assert hessian(model, CE, ragged(x, class_targets(11)), mode="rebuilt").info.kept_batches == 0


def test_bad_choices_are_named():
    model, x = make("mlp tanh")
    data = (x, class_targets(11))
    for build, options, text in (
        (hessian, {"mode": "fast"}, "mode"),
        (ggn, {"mode": "forward"}, "mode"),
        (hessian, {"mode": "forward", "forward": lambda m, b: (m(b[0]), b[1])}, "mode"),
        (hessian, {"block_size": 0}, "block_size"),
        (hessian, {"block_size": 2.5}, "block_size"),
    ):
        with pytest.raises(ValueError, match=text):
            build(model, CE, data, **options)


def test_vectors_in_any_memory_layout():
    model, x = make("conv")
    op = hessian(model, CE, (x, class_targets(11)))
    v = torch.randn(op.shape[0], 4, dtype=torch.float64)  # columns lie apart in memory
    expected = op.to_dense() @ v
    for given in (v, v.mT.contiguous().mT, v.repeat_interleave(2, 0)[::2]):
        assert_close(op @ given, expected)
    with torch.inference_mode():
        assert_close(op @ v, expected)
        assert_close(op @ v.clone(), expected)


@pytest.mark.parametrize("build", [hessian, ggn])
@pytest.mark.parametrize("max_memory", [None, 0])
def test_autocast_regions_of_making_and_not_of_use(build, max_memory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    data = [(torch.randn(20, 4), class_targets(20))]
    exact = build(model, CE, data).to_dense()
    v = torch.randn(exact.shape[0], 3)
    expected = exact @ v
    outside = build(model, CE, data, max_memory=max_memory)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_close(outside @ v, expected, 1e-5)
        inside = build(model, CE, data, max_memory=max_memory)
        within = inside @ v
    assert within.dtype == torch.float32
    assert_close(inside @ v, within, 1e-6)
    assert not torch.equal(within, outside @ v)
    assert (within - exact @ v).norm() < 3e-2 * (exact @ v).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("mode", ["auto", "rebuilt", "forward"])
def test_low_precision_in_every_mode(dtype, mode):
    model, x = make("mlp tanh", 32)
    exact = hessian(model, CE, (x, class_targets(32))).to_dense()
    op = hessian(model.to(dtype), CE, ragged(x.to(dtype), class_targets(32), 5), mode=mode)
    assert op.dtype == torch.float32
    error = (op.to_dense().double() - exact).norm() / exact.norm()
    assert error < (3e-2 if dtype == torch.bfloat16 else 1e-5)


def test_a_jacobian_is_not_changed_by_autocast_regions():
    model, x = make("mlp tanh", 4)
    J = jacobian(model.float(), x.float())
    v = torch.ones(J.shape[1])
    expected = J @ v
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(J @ v, expected)


class Product(nn.Module):
    """torch's tangent of this scatter is silently wrong; a mode that disagrees is not taken."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(4, 6)

    def forward(self, x):
        index = torch.tensor([0, 1, 2, 0, 1, 2]).expand(len(x), 6)
        return torch.ones(len(x), 3, dtype=x.dtype).scatter_reduce(1, index, self.inner(x), "prod")


def test_modes_that_disagree_are_not_taken(monkeypatch):
    torch.manual_seed(0)
    model, x, y = Product().double(), torch.randn(6, 4, dtype=torch.float64), class_targets(6)
    expected = explicit_hessian(model, CE, x, y)
    # forward mode would win every race here
    clock = iter(range(1000))
    monkeypatch.setattr(products, "seconds", lambda run: (run(), next(clock))[1])
    op = hessian(model, CE, (x, y), max_memory=0)
    v = block(len(expected), 2)
    assert_close(op @ v, expected @ v)
    wrong = hessian(model, CE, (x, y), mode="forward") @ v
    assert op.info.mode == ("rebuilt" if (wrong - expected @ v).norm() > 1e-6 else "forward")
