"""Stale weights, changing data, the user's state, memory, bad input."""

import gc
import weakref

import pytest
import torch
from explicit import assert_close, make, vectors
from torch import nn
from torch.nn.attention import SDPBackend
from torch.utils.data import DataLoader, TensorDataset

from flatkern.operators import StaleOperatorError, ggn, hessian

CE = nn.CrossEntropyLoss()
LABELS = torch.tensor([0, 2, 1, 1, 0, 2])


def case(name="mlp tanh", n=6):
    model, x = make(name, n)
    return model, x, LABELS[:n]


def _replace_data(model):
    model[0].weight.data = model[0].weight.data * 2


def _replace_parameter(model):
    model[0].weight = nn.Parameter(model[0].weight.detach() * 2)


def _in_place(model):
    with torch.no_grad():
        model[0].weight.mul_(2)


def _behind_autograd(model):
    model[0].weight.data.mul_(2)


def _optimizer_step(model):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.mark.parametrize(
    "change",
    [_replace_data, _replace_parameter, _in_place, _behind_autograd, _optimizer_step],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("max_memory", [None, 0])
@pytest.mark.parametrize("build", [hessian, ggn])
def test_changed_weights_are_noticed(change, build, max_memory):
    model, x, y = case()
    op = build(model, CE, (x, y), max_memory=max_memory)
    v = torch.ones(op.shape[0], dtype=torch.float64)
    op @ v
    change(model)
    with pytest.raises(StaleOperatorError, match=r"H\.refresh\(\)"):
        op @ v
    if change is not _replace_parameter:
        assert_close(op.refresh() @ v, build(model, CE, (x, y)) @ v)


def test_changed_buffers_and_channels_last_weights_are_noticed():
    model, x, y = case("batch norm eval")
    op = hessian(model, CE, (x, y))
    model[1].running_var.data.mul_(3)
    with pytest.raises(StaleOperatorError):
        op @ torch.ones(op.shape[0], dtype=torch.float64)
    conv = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Flatten()).to(memory_format=torch.channels_last)
    op = hessian(conv, CE, (torch.randn(2, 2, 3, 3), y[:2]))
    conv[0].weight.data.mul_(2)
    with pytest.raises(StaleOperatorError):
        op @ torch.ones(op.shape[0])


def test_a_failed_refresh_leaves_no_half_operator():
    model, x, y = case()
    op = hessian(model, CE, (x, y))
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="NaN or Inf"):
        op.refresh()
    with pytest.raises(StaleOperatorError, match="refresh"):
        op @ torch.ones(op.shape[0], dtype=torch.float64)


def test_data_that_differ_between_passes():
    model, x = make("mlp tanh", 20)
    y = torch.arange(20) % 3
    shuffled = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True)
    op = hessian(model, CE, shuffled, max_memory=0, check_determinism=False)
    v = torch.ones(op.shape[0], dtype=torch.float64)
    op @ v  # the same state of the global generator gives the same order
    torch.rand(1)
    with pytest.raises(RuntimeError, match="shuffle=False"):
        op @ v
    # kept in full, the order does not matter
    assert_close(hessian(model, CE, shuffled) @ v, hessian(model, CE, (x, y)) @ v)
    growing = [(x[:10], y[:10])]
    op = hessian(model, CE, growing, max_memory=0)
    growing.append((x[10:], y[10:]))
    with pytest.raises(RuntimeError, match="number of batches"):
        op @ v
    growing.clear()
    with pytest.raises((RuntimeError, ValueError)):
        op @ v


