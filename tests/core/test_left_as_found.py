"""Nothing of the user's is changed, on success or on errors; bad input gets an error that says what to do."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import flatkern as fk
from flatkern.capture import record_calls
from flatkern.problem import Batches, Layout, call_with, select_parameters
from tests.core.networks import NAMES, networks, parameter_jacobian

QUANTITIES = {
    "sharpness": fk.sharpness,
    "geometry": fk.geometry,
    "bounds": fk.bounds,
    "log_volume": lambda m, x: fk.log_volume(m, x, rank=1),
    "max_sensitivity": fk.max_sensitivity,
    "local_dimensionality": fk.local_dimensionality,
    "ggn_trace": lambda m, x: fk.ggn_trace(m, nn.MSELoss(), (x, torch.zeros_like(m(x.clone())))),
    "sketch": lambda m, x: fk.sharpness(m, x, method="sketch", samples=2),
    "gradient_norms": lambda m, x: fk.gradient_norms(m, nn.MSELoss(), (x, torch.zeros_like(m(x.clone())))),
}


def snapshot(model: nn.Module, x: torch.Tensor) -> dict[str, object]:
    return {
        "state": copy.deepcopy(model.state_dict()),
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "identity": [id(p) for p in model.parameters(recurse=True)],
        "versions": [p._version for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "hooks": [
            (
                len(m._forward_hooks),
                len(m._forward_pre_hooks),
                len(m._backward_hooks),
                len(m._forward_hooks_with_kwargs),
            )
            for m in model.modules()
        ],
        "attributes": [sorted(vars(m)) + sorted(m._parameters) for m in model.modules()],
        "rng": torch.get_rng_state(),
        "x": x.clone(),
        "x flags": (x.requires_grad, x.grad),
        "grad mode": torch.is_grad_enabled(),
    }


def same(a: object, b: object) -> bool:
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(p, q) for p, q in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("quantity", list(QUANTITIES))
@pytest.mark.parametrize(
    "name", ["mlp tanh", "one module twice", "tied across modules", "skip", "writes into input"]
)
def test_untouched_on_success(name, quantity):
    model, x = networks()[name]
    model.train()  # no batch norm or dropout in these: allowed, and kept
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = snapshot(model, x)
    QUANTITIES[quantity](model, x)
    after = snapshot(model, x)
    for key in before:
        assert same(before[key], after[key]), key


class _FailsLate(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.register_buffer("counter", torch.zeros(()))

    def forward(self, x):
        self.counter += 1
        torch.rand(2)
        raise RuntimeError("user's own error")


@pytest.mark.parametrize("quantity", ["sharpness", "geometry", "max_sensitivity"])
def test_untouched_on_errors(quantity):
    model, x = _FailsLate(), torch.randn(4, 3)
    before = snapshot(model, x)
    with pytest.raises(RuntimeError, match="user's own error"):
        QUANTITIES[quantity](model, x)
    after = snapshot(model, x)
    for key in before:
        assert same(before[key], after[key]), key


def test_hooks_are_removed_whatever_happens():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    with pytest.raises(KeyError), record_calls(model):
        raise KeyError
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_users_own_hooks_keep_their_effect():
    model, x = networks()["mlp tanh"]
    plain = fk.sharpness(model, x).value
    model[4].register_forward_hook(lambda _m, _a, out: 3 * out)
    assert fk.sharpness(model, x).value == pytest.approx(9 * plain)
    model[0].register_forward_pre_hook(lambda _m, args: (0 * args[0],))
    assert fk.max_sensitivity(model, x).mean == 0


@pytest.mark.parametrize("quantity", list(QUANTITIES))
def test_bad_inputs(quantity):
    measure, model = QUANTITIES[quantity], nn.Linear(3, 2)
    with pytest.raises(ValueError, match=r"holds no sample|is empty"):
        measure(model, torch.zeros(0, 3))
    for bad in (float("nan"), float("inf")):
        x = torch.zeros(2, 3)
        x[1, 1] = bad
        with pytest.raises(ValueError, match="NaN or Inf"):
            measure(model, x)
    broken = nn.Linear(3, 2)
    with torch.no_grad():
        broken.bias[0] = float("nan")
    with pytest.raises(ValueError, match="parameter 'bias' holds NaN or Inf"):
        measure(broken, torch.ones(2, 3))
    with pytest.raises(ValueError, match="dropout '1' is in train mode"):
        measure(nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.5)).train(), torch.ones(2, 3))
    with pytest.raises(ValueError, match="batch norm '1' is in train mode"):
        measure(nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).train(), torch.ones(2, 3))


@pytest.mark.parametrize(
    "quantity", ["geometry", "bounds", "log_volume", "max_sensitivity", "local_dimensionality"]
)
def test_integer_inputs_have_no_jacobian(quantity):
    model, x = networks()["tokens"]
    with pytest.raises(TypeError, match="has no gradient"):
        QUANTITIES[quantity](model, x)


class _Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.a, self.function = nn.Linear(3, 3), function

    def forward(self, x):
        return self.function(self.a(x))


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda z: (z, z), TypeError, "must be one tensor"),
        (lambda z: z.sum(0), ValueError, "does not start with the number of samples"),
        (lambda z: z - z.mean(0), ValueError, "changes with the other samples"),
        (lambda z: nn.functional.dropout(z, 0.5), ValueError, "draws random numbers"),
        (lambda z: z + torch.randn_like(z), ValueError, "draws random numbers"),
        (lambda z: z.argmax(1), TypeError, "not a real floating-point type"),
        (lambda z: z / 0, ValueError, "its output holds NaN or Inf"),
    ],
)
def test_models_without_a_jacobian_a_sample(function, error, message):
    with pytest.raises(error, match=message):
        fk.sharpness(_Calls(function), torch.randn(4, 3))


def test_sequence_first_attention_is_refused():
    model = nn.TransformerEncoderLayer(8, 2, 8, dropout=0.0, batch_first=False).eval()
    with pytest.raises(ValueError, match="axis 0"):
        fk.sharpness(model, torch.randn(5, 5, 8))


def test_arguments():
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.raises(TypeError, match=r"model: expected a torch\.nn\.Module"):
        fk.sharpness(lambda v: v, x)
    with pytest.raises(TypeError, match="x: expected a tensor"):
        fk.sharpness(model, [1, 2])
    with pytest.raises(ValueError, match="max_memory"):
        fk.sharpness(model, x, max_memory=0)
    with pytest.raises(ValueError, match=r"rank: must be an integer from 1 to min\(N, M\) = 2"):
        fk.log_volume(model, x, rank=3)
    with pytest.raises(ValueError, match="'wieght' matches no parameter"):
        fk.sharpness(model, x, params="wieght")
    with pytest.raises(ValueError, match="not convex in the output: sample"):
        fk.ggn_trace(model, lambda f, y: (f - y).cos().sum(), (x, x[:, :2]), reduction="sum")
    with pytest.raises(ValueError, match="NLLLoss is linear"):
        fk.ggn_trace(model, nn.NLLLoss(), (x, torch.zeros(4, dtype=torch.long)))
    with pytest.raises(ValueError, match="method: expected 'auto'"):
        fk.sharpness(model, x, method="fast")
    with pytest.raises(ValueError, match="lazy parameter"):
        fk.sharpness(nn.Sequential(nn.LazyLinear(3)), x)
    model.requires_grad_(False)
    with pytest.raises(ValueError, match="no parameter with requires_grad"):
        fk.sharpness(model, x)
    with pytest.raises(ValueError, match="'bias' is frozen"):
        fk.sharpness(model, x, params="bias")


def test_data():
    device = torch.device("cpu")
    x, y = torch.zeros(2, 3), torch.zeros(2)
    for bad, error, message in [
        (x, TypeError, "expected a pair"),
        (iter([(x, y)]), TypeError, "one-shot iterator"),
        ([], ValueError, "no batch"),
        ([(x, y, y)], TypeError, "pair of tensors"),
        ([(x, torch.zeros(3))], ValueError, "axis 0 must agree"),
        ([(x[:0], y[:0])], ValueError, "is empty"),
    ]:
        with pytest.raises(error, match=message):
            list(Batches(bad, device))


def test_layout_goes_both_ways():
    model, _ = networks()["vgg"]
    parameters = select_parameters(model)
    layout = Layout(parameters)
    flat = layout.flatten({n: p.detach() for n, p in parameters.items()})
    assert flat.shape == (sum(p.numel() for p in model.parameters()),)
    for name, value in layout.unflatten(torch.stack([flat, 2 * flat])).items():
        assert torch.equal(value[0], parameters[name])
        assert torch.equal(value[1], 2 * parameters[name])
    with pytest.raises(ValueError, match="expected"):
        layout.unflatten(flat[1:])


@pytest.mark.parametrize("name", NAMES)
def test_replacing_parameters_leaves_the_model_its_own(name):
    model, x = networks()[name]
    identity, before = [id(p) for p in model.parameters()], model(x.clone())
    parameters = select_parameters(model)
    call_with(model, {n: torch.zeros_like(p) for n, p in parameters.items()}, x.clone())
    assert identity == [id(p) for p in model.parameters()]
    assert torch.equal(before, model(x.clone()))


class _Weighted(nn.Module):
    """A layer called with a weight computed from its own: the graph uses the parameter once, but not as it is."""

    def __init__(self):
        super().__init__()
        self.a, self.o = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.o(torch.func.functional_call(self.a, {"weight": self.a.weight * 2}, (x,)).tanh())


def test_a_weight_changed_on_its_way_into_the_layer():
    model, x = _Weighted().double(), torch.randn(4, 3).double()
    exact = sum(j.square().sum((1, 2)) for j in parameter_jacobian(model, x).values())
    torch.testing.assert_close(fk.sharpness(model, x).per_sample, exact)


def test_samples_that_see_only_earlier_ones_are_refused():
    class Causal(_Calls):
        def __init__(self):
            super().__init__(lambda z: z + 0.1 * torch.cat([z[:1] * 0, z.cumsum(0)[:-1]]))

    with pytest.raises(ValueError, match="changes with the other samples"):
        fk.sharpness(Causal(), torch.randn(5, 3))


class _Counts(nn.Module):
    """Writes into one buffer and replaces another, and uses a parameter directly (the fall-back runs it too)."""

    def __init__(self):
        super().__init__()
        self.a, self.scale = nn.Linear(3, 2), nn.Parameter(torch.ones(2))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(2))

    def forward(self, x):
        self.calls += 1
        self.mean = self.mean * 0.9 + 1
        return self.a(x) * self.scale


def test_buffers_written_or_replaced_are_as_before():
    model = _Counts()
    mean = model.mean
    fk.geometry(model, torch.randn(4, 3))
    assert float(model.calls) == 0
    assert model.mean is mean
    assert torch.equal(mean, torch.zeros(2))


def test_a_forward_that_rewrites_its_weights_is_refused():
    with pytest.raises(ValueError, match="has max_norm"):
        fk.sharpness(nn.Sequential(nn.Embedding(5, 3, max_norm=0.1), nn.Flatten()), torch.tensor([[1], [2]]))


def test_a_geometry_of_another_state_is_refused():
    model, x = networks()["mlp tanh"]
    g = fk.geometry(model, x)
    with pytest.raises(ValueError, match="other inputs than x"):
        fk.bounds(model, 2 * x, geometry=g)
    with pytest.raises(ValueError, match="on another model"):
        fk.bounds(copy.deepcopy(model), x, geometry=g)
    with torch.no_grad():
        model[0].weight.mul_(0.5)
    with pytest.raises(ValueError, match="at other weights"):
        fk.bounds(model, x, geometry=g)


def test_half_precision_does_not_overflow():
    x = (300 * torch.randn(4, 60)).half()
    g = fk.geometry(nn.Linear(60, 3).half(), x)
    torch.testing.assert_close(g.input_norm_sq, x.double().square().sum(1))
    assert torch.isfinite(g.sharpness.per_sample).all()


LOADED = {
    "ggn_trace": lambda m, d: fk.ggn_trace(m, torch.nn.CrossEntropyLoss(), d),
    "hessian_trace": lambda m, d: fk.hessian_trace(m, torch.nn.CrossEntropyLoss(), d),
    "gradient_norms": lambda m, d: fk.gradient_norms(m, torch.nn.CrossEntropyLoss(), d),
    "ggn_diagonal": lambda m, d: fk.ggn_diagonal(m, torch.nn.CrossEntropyLoss(), d),
    "ggn_matrix": lambda m, d: fk.ggn_matrix(m, torch.nn.CrossEntropyLoss(), d),
    "ggn_spectrum": lambda m, d: fk.ggn_spectrum(m, torch.nn.CrossEntropyLoss(), d),
    "kfac": lambda m, d: fk.kfac(m, torch.nn.CrossEntropyLoss(), d),
    "flatness": lambda m, d: fk.flatness(m, torch.nn.CrossEntropyLoss(), d, quantities=["loss", "ggn_trace"]),
    "hessian": lambda m, d: fk.hessian(m, torch.nn.CrossEntropyLoss(), d) @ torch.ones(43),
    "plan": lambda m, d: fk.plan(fk.ggn_trace, m, torch.nn.CrossEntropyLoss(), d),
    "eigenvectors": lambda m, d: (
        fk.ggn_spectrum(m, torch.nn.CrossEntropyLoss(), d, vectors=True).vectors.T @ torch.ones(43)
    ),
}


def test_tensors_made_under_inference_mode_and_calls_under_autocast():
    torch.manual_seed(4)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    with torch.inference_mode():
        data = torch.randn(6, 4), torch.arange(6) % 3
    loss = torch.nn.CrossEntropyLoss()
    for quantity in (
        fk.hessian_trace,
        fk.hessian_diagonal,
        fk.adaptive_sharpness,
        fk.max_eigenvalue,
        fk.kfac,
    ):
        quantity(model, loss, data)
    # an operator made outside is not rounded, one made inside keeps its region
    op = fk.hessian(model, loss, data)
    matrix = torch.diag(torch.tensor([3.0, 2.0, 1.0, 0.5]))
    with torch.autocast("cpu", torch.bfloat16):
        pairs = fk.eigsh(op, 2, seed=0)
        assert fk.eigsh(matrix, 1, seed=0).values[0] == pytest.approx(3.0, rel=1e-6)
        assert fk.trace(matrix, method="exact").value == pytest.approx(6.5, rel=1e-6)
        assert fk.spectral_density(matrix, probes=2, steps=3, seed=0) is not None
        assert fk.max_eigenvalue(model, loss, data, seed=0).value > 0
    torch.testing.assert_close(pairs.values, fk.eigsh(op, 2, seed=0).values)


def test_complex_parameters_are_refused_alike():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))

        def forward(self, x):
            return (x.to(self.a.dtype) @ self.a).real

    data = torch.randn(6, 4), torch.arange(6) % 3
    for quantity in (
        fk.ggn_trace,
        fk.hessian_trace,
        fk.gradient_norms,
        fk.kfac,
        fk.max_eigenvalue,
        fk.hessian,
    ):
        with pytest.raises(TypeError, match="parameter 'a' is complex"):
            quantity(Net(), torch.nn.CrossEntropyLoss(), data)
    with pytest.raises(ValueError, match="params: an empty list"):
        fk.ggn_trace(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data, params=[])
    with pytest.raises(ValueError, match="max_memory: expected bytes"):
        fk.max_eigenvalue(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data, max_memory="1GB")
    with pytest.raises(TypeError, match="seed: expected an int"):
        fk.ggn_spectrum(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data, seed="a")
    with pytest.raises(ValueError, match="samples: expected"):
        fk.ggn_trace(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), data, samples=True)
    with pytest.raises(IndexError, match="Target 4"):
        fk.hessian_trace(
            torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3)),
            torch.nn.CrossEntropyLoss(), (data[0], torch.full((6,), 4)),
        )  # fmt: skip


@pytest.mark.parametrize("own", [False, True], ids=["global generator", "own generator"])
@pytest.mark.parametrize("name", LOADED)
def test_reading_a_loader_moves_no_generator(name, own):
    """A DataLoader draws a seed whenever it is read, from its own generator or the global one."""
    torch.manual_seed(3)
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    data = torch.utils.data.TensorDataset(torch.randn(12, 4), torch.arange(12) % 3)
    generator = torch.Generator().manual_seed(1) if own else None
    loader = torch.utils.data.DataLoader(data, batch_size=5, generator=generator)
    before, states = torch.get_rng_state(), None if generator is None else generator.get_state()
    LOADED[name](model, loader)
    assert torch.equal(torch.get_rng_state(), before)
    assert generator is None or torch.equal(generator.get_state(), states)


def test_what_is_wrong_is_named():
    class Blind(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.layer(x.detach())

    x = torch.randn(5, 4)
    for quantity in (fk.log_volume, fk.max_sensitivity, fk.local_dimensionality, fk.geometry):
        with pytest.raises(ValueError, match="does not depend differentiably on x"):
            quantity(Blind(), x)

    class Mean(Blind):
        def forward(self, x):
            return self.layer(x).mean()

    with pytest.raises(ValueError, match=r"its output has shape \(\), without an axis of samples"):
        fk.geometry(Mean(), x)
    with pytest.raises(
        TypeError, match=r"CrossEntropyLoss is a class; give an instance, CrossEntropyLoss\(\)"
    ):
        fk.ggn_trace(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss, (x, torch.arange(5) % 3))
