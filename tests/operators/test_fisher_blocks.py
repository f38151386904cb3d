"""Fisher matrices, single products and blocks, against explicit matrices."""

import pytest
import torch
from explicit import assert_close, explicit_ggn, explicit_hessian, make
from test_curvature_exact import class_targets, dense_targets, ragged, some_ignored
from torch import nn

from flatkern.losses import TokenCrossEntropyLoss
from flatkern.operators import as_operator, fisher, ggn, hessian, hvp

W = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)
CE = nn.CrossEntropyLoss()


def per_sample_gradients(model, loss, x, y):
    """Gradients of the summed loss, one sample at a time."""
    rows = []
    for i in range(len(x)):
        grads = torch.autograd.grad(loss(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("loss", "summed", "targets", "entries"),
    [
        (CE, nn.CrossEntropyLoss(reduction="sum"), class_targets, 1),
        (nn.MSELoss(), nn.MSELoss(reduction="sum"), dense_targets, 3),
        (nn.HuberLoss(delta=0.3), nn.HuberLoss(delta=0.3, reduction="sum"), dense_targets, 3),
    ],
    ids=["ce", "mse", "huber"],
)
def test_empirical_fisher(loss, summed, targets, entries):
    model, x = make("mlp tanh", 13)
    y = targets(13)
    rows = per_sample_gradients(model, summed, x, y)
    expected = rows.T @ rows / (13 * entries)
    for options in ({}, {"max_memory": 0}):
        op = fisher(model, loss, ragged(x, y), kind="empirical", **options)
        assert_close(op.to_dense(), expected)
    ce = fisher(model, lambda o, t: loss(o, t), ragged(x, y), kind="empirical", reduction="mean")
    assert_close(ce.to_dense() * ce.denominator, rows.T @ rows / entries**2)


def test_empirical_fisher_squares_class_weights():
    model, x = make("mlp tanh", 9)
    y = some_ignored(9)
    rows = per_sample_gradients(model, nn.CrossEntropyLoss(weight=W, reduction="sum"), x, y)
    op = fisher(model, nn.CrossEntropyLoss(weight=W), (x, y), kind="empirical")
    assert_close(op.to_dense(), rows.T @ rows / W[y[y >= 0]].sum())


@pytest.mark.parametrize(
    ("loss", "targets"),
    [
        (nn.CrossEntropyLoss(weight=W, label_smoothing=0.1), some_ignored),
        (nn.MSELoss(), dense_targets),
        (nn.BCEWithLogitsLoss(pos_weight=W), dense_targets),
    ],
    ids=["ce", "mse", "bce"],
)
def test_sampled_fisher_tends_to_the_ggn_and_is_one_fixed_matrix(loss, targets):
    model, x = make("mlp tanh", 8)
    y = targets(8)
    expected = explicit_ggn(model, loss, x, y)
    op = fisher(model, loss, ragged(x, y), seed=3, samples=2000)
    dense = op.to_dense()
    assert (dense - expected).norm() < 0.1 * expected.norm()
    assert torch.linalg.eigvalsh(dense).min() > -1e-12
    again = fisher(model, loss, ragged(x, y), seed=3, samples=2000, max_memory=0)
    assert_close(again.to_dense(), dense, 1e-12)
    other = fisher(model, loss, ragged(x, y), seed=4)
    assert not torch.allclose(other.to_dense(), fisher(model, loss, ragged(x, y), seed=5).to_dense())
    assert torch.equal(op.refresh().to_dense(), dense)


def test_one_draw_is_an_outer_product_of_gradients_at_drawn_labels():
    model, x = make("mlp tanh", 1)
    dense = fisher(model, CE, (x, torch.tensor([1])), seed=0).to_dense()
    candidates = [
        per_sample_gradients(model, nn.CrossEntropyLoss(reduction="sum"), x, torch.tensor([c]))
        for c in range(3)
    ]
    assert any(torch.allclose(dense, g.T @ g, atol=1e-14) for g in candidates)


def test_nll_has_the_fisher_of_the_logits_and_no_gauss_newton():
    model, x = make("mlp tanh", 8)
    y = class_targets(8)
    whole = nn.Sequential(model, nn.LogSoftmax(1))
    expected = explicit_ggn(model, CE, x, y)
    op = fisher(whole, nn.NLLLoss(), (x, y), samples=4000)
    assert (op.to_dense() - expected).norm() < 0.1 * expected.norm()
    assert_close(hessian(whole, nn.NLLLoss(), (x, y)).to_dense(), explicit_hessian(model, CE, x, y))
    with pytest.raises(ValueError, match="CrossEntropyLoss"):
        ggn(whole, nn.NLLLoss(), (x, y))


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(6, 3), nn.Linear(3, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.table(x).cumsum(1)))