class Counting(nn.Module):
    """Changes a buffer in every forward pass."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return torch.tanh(self.linear(x))


def snapshot(model):
    return {
        "training": [m.training for m in model.modules()],
        "grads": [p.grad for p in model.parameters()],
        "requires": [p.requires_grad for p in model.parameters()],
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "rng": torch.get_rng_state(),
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "grad mode": torch.is_grad_enabled(),
        "flash": torch.backends.cuda.flash_sdp_enabled(),
        "efficient": torch.backends.cuda.mem_efficient_sdp_enabled(),
    }


def same(before, after):
    for key in ("training", "requires", "hooks", "grad mode", "flash", "efficient"):
        assert before[key] == after[key], key
    assert all(a is b for a, b in zip(before["grads"], after["grads"], strict=True))
    assert torch.equal(before["rng"], after["rng"])
    assert all(torch.equal(before["state"][k], after["state"][k]) for k in before["state"])


@pytest.mark.parametrize("build", [hessian, ggn])
@pytest.mark.parametrize("max_memory", [None, 0])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_nothing_of_the_user_s_is_changed(build, max_memory, mode):
    torch.manual_seed(0)
    model = nn.Sequential(Counting(), nn.LayerNorm(3), nn.Dropout(0.5).eval()).double()
    model[0].linear.weight.grad = torch.full_like(model[0].linear.weight, 7.0)
    loader = DataLoader(TensorDataset(vectors(6), LABELS), batch_size=4)
    before = snapshot(model)
    with mode():
        op = build(model, CE, loader, max_memory=max_memory)
        product = op @ torch.ones(op.shape[0], dtype=torch.float64)
        op.refresh()
    same(before, snapshot(model))
    assert not product.requires_grad


def test_nothing_is_changed_when_it_fails():
    class Failing(Counting):
        def forward(self, x):
            out = super().forward(x)
            torch.rand(3)
            raise RuntimeError("on purpose")
            return out

    for model, error in (
        (Failing().double(), "on purpose"),
        (nn.Sequential(Counting(), Noise()).double(), "random"),
    ):
        x = vectors(6)
        before = snapshot(model)
        with pytest.raises((RuntimeError, ValueError), match=error):
            hessian(model, CE, (x, LABELS))
        same(before, snapshot(model))


class Noise(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


def test_attention_settings_are_those_of_the_caller():
    model, x, y = case("attention")
    with torch.nn.attention.sdpa_kernel([SDPBackend.FLASH_ATTENTION]):
        before = (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())
        op = hessian(model, CE, (x, y))
        op @ torch.ones(op.shape[0], dtype=torch.float64)
        assert before == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())


@pytest.mark.parametrize("build", [hessian, ggn])
def test_deleting_an_operator_frees_its_graphs_without_the_collector(build):
    model, x, y = case("attention")
    x = x.clone()
    gc.disable()
    try:
        op = build(model, CE, (x, y))
        op @ torch.ones(op.shape[0], dtype=torch.float64)
        op.to_scipy()
        held = [weakref.ref(op), *(weakref.ref(root) for root in op._batches[0].kept.roots)]
        del op
        assert all(ref() is None for ref in held)
    finally:
        gc.enable()


def bad(**changes):
    model, x, y = case()
    arguments = {"model": model, "loss_fn": CE, "data": (x, y)} | changes
    return hessian(arguments.pop("model"), arguments.pop("loss_fn"), arguments.pop("data"), **arguments)


def test_bad_arguments_are_named():
    _, x, y = case()
    train_mode = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).double()
    nan = x.clone()
    nan[2, 1] = float("nan")
    for changes, error, text in (
        ({"model": train_mode}, ValueError, "eval"),
        ({"model": nn.Sequential(nn.Linear(4, 3), nn.Dropout())}, ValueError, "eval"),
        ({"model": "net"}, TypeError, "model"),
        ({"model": nn.ReLU()}, ValueError, "requires_grad"),
        ({"model": nn.Sequential(nn.Embedding(3, 3, sparse=True))}, ValueError, "sparse"),
        ({"loss_fn": lambda o, t: o.sum()}, ValueError, "reduction"),
        ({"loss_fn": 3}, TypeError, "loss_fn"),
        ({"loss_fn": nn.CrossEntropyLoss(reduction="none")}, ValueError, "reduction"),
        ({"loss_fn": lambda o, t: o, "reduction": "sum"}, ValueError, "scalar"),
        ({"loss_fn": lambda o, t: (o * float("inf")).sum(), "reduction": "sum"}, ValueError, "NaN or Inf"),
        ({"reduction": "sum"}, ValueError, "contradicts"),
        ({"data": []}, ValueError, "data"),
        ({"data": iter([(x, y)])}, TypeError, "one-shot"),
        ({"data": x}, TypeError, "pair"),
        ({"data": (x[:0], y[:0])}, ValueError, "empty"),
        ({"data": (x, y[:3])}, ValueError, "axis 0"),
        ({"data": (nan, y)}, ValueError, "NaN"),
        ({"data": (x, torch.full_like(y, -100))}, ValueError, "denominator"),
        ({"params": "nothing.*"}, ValueError, "params"),
        ({"params": "0.weigth"}, ValueError, "params"),
        ({"max_memory": -1}, ValueError, "max_memory"),
    ):
        with pytest.raises(error, match=text):
            bad(**changes)


def test_gradients_that_are_not_finite_are_refused():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return (self.w * x).abs().sqrt()

    with pytest.raises(ValueError, match="gradient"):
        hessian(Root(), nn.MSELoss(), (torch.ones(2, 1), torch.ones(2, 1)))


def test_bad_vectors_are_named():
    op = bad()
    size = op.shape[0]
    for v, error, text in (
        (torch.ones(size), TypeError, "dtype"),
        (torch.ones(size, dtype=torch.long), TypeError, "dtype"),
        (torch.ones(size + 1, dtype=torch.float64), ValueError, "columns"),
        (torch.ones(2, size, dtype=torch.float64), ValueError, "columns"),
        (torch.ones(size, 1, 1, dtype=torch.float64), ValueError, "shape"),
        (torch.ones(size).numpy(), TypeError, "from_numpy"),
        ([1.0] * size, TypeError, "tensor"),
    ):
        with pytest.raises(error, match=text):
            op @ v
