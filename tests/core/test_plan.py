"""What a plan says against what a call takes: products, and bytes within a factor 1.5."""

import pytest
import torch
from torch import nn

import flatkern as fk
from flatkern.allocation import AllocationMeter

CE = nn.CrossEntropyLoss()


def problem(n=600):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 200), nn.Tanh(), nn.Linear(200, 200), nn.Tanh(), nn.Linear(200, 5))
    return model, torch.randn(n, 40), torch.randint(0, 5, (n,))


def taken(fn, *args, **kwargs):
    with AllocationMeter() as meter:
        result = fn(*args, **kwargs)
    return result, meter.peak


CALLS = {
    "trace": (fk.trace, {"samples": 40, "method": "hutchinson"}),
    "hutch++": (fk.trace, {"samples": 40, "method": "hutch++"}),
    "xtrace": (fk.trace, {"samples": 40, "method": "xtrace"}),
    "diagonal": (fk.diagonal, {"samples": 40, "method": "hutchinson"}),
    "eigsh": (fk.eigsh, {"k": 5, "max_matvecs": 60}),
    "eigsh in blocks": (fk.eigsh, {"k": 8, "block_size": 4, "max_matvecs": 80}),
    "density": (fk.spectral_density, {"probes": 6, "steps": 12, "reorthogonalize": False}),
    "density by default": (fk.spectral_density, {"probes": 6, "steps": 12}),
    "density with its basis": (fk.spectral_density, {"probes": 6, "steps": 12, "reorthogonalize": True}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CALLS)
def test_bytes_within_half_as_much_again(name, dtype):
    model, x, y = problem()
    op = fk.hessian(model.to(dtype), CE, (x.to(dtype), y))
    fn, options = CALLS[name]
    planned = fk.plan(fn, op, **options)
    result, peak = taken(fn, op, seed=0, **options)
    assert peak / 1.5 <= planned.bytes <= 1.5 * peak
    assert planned.matvecs == planned.passes
    assert result.matvecs <= planned.matvecs
    if not planned.at_most:
        assert result.matvecs == planned.matvecs
    assert planned.seconds > 0
    assert planned.what in str(planned)


@pytest.mark.parametrize("method", ["cg", "minres"])
@pytest.mark.parametrize("columns", [1, 5])
def test_solves(method, columns):
    model, x, y = problem()
    op = fk.ggn(model, CE, (x, y)).shift(1.0)
    B = torch.randn(op.shape[0], columns)
    planned = fk.plan(fk.solve, op, B, method=method)
    solution, peak = taken(fk.solve, op, B, method=method)
    assert peak / 1.5 <= planned.bytes <= 1.5 * peak
    assert planned.at_most
    assert solution.matvecs <= planned.matvecs


@pytest.mark.parametrize("build", [fk.hessian, fk.ggn, fk.fisher])
@pytest.mark.parametrize("max_memory", [None, 6_000_000, 0])
def test_making_an_operator(build, max_memory):
    model, x, y = problem()
    data = [(x[i : i + 100], y[i : i + 100]) for i in range(0, 600, 100)]
    planned = fk.plan(build, model, CE, data, max_memory=max_memory)
    op, peak = taken(build, model, CE, data, max_memory=max_memory)
    assert peak / 1.5 <= planned.bytes <= 1.5 * peak
    assert f"{op.info.kept_batches} of 6" in planned.notes[0]


@pytest.mark.parametrize("options", [{}, {"reorthogonalize": False}])
def test_log_determinants(options):
    model, x, y = problem()
    op = fk.ggn(model, CE, (x, y)).shift(1.0)
    planned = fk.plan(fk.logdet, op, floor=1.0, probes=6, steps=9, **options)
    value, peak = taken(fk.logdet, op, floor=1.0, probes=6, steps=9, seed=0, **options)
    assert peak / 1.5 <= planned.bytes <= 1.5 * peak
    assert value.matvecs == planned.matvecs


def test_a_tolerance_gives_bounds():
    model, x, y = problem()
    op = fk.ggn(model, CE, (x, y))
    planned = fk.plan(fk.trace, op, rtol=0.5, max_matvecs=64)
    result, peak = taken(fk.trace, op, rtol=0.5, max_matvecs=64, seed=0)
    assert planned.at_most
    assert result.matvecs <= planned.matvecs == 64
    assert peak <= 1.5 * planned.bytes


def conv_net():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.GELU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 16, 10),
    )  # fmt: skip
    return model, torch.randn(400, 1, 12, 12), torch.randint(0, 10, (400,))


