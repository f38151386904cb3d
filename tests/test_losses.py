"""Every loss's numerator, weight, product and root against torch's own losses and their autograd Hessians."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flatkern.losses import TokenCrossEntropyLoss, resolve_loss

W = torch.tensor([0.2, 1.0, 3.0, 0.7], dtype=torch.float64)


def outputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels(*shape, ignore=False, value=-100):
    y = torch.randint(0, 4, shape, generator=torch.Generator().manual_seed(1))
    return y.masked_fill(torch.arange(y.numel()).view(shape) % 3 == 0, value) if ignore else y


def shares(*shape, seed=1, normalized=True):
    t = torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return t / t.sum(1, keepdim=True) if normalized else t


CE = nn.CrossEntropyLoss
CASES = {
    "ce": (CE(), outputs(5, 4), labels(5)),
    "ce weights": (CE(weight=W), outputs(5, 4), labels(5)),
    "ce smoothing": (CE(label_smoothing=0.3), outputs(5, 4), labels(5)),
    "ce weights smoothing": (CE(weight=W, label_smoothing=0.3), outputs(5, 4), labels(5)),
    "ce ignore": (CE(), outputs(7, 4), labels(7, ignore=True)),
    "ce everything": (CE(weight=W, label_smoothing=0.2), outputs(7, 4), labels(7, ignore=True)),
    "ce ignore a class": (CE(weight=W, label_smoothing=0.2, ignore_index=2), outputs(7, 4), labels(7)),
    "ce other ignore index": (CE(ignore_index=-1), outputs(7, 4), labels(7, ignore=True, value=-1)),
    "ce zero weight": (CE(weight=torch.tensor([0.0, 1.0, 1.0, 0.0]).double()), outputs(6, 4), labels(6)),
    "ce two classes": (CE(), outputs(5, 2), labels(5) % 2),
    "ce one class": (CE(), outputs(5, 1), labels(5) * 0),
    "ce spatial": (CE(), outputs(2, 4, 3, 2), labels(2, 3, 2)),
    "ce spatial everything": (CE(weight=W, label_smoothing=0.2), outputs(2, 4, 5), labels(2, 5, ignore=True)),
    "ce probabilities": (CE(), outputs(5, 4), shares(5, 4)),
    "ce probabilities weights": (CE(weight=W, label_smoothing=0.2), outputs(5, 4), shares(5, 4)),
    "ce not summing to one": (
        CE(weight=W, label_smoothing=0.2),
        outputs(5, 4),
        shares(5, 4, normalized=False),
    ),
    "ce spatial probabilities": (CE(weight=W), outputs(2, 4, 3), shares(2, 4, 3)),
    "ce sum": (CE(weight=W, label_smoothing=0.1, reduction="sum"), outputs(5, 4), labels(5)),
    "mse": (nn.MSELoss(), outputs(5, 4), outputs(5, 4, seed=2)),
    "mse spatial": (nn.MSELoss(), outputs(2, 3, 4), outputs(2, 3, 4, seed=2)),
    "mse no class axis": (nn.MSELoss(), outputs(5), outputs(5, seed=2)),
    "mse sum": (nn.MSELoss(reduction="sum"), outputs(5, 4), outputs(5, 4, seed=2)),
    "bce": (nn.BCEWithLogitsLoss(), outputs(5, 4), shares(5, 4)),
    "bce weights": (nn.BCEWithLogitsLoss(weight=W, pos_weight=W.flip(0)), outputs(5, 4), shares(5, 4)),
    "huber": (nn.HuberLoss(delta=0.7), outputs(5, 4), outputs(5, 4, seed=2)),
    "smooth l1": (nn.SmoothL1Loss(beta=0.6, reduction="sum"), outputs(5, 4), outputs(5, 4, seed=2)),
    "tokens": (TokenCrossEntropyLoss(), outputs(2, 3, 4), labels(2, 3)),
    "tokens everything": (
        TokenCrossEntropyLoss(weight=W, label_smoothing=0.2),
        outputs(3, 5, 4),
        labels(3, 5, ignore=True),
    ),
    "tokens probabilities": (
        TokenCrossEntropyLoss(weight=W),
        outputs(2, 3, 4),
        shares(2, 4, 3).movedim(1, -1),
    ),
    "function": (F.cross_entropy, outputs(5, 4), labels(5)),
    "bce sum": (nn.BCEWithLogitsLoss(reduction="sum"), outputs(5), shares(5, 1)[:, 0]),
}


def true_hessian(loss_fn, f, y):
    return torch.autograd.functional.hessian(lambda t: loss_fn(t.view(f.shape), y), f.reshape(-1))


def blocks(matrix, n):
    """[nN, nN] → the diagonal blocks [n, N, N], having checked that the others are zero."""
    size = len(matrix) // n
    parts = matrix.view(n, size, n, size)
    index = torch.arange(n)
    diagonal = parts[index, :, index, :]
    assert torch.allclose(parts.square().sum(), diagonal.square().sum())
    return diagonal


@pytest.mark.parametrize("name", CASES)
def test_value_and_denominator(name):
    loss_fn, f, y = CASES[name]
    loss = resolve_loss(loss_fn)
    value = loss.numerator(f, y) / loss.denominator(loss.weight(f, y))
    assert torch.allclose(value, loss_fn(f, y), rtol=1e-13)
    # sums over batches of any size are those of one batch
    parts = [slice(0, 1), slice(1, None)]
    numerator = sum(loss.numerator(f[p], y[p]) for p in parts)
    weight = sum(loss.weight(f[p], y[p]) for p in parts)
    assert torch.allclose(numerator / loss.denominator(weight), loss_fn(f, y), rtol=1e-13)


@pytest.mark.parametrize("name", CASES)
def test_product_and_root_are_the_hessian(name):
    loss_fn, f, y = CASES[name]
    loss = resolve_loss(loss_fn)
    scale = loss.denominator(loss.weight(f, y))
    exact = true_hessian(loss_fn, f, y)
    units = torch.eye(f.numel(), dtype=f.dtype).view(-1, *f.shape)
    assert torch.allclose(loss.product(f, y, units).reshape(exact.shape) / scale, exact, atol=1e-15)
    v = outputs(*f.shape, seed=9)
    assert torch.allclose(loss.product(f, y, v).reshape(-1) / scale, exact @ v.reshape(-1), atol=1e-15)
    rows = loss.root(f, y).reshape(-1, len(f), f[0].numel())
    squared = torch.einsum("kna,knb->nab", rows, rows) / scale
    assert torch.allclose(squared, blocks(exact, len(f)), atol=1e-15)


def test_a_softmax_root_has_one_column_less_than_classes():
    assert resolve_loss(CE()).root(outputs(5, 4), labels(5)).shape == (3, 5, 4)
    assert resolve_loss(CE()).root(outputs(2, 4, 3), labels(2, 3)).shape == (9, 2, 4, 3)


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.floats(0, 80), st.integers(0, 999))
def test_float32_is_stable_at_extreme_logits(classes, spread, seed):
    g = torch.Generator().manual_seed(seed)
    f = (torch.randn(3, classes, generator=g) * spread).float()
    y = torch.zeros(3, dtype=torch.long)
    loss = resolve_loss(CE())
    p = f.double().softmax(1)
    others = (p[:, None, :] * (1 - torch.eye(classes, dtype=torch.float64))).sum(
        2
    )  # 1 − p without cancelling
    exact = -p[:, :, None] * p[:, None, :]
    exact.diagonal(dim1=1, dim2=2).copy_(p * others)
    rows = loss.root(f, y)
    assert torch.isfinite(rows).all()
    product = loss.product(f, y, torch.eye(classes)[:, None].expand(-1, 3, -1)).movedim(0, 2).double()
    squared = torch.einsum("kna,knb->nab", rows.double(), rows.double())
    # relative to each sample's own curvature, however small: p (1 − p) formed naively loses all of it
    scale = exact.diagonal(dim1=1, dim2=2).sum(1)
    for i in range(3):
        if scale[i] > 1e-30:
            limit = 1e-6 * max(10.0, spread) * scale[i]
            assert (squared[i] - exact[i]).abs().max() <= limit
            assert (product[i] - exact[i]).abs().max() <= limit


def test_product_and_root_agree_in_float32_at_a_logit_gap_of_25():
    f, y = torch.tensor([[25.0, 0.0, -3.0]]), torch.tensor([0])
    loss = resolve_loss(CE())
    exact = true_hessian(CE(), f.double(), y)
    exact[0, 0] = -exact[0, 1:].sum()
    rows = loss.root(f, y)[:, 0].double()
    assert torch.allclose(rows.T @ rows, exact, rtol=1e-5, atol=0)
    product = loss.product(f, y, torch.eye(3)[:, None])[:, 0].double()
    assert torch.allclose(product, exact, rtol=1e-5, atol=0)


def test_bce_in_float32_at_extreme_logits():
    f = torch.tensor([[40.0], [-40.0], [80.0]])
    loss = resolve_loss(nn.BCEWithLogitsLoss())
    exact = torch.exp(-f.double().abs())
    assert torch.allclose(loss.product(f, f * 0, torch.ones(3, 1)).double(), exact, rtol=1e-5, atol=1e-45)


def test_callables():
    def mean_loss(output, target):
        return F.smooth_l1_loss(output, target, reduction="sum") / len(output)

    f, y = outputs(6, 4), outputs(6, 4, seed=3)
    loss = resolve_loss(mean_loss, "mean")
    assert loss.name == "mean_loss"
    assert loss.product is None
    assert loss.root is None
    assert torch.allclose(loss.numerator(f, y) / loss.denominator(loss.weight(f, y)), mean_loss(f, y))
    assert float(loss.weight(f, y)) == 6
    summed = resolve_loss(lambda o, t: (o * t).sum(), "sum")
    assert summed.denominator(summed.weight(f, y)) == 1.0


@pytest.mark.parametrize("name", [n for n in CASES if n not in ("huber", "smooth l1")])
def test_sampled_gradients_have_the_hessian_as_their_second_moment(name):
    loss_fn, f, y = CASES[name]
    loss = resolve_loss(loss_fn)
    generator = torch.Generator().manual_seed(0)
    draws = 3000
    rows = torch.stack([loss.sampled(f, y, generator).reshape(-1) for _ in range(draws)])
    exact = true_hessian(loss_fn, f, y) * loss.denominator(loss.weight(f, y))
    assert (rows.T @ rows / draws - exact).norm() <= 0.1 * exact.norm() + 1e-12


def test_nll_is_cross_entropy_on_log_probabilities():
    logits, y = outputs(7, 4), labels(7, ignore=True)
    loss = resolve_loss(nn.NLLLoss(weight=W))
    f = logits.log_softmax(1)
    value = loss.numerator(f, y) / loss.denominator(loss.weight(f, y))
    assert torch.allclose(value, CE(weight=W)(logits, y))
    assert loss.product is None
    generator = torch.Generator().manual_seed(0)
    rows = torch.stack([loss.sampled(f, y, generator).reshape(-1) for _ in range(3000)])
    weights = (W[y.clamp(min=0)] * (y >= 0)).unsqueeze(1)
    assert torch.allclose((rows.T @ rows / 3000).diagonal().view(7, 4), weights * f.exp(), atol=0.12)


def test_a_callable_s_reduction_is_checked_on_two_halves():
    f, y = outputs(7, 4), labels(7)
    mean = resolve_loss(lambda o, t: F.cross_entropy(o, t), "mean")
    mean.check_reduction(f, y)
    resolve_loss(lambda o, t: F.cross_entropy(o, t, reduction="sum"), "sum").check_reduction(f, y)
    for said, other in (("sum", "mean"), ("mean", "sum")):
        wrong = resolve_loss(lambda o, t, r=other: F.cross_entropy(o, t, reduction=r), said)
        with pytest.raises(ValueError, match=f"pass reduction='{other}'"):
            wrong.check_reduction(f, y)
    for mixing in (lambda o, t: o.std(), lambda o, t: F.cross_entropy(o, t, weight=W)):
        with pytest.raises(ValueError, match=r"reduction: .*neither"):
            resolve_loss(mixing, "mean").check_reduction(f, y)


def test_a_subclass_with_its_own_forward_is_a_callable():
    class Doubled(nn.MSELoss):
        def forward(self, input, target):
            return 2 * super().forward(input, target)

    with pytest.raises(ValueError, match="reduction"):
        resolve_loss(Doubled())
    assert resolve_loss(Doubled(), "mean").callable


def test_bad_losses_and_targets_are_named():
    for call, error, text in (
        (lambda: resolve_loss(3), TypeError, "loss_fn"),
        (lambda: resolve_loss(lambda o, t: o.sum()), ValueError, "reduction"),
        (lambda: resolve_loss(CE(reduction="none")), ValueError, "reduction"),
        (lambda: resolve_loss(CE(), "sum"), ValueError, "contradicts"),
        (lambda: resolve_loss(lambda o, t: o, "sum").numerator(outputs(2, 2), None), ValueError, "scalar"),
        (lambda: resolve_loss(nn.MSELoss()).numerator(outputs(4, 1), outputs(4)), ValueError, "shape"),
        (
            lambda: resolve_loss(nn.BCEWithLogitsLoss()).numerator(outputs(4, 1), outputs(4)),
            ValueError,
            "shape",
        ),
        (lambda: resolve_loss(CE()).denominator(0.0), ValueError, "ignored"),
        (lambda: resolve_loss(CE()).numerator(outputs(2, 3, 4), labels(2, 3)), ValueError, "TokenCross"),
        (lambda: resolve_loss(CE()).numerator(outputs(4), labels(4)), ValueError, "loss_fn"),
        (lambda: TokenCrossEntropyLoss()(outputs(2, 3, 4), labels(2)), ValueError, "target"),
    ):
        with pytest.raises(error, match=text):
            call()
