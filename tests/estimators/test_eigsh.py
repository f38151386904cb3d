"""Eigenpairs against torch.linalg.eigh, multiplicities, and flags true to residuals."""

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flatkern.estimators import NotSymmetricError, eigsh
from flatkern.operators import as_operator, hessian

WHICH = ["LA", "SA", "LM", "BE"]


def symmetric(values, seed=0):
    values = torch.as_tensor(values, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64)).Q
    return (q * values) @ q.T


def wanted(matrix, which, k):
    exact = torch.linalg.eigvalsh(matrix)
    if which == "LA":
        return exact.flip(0)[:k]
    if which == "SA":
        return exact[:k]
    if which == "LM":
        return exact[exact.abs().argsort(descending=True)][:k]
    return torch.cat([exact.flip(0)[: (k + 1) // 2], exact[: k // 2].flip(0)])


def check(matrix, pairs, which, k, tol=1e-8):
    exact = wanted(matrix, which, k)
    scale = max(float(matrix.abs().sum(1).max()), 1e-300)
    assert len(pairs) == k
    assert pairs.vectors.shape == (len(matrix), k)
    # the order of ±λ under "LM" is arbitrary
    order = torch.Tensor.abs if which == "LM" else torch.clone
    assert torch.allclose(order(pairs.values), order(exact.double()), rtol=0, atol=tol * scale)
    assert torch.allclose(
        pairs.vectors.mT @ pairs.vectors, torch.eye(k, dtype=matrix.dtype), atol=1e-6 if k > 1 else 1e-12
    )
    residuals = (matrix @ pairs.vectors - pairs.vectors * pairs.values.to(matrix)).norm(dim=0).double()
    assert torch.allclose(
        residuals, pairs.residuals, rtol=1e-3, atol=10 * torch.finfo(matrix.dtype).eps * scale
    )


SPECTRA = {
    "spread": torch.linspace(-1, 3, 150),
    "outliers": torch.cat([torch.tensor([50.0, 20.0, 8.0]), torch.linspace(0, 1, 200).sqrt()]),
    "multiple": torch.tensor([5.0] * 3 + [4.0] * 2 + [-6.0] * 2 + [0.02 * i - 1 for i in range(100)]),
    "null space": torch.cat([torch.zeros(60), torch.linspace(1, 2, 60)]),
    "projector": torch.tensor([1.0] * 30 + [0.0] * 90),
    "zero": torch.zeros(40),
    "identity": torch.ones(40),
    "small": torch.tensor([3.0, 1.0, 1.0, -2.0, 0.0, 0.5]),
}


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("name", SPECTRA)
def test_against_eigh(name, which):
    matrix = symmetric(SPECTRA[name])
    for k in (1, 3, 6):
        pairs = eigsh(matrix, k, which=which, seed=k)
        check(matrix, pairs, which, k)
        assert pairs.converged.all()
        assert pairs.verified


def test_orders():
    matrix = torch.diag(torch.tensor([-5.0, 4, -3, 2, -1, 0.5], dtype=torch.float64))
    assert eigsh(matrix, 3, which="LA", seed=0).values.tolist() == pytest.approx([4, 2, 0.5])
    assert eigsh(matrix, 3, which="SA", seed=0).values.tolist() == pytest.approx([-5, -3, -1])
    assert eigsh(matrix, 3, which="LM", seed=0).values.tolist() == pytest.approx([-5, 4, -3])
    assert eigsh(matrix, 3, which="BE", seed=0).values.tolist() == pytest.approx([4, 2, -5])


def test_one_by_one_and_whole_spectra():
    pairs = eigsh(torch.tensor([[-2.5]], dtype=torch.float64), 1, seed=0)
    assert pairs.values.item() == -2.5
    assert abs(pairs.vectors.item()) == pytest.approx(1.0)
    matrix = symmetric(torch.linspace(-1, 1, 60))
    check(matrix, eigsh(matrix, 60, seed=0), "LA", 60)


def test_a_copy_missed_by_one_start_vector_is_found():
    matrix = symmetric([9.0, 9.0, 9.0, *torch.linspace(0, 1, 150).tolist()])
    single = eigsh(matrix, 3, verify=False, seed=0)
    assert not single.verified
    assert single.converged.all()  # true pairs all the same
    assert single.matvecs < eigsh(matrix, 3, seed=0).matvecs
    assert eigsh(matrix, 3, seed=0).values.tolist() == pytest.approx([9.0, 9.0, 9.0])


def test_flags_are_true_when_the_budget_ends_first():
    matrix = symmetric(torch.linspace(-1, 1, 300))
    for budget in (12, 30, 60, 100):
        pairs = eigsh(matrix, 6, max_matvecs=budget, seed=0)
        assert pairs.matvecs <= budget
        assert not pairs.verified
        residuals = (matrix @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
        assert torch.allclose(residuals, pairs.residuals, rtol=1e-6, atol=1e-13)
        assert torch.equal(pairs.converged, pairs.residuals <= 1e-8 * pairs.values.abs().max()) or budget > 60
    assert not eigsh(matrix, 6, max_matvecs=12, seed=0).converged.any()


@pytest.mark.parametrize("which", WHICH)
def test_float32(which):
    matrix = symmetric(SPECTRA["outliers"]).float()
    pairs = eigsh(matrix, 3, which=which, seed=0, tol=1e-5)
    assert pairs.vectors.dtype == torch.float32
    assert pairs.values.dtype == torch.float64
    assert pairs.converged.all()
    check(matrix, pairs, which, 3, tol=1e-5)
    impossible = eigsh(matrix, 2, which=which, seed=0, tol=1e-12, max_matvecs=200)
    assert not impossible.converged.any()


def test_a_loose_tolerance_is_not_taken_for_asymmetry():
    matrix = symmetric(SPECTRA["spread"])
    pairs = eigsh(matrix, 4, tol=1e-2, seed=0)
    assert pairs.converged.all()
    assert (pairs.values - wanted(matrix, "LA", 4)).abs().max() < 0.1


def test_small_bases_and_restarts():
    matrix = symmetric(SPECTRA["outliers"])
    for width in (4, 6, 10, 40):
        pairs = eigsh(matrix, 3, basis_size=width, seed=1)
        check(matrix, pairs, "LA", 3)
        assert pairs.converged.all()


def test_any_operator_like_object():
    matrix = symmetric(SPECTRA["outliers"])
    for obj in (matrix.numpy(), scipy.sparse.csr_array(matrix.numpy()), as_operator(matrix).to_scipy()):
        assert eigsh(obj, 2, seed=0).values.tolist() == pytest.approx([50.0, 20.0])
    assert eigsh(as_operator(matrix).shift(-100.0), 1, which="SA", seed=0).values.item() < -99


def test_the_hessian_of_a_model():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    op = hessian(model, nn.CrossEntropyLoss(), (torch.randn(20, 4).double(), torch.arange(20) % 3))
    for which in WHICH:
        check(op.to_dense(), eigsh(op, 4, which=which, seed=0), which, 4)


def test_seeds_and_the_global_state():
    matrix = symmetric(SPECTRA["spread"])
    before = torch.get_rng_state()
    a, b = (
        eigsh(matrix, 2, seed=3),
        eigsh(matrix, 2, generator=torch.Generator().manual_seed(3), progress=True),
    )
    assert torch.equal(a.vectors, b.vectors)
    eigsh(matrix, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_bad_arguments_are_named():
    matrix = symmetric(SPECTRA["spread"])
    nan = matrix.clone()
    nan[0, 0] = float("nan")
    for call, error, text in (
        (lambda: eigsh(torch.ones(3, 4)), ValueError, "square"),
        (lambda: eigsh(matrix, 0), ValueError, "k"),
        (lambda: eigsh(matrix, 151), ValueError, "k"),
        (lambda: eigsh(matrix, 2.0), TypeError, "k"),
        (lambda: eigsh(matrix, which="XX"), ValueError, "which"),
        (lambda: eigsh(matrix, tol=-1.0), ValueError, "tol"),
        (lambda: eigsh(matrix, 6, max_matvecs=11), ValueError, "max_matvecs"),
        (lambda: eigsh(matrix, 6, basis_size=6), ValueError, "basis_size"),
        (lambda: eigsh(nan), FloatingPointError, "NaN"),
        (lambda: eigsh(torch.triu(torch.ones(50, 50)), seed=0), NotSymmetricError, "symmetric"),
        (lambda: eigsh(np.triu(np.ones((50, 50))), seed=0), NotSymmetricError, "symmetric"),
        (lambda: eigsh(torch.ones(3, 3, dtype=torch.float16)), TypeError, "dtype"),
    ):
        with pytest.raises(error, match=text):
            call()


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.sampled_from([0.0, 1.0, 1.0 + 1e-3, -1.0, 2.0, 1e-6, 1e3]), min_size=1, max_size=45),
    st.sampled_from(WHICH),
    st.integers(0, 99),
)
def test_clusters_multiplicities_and_zeros(values, which, seed):
    matrix = symmetric(values, seed)
    k = min(3, len(values))
    pairs = eigsh(matrix, k, which=which, seed=seed)
    check(matrix, pairs, which, k, tol=1e-7)


@given(
    st.lists(st.sampled_from([0.0, 1.0, 1.0 + 1e-3, -1.0, 2.0, -3.0, 1e-12, 1e-6]), min_size=1, max_size=60),
    st.sampled_from([1e-12, 1.0, 1e6]),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([None, 1, 3]),
    st.sampled_from(WHICH),
    st.integers(0, 99),
)
def test_known_spectra_at_every_scale(values, scale, dtype, block, which, seed):
    matrix = (symmetric(values, seed) * scale).to(dtype)
    matrix = (matrix + matrix.mT) / 2
    k = min(4, len(values))
    pairs = eigsh(matrix, k, which=which, block_size=block, seed=seed)
    largest = float(torch.as_tensor(values).abs().max()) * scale
    tol = 2e-8 if dtype == torch.float64 else 3e-4
    assert pairs.converged.all()
    assert pairs.verified
    order = torch.Tensor.abs if which == "LM" else torch.clone
    exact = wanted(symmetric(values, seed) * scale, which, k)
    assert torch.allclose(order(pairs.values), order(exact), rtol=0, atol=tol * largest + 1e-300)
    true = (matrix.double() @ pairs.vectors.double() - pairs.vectors.double() * pairs.values).norm(dim=0)
    assert (true <= pairs.residuals + 100 * torch.finfo(dtype).eps * largest).all()
    gram = pairs.vectors.double().mT @ pairs.vectors.double()
    assert torch.allclose(gram, torch.eye(k).double(), atol=1e3 * torch.finfo(dtype).eps)