OVER_DATA = {
    "sharpness": (fk.sharpness, {}),
    "sharpness, sketched": (fk.sharpness, {"method": "sketch", "samples": 3}),
    "ggn_trace": (fk.ggn_trace, {}),
    "ggn_trace, sketched": (fk.ggn_trace, {"method": "sketch", "samples": 3}),
    "gradient_norms": (fk.gradient_norms, {}),
    "hessian_trace": (fk.hessian_trace, {"samples": 3}),
    "geometry": (fk.geometry, {}),
    "kfac": (fk.kfac, {}),
}


@pytest.mark.parametrize("max_memory", [None, 8 << 20])
@pytest.mark.parametrize("make", [problem, conv_net])
@pytest.mark.parametrize("name", OVER_DATA)
def test_calls_over_data(name, make, max_memory):
    model, x, y = make()
    fn, options = OVER_DATA[name]
    arguments = (model, x) if fn in (fk.sharpness, fk.geometry) else (model, CE, (x, y))
    options = {**options, "max_memory": max_memory}
    planned = fk.plan(fn, *arguments, **options)
    result, peak = taken(fn, *arguments, **options)
    assert peak / 1.5 <= planned.bytes <= 1.5 * peak
    assert planned.passes == getattr(result, "passes", planned.passes)
    assert planned.passes >= 1
    assert planned.seconds > 0
    assert f"of {len(x)} samples" in planned.notes[0]


def test_a_trace_to_a_tolerance_says_that_it_may_be_cheaper():
    torch.manual_seed(0)
    layers = [
        nn.Linear(6, 8),
        nn.Tanh(),
        nn.Linear(8, 8),
        nn.GELU(),
        nn.Linear(8, 8),
        nn.Tanh(),
        nn.Linear(8, 3),
    ]
    model, x, y = nn.Sequential(*layers), torch.randn(200, 6), torch.randint(3, (200,))
    planned = fk.plan(fk.hessian_trace, model, CE, (x, y), rtol=0.05)
    assert any("may be sketched as well" in note for note in planned.notes)
    few = fk.plan(fk.hessian_trace, model, CE, (x[:100], y[:100]), rtol=0.05)
    assert not any("sketched" in note for note in few.notes)
    exact = fk.plan(fk.hessian_trace, model[:3], CE, (x, y % 3), rtol=0.05)
    assert not any("estimate" in note or "sketched" in note for note in exact.notes)


@pytest.mark.parametrize("make", [problem, conv_net])
@pytest.mark.parametrize("name", ["ntk", "ntk of two sets", "ggn_spectrum", "with vectors"])
def test_gram_matrices(name, make):
    model, x, y = make()
    x, y = x[:120], y[:120]
    fn, arguments, options = {
        "ntk": (fk.ntk, (model, x), {}),
        "ntk of two sets": (fk.ntk, (model, x, x[:60]), {}),
        "ggn_spectrum": (fk.ggn_spectrum, (model, CE, (x, y)), {}),
        "with vectors": (fk.ggn_spectrum, (model, CE, (x, y)), {"vectors": True}),
    }[name]
    planned = fk.plan(fn, *arguments, **options)
    _, peak = taken(fn, *arguments, **options)
    assert peak / 1.5 <= planned.bytes <= 1.5 * peak
    assert planned.seconds > 0


def test_a_sketch_to_a_tolerance_is_planned():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(10, 30), nn.Tanh(), nn.Linear(30, 100)), torch.randn(500, 10)
    planned = fk.plan(fk.sharpness, model, x, rtol=0.0007)
    result = fk.sharpness(model, x, rtol=0.0007)
    assert result.passes > 4
    assert result.passes / 3 <= planned.passes <= 3 * result.passes
    assert "estimate" in planned.notes[-1]


def test_loaders_are_counted():
    model, x, y = problem(200)
    data = [(x[i : i + 50], y[i : i + 50]) for i in range(0, 200, 50)]
    planned = fk.plan(fk.ggn_trace, model, CE, data)
    assert "of 200 samples" in planned.notes[0]
    assert "4 batches" in planned.notes[1]


def test_a_single_sample():
    model, x, y = problem(1)
    planned = fk.plan(fk.ggn_trace, model, CE, (x, y))
    _, peak = taken(fk.ggn_trace, model, CE, (x, y))
    assert peak / 1.5 <= planned.bytes <= 1.5 * peak


def test_a_plan_runs_few_samples():
    model, x, y = problem()
    seen = []
    model.register_forward_hook(lambda _m, args, _o: seen.append(len(args[0])))
    fk.plan(fk.ggn_trace, model, CE, (x, y))
    assert max(seen) <= 32


def test_what_there_is_no_plan_for():
    with pytest.raises(ValueError, match="no plan"):
        fk.plan(fk.bounds, nn.Linear(2, 2), torch.ones(1, 2))
    with pytest.raises(TypeError, match="does not take"):
        fk.plan(fk.eigsh, torch.eye(3), wrong=1)
