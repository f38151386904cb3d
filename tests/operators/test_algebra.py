"""Operator algebra, adapters and export, against dense matrices."""

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch
from explicit import make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flatkern.operators import Identity, LinearOperator, as_operator, ggn, hessian


def dense(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


A, B, R = dense(5, 5), dense(5, 5, seed=1), dense(3, 5, seed=2)
opA, opB, opR = as_operator(A), as_operator(B), as_operator(R)
EYE = torch.eye(5, dtype=torch.float64)

CASES = {
    "sum": (opA + opB, A + B),
    "difference": (opA - opB, A - B),
    "negative": (-opA, -A),
    "multiple": (2.5 * opA, 2.5 * A),
    "numpy multiple": (np.float64(2.5) * opA, 2.5 * A),
    "tensor multiple": (opA * torch.tensor(2.5), 2.5 * A),
    "quotient": (opA / 4, A / 4),
    "product": (opR @ opA, R @ A),
    "shift": (opA.shift(-0.5), A - 0.5 * EYE),
    "eye": (opA + 0.25 * opA.eye(), A + 0.25 * EYE),
    "eye first": (opA.eye() + opA, A + EYE),
    "transpose": (opR.T, R.T),
    "transpose of a product": ((opR @ opA).T, (R @ A).T),
    "transpose of a sum": ((opA + 2 * opB).T, (A + 2 * B).T),
    "transpose twice": (opR.T.T, R),
    "gram": (opR.adjoint() @ opR, R.T @ R),
}


@pytest.mark.parametrize("name", CASES)
def test_algebra(name):
    op, expected = CASES[name]
    assert op.shape == expected.shape
    v, block = dense(op.shape[1], seed=3), dense(op.shape[1], 4, seed=4)
    assert torch.allclose(op @ v, expected @ v)
    assert torch.allclose(op @ block, expected @ block)
    assert torch.allclose(op.to_dense(block_size=2), expected)
    left = dense(op.shape[0], seed=5)
    assert torch.allclose(left @ op, left @ expected)
    assert torch.allclose(dense(2, op.shape[0]) @ op, dense(2, op.shape[0]) @ expected)


def test_what_is_ambiguous_or_does_not_fit_raises():
    for wrong in (
        lambda: opA + 1,
        lambda: 1.0 + opA,
        lambda: opA - 1,
        lambda: 2 - opA,
        lambda: opA + torch.tensor(1.0),
    ):
        with pytest.raises(TypeError, match="shift"):
            wrong()
    for wrong in (lambda: opA + opR, lambda: opR @ opR, lambda: opR.shift(1), lambda: opR.eye()):
        with pytest.raises(ValueError):
            wrong()
    for wrong in (
        lambda: opA + as_operator(A.float()),
        lambda: opA @ as_operator(A.float()),
        lambda: opA * opA,
        lambda: opA + A,
        lambda: opA.shift("1"),
        lambda: np.ones((2, 5)) @ opA,
    ):
        with pytest.raises(TypeError):
            wrong()
    with pytest.raises(ValueError, match="finite"):
        opA.shift(float("nan"))
    with pytest.raises(ValueError, match="max_size"):
        Identity(20_000, torch.float32).to_dense()
    with pytest.raises(NotImplementedError):
        LinearOperator((2, 2), torch.float32) @ torch.ones(2)


def test_symmetric_operators_are_their_own_transposes_and_keep_their_layout():
    model, x = make("mlp tanh")
    op = hessian(model, nn.MSELoss(), (x, torch.zeros(11, 3, dtype=torch.float64)))
    assert op.T is op
    shifted = 2 * op.shift(1e-3)
    assert shifted.T is shifted
    assert shifted.layout is op.layout
    pieces = op.layout.unflatten(shifted @ torch.ones(op.shape[0], dtype=torch.float64))
    assert {n: t.shape for n, t in pieces.items()} == {n: p.shape for n, p in model.named_parameters()}


class Bare:
    """The least an operator-like object has to have."""

    shape, dtype, device = (5, 5), torch.float64, torch.device("cpu")

    def __matmul__(self, v):
        return A @ v


@pytest.mark.parametrize(
    "obj",
    [
        A,
        A.to_sparse(),
        A.numpy(),
        scipy.sparse.csr_array(A.numpy()),
        scipy.sparse.linalg.aslinearoperator(A.numpy()),
        Bare(),
    ],
    ids=["tensor", "sparse tensor", "numpy", "scipy sparse", "scipy operator", "bare object"],
)
def test_adapters(obj):
    op = as_operator(obj)
    block = dense(5, 3)
    assert torch.allclose(op @ block, A @ block)
    assert torch.allclose(op @ block[:, 0], A @ block[:, 0])
    if not isinstance(obj, Bare):
        assert torch.allclose(op.T @ block, A.T @ block)
    assert as_operator(op) is op


def test_what_is_no_operator_is_refused():
    class Wrong(Bare):
        def __matmul__(self, v):
            return v[:2]

    with pytest.raises(ValueError, match="gave shape"):
        as_operator(Wrong()) @ torch.ones(5, dtype=torch.float64)
    for obj, error, text in (
        (3, TypeError, "shape"),
        (torch.ones(3), ValueError, "two dimensions"),
        (torch.ones(0, 0), ValueError, "empty"),
        (torch.ones(2, 2, dtype=torch.long), TypeError, "float32 or float64"),
        (np.ones((2, 2), dtype=int), TypeError, "float32 or float64"),
        ([[1.0]], TypeError, "shape"),
    ):
        with pytest.raises(error, match=text):
            as_operator(obj)
    with pytest.raises(NotImplementedError):
        as_operator(Bare()).T @ torch.ones(5, dtype=torch.float64)


def test_scipy_runs_on_it():
    model, x = make("mlp tanh")
    op = hessian(model, nn.CrossEntropyLoss(), (x, torch.arange(11) % 3))
    exact = torch.linalg.eigvalsh(op.to_dense())
    exported = op.to_scipy()
    assert exported.dtype == np.float64
    assert np.allclose(scipy.sparse.linalg.eigsh(exported, k=2, which="LA")[0], exact[-2:])
    assert np.allclose(opR.to_scipy().rmatvec(np.ones(3)), R.T @ torch.ones(3, dtype=torch.float64))
    assert np.allclose(opR.to_scipy() @ np.eye(5), R)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 1000), st.floats(-3, 3), st.floats(-3, 3))
def test_operators_are_linear_and_adjoint(rows, columns, seed, a, b):
    matrix = dense(rows, columns, seed=seed)
    op = a * as_operator(matrix) + b * as_operator(matrix.flip(0))
    u, v, w = dense(columns, seed=seed + 1), dense(columns, seed=seed + 2), dense(rows, seed=seed + 3)
    assert torch.allclose(op @ (2 * u - v), 2 * (op @ u) - op @ v, atol=1e-10)
    assert torch.allclose(w @ (op @ u), (op.T @ w) @ u, atol=1e-10)


def test_what_is_known_to_be_semidefinite():
    torch.manual_seed(0)
    model, x, y = torch.nn.Linear(3, 2), torch.randn(5, 3), torch.randint(0, 2, (5,))
    G = ggn(model, torch.nn.CrossEntropyLoss(), (x, y))
    H = hessian(model, torch.nn.CrossEntropyLoss(), (x, y))
    for op in (G, G.shift(1.0), 2 * G, G.eye(), G.block("weight"), G.block_diagonal(), G + G):
        assert op.semidefinite
    for op in (H, -G, G.shift(-1.0), G + H, H.block("weight")):
        assert not op.semidefinite
