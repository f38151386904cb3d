"""How eigsh runs: warm starts, blocks, interrupts, checkpoints, waiting for the device, memory."""

import os
import signal

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flatkern.estimators import Eigenpairs, eigsh
from flatkern.estimators.gram_schmidt import orthonormalize
from flatkern.estimators.restarted_lanczos import LanczosBasis
from flatkern.operators.base import LinearOperator


class Diagonal(LinearOperator):
    """A diagonal that counts its products and can do something at one of them."""

    def __init__(self, values, at=None, action=None, name=None):
        super().__init__((len(values), len(values)), values.dtype, symmetric=True)
        self.values, self.products, self.calls = values, 0, 0
        self._at, self._action, self._name = at, action, name

    def _rows(self, rows):
        self.products += len(rows)
        self.calls += 1
        if self.calls == self._at:
            self._action()
        return rows * self.values

    def _identity(self):
        return self._name


@pytest.fixture(autouse=True)
def _no_fsync(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)  # thousands of saves need not reach the disk


class Stop(Exception):
    """What stands for a kill."""


def kill():
    raise Stop


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


OUTLIERS = torch.cat([torch.tensor([9.0, 5.0, 5.0, -7.0, 3.0]), torch.linspace(-1, 1, 395)]).double()
PROJECTOR = torch.tensor([1.0] * 40 + [0.0] * 160).double()


def same(a, b):
    return (
        torch.equal(a.values, b.values)
        and torch.equal(a.vectors, b.vectors)
        and torch.equal(a.residuals, b.residuals)
        and torch.equal(a.converged, b.converged)
        and (a.verified, a.matvecs, a.notes) == (b.verified, b.matvecs, b.notes)
    )