def test_token_level_cross_entropy():
    torch.manual_seed(0)
    model, x = Tokens().double(), torch.randint(0, 6, (7, 5))
    y = torch.randint(0, 4, (7, 5))
    y[0, 3:] = y[4, 1:] = -100
    loss = TokenCrossEntropyLoss()
    swapped = lambda o, t: CE(o.movedim(-1, 1), t)  # noqa: E731
    for build, explicit in ((hessian, explicit_hessian), (ggn, explicit_ggn)):
        op = build(model, loss, ragged(x, y, 3))
        assert op.denominator == (y >= 0).sum()
        assert_close(op.to_dense(), explicit(model, swapped, x, y))
    drawn = fisher(model, loss, (x, y), samples=4000).to_dense()
    expected = explicit_ggn(model, swapped, x, y)
    assert (drawn - expected).norm() < 0.1 * expected.norm()
    with pytest.raises(ValueError, match="TokenCrossEntropyLoss"):
        hessian(model, CE, (x, y))


@pytest.mark.parametrize("loss", [nn.HuberLoss(delta=0.4), nn.SmoothL1Loss(beta=0.3)], ids=["huber", "l1"])
@pytest.mark.parametrize(("build", "explicit"), [(hessian, explicit_hessian), (ggn, explicit_ggn)])
def test_huber(loss, build, explicit):
    model, x = make("mlp tanh", 11)
    y = dense_targets(11)
    assert_close(build(model, loss, ragged(x, y)).to_dense(), explicit(model, loss, x, y))


@pytest.mark.parametrize("build", [hessian, ggn, fisher])
def test_a_callable_with_the_wrong_reduction_is_refused(build):
    model, x = make("mlp tanh", 6)
    options = {"kind": "empirical"} if build is fisher else {}
    with pytest.raises(ValueError, match="pass reduction='sum'"):
        build(model, lambda o, t: (o - t).square().sum(), (x, dense_targets(6)), reduction="mean", **options)


def test_hvp():
    model, x = make("mlp tanh", 11)
    y = class_targets(11)
    loss = nn.CrossEntropyLoss(weight=W)
    exact = explicit_hessian(model, loss, x, y)
    v = torch.randn(len(exact), 3, dtype=torch.float64)
    assert_close(hvp(model, loss, ragged(x, y), v), exact @ v)
    assert_close(hvp(model, loss, ragged(x, y), v[:, 0]), exact @ v[:, 0])
    with torch.no_grad():
        part = hvp(model, loss, (x, y), v[:24, 0], params="0.weight")
    assert_close(part, exact[:24, :24] @ v[:24, 0])
    for wrong, error in ((v[:3], ValueError), (v.float(), TypeError), (None, TypeError)):
        with pytest.raises(error, match="v:"):
            hvp(model, loss, (x, y), wrong)


@pytest.mark.parametrize("build", [hessian, ggn])
@pytest.mark.parametrize("max_memory", [None, 0])
def test_blocks(build, max_memory):
    model, x = make("mlp tanh", 11)
    data = ragged(x, class_targets(11))
    op = build(model, CE, data, max_memory=max_memory)
    dense = op.to_dense()
    for names in ("0.*", ["2.bias", "0.weight"], "*.bias"):
        block = op.block(names)
        index = torch.cat([torch.arange(len(dense))[op.layout.slices[n]] for n in block.names])
        expected = dense[index][:, index]
        assert_close(block.to_dense(), expected)
        assert block.T is block
        assert_close(build(model, CE, data, params=names).to_dense(), expected)
        assert_close((2 * op + op.eye()).block(names).to_dense(), 2 * expected + torch.eye(len(index)))
        assert_close((op @ op).block(names).to_dense(), (dense @ dense)[index][:, index])
    assert_close(op.block("0.*").block("0.bias").to_dense(), op.block("0.bias").to_dense())


def test_block_diagonals():
    model, x = make("mlp tanh", 11)
    op = hessian(model, CE, (x, class_targets(11)))
    dense = op.to_dense()
    layers = op.block_diagonal()
    assert list(layers.blocks) == ["0", "2"]
    first = layers.blocks["0"].shape[0]
    expected = dense.clone()
    expected[:first, first:] = expected[first:, :first] = 0
    assert_close(layers.to_dense(), expected)
    assert layers.layout is op.layout
    biases = op.block_diagonal({"b": "*.bias"}).to_dense()
    kept = torch.zeros(len(dense), dtype=torch.bool)
    for name in ("0.bias", "2.bias"):
        kept[op.layout.slices[name]] = True
    assert_close(biases, dense * kept[:, None] * kept)
    product = (op @ op).block_diagonal()
    assert_close(product.T.to_dense(), product.to_dense().T)
    for call, text in (
        (lambda: op.block("nothing"), "names"),
        (lambda: op.block([]), "names"),
        (lambda: op.block_diagonal({"a": "0.*", "b": "*.bias"}), "groups"),
        (lambda: as_operator(torch.eye(3)).block("a"), "layout"),
        (lambda: as_operator(torch.eye(3)).block_diagonal(), "layout"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_bad_fisher_arguments_are_named():
    model, x = make("mlp tanh", 6)
    for loss, options, text in (
        (CE, {"kind": "exact"}, "kind"),
        (CE, {"seed": -1}, "seed"),
        (CE, {"samples": 0}, "samples"),
        (CE, {"kind": "empirical", "samples": 2}, "samples"),
        (nn.HuberLoss(), {}, "empirical"),
    ):
        with pytest.raises(ValueError, match=text):
            fisher(model, loss, (x, class_targets(6)), **options)
