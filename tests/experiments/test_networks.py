"""The networks have the paper's sizes; training by autograd equals torch's SGD; state and load go round."""

import math

import pytest
import torch
from torch import nn

from flatkern.experiments.data import Samples
from flatkern.experiments.errors import UserError
from flatkern.experiments.measure import misclassified, relative_flatness
from flatkern.experiments.networks import build_network, network_from
from flatkern.experiments.sgd import BatchStream, Ensemble
from flatkern.experiments.trainers import AutogradTrainer


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_parameter_counts_are_the_papers() -> None:
    assert count(build_network("mlp-tanh", (1, 28, 28), (500, 500, 500))) == 898_510
    assert count(build_network("mlp-relu", (1, 28, 28), (500, 500, 500))) == 898_510
    assert count(build_network("vgg10", (3, 32, 32), ())) == 97_018
    assert count(build_network("lenet", (1, 28, 28), ())) == 61_706  # LeNet-5


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("vgg10", (3, 32, 32)),
        ("vgg10", (1, 28, 28)),
        ("lenet", (1, 28, 28)),
        ("lenet", (3, 32, 32)),
        ("vit-16-2", (1, 28, 28)),
        ("vit-8-1", (3, 32, 32)),
    ],
)
def test_images_of_all_data_sets_fit(name: str, shape: tuple[int, int, int]) -> None:
    model = build_network(name, shape, ())
    x = torch.rand(2, *shape)
    again = network_from(name, shape, (), model.state_dict())
    assert model(x).shape == (2, 10)
    assert torch.equal(model(x), again(x))


@pytest.mark.parametrize(
    ("name", "shape", "what"),
    [
        ("resnet", (1, 28, 28), "unknown network 'resnet'"),
        ("lenet", (1, 8, 8), "28×28 or 32×32"),
        ("vit-12-1", (1, 28, 28), "multiple of 8"),
        ("vit-8-1", (1, 9, 9), "7 or 4 divides"),
    ],
)
def test_what_does_not_fit_is_refused(name: str, shape: tuple[int, int, int], what: str) -> None:
    with pytest.raises(UserError, match=what):
        build_network(name, shape, ())


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_hand_written_steps_equal_autograd(activation: type[nn.Module]) -> None:
    sizes, seeds = (7, 6, 5, 4), (0, 3)
    by_hand = Ensemble(sizes, seeds, activation, dtype=torch.float64)
    other = AutogradTrainer(lambda: by_hand.member(0), seeds)
    for k in range(2):
        other.load(k, by_hand.state(k))
    generator = torch.Generator().manual_seed(1)
    for _ in range(4):
        x = torch.randn(2, 9, 7, generator=generator, dtype=torch.float64)
        y = torch.randn(2, 9, 4, generator=generator, dtype=torch.float64)
        by_hand.step(x, y, 0.4)
        other.step(x, y, 0.4)
    for k in range(2):
        for name, value in by_hand.state(k).items():
            torch.testing.assert_close(value, other.state(k)[name], rtol=1e-12, atol=1e-13)
            torch.testing.assert_close(value, by_hand.member(k).state_dict()[name])


def test_autograd_steps_equal_torchs_sgd_and_keep_the_global_generator() -> None:
    state = torch.get_rng_state()
    trainer = AutogradTrainer(lambda: build_network("vit-8-1", (1, 8, 8), ()), (5,))
    assert torch.equal(torch.get_rng_state(), state)
    model = trainer.member(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(3):
        x, y = (
            torch.rand(1, 4, 1, 8, 8, generator=torch.Generator().manual_seed(seed)),
            torch.eye(10)[None, :4],
        )
        trainer.step(x, y, 0.1)
        optimizer.zero_grad()
        nn.MSELoss()(model(x[0]), y[0]).backward()
        optimizer.step()
    for name, value in trainer.state(0).items():
        torch.testing.assert_close(value, model.state_dict()[name])


def test_loading_undoes_steps() -> None:
    networks = Ensemble((3, 4, 2), (0, 1))
    before = [networks.state(k) for k in range(2)]
    networks.step(torch.rand(2, 5, 3), torch.rand(2, 5, 2), 1.0)
    for k in range(2):
        networks.load(k, before[k])
        assert all(torch.equal(before[k][name], v) for name, v in networks.state(k).items())


def test_a_stream_goes_on_where_its_state_was_taken() -> None:
    first, second = BatchStream(10, 4, (0, 1)), BatchStream(10, 4, (0, 1))
    for _ in range(3):
        first.next()
    second.load(first.state())
    for _ in range(7):
        assert torch.equal(first.next(), second.next())


def test_relative_flatness_is_that_of_the_explicit_hessian() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    x, y = torch.randn(6, 5).double(), torch.randn(6, 3).double()
    z, w = model[:2](x).detach(), model[2].weight.detach()

    def loss(weight: torch.Tensor) -> torch.Tensor:
        return nn.functional.mse_loss(nn.functional.linear(z, weight, model[2].bias.detach()), y)

    hessian = torch.func.hessian(loss)(w)  # [3, 4, 3, 4]
    expected = torch.einsum("ik,jk,iljl->", w, w, hessian)
    assert relative_flatness(model, x) == pytest.approx(float(expected), rel=1e-10)
    assert math.isnan(relative_flatness(nn.Sequential(nn.Tanh()), x))


def test_misclassified_samples_are_those() -> None:
    class Fixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    x = torch.eye(10).repeat(3, 1)
    labels = torch.arange(10).repeat(3)
    labels[[2, 13, 27]] = torch.tensor([5, 5, 5])
    wrong = misclassified(Fixed(), Samples(x, labels), 10)
    assert torch.equal(wrong.x, x[[2, 13, 27]])
    assert len(misclassified(Fixed(), Samples(x, labels), 2)) == 2
    assert len(misclassified(Fixed(), Samples(x, torch.arange(10).repeat(3)), 2)) == 0
