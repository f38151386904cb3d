"""Batch norm with batch statistics and dropout, where asked for: one fixed function of θ, and nothing else changes."""

import pytest
import torch
from explicit import assert_close, explicit_ggn, explicit_hessian, vectors
from test_curvature_exact import class_targets, ragged
from torch import nn

from flatkern.operators import StaleOperatorError, fisher, ggn, hessian, hvp, jacobian

CE = nn.CrossEntropyLoss()
SUM = nn.CrossEntropyLoss(reduction="sum")
WAYS = {
    "kept": {},
    "rebuilt": {"mode": "rebuilt"},
    "forward": {"mode": "forward"},
    "blocks": {"block_size": 4},
}


def normalized():
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3), nn.BatchNorm1d(3, affine=False)
    ).double()


def masked():
    torch.manual_seed(2)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 3)).double()


class Mask(nn.Module):
    """A dropout layer's mask, batch after batch, as a constant."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def forward(self, x):
        return x * self.mask


def data():
    return ragged(vectors(11), class_targets(11))


@pytest.mark.parametrize("way", WAYS)
def test_batch_statistics_are_differentiated_through(way):
    torch.manual_seed(0)
    batches, model = data(), normalized()
    op = hessian(model, CE, batches, train_mode=True, **WAYS[way])
    expected = sum(explicit_hessian(normalized(), SUM, x, y) for x, y in batches) / 11
    assert_close(op.to_dense(), expected)
    assert_close(hvp(model, CE, batches, expected[:, 0].clone(), train_mode=True), expected @ expected[:, 0])


@pytest.mark.parametrize("max_memory", [None, 0])
def test_the_gauss_newton_matrix_with_batch_statistics(max_memory):
    torch.manual_seed(0)
    batches, model = data(), normalized()
    op = ggn(model, CE, batches, train_mode=True, max_memory=max_memory)
    assert_close(op.to_dense(), sum(explicit_ggn(normalized(), SUM, x, y) for x, y in batches) / 11)


@pytest.mark.parametrize("way", WAYS)
def test_masks_are_fixed_by_the_seed(way):
    torch.manual_seed(0)
    batches, model = data(), masked()
    masks = []
    with model[2].register_forward_hook(lambda _m, args, out: masks.append((out / args[0]).detach())):
        hessian(model, CE, batches, train_mode=True, seed=5, check_determinism=False)
    assert len(masks) == len(batches)
    assert any(not m.all() for m in masks)
    expected = torch.zeros(())
    for (x, y), mask in zip(batches, masks, strict=True):
        fixed = masked()
        fixed[2] = Mask(mask)
        expected = expected + explicit_hessian(fixed, SUM, x, y) / 11
    op = hessian(model, CE, batches, train_mode=True, seed=5, **WAYS[way])
    assert_close(op.to_dense(), expected)
    assert_close(op.refresh().to_dense(), expected)
    other = hessian(model, CE, batches, train_mode=True, seed=6, **WAYS[way]).to_dense()
    assert (other - expected).norm() > 1e-3 * expected.norm()


def test_dropout_inside_recurrent_layers_and_attention():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(2, 3, num_layers=2, dropout=0.5, batch_first=True)
            self.mix = nn.TransformerEncoderLayer(3, 1, 4, dropout=0.3, batch_first=True)

        def forward(self, x):
            return self.mix(self.rnn(x.unflatten(1, (2, 2)))[0])[:, -1]

    torch.manual_seed(0)
    model, batches = Recurrent().double(), data()
    with pytest.raises(ValueError, match="eval"):
        hessian(model, CE, batches)
    op = hessian(model, CE, batches, train_mode=True)
    v = torch.randn(op.shape[0], 2, dtype=torch.float64)
    image = op @ v
    assert_close(hessian(model, CE, batches, train_mode=True, max_memory=0) @ v, image)
    assert_close(v.mT @ image, image.mT @ v)


@pytest.mark.parametrize("way", ["kept", "rebuilt", "forward"])
@pytest.mark.parametrize("make", [normalized, masked])
def test_nothing_is_changed(make, way):
    model, batches = make(), data()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    op = hessian(model, CE, batches, train_mode=True, **WAYS[way])
    op @ torch.ones(op.shape[0], dtype=torch.float64)
    jacobian(model, batches[0][0], train_mode=True)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(m.training for m in model.modules())
    assert all(m.track_running_stats for m in model if isinstance(m, nn.BatchNorm1d))
    assert torch.equal(state, torch.get_rng_state())


def test_the_other_operators():
    torch.manual_seed(0)
    x, y = vectors(6), class_targets(6)
    model, output = normalized(), normalized()(x)
    J = jacobian(model, x, train_mode=True)
    F = fisher(model, CE, (x, y), kind="empirical", train_mode=True)
    rows = torch.func.vmap(torch.func.grad(lambda f, t: nn.functional.cross_entropy(f, t)))(output, y)
    gradients = torch.stack(
        [J.T @ (torch.eye(6).double()[i, :, None] * rows[i]).reshape(-1) for i in range(6)]
    )
    assert_close(F.to_dense(), gradients.mT @ gradients / 6)
    assert_close(ggn(model, CE, (x, y), train_mode=True).to_dense(), explicit_ggn(normalized(), CE, x, y))


def test_what_is_not_asked_for_is_refused():
    x, y = vectors(6), class_targets(6)
    for model in (normalized(), masked()):
        for build in (hessian, ggn, fisher):
            with pytest.raises(ValueError, match=r"model\.eval\(\)"):
                build(model, CE, (x, y))
    without = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3, track_running_stats=False)).double().eval()
    with pytest.raises(ValueError, match="running statistics"):
        hessian(without, CE, (x, y))
    assert_close(
        hessian(without, CE, (x, y), train_mode=True).to_dense(), explicit_hessian(without, CE, x, y)
    )
    with pytest.raises(ValueError, match="train_mode"):
        jacobian(normalized(), x, wrt="input", train_mode=True)
    with pytest.raises(TypeError, match="train_mode"):
        hessian(normalized(), CE, (x, y), train_mode="yes")
    with pytest.raises(ValueError, match="seed"):
        hessian(normalized(), CE, (x, y), train_mode=True, seed=-1)


def test_a_switch_between_modes_is_noticed_where_batches_are_rebuilt():
    x, y = vectors(6), class_targets(6)
    model = normalized().eval()
    kept, rebuilt = hessian(model, CE, (x, y)), hessian(model, CE, (x, y), max_memory=0)
    v = torch.ones(kept.shape[0], dtype=torch.float64)
    expected = kept @ v
    model.train()
    assert_close(kept @ v, expected)
    with pytest.raises(StaleOperatorError, match="mode"):
        rebuilt @ v
    model.eval()
    assert_close(rebuilt @ v, expected)
