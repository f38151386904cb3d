"""`FLATKERN_KERNELS` and `FLATKERN_ISA`, each in a fresh interpreter; what `active()` says."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from flatkern import kernels
from flatkern.kernels._select import _state, compiled_available, environment_choice, rows_that_fit, using

built = pytest.mark.skipif(not compiled_available(), reason="no compiled kernels")


def run(code: str, **environment: str) -> subprocess.CompletedProcess:
    # the kernels alone: `import flatkern` would bring in the whole package
    prelude = (
        "import sys, types, importlib.util, pathlib\n"
        "root = pathlib.Path(importlib.util.find_spec('flatkern').origin).parent\n"
        "package = types.ModuleType('flatkern'); package.__path__ = [str(root)]\n"
        "sys.modules['flatkern'] = package\n"
    )
    return subprocess.run(
        [sys.executable, "-W", "always", "-c", prelude + code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


SHOW = "from flatkern import kernels; i = kernels.active(); print(i.kernels, i.isa)"


@built
@pytest.mark.parametrize(
    ("choice", "expected"), [("", "compiled"), ("compiled", "compiled"), ("reference", "reference")]
)
def test_choice(choice, expected):
    done = run(SHOW, FLATKERN_KERNELS=choice)
    assert done.stdout.split()[0] == expected, done.stderr
    assert "RuntimeWarning" not in done.stderr


@built
def test_every_instruction_set_gives_the_same():
    code = (
        "import torch; from flatkern import kernels, native; torch.manual_seed(0)\n"
        "x = torch.randn(40, 11, 37); print(kernels.gram_stats(x).logdet.sum().item(),\n"
        "    kernels.spd_logdet(kernels.gram(x).float()).sum().item(), native.build_info()['isa'])"
    )
    results = {isa: run(code, FLATKERN_ISA=isa).stdout.split() for isa in ("baseline", "avx2", "")}
    assert results["baseline"][2] == "baseline"
    for _, (a, b, _isa) in results.items():
        assert float(a) == pytest.approx(float(results["baseline"][0]), rel=1e-12)
        assert float(b) == pytest.approx(float(results["baseline"][1]), rel=1e-5)


@pytest.mark.parametrize("name", ["FLATKERN_KERNELS", "FLATKERN_ISA"])
def test_an_unknown_value_raises_and_names_the_allowed_ones(name):
    done = run("import flatkern.kernels", **{name: "fastest"})
    assert done.returncode != 0
    assert "fastest" in done.stderr
    assert ("reference" if name == "FLATKERN_KERNELS" else "avx2") in done.stderr


def test_environment_choice(monkeypatch):
    monkeypatch.setenv("FLATKERN_TEST", "b")
    assert environment_choice("FLATKERN_TEST", ("a", "b"), "a") == "b"
    monkeypatch.setenv("FLATKERN_TEST", "")
    assert environment_choice("FLATKERN_TEST", ("a", "b"), "a") == "a"
    monkeypatch.setenv("FLATKERN_TEST", "c")
    with pytest.raises(ValueError, match="a, b"):
        environment_choice("FLATKERN_TEST", ("a", "b"), "a")


def test_active_is_frozen_and_follows_the_choice():
    with using("reference"):
        info = kernels.active()
        assert info.kernels == "reference"
        assert info.reason
        assert info.isa == ""
    with pytest.raises(dataclasses.FrozenInstanceError):
        info.isa = "x"
    assert info.torch_now == torch.__version__


@built
def test_active_compiled():
    with using("compiled"):
        info = kernels.active()
    assert info.kernels == "compiled"
    assert info.reason == ""
    assert info.isa in ("baseline", "avx2", "avx512")
    assert info.compiler


def test_using_restores_on_errors():
    before = _state.compiled
    with pytest.raises(RuntimeError, match="inside"), using("reference"):
        raise RuntimeError("inside")
    assert _state.compiled == before


@pytest.mark.parametrize(
    ("device", "kib", "rows", "values", "vectors"),
    [
        ("H100", 227, 128, 119, 97),
        ("A100", 163, 128, 101, 82),
        ("RTX 4090", 99, 110, 78, 64),
        ("T4", 63, 88, 62, 51),
    ],
)
def test_rows_that_fit_the_shared_memory_of_a_gpu(device, kib, rows, values, vectors):
    assert [rows_that_fit(kib << 10, squares) for squares in range(3)] == [rows, values, vectors], device


def test_shapes_on_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setitem(_state.build, "cuda", True)
    for which in ("reference", "compiled") if compiled_available() else ("reference",):
        with FakeTensorMode(), using(which), torch.no_grad():
            product = kernels.gram(torch.empty(3, 4, 5, device="cuda"))
        assert product.shape == (3, 4, 4)
        assert product.device.type == "cuda"