RUNS = {
    "default": (OUTLIERS, {"k": 3}),
    "both ends, small basis": (OUTLIERS, {"k": 4, "which": "BE", "basis_size": 8, "tol": 1e-2}),
    "blocks": (OUTLIERS, {"k": 3, "block_size": 3}),
    "growing blocks": (PROJECTOR, {"k": 5}),
    "float32, warm": (OUTLIERS.float(), {"k": 2, "start": torch.eye(400)[:, :2]}),
    "budget": (OUTLIERS, {"k": 6, "which": "SA", "max_matvecs": 30}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_at_any_step_goes_on_to_the_same_bits(name, tmp_path):
    values, options = RUNS[name]
    path = tmp_path / "run.npz"
    whole_op = Diagonal(values, name="x")
    whole = eigsh(whole_op, seed=3, **options)
    for seconds, stops in (
        (
            0.0,
            {1, 2, 4, 9, 17, 26, whole_op.calls // 2, whole_op.calls - 4, whole_op.calls - 1, whole_op.calls},
        ),
        (1e9, [7]),
    ):
        for at in stops:
            if not 1 <= at <= whole_op.calls:
                continue
            path.unlink(missing_ok=True)
            with pytest.raises(Stop):
                eigsh(
                    Diagonal(values, at, kill, "x"),
                    seed=3,
                    checkpoint=path,
                    checkpoint_seconds=seconds,
                    **options,
                )
            assert path.exists() == (seconds == 0 and at > 1)
            op = Diagonal(values, name="x")
            assert same(whole, eigsh(op, seed=3, checkpoint=path, checkpoint_seconds=seconds, **options))
            if seconds == 0 and at <= whole_op.calls - len(whole):
                assert op.calls == whole_op.calls - at + 1


def test_a_run_killed_again_and_again(tmp_path):
    whole, path = eigsh(Diagonal(OUTLIERS, name="x"), 3, seed=0), tmp_path / "run"
    for _ in range(200):
        try:
            pairs = eigsh(Diagonal(OUTLIERS, 4, kill, "x"), 3, seed=0, checkpoint=path, checkpoint_seconds=0)
            break
        except Stop:
            pass
    assert same(whole, pairs)


def test_a_finished_run_returns_at_once(tmp_path):
    path = tmp_path / "run"
    for options in ({"k": 3}, {"k": 3, "max_matvecs": 14}):
        first = eigsh(Diagonal(OUTLIERS, name="x"), seed=0, checkpoint=path, **options)
        op = Diagonal(OUTLIERS, name="x")
        assert same(first, eigsh(op, seed=0, checkpoint=path, **options))
        assert op.products == 0
        path.unlink()
    # a larger budget goes on from where the smaller one ended
    short = eigsh(Diagonal(OUTLIERS, name="x"), 3, seed=0, max_matvecs=14, checkpoint=path)
    op = Diagonal(OUTLIERS, name="x")
    longer = eigsh(op, 3, seed=0, checkpoint=path)
    assert not short.converged.all()
    assert longer.converged.all()
    assert op.products == longer.matvecs - short.matvecs + 3


def test_another_run_is_refused(tmp_path):
    path, start = tmp_path / "run", torch.eye(400, dtype=torch.float64)[:, :1]
    eigsh(Diagonal(OUTLIERS, name="x"), 2, seed=0, start=start, checkpoint=path)
    for op, options, text in (
        (Diagonal(OUTLIERS, name="y"), {"seed": 0, "start": start}, "operator is another one"),
        (Diagonal(OUTLIERS, name="x"), {"seed": 1, "start": start}, "seed was 0 and is 1"),
        (Diagonal(OUTLIERS, name="x"), {"seed": 0}, "start was"),
        (Diagonal(OUTLIERS, name="x"), {"seed": 0, "start": start, "tol": 1e-3}, "tol was"),
        (Diagonal(OUTLIERS, name="x"), {"generator": torch.Generator()}, "generator"),
    ):
        with pytest.raises(ValueError, match=text):
            eigsh(op, 2, checkpoint=path, **options)
    nameless = tmp_path / "nameless"
    eigsh(Diagonal(OUTLIERS), 2, seed=0, checkpoint=nameless)
    with pytest.raises(ValueError, match="product with a fixed vector"):
        eigsh(Diagonal(OUTLIERS * 1.0001), 2, seed=0, checkpoint=nameless)


@pytest.fixture
def default_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_handler")
def test_ctrl_c_returns_what_is_there(tmp_path):
    whole, path = eigsh(Diagonal(OUTLIERS, name="x"), 3, seed=0), tmp_path / "run"
    for at in (1, 2, 9, 23):
        path.unlink(missing_ok=True)
        op = Diagonal(OUTLIERS, at, ctrl_c, "x")
        pairs = eigsh(op, 3, seed=0, checkpoint=path)
        assert op.products == pairs.matvecs == at  # no products are made after it
        assert len(pairs) == min(at, 3)
        assert not pairs.converged.any()
        assert any("interrupted" in note for note in pairs.notes)
        true = (OUTLIERS[:, None] * pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
        assert (true <= pairs.residuals + 1e-12).all()
        assert (pairs.residuals <= true + 1e-7).all()
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert same(whole, eigsh(Diagonal(OUTLIERS, name="x"), 3, seed=0, checkpoint=path))
    twice = Diagonal(OUTLIERS, 5, lambda: (ctrl_c(), ctrl_c()))
    with pytest.raises(KeyboardInterrupt):
        eigsh(twice, 3, seed=0)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_warm_start_saves_products():
    g = torch.Generator().manual_seed(0)
    q = torch.linalg.qr(torch.randn(300, 300, generator=g, dtype=torch.float64)).Q
    values = torch.cat([torch.tensor([9.0, 7.0, 6.0, 5.0]), torch.linspace(-1, 2.5, 296)]).double()
    matrix = (q * values) @ q.T
    noise = torch.randn(300, 300, generator=g, dtype=torch.float64)
    nearby = matrix + 1e-4 * (noise + noise.T)
    for k in (1, 4):
        for dtype, tol in ((torch.float32, 1e-4), (torch.float64, 1e-6)):
            options = {"k": k, "tol": tol, "verify": False, "seed": 1}
            earlier = eigsh(matrix.to(dtype), **options)
            cold = eigsh(nearby.to(dtype), **options)
            for start in (earlier, earlier.vectors * 5, earlier.vectors.double(), earlier.vectors.sum(1)):
                warm = eigsh(nearby.to(dtype), start=start, **options)
                assert warm.converged.all()
                assert torch.allclose(warm.values, cold.values, atol=20 * tol)
                assert warm.matvecs <= cold.matvecs - 4
    # an eigenvector of the second largest eigenvalue does not hide the largest
    for seed in range(5):
        trapped = eigsh(torch.diag(values), 1, start=torch.eye(300).double()[:, 1], verify=False, seed=seed)
        assert trapped.values.item() == pytest.approx(9.0)


def test_a_block_finds_its_multiplicity_at_once():
    values = torch.cat([torch.full((4,), 9.0), torch.linspace(-1, 1, 200)]).double()
    pairs = eigsh(Diagonal(values), 4, block_size=4, verify=False, seed=0)
    assert pairs.values.tolist() == pytest.approx([9.0] * 4)
    op = Diagonal(values)
    assert eigsh(op, 4, block_size=2, seed=0).values.tolist() == pytest.approx([9.0] * 4)
    assert op.calls < op.products
    assert eigsh(Diagonal(values[:7]), 5, block_size=4, seed=0).converged.all()  # P not a multiple of it


def test_many_copies_do_not_cost_a_round_each():
    values = torch.cat([torch.full((20,), 9.0), torch.linspace(-1, 1, 400)]).double()
    pairs = eigsh(Diagonal(values), 12, seed=0)
    assert pairs.verified
    assert pairs.values.tolist() == pytest.approx([9.0] * 12)
    assert pairs.matvecs < 12 * 19


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("block", [1, 3])
def test_the_basis_stays_orthonormal(block, dtype):
    for values in (
        torch.logspace(-12, 6, 600, dtype=torch.float64),
        torch.cat([torch.tensor([1e4, 50.0, 20.0]), torch.linspace(0, 1, 597)]).double(),
        torch.tensor([1.0, 1 + 1e-9, 2, 2, 0, -1]).double().repeat(100),
    ):
        basis = LanczosBasis(Diagonal(values.to(dtype)), 40, block, torch.Generator().manual_seed(0))
        basis.fill()
        for _ in range(3):
            while not basis.full:
                basis.step()
            if basis.look():
                basis.fill()
            rows = basis.rows[: basis.known + basis.pending].double()
            off = (rows @ rows.T - torch.eye(len(rows))).abs().max()
            assert off < 100 * torch.finfo(dtype).eps
            theta, coordinates, _ = basis.ritz()
            basis.restart(theta[-8:], coordinates[:, -8:], fresh=False)
        # what the projection says is what the basis spans
        count = min(basis.known, 8)
        rows = basis.rows[:count].double()
        projected = rows @ (rows * values.to(dtype).double()).T
        assert torch.allclose(projected.diagonal(), theta[-8:][:count], rtol=1e-4, atol=1e-6 * basis.scale)


def test_gram_schmidt():
    g = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(30, 6, generator=g, dtype=torch.float64)).Q.mT.contiguous()
    for count in (1, 4):
        vectors = torch.randn(count, 30, generator=g, dtype=torch.float64)
        if count == 4:
            vectors[2] = vectors[0] - 3 * vectors[1] + basis[1]  # nothing of its own
            vectors[3] = basis[2] + 1e-9 * vectors[3]  # almost nothing
        out = torch.empty_like(vectors)
        c, r = orthonormalize(basis, vectors, out, scale=torch.ones((), dtype=torch.float64))
        alive = torch.tensor([True, True, False, True])[:count]
        gram = torch.cat([basis, out]) @ torch.cat([basis, out]).T
        assert torch.allclose(
            gram, torch.diag(torch.cat([torch.ones(6), alive.float()])).double(), atol=1e-14
        )
        assert torch.allclose(c.T @ basis + r.T @ out, vectors, atol=1e-13)
        assert torch.equal(r.diagonal() > 0, alive)
        assert torch.equal(r, r.triu())


class Watching(TorchDispatchMode):
    """Refuses to read a value on the host, and remembers the largest allocation."""

    def __init__(self):
        super().__init__()
        self.reads, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        self.reads += any(part in name for part in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"))
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.untyped_storage().nbytes())
        return out


def test_steps_read_nothing_on_the_host():
    for block in (1, 3):
        basis = LanczosBasis(Diagonal(OUTLIERS), 20, block, torch.Generator().manual_seed(0))
        with Watching() as watching:
            basis.fill()
            while not basis.full:
                basis.step()
        assert watching.reads == 0
        with Watching() as watching:
            basis.look()
        assert watching.reads > 0


def test_looks_are_rare(monkeypatch):
    looks = []
    look = LanczosBasis.look
    monkeypatch.setattr(LanczosBasis, "look", lambda self: looks.append(1) or look(self))
    pairs = eigsh(Diagonal(torch.linspace(-1, 1, 2000).double()), 4, tol=1e-6, seed=0)
    assert len(looks) <= pairs.matvecs / 3


def test_memory_is_the_basis(monkeypatch):
    places = []
    restart = LanczosBasis.restart

    def watched(self, *args, **kwargs):
        restart(self, *args, **kwargs)
        places.append(self.rows.data_ptr())

    monkeypatch.setattr(LanczosBasis, "restart", watched)
    size = 100_000
    with Watching() as watching:
        eigsh(Diagonal(torch.linspace(-1, 1, size)), 2, basis_size=10, max_matvecs=60, seed=0)
    assert watching.largest == 11 * size * 4
    assert len(places) > 5
    assert len(set(places)) == 1


def test_bad_starts_are_named():
    op = Diagonal(OUTLIERS)
    for start, error, text in (
        ([1.0, 2.0], TypeError, "start: expected Eigenpairs or a tensor"),
        (torch.ones(3), ValueError, "start: expected"),
        (torch.ones(400, 0), ValueError, "start: expected"),
        (torch.zeros(400, 2), ValueError, "start: a vector is zero"),
        (torch.full((400,), float("nan")), ValueError, "start: a vector is zero or holds NaN"),
    ):
        with pytest.raises(error, match=text):
            eigsh(op, 2, start=start)
    with pytest.raises(ValueError, match="block_size"):
        eigsh(op, 2, block_size=0)
    with pytest.raises(ValueError, match="basis_size"):
        eigsh(op, 2, block_size=4, basis_size=5)
    with pytest.raises(ValueError, match="max_matvecs"):
        eigsh(op, 2, block_size=4, max_matvecs=5)


def test_results_are_eigenpairs_whatever_the_end():
    pairs = eigsh(torch.zeros(500, 500), 6, seed=0, max_matvecs=12)
    assert isinstance(pairs, Eigenpairs)
    assert not pairs.converged.any()
    assert "missing" in pairs.notes[0]
