"""Operators are recognised in another process by what determines their products, and round alike there."""

import numpy as np
import pytest
import torch
from explicit import make
from test_curvature_exact import class_targets
from torch import nn

from flatkern.operators import as_operator, fisher, ggn, hessian, jacobian

CE = nn.CrossEntropyLoss()


def case():
    model, x = make("mlp tanh", 8)
    return model, x, class_targets(8)


def builders():
    return {
        "hessian": lambda m, x, y: hessian(m, CE, (x, y)),
        "ggn": lambda m, x, y: ggn(m, CE, (x, y)),
        "fisher": lambda m, x, y: fisher(m, CE, (x, y), seed=3),
        "jacobian": lambda m, x, y: jacobian(m, x),
        "shifted": lambda m, x, y: hessian(m, CE, (x, y)).shift(0.5),
        "block": lambda m, x, y: hessian(m, CE, (x, y)).block("0.*"),
        "block diagonal": lambda m, x, y: hessian(m, CE, (x, y)).block_diagonal(),
        "product": lambda m, x, y: jacobian(m, x).T @ jacobian(m, x),
    }


@pytest.mark.parametrize("name", builders())
def test_the_same_again_has_the_same_identity_and_another_model_another(name):
    build = builders()[name]
    model, x, y = case()
    identity = build(model, x, y)._identity()
    assert identity is not None
    assert identity == build(*case())._identity()
    with torch.no_grad():
        model[0].weight[3, 1] += 1e-12
    assert identity != build(model, x, y)._identity()
    model, x, y = case()
    x = x.clone()
    x[0, 0] += 1e-6
    assert identity != build(model, x, y)._identity()


def test_what_else_makes_another_operator():
    model, x, y = case()
    weight = torch.tensor([1.0, 2.0, 3.0]).double()
    kinds = [
        hessian(model, CE, (x, y)),
        ggn(model, CE, (x, y)),
        hessian(model, CE, (x, y), params="0.*"),
        hessian(model, CE, (x, (y + 1) % 3)),
        hessian(model, CE, [(x[:4], y[:4]), (x[4:], y[4:])]),
        hessian(model, nn.CrossEntropyLoss(label_smoothing=0.1), (x, y)),
        hessian(model, nn.CrossEntropyLoss(weight=weight), (x, y)),
        hessian(model, nn.CrossEntropyLoss(reduction="sum"), (x, y)),
        hessian(model, CE, (x, y)).shift(1.0),
        hessian(model, CE, (x, y)).shift(2.0),
        hessian(model, CE, (x, y)).block("0.*"),
        hessian(model, CE, (x, y)).block("2.*"),
        fisher(model, CE, (x, y), seed=1),
        fisher(model, CE, (x, y), seed=2),
        fisher(model, CE, (x, y), kind="empirical"),
    ]
    assert len({op._identity() for op in kinds}) == len(kinds)


def test_matrices_by_their_entries_and_unknown_objects_not_at_all():
    a = np.arange(9.0).reshape(3, 3)
    assert as_operator(a)._identity() == as_operator(a.copy())._identity()
    assert as_operator(a)._identity() != as_operator(a + 1)._identity()
    t = torch.from_numpy(a)
    assert as_operator(t)._identity() == as_operator(t.clone())._identity()
    assert as_operator(t.to_sparse())._identity() is not None

    class Unknown:
        shape, dtype = (3, 3), torch.float64

        def __matmul__(self, other):
            return t @ other

    assert as_operator(Unknown())._identity() is None
    assert as_operator(Unknown()).shift(1.0)._identity() is None


def test_an_engine_is_taken_over():
    model, x, y = case()
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    first = hessian(model, CE, data)
    V = torch.randn(first.shape[0], 5, dtype=torch.float64)
    expected = first @ V
    second = hessian(model, CE, data)
    second._use_engine(first._engine())
    assert second.info.block_size == first.info.block_size
    assert torch.equal(second @ V, expected)
    shifted = hessian(model, CE, data).shift(0.1)
    shifted._use_engine((first.shift(0.1))._engine())
    assert torch.equal(shifted @ V, first.shift(0.1) @ V)
    with pytest.raises(ValueError, match="max_memory"):
        hessian(model, CE, data, max_memory=0)._use_engine(first._engine())
