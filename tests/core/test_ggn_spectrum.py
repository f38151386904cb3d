"""fk.ggn_spectrum against the eigenvalues of explicit Gauss-Newton matrices."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import flatkern as fk
from flatkern.losses import TokenCrossEntropyLoss
from tests.core.networks import TinyGPT, networks, parameter_jacobian, rule_networks


def explicit_ggn(model, loss_fn, x, y):
    """Jᵀ H J with autograd's Hessian of the loss itself in the outputs."""
    output = model(x.clone()).detach()
    hessian = torch.autograd.functional.hessian(lambda f: loss_fn(f, y), output)
    hessian = hessian.reshape(output.numel(), output.numel())
    j = torch.cat([j.flatten(0, 1) for j in parameter_jacobian(model, x).values()], 1)
    return j.mT @ hessian @ j


def target(loss_fn, model, x):
    torch.manual_seed(3)
    output = model(x.clone()).detach()
    if isinstance(loss_fn, TokenCrossEntropyLoss):
        y = torch.randint(output.shape[-1], output.shape[:-1])
        y[0, :2] = -100
        return y
    if isinstance(loss_fn, nn.CrossEntropyLoss):
        y = torch.randint(output.shape[1], (len(x), *output.shape[2:]))
        y[0] = loss_fn.ignore_index
        return y
    return torch.rand_like(output)


LOSSES = {
    "ce": nn.CrossEntropyLoss(),
    "ce weights smoothing ignored": nn.CrossEntropyLoss(
        torch.rand(3).double() + 0.5, label_smoothing=0.1, ignore_index=1
    ),
    "ce sum": nn.CrossEntropyLoss(reduction="sum"),
    "mse": nn.MSELoss(),
    "bce": nn.BCEWithLogitsLoss(),
    "convex callable": (lambda f, y: (f - y).exp().sum()),
}
MODELS = [
    "mlp tanh",
    "mlp relu no bias",
    "vgg",
    "skip",
    "frozen weight",
    "attention",
    "tokens",
    "class token",
    "functional",
]


def check(model, loss_fn, data, matrix, **settings):
    got = fk.ggn_spectrum(model, loss_fn, data, **settings)
    want = torch.linalg.eigvalsh(matrix).flip(0)
    size = float(want[0])
    nonzero = int((want > 1e-11 * size).sum())
    assert int((got.values > 1e-11 * size).sum()) == nonzero
    assert got.num_zeros == len(matrix) - len(got)
    assert got.complete
    torch.testing.assert_close(got.values, want[: len(got)], rtol=1e-8, atol=1e-12 * size)
    assert got.trace == pytest.approx(float(matrix.trace()), rel=1e-9)
    assert got.trace_error < 1e-10
    return got


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("loss", list(LOSSES))
def test_all_eigenvalues(name, loss):
    model, x = {**networks(), **rule_networks()}[name]
    loss_fn = LOSSES[loss]
    y = target(loss_fn, model, x)
    reduction = None if isinstance(loss_fn, nn.Module) else "sum"
    check(model, loss_fn, (x, y), explicit_ggn(model, loss_fn, x, y), reduction=reduction)


def test_a_ragged_loader_within_memory_is_the_whole():
    model, x = networks()["vgg"]
    loss_fn = LOSSES["ce weights smoothing ignored"]
    y = target(loss_fn, model, x)
    matrix = explicit_ggn(model, loss_fn, x, y)
    loader = [(x[:3], y[:3]), (x[3:], y[3:])]
    for memory in (None, 5000, 200_000):
        got = check(model, loss_fn, loader, matrix, max_memory=memory)
    assert got.loss == pytest.approx(float(loss_fn(model(x), y).detach()))
    assert got.num_data == len(x)


def test_token_losses_over_sequences_of_different_length():
    torch.manual_seed(0)
    model, loss_fn = TinyGPT().double(), TokenCrossEntropyLoss(reduction="sum")
    batches = [(torch.randint(11, (1, t)), torch.randint(11, (1, t))) for t in (3, 2)]
    matrix = sum(explicit_ggn(model, loss_fn, x, y) for x, y in batches)
    got = check(model, loss_fn, batches, matrix, vectors=True)
    v = got.vectors @ torch.eye(len(got)).double()
    torch.testing.assert_close(v * got.values @ v.mT, matrix, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("memory", [None, 20_000])
def test_eigenvectors_as_an_operator(memory):
    model, x = networks()["vgg"]
    y = torch.randint(3, (len(x),))
    loss_fn, data = nn.CrossEntropyLoss(), [(x[:1], y[:1]), (x[1:], y[1:])]
    matrix = explicit_ggn(model, loss_fn, x, y)
    got = check(model, loss_fn, data, matrix, vectors=True, max_memory=memory)
    r = len(got)
    assert got.vectors.shape == (len(matrix), r)
    v = got.vectors @ torch.eye(r).double()
    torch.testing.assert_close(v.mT @ v, torch.eye(r).double(), rtol=0, atol=1e-7)
    torch.testing.assert_close(
        v @ got.values.diag() @ v.mT, matrix, rtol=1e-8, atol=1e-9 * float(got.values[0])
    )
    u = torch.randn(len(matrix), 2).double()
    torch.testing.assert_close(got.vectors.T @ u, v.mT @ u)


def test_eigenvectors_of_models_with_one_number_a_sample():
    class Column(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 1))

        def forward(self, x):
            return self.layers(x)[:, 0]

    torch.manual_seed(0)
    model, x, y = Column().double(), torch.randn(6, 4).double(), torch.rand(6).round().double()
    loss = torch.nn.BCEWithLogitsLoss()
    found = fk.ggn_spectrum(model, loss, (x, y), vectors=True)
    vectors = found.vectors @ torch.eye(len(found), dtype=torch.float64)
    product = fk.ggn(model, loss, (x, y)) @ vectors
    torch.testing.assert_close(product, vectors * found.values)
    torch.testing.assert_close(found.vectors.T @ vectors, torch.eye(len(found), dtype=torch.float64))


