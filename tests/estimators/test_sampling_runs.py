"""Runs of products: independent of block sizes, resumed bit by bit, interrupted with what is there."""

import signal

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator
from spectra import FLAT, POWER

import flatkern.estimators.sampling_run as sampling_run
from flatkern.estimators import diagonal, trace

METHODS = [
    (trace, {"method": "hutchinson", "samples": 70}),
    (trace, {"method": "hutchinson", "rtol": 0.05}),
    (trace, {"method": "hutch++", "samples": 20}),
    (trace, {"method": "hutch++", "rtol": 0.05}),
    (trace, {"method": "xtrace", "samples": 20}),
    (trace, {"method": "xtrace", "rtol": 0.05}),
    (trace, {"method": "xnystrace", "samples": 20}),
    (trace, {"method": "auto", "rtol": 0.1}),
    (trace, {"method": "exact"}),
    (diagonal, {"method": "hutchinson", "samples": 70}),
    (diagonal, {"method": "xdiag", "samples": 20}),
    (diagonal, {"method": "auto", "rtol": 0.3}),
    (diagonal, {"method": "exact"}),
]
NAMES = [f"{f.__name__}-{'-'.join(map(str, k.values()))}" for f, k in METHODS]


def numbers(result):
    if hasattr(result, "samples") and isinstance(result.samples, torch.Tensor):
        return torch.cat([result.samples, torch.tensor([result.value, result.stderr, result.matvecs])])
    if hasattr(result, "values"):
        return torch.cat([result.values, result.stderr, torch.tensor([float(result.matvecs)])])
    return torch.tensor([result.value, result.stderr, result.matvecs])


class ByColumns:
    """Products column by column, so that they round alike in blocks of any size; raises after some."""

    dtype, shape = torch.float64, (80, 80)

    def __init__(self, matrix, limit=None, action=None):
        self.matrix, self.limit, self.action, self.made = matrix, limit, action, 0

    def __matmul__(self, block):
        self.made += block.shape[1]
        if self.limit is not None and self.made > self.limit:
            self.action()
        return torch.stack([(self.matrix * v).sum(1) for v in block.T], dim=1)


def die():
    raise RuntimeError("killed")


@pytest.mark.parametrize(("function", "kwargs"), METHODS, ids=NAMES)
def test_the_block_size_does_not_matter(function, kwargs, monkeypatch):
    results = []
    for size in (1, 7, 32):
        monkeypatch.setattr(sampling_run, "rows_per_block", lambda op, size=size: size)
        results.append(numbers(function(ByColumns(POWER), seed=3, **kwargs)))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("function", "kwargs"), METHODS, ids=NAMES)
def test_killed_anywhere_and_resumed(function, kwargs, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling_run, "rows_per_block", lambda op: 5)
    whole = function(ByColumns(POWER), seed=3, **kwargs)
    for limit in range(2, whole.matvecs, max(5, whole.matvecs // 6)):
        path = tmp_path / f"{limit}.npz"
        options = {"seed": 3, "checkpoint": path, "checkpoint_seconds": 0, **kwargs}
        with pytest.raises(RuntimeError, match="killed"):
            function(ByColumns(POWER, limit, die), **options)
        rest = ByColumns(POWER)
        resumed = function(rest, **options)
        assert torch.equal(numbers(resumed), numbers(whole))
        # one product recognises the operator; at most a block is made anew
        assert rest.made <= max(whole.matvecs - limit, 0) + 5 + 2
        again = ByColumns(POWER)
        assert torch.equal(numbers(function(again, **options)), numbers(whole))
        assert again.made <= 1


def test_a_checkpoint_without_a_seed_keeps_its_own(tmp_path):
    options = {"rtol": 0.1, "method": "hutchinson", "checkpoint": tmp_path / "run", "checkpoint_seconds": 0}
    with pytest.raises(RuntimeError, match="killed"):
        trace(ByColumns(FLAT, 20, die), **options)
    first = trace(ByColumns(FLAT), **options)
    assert trace(ByColumns(FLAT), **options).value == first.value
    with pytest.raises(ValueError, match="checkpoint"):
        trace(ByColumns(FLAT), **{**options, "rtol": 0.2})
    with pytest.raises(ValueError, match="checkpoint"):
        diagonal(ByColumns(FLAT), method="hutchinson", samples=20, checkpoint=tmp_path / "run")
    with pytest.raises(ValueError, match="generator"):
        trace(ByColumns(FLAT), generator=torch.Generator(), **options)


@pytest.mark.parametrize(("function", "kwargs"), METHODS, ids=NAMES)
def test_interrupted(function, kwargs, tmp_path, monkeypatch):
    monkeypatch.setattr(sampling_run, "rows_per_block", lambda op: 5)
    before = signal.getsignal(signal.SIGINT)

    def press():
        op.limit = None
        signal.raise_signal(signal.SIGINT)

    whole = function(ByColumns(POWER), seed=3, **kwargs)
    for limit in (7, whole.matvecs - 1):
        op = ByColumns(POWER, limit, press)
        options = {"seed": 3, "checkpoint": tmp_path / f"{limit}", **kwargs}
        if kwargs["method"] == "exact":
            with pytest.raises(KeyboardInterrupt):
                function(op, **options)
            continue
        result = function(op, **options)
        if limit == 7:
            assert not result.converged
            assert "interrupted" in result.notes[0]
            assert result.matvecs == 10
            assert bool(torch.isfinite(numbers(result)).all())
        assert torch.equal(numbers(function(ByColumns(POWER), **options)), numbers(whole))
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("function", [trace, diagonal])
def test_any_operator_like_object(function):
    array = FLAT.numpy()

    class Times:
        shape, dtype = array.shape, array.dtype

        def __matmul__(self, block):
            return array @ block

    expected = numbers(function(FLAT, samples=20, seed=1))
    for op in (array, aslinearoperator(array), Times(), np.asfortranarray(array)):
        torch.testing.assert_close(
            numbers(function(op, samples=20, seed=1)), expected, rtol=1e-10, atol=1e-10
        )
    single = numbers(function(FLAT.float(), samples=20, seed=1))
    assert single.dtype == torch.float64
