"""A monitored run has bit for bit the weights of an unmonitored one, and nothing else of it changes either."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import flatkern as fk
from flatkern.monitor.undisturbed import bare, undisturbed
from tests.monitor.training import LOSS, Mixed, X, Y, conv, mlp, reparametrized, seeded, train

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"every": 1},
    "log, bounds": {"every": "log", "bounds": True},
    "within a share": {"every": 1, "share": 0.5},
    "with more": {"every": 3, "extra": {"hessian": lambda m: fk.hessian_trace(m, LOSS, (X, Y), seed=0)}},
}


@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize("make", [mlp, conv, Mixed, reparametrized])
def test_weights_are_those_of_the_run_without(make: Any, options: str, tmp_path: Any) -> None:
    alone = seeded(make)
    train(alone, 12)
    states = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002

    watched = seeded(make)
    with fk.Monitor(watched, X, Y, LOSS, path=tmp_path / "a.csv", **OPTIONS[options]) as m:
        train(watched, 12, m.step)
    assert len(m.history) >= 2
    for (name, a), b in zip(alone.state_dict().items(), watched.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # noqa: NPY002
    assert random.getstate() == states[2]
    for p, q in zip(alone.parameters(), watched.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        assert torch.equal(p.grad, q.grad)


def snapshot(model: nn.Module) -> dict[str, Any]:
    return {
        "modes": [m.training for m in model.modules()],
        "grads": [id(p.grad) for p in model.parameters()],
        "versions": [p._version for p in model.parameters()],
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        "rng": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": [np.random.get_state()[2], *np.random.get_state()[1]],  # noqa: NPY002
    }


def same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return bool(a == b)


def disturb(model: nn.Module) -> float:
    """All that a quantity of the user's own may do."""
    torch.rand(3)
    np.random.rand()  # noqa: NPY002
    random.random()
    LOSS(model(X), Y).backward()  # into .grad
    model.train()
    return 1.0


class TooMuch(RuntimeError):
    pass


def fail(model: nn.Module) -> float:
    disturb(model)
    raise TooMuch


@pytest.mark.parametrize("quantity", [disturb, fail])
def test_everything_is_as_before_also_after_an_error(quantity: Any) -> None:
    model = seeded(Mixed)
    train(model, 3)
    m = fk.Monitor(model, X, Y, extra={"q": quantity})
    before = snapshot(model)
    assert before["modes"].count(True) > 1
    assert False in before["modes"]
    if quantity is fail:
        with pytest.raises(TooMuch):
            m.start()
    else:
        assert m.start().history[0]["q"] == 1.0
    after = snapshot(model)
    for key in before:
        assert same(before[key], after[key]), key


def test_measured_is_the_model_in_eval_mode() -> None:
    model = seeded(Mixed)
    train(model, 5)
    row = fk.Monitor(model, X, Y, LOSS, samples=60).start().history[0]
    quiet = copy.deepcopy(model).eval()
    g = fk.geometry(quiet, X)
    assert row["sharpness"] == pytest.approx(g.sharpness.value, rel=1e-6)
    assert row["nmls"] == pytest.approx(g.nmls.value, rel=1e-6)
    assert row["log_volume"] == pytest.approx(g.log_volume.mean, rel=1e-6)
    assert row["probe_loss"] == pytest.approx(LOSS(quiet(X), Y).item(), rel=1e-6)


def test_autocast_and_grad_modes_of_the_loop_do_not_reach_the_measurement() -> None:
    model = mlp()
    plain = fk.Monitor(model, X).start().history[0]
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        mixed = fk.Monitor(model, X).start().history[0]
        assert torch.is_autocast_enabled("cpu")
        assert not torch.is_grad_enabled()
    with torch.inference_mode():
        inference = fk.Monitor(model, X).start().history[0]
    for key in ("sharpness", "mls", "log_volume"):
        assert plain[key] == mixed[key] == inference[key]


def test_eval_overrides_are_not_called() -> None:
    class Merges(nn.Linear):
        def train(self, mode: bool = True) -> Merges:
            if not mode:
                self.weight.data.add_(1)
            return super().train(mode)

    model = Merges(6, 4)
    before = model.weight.clone()
    fk.Monitor(model, X).start()
    assert torch.equal(model.weight, before)


@pytest.mark.parametrize("wrap", ["compiled", "compiled in place", "parallel"])
def test_wrapped_models_are_unwrapped(wrap: str) -> None:
    model = mlp()
    plain = fk.Monitor(model, X).start().history[0]
    wrapped: Any = model
    if wrap == "compiled":
        wrapped = torch.compile(model, backend="eager")
    elif wrap == "compiled in place":
        model.compile(backend="eager")
    else:
        wrapped = nn.DataParallel(model)
    row = fk.Monitor(wrapped, X).start().history[0]
    assert row["sharpness"] == plain["sharpness"]
    if wrap == "compiled in place":
        assert model._compiled_call_impl is not None
    else:
        assert bare(wrapped) is model


class FullyShardedDataParallel(nn.Module):
    """By its name, as without several processes there is no real one."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


@pytest.mark.parametrize("mark", ["device_mesh", "ds_id", "wrapper"])
def test_sharded_models_are_refused(mark: str) -> None:
    model: nn.Module = mlp()
    if mark == "wrapper":
        model = FullyShardedDataParallel(model)
    else:
        setattr(next(model.parameters()), mark, 1)
    with pytest.raises(ValueError, match=r"parameter '.*0\.weight' is sharded"):
        fk.Monitor(model, X)


def test_gradients_are_the_same_objects_afterwards() -> None:
    model = mlp()
    LOSS(model(X), Y).backward()
    grads = [p.grad for p in model.parameters()]
    with undisturbed(model):
        assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
