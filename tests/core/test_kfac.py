"""fk.kfac: where it is exact, against factors from explicit activations and gradients, and its algebra."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flatkern as fk
from flatkern.kronecker_blocks import DenseBlock, DiagonalBlock, KroneckerBlock
from tests.core.networks import NAMES, RULE_NAMES, networks, rule_networks
from tests.core.test_ggn_spectrum import LOSSES, explicit_ggn, target

CE = nn.CrossEntropyLoss()


def block_diagonal(matrix, model, groups):
    """The matrix with everything between groups of parameters set to zero."""
    layout, out = fk.operators.base.Layout(dict(model.named_parameters())), torch.zeros_like(matrix)
    for names in groups:
        index = torch.cat([torch.arange(layout.slices[n].start, layout.slices[n].stop) for n in names])
        out[index[:, None], index] = matrix[index[:, None], index]
    return out


def test_exact_for_one_sample_of_any_loss():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double(), torch.randn(1, 4).double()
    for loss_fn, y in ((CE, torch.tensor([1])), (nn.MSELoss(), torch.randn(1, 3).double())):
        matrix = explicit_ggn(model, loss_fn, x, y)
        want = block_diagonal(matrix, model, [("0.weight", "0.bias"), ("2.weight", "2.bias")])
        torch.testing.assert_close(fk.kfac(model, loss_fn, (x, y)).to_dense(), want)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_exact_for_deep_linear_networks(bias, reduction):
    torch.manual_seed(0)
    layers = [nn.Linear(a, b, bias=bias) for a, b in ((4, 6), (6, 5), (5, 3))]
    model, x = nn.Sequential(*layers).double(), torch.randn(9, 4).double()
    y, loss_fn = torch.randn(9, 3).double(), nn.MSELoss(reduction=reduction)
    matrix = explicit_ggn(model, loss_fn, x, y)
    groups = [tuple(n for n, _ in model.named_parameters() if n.startswith(f"{i}.")) for i in range(3)]
    want = block_diagonal(matrix, model, groups)
    loader = [(x[:4], y[:4]), (x[4:], y[4:])]
    for approx in ("expand", "reduce"):
        torch.testing.assert_close(fk.kfac(model, loss_fn, loader, approx=approx).to_dense(), want)


def test_expand_is_exact_for_linear_networks_with_a_loss_a_position():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()
    x, y = torch.randn(4, 5, 3).double(), torch.randn(4, 5, 2).double()
    matrix = explicit_ggn(model, nn.MSELoss(), x, y)
    want = block_diagonal(matrix, model, [("0.weight", "0.bias"), ("1.weight", "1.bias")])
    torch.testing.assert_close(fk.kfac(model, nn.MSELoss(), (x, y)).to_dense(), want)
    assert float((fk.kfac(model, nn.MSELoss(), (x, y), approx="reduce").to_dense() - want).abs().max()) > 1e-3


class Pooled(nn.Module):
    """Linear layers at every position, then their mean."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.a(x)).mean(1)