def test_fewer_parameters_than_rows():
    model, x = nn.Linear(2, 3).double(), torch.randn(20, 2).double()
    y = torch.randint(3, (20,))
    matrix = explicit_ggn(model, nn.CrossEntropyLoss(), x, y)
    got = check(model, nn.CrossEntropyLoss(), (x, y), matrix, vectors=True)
    assert "Gauss-Newton" in got.method
    v = got.vectors @ torch.eye(len(got)).double()
    torch.testing.assert_close(matrix @ v, v * got.values)


def test_the_largest_few_and_lanczos_beyond_the_size():
    model, x = networks()["mlp tanh"]
    data = (x, torch.randint(3, (len(x),)))
    full = fk.ggn_spectrum(model, nn.CrossEntropyLoss(), data)
    few = fk.ggn_spectrum(model, nn.CrossEntropyLoss(), data, k=3)
    assert not few.complete
    assert few.num_zeros == full.num_zeros
    torch.testing.assert_close(few.values, full.values[:3])
    with pytest.raises(ValueError, match="max_size"):
        fk.ggn_spectrum(model, nn.CrossEntropyLoss(), data, max_size=5)
    lanczos = fk.ggn_spectrum(model, nn.CrossEntropyLoss(), data, max_size=5, k=3, vectors=True)
    assert "Lanczos" in lanczos.method
    assert not lanczos.complete
    torch.testing.assert_close(lanczos.values, full.values[:3])
    torch.testing.assert_close((lanczos.vectors.T @ lanczos.vectors).to_dense(), torch.eye(3).double())


def test_float32_tells_zeros_from_rounding():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(30, 40), nn.Tanh(), nn.Linear(40, 4)), torch.randn(20, 30)
    x[10:] = x[:10]  # half of the rows are copies
    y = torch.arange(20) % 4
    single = fk.ggn_spectrum(model, nn.CrossEntropyLoss(), (x, y))
    double = fk.ggn_spectrum(model.double(), nn.CrossEntropyLoss(), (x.double(), y))
    assert len(single) == len(double) == 30
    torch.testing.assert_close(single.values, double.values, rtol=1e-3, atol=1e-6 * float(double.values[0]))


def test_scaling_laws():
    model, x = networks()["mlp tanh"]
    y = torch.randint(3, (len(x),))
    once = fk.ggn_spectrum(model, nn.CrossEntropyLoss(), (x, y)).values
    twice = fk.ggn_spectrum(model, nn.CrossEntropyLoss(), (torch.cat([x, x]), torch.cat([y, y]))).values
    torch.testing.assert_close(twice[: len(once)], once)
    order = torch.randperm(len(x))
    torch.testing.assert_close(
        fk.ggn_spectrum(model, nn.CrossEntropyLoss(), (x[order], y[order])).values, once
    )


class Noisy(torch.utils.data.Dataset):
    """Other samples whenever they are read, whatever torch's generator says."""

    def __init__(self, x, y):
        self.x, self.y, self.source = x, y, torch.Generator().manual_seed(0)

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return self.x[i] + torch.randn(3, generator=self.source), self.y[i]


def test_changing_data_is_noticed():
    x, y = torch.randn(8, 3), torch.arange(8) % 2
    model, loss = nn.Linear(3, 2), nn.CrossEntropyLoss()
    with pytest.raises(ValueError, match="data"):
        fk.ggn_spectrum(model, loss, torch.utils.data.DataLoader(Noisy(x, y), 4))
    # shuffling draws from the global generator, which is put back, so that every pass has the same order
    shuffled = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), 4, shuffle=True)
    torch.testing.assert_close(
        fk.ggn_spectrum(model, loss, shuffled).values, fk.ggn_spectrum(model, loss, (x, y)).values
    )


def test_bad_arguments():
    model, data = nn.Linear(3, 2), (torch.randn(4, 3), torch.arange(4) % 2)
    for settings, match in (
        ({"k": 0}, "k:"),
        ({"max_size": -1}, "max_size"),
        ({"params": "nothing"}, "params"),
    ):
        with pytest.raises(ValueError, match=match):
            fk.ggn_spectrum(model, nn.CrossEntropyLoss(), data, **settings)
    with pytest.raises(ValueError, match="NLLLoss"):
        fk.ggn_spectrum(model, nn.NLLLoss(), data)
    with pytest.raises(ValueError, match="convex"):
        fk.ggn_spectrum(model, lambda f, y: -f.square().sum(), data, reduction="sum")
