"""The build: fall-back or error without a compiler, symbols of the library, a failed build's warning."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flatkern
from flatkern.kernels._select import LIBRARY, compiled_available

ROOT = Path(flatkern.__file__).resolve().parent.parent
pytestmark = pytest.mark.cpu_kernels
in_tree = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not run from the source tree")


@pytest.fixture
def copy(tmp_path):
    """What a build needs, elsewhere, without anything built."""
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    ignore = shutil.ignore_patterns("*.so", "_build_info.json", "__pycache__")
    shutil.copytree(ROOT / "flatkern" / "kernels", tmp_path / "flatkern" / "kernels", ignore=ignore)
    (tmp_path / "flatkern" / "__init__.py").write_text("")
    return tmp_path


def build(where: Path, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("FLATKERN_")}
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--inplace"],
        cwd=where,
        env={**clean, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def warnings_at_import(where: Path, **environment: str) -> str:
    code = "import flatkern.kernels as k; i = k.active(); print(i.kernels); print(i.reason)"
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", code],
        cwd=where,
        env={**os.environ, "PYTHONPATH": str(where), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


@in_tree
@pytest.mark.parametrize("compiler", ["/bin/false", "no-such-compiler"])
def test_a_failed_build_installs_the_reference_and_says_why(copy, compiler):
    done = build(copy, CXX=compiler, FLATKERN_BUILD="auto", FLATKERN_CUDA="0")
    assert done.returncode == 0, done.stderr
    info = json.loads((copy / "flatkern" / "_build_info.json").read_text())
    assert info["status"] == "failed"
    assert "compiler" in info["reason"]
    assert not list((copy / "flatkern").glob("*.so"))
    said = warnings_at_import(copy)
    assert said.startswith("reference")
    assert said.count("RuntimeWarning") == 1
    assert "compiler" in said
    forced = warnings_at_import(copy, FLATKERN_KERNELS="compiled")
    assert "ImportError" in forced
    assert "compiler" in forced


@in_tree
@pytest.mark.parametrize("compiler", ["/bin/false", "no-such-compiler"])
def test_required_makes_it_an_error(copy, compiler):
    done = build(copy, CXX=compiler, FLATKERN_BUILD="required", FLATKERN_CUDA="0")
    assert done.returncode != 0
    assert "compiler" in done.stderr


@in_tree
def test_skip_builds_nothing_and_does_not_warn(copy):
    assert build(copy, FLATKERN_BUILD="skip").returncode == 0
    assert json.loads((copy / "flatkern" / "_build_info.json").read_text())["status"] == "skipped"
    said = warnings_at_import(copy)
    assert said.startswith("reference")
    assert "FLATKERN_BUILD=skip" in said
    assert "RuntimeWarning" not in said


@in_tree
@pytest.mark.parametrize("name", ["FLATKERN_BUILD", "FLATKERN_CUDA"])
def test_unknown_options_are_refused(copy, name):
    done = build(copy, **{name: "maybe"})
    assert done.returncode != 0
    assert "auto" in done.stderr


@in_tree
def test_cuda_demanded_without_nvcc(copy):
    done = build(copy, FLATKERN_CUDA="1", NVCC="no-such-nvcc", FLATKERN_BUILD="required")
    assert done.returncode != 0
    assert "nvcc" in done.stderr


@pytest.mark.skipif(not compiled_available() or not shutil.which("nm"), reason="needs the library and nm")
def test_only_the_stable_abi_is_used():
    """No C++ symbol of torch: the library would be tied to one release."""
    listed = subprocess.run(
        ["nm", "-D", "-C", str(LIBRARY)], capture_output=True, text=True, check=True
    ).stdout
    undefined = [line for line in listed.splitlines() if re.match(r"\s+U ", line)]
    assert any("aoti_torch" in line or "torch_" in line for line in undefined)
    unstable = [line for line in undefined if re.search(r"\b(at|c10|torch)::", line)]
    assert unstable == []


@pytest.mark.skipif(not compiled_available() or not shutil.which("nm"), reason="needs the library and nm")
def test_no_openmp_is_linked():
    """torch brings its own OpenMP; threads come from torch's pool."""
    listed = subprocess.run(["nm", "-D", str(LIBRARY)], capture_output=True, text=True, check=True).stdout
    assert "GOMP" not in listed
    assert "omp_" not in listed


@pytest.mark.slow
@in_tree
def test_a_wheel_holds_the_libraries(copy):
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", "out", "."],
        cwd=copy,
        env={**os.environ, "FLATKERN_BUILD": "required", "FLATKERN_CUDA": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = (copy / "out").glob("*.whl")
    names = subprocess.run(
        [sys.executable, "-m", "zipfile", "-l", str(wheel)], capture_output=True, text=True, check=True
    ).stdout
    assert "flatkern/_C.so" in names
    assert "flatkern/_native." in names
    assert "flatkern/_build_info.json" in names