def test_reduce_is_exact_for_linear_networks_that_average_positions():
    torch.manual_seed(0)
    model = Pooled().double()
    x, y = torch.randn(4, 5, 3).double(), torch.randn(4, 2).double()
    matrix = explicit_ggn(model, nn.MSELoss(), x, y)
    want = block_diagonal(matrix, model, [("a.weight", "a.bias"), ("b.weight", "b.bias")])
    torch.testing.assert_close(fk.kfac(model, nn.MSELoss(), (x, y), approx="reduce").to_dense(), want)
    assert float((fk.kfac(model, nn.MSELoss(), (x, y)).to_dense() - want).abs().max()) > 1e-3


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolution_factors_from_patches_and_gradients(approx, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=groups)
    model = nn.Sequential(conv, nn.Tanh(), nn.Flatten(), nn.Linear(6 * 9, 3)).double()
    x, y = torch.randn(5, 4, 5, 5).double(), torch.tensor([0, 1, 2, 1, 0])
    a = F.unfold(x, 3, stride=2, padding=1).reshape(5, groups, -1, 9).mT  # [n, G, T, d]
    a = torch.cat([a, torch.ones_like(a[..., :1])], -1)
    z = conv(x).detach()
    p = model(x).softmax(1).detach()
    g = []
    for i in range(5):  # (1/n) (diag p − p pᵀ) = E (e_c − p)(e_c − p)ᵀ over the classes c
        for c in range(3):
            zi = z[i : i + 1].clone().requires_grad_()
            root = (p[i, c] / 5).sqrt() * (F.one_hot(torch.tensor(c), 3) - p[i])
            (found,) = torch.autograd.grad((model[1:](zi) * root).sum(), zi)
            g.append(found[0].reshape(groups, 6 // groups, 9).mT)
    g = torch.stack(g)  # [n C, G, T, d]
    if approx == "reduce":
        a, g = a.mean(2, keepdim=True), g.sum(2, keepdim=True)
    inputs = torch.einsum("ngti,ngtj->gij", a, a) / (a.shape[0] * a.shape[2])
    outputs = torch.einsum("ngti,ngtj->gij", g, g)
    got = fk.kfac(model, CE, (x, y), approx=approx)
    block = got.blocks[0]
    assert isinstance(block, KroneckerBlock)
    assert block.names == ("0.weight", "0.bias")
    torch.testing.assert_close(block.input_factor, inputs)
    torch.testing.assert_close(block.output_factor, outputs)
    dense = torch.cat([torch.kron(outputs[i], inputs[i])[None] for i in range(groups)])
    d_in, d_out = a.shape[-1] - 1, 6 // groups
    v = torch.randn(6 * d_in).double()  # a weight in its own order against the Kronecker products
    m = torch.cat([v.reshape(groups, d_out, d_in), torch.zeros(groups, d_out, 1).double()], -1)
    want = (dense @ m.flatten(1).unsqueeze(-1)).reshape(groups, d_out, d_in + 1)
    full = torch.cat([v, torch.zeros(got.shape[0] - len(v)).double()])
    image = got @ full
    torch.testing.assert_close(image[: len(v)], want[..., :-1].flatten())
    torch.testing.assert_close(image[len(v) : len(v) + 6], want[..., -1].flatten())


@pytest.mark.parametrize("name", NAMES + RULE_NAMES)
def test_every_parameter_has_a_block_and_others_are_exact(name):
    model, x = {**networks(), **rule_networks()}[name]
    y = torch.rand_like(model(x.clone()).detach())
    matrix = explicit_ggn(model, nn.MSELoss(), x, y)
    got = fk.kfac(model, nn.MSELoss(), (x, y), max_block=40)
    dense = got.to_dense()
    torch.testing.assert_close(dense, dense.mT)
    assert float(torch.linalg.eigvalsh(dense).min()) > -1e-10 * (1 + float(dense.abs().max()))
    torch.testing.assert_close(
        torch.linalg.eigvalsh(dense).flip(0), got.eigenvalues, rtol=1e-7, atol=1e-10 * (1 + got.trace)
    )
    assert got.trace == pytest.approx(float(dense.trace()), rel=1e-9, abs=1e-12)
    assert {n for block in got.blocks for n in block.names} == set(got.layout.names)
    factored = {n for b in got.blocks if isinstance(b, KroneckerBlock) for n in b.names}
    assert factored | set(got.others) == set(got.layout.names)
    assert not factored & set(got.others)
    for parameter, what in got.others.items():
        place = got.layout.slices[parameter]
        exact = matrix[place, place] if what == "exact block" else matrix[place, place].diagonal().diag()
        torch.testing.assert_close(dense[place, place], exact, rtol=1e-9, atol=1e-12)
        assert any(parameter in note for note in got.notes)


@pytest.mark.parametrize(
    "name", ["mlp tanh", "vgg", "attention", "cross attention", "lstm", "conv1d groups dilation"]
)
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_loaders_and_little_memory_give_the_same(name, approx):
    model, x = {**networks(), **rule_networks()}[name]
    y = torch.rand_like(model(x.clone()).detach())
    whole = fk.kfac(model, nn.MSELoss(), (x, y), approx=approx)
    loader = [(x[:1], y[:1]), (x[1:], y[1:])]
    for data, memory in ((loader, None), ((x, y), 20_000)):
        parts = fk.kfac(model, nn.MSELoss(), data, approx=approx, max_memory=memory)
        assert parts.others == whole.others
        torch.testing.assert_close(parts.to_dense(), whole.to_dense())
    assert whole.loss == pytest.approx(float(F.mse_loss(model(x.clone()), y).detach()))


@pytest.mark.parametrize("name", ["mlp tanh", "vgg", "attention", "cross attention", "lstm", "gpt tied"])
def test_projections_tied_weights_and_splits_have_factors(name):
    model, x = {**networks(), **rule_networks()}[name]
    y = torch.rand_like(model(x.clone()).detach())
    got = fk.kfac(model, nn.MSELoss(), (x, y), max_block=0)
    factored = {n for b in got.blocks if isinstance(b, KroneckerBlock) for n in b.names}
    wanted = {
        "mlp tanh": {"0.weight", "0.bias", "4.weight"},
        "vgg": {"0.weight", "0.bias", "3.weight", "6.bias"},
        "attention": {"encoder.self_attn.in_proj_weight", "encoder.linear1.weight", "head.bias"},
        "cross attention": {"attention.in_proj_weight", "attention.in_proj_bias", "head.weight"},
        "lstm": {"layer.weight_ih_l0", "layer.bias_ih_l0", "layer.weight_hh_l0", "layer.bias_hh_l0"},
        "gpt tied": {"up.weight", "down.weight", "qkv"},
    }[name]
    assert wanted <= factored, wanted - factored


@pytest.mark.parametrize("loss", list(LOSSES))
def test_all_losses_on_one_sample_at_a_time(loss):
    """Sums over samples of exact one-sample blocks bound what factors of a single sample must give."""
    model, x = networks()["mlp tanh"]
    loss_fn = LOSSES[loss]
    y = target(loss_fn, model, x)
    reduction = None if isinstance(loss_fn, nn.Module) else "sum"
    i = len(x) - 1
    matrix = explicit_ggn(model, loss_fn, x[i:], y[i:])
    groups = [(f"{j}.weight", f"{j}.bias") for j in (0, 2, 4)]
    got = fk.kfac(model, loss_fn, (x[i:], y[i:]), reduction=reduction)
    torch.testing.assert_close(got.to_dense(), block_diagonal(matrix, model, groups))


def test_solve_inverse_and_determinant():
    model, x = {**networks(), **rule_networks()}["class token"]
    y = torch.randint(3, (len(x),))
    k = fk.kfac(model, CE, (x, y), max_block=20)
    assert {type(b) for b in k.blocks} == {KroneckerBlock, DenseBlock, DiagonalBlock}
    dense, delta = k.to_dense(), 0.3
    shifted = dense + delta * torch.eye(len(dense)).double()
    b = torch.randn(len(dense), 3).double()
    torch.testing.assert_close(k.solve(b, delta), torch.linalg.solve(shifted, b))
    torch.testing.assert_close(k.inverse(delta).to_dense() @ shifted, torch.eye(len(dense)).double())
    root = k.inverse_root(delta).to_dense()
    torch.testing.assert_close(root @ shifted @ root, torch.eye(len(dense)).double())
    assert k.logdet(delta) == pytest.approx(float(torch.logdet(shifted)))
    assert k.logdet() == -float("inf")
    torch.testing.assert_close(k.T @ b, dense @ b)
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="delta"):
            k.logdet(wrong)
    with pytest.raises(ValueError, match="delta"):
        k.solve(b, 0.0)


def test_sampled_factors_are_unbiased_and_float32_keeps_its_dtype():
    model, x = networks()["mlp tanh"]
    y = torch.randint(3, (len(x),))
    exact = fk.kfac(model, CE, (x, y)).to_dense()
    draws = torch.stack(
        [fk.kfac(model, CE, (x, y), fisher="mc", samples=10, seed=s).to_dense() for s in range(40)]
    )
    error = draws.std(0) / len(draws) ** 0.5
    kept = error > 1e-9 * error.max()
    scores = ((draws.mean(0) - exact) / error)[kept]
    assert 0.5 < float(scores.square().mean().sqrt()) < 1.5
    empirical = fk.kfac(model, CE, (x, y), fisher="empirical")
    assert float((empirical.to_dense() - exact).abs().max()) > 1e-3
    single = fk.kfac(model.float(), CE, (x.float(), y))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.to_dense().double(), exact, rtol=1e-3, atol=1e-5)


def test_bad_arguments():
    model, data = nn.Linear(3, 2), (torch.randn(4, 3), torch.arange(4) % 2)
    for settings in ({"approx": "both"}, {"fisher": "no"}, {"max_block": -1}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            fk.kfac(model, CE, data, **settings)


@pytest.mark.peers
@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("name", ["mlp tanh", "mlp relu no bias", "vgg"])
def test_curvlinops_agrees(name, approx):
    curvlinops = pytest.importorskip("curvlinops")
    model, x = networks()[name]
    y = torch.randint(3, (len(x),))
    chosen = dict(model.named_parameters())
    settings = {"fisher_type": curvlinops.FisherType.TYPE2, "kfac_approx": approx}
    settings |= {"check_deterministic": False, "separate_weight_and_bias": False}
    peer = curvlinops.KFACLinearOperator(model, CE, list(chosen.values()), [(x, y)], **settings)
    size = sum(p.numel() for p in chosen.values())
    theirs = (peer @ torch.eye(size, dtype=torch.float64)).detach()
    torch.testing.assert_close(
        fk.kfac(model, CE, (x, y), approx=approx).to_dense(), theirs, rtol=1e-6, atol=1e-9
    )
