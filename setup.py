"""Builds the compiled side with ninja; everything else about the package is in pyproject.toml.

Two libraries come out of csrc/: `flatkern/_C.so` (operators for torch on its stable ABI: tied to no Python
and to no single torch) and `flatkern/_native.<abi>.so` (the same kernels over NumPy arrays). torch is located,
never imported. Environment:

    FLATKERN_BUILD=auto|required|skip   auto (default): a failed build still installs, the PyTorch reference runs
    FLATKERN_CUDA=auto|0|1|emulated     auto: where the installed torch has CUDA and nvcc is found; emulated: for
                                        tests, the CUDA kernels on the host and in place of the CPU's
    TORCH_CUDA_ARCH_LIST                as torch's extensions read it; default "8.0 9.0+PTX"
    CXX, NVCC, MAX_JOBS                 the compilers, and how many at a time

What was built, and why not where it was not, goes to `flatkern/_build_info.json`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, field
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
TARGET_VERSION = "0x020b000000000000"  # the stable ABI of torch 2.11
ISA_FLAGS = {
    "baseline": "",
    "avx2": "-mavx2 -mfma",
    "avx512": "-mavx2 -mfma -mavx512f -mavx512dq -mavx512vl -mavx512bw -mprefer-vector-width=512",
}


class BuildError(RuntimeError):
    """The compiled side cannot be built; the message is for the user."""


def option(name: str, allowed: tuple[str, ...]) -> str:
    value = os.environ.get(name, "") or allowed[0]
    if value not in allowed:
        raise SystemExit(f"{name}={value!r}: the allowed values are {', '.join(allowed)}")
    return value


def package_dir(name: str) -> Path | None:
    """Where an installed package lies, without importing it.

    pip hides the environment's own packages from an isolated build (`pip wheel .`), but they are where they were.
    """
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or []) if spec else []
    installed = (Path(sysconfig.get_path(where)) / name for where in ("platlib", "purelib"))
    found = [Path(p) for p in places] + [p for p in installed if (p / "__init__.py").exists()]
    return found[0] if found else None


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    named = os.environ.get("NVCC")
    if named:
        return shutil.which(named)
    return (shutil.which(str(Path(home) / "bin" / "nvcc")) if home else None) or shutil.which("nvcc")


def cuda_architectures() -> list[str]:
    """`TORCH_CUDA_ARCH_LIST` ("8.0 9.0+PTX") as ["80", "90", "90+PTX"]."""
    listed = os.environ.get("TORCH_CUDA_ARCH_LIST", "") or "8.0 9.0+PTX"
    out: list[str] = []
    for item in listed.replace(";", " ").split():
        number = item.removesuffix("+PTX").replace(".", "")
        if not number.rstrip("af").isdigit():
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: {item!r} is not a number such as 9.0 or 9.0+PTX")
        out += [number, f"{number}+PTX"] if item.endswith("+PTX") else [number]
    return out


@dataclass
class Plan:
    """Everything ninja is told, settled before anything is compiled."""

    torch: Path
    pybind11: Path
    cxx: str
    ninja: str
    nvcc: str | None
    architectures: list[str] = field(default_factory=list)
    emulated: bool = False

    @classmethod
    def make(cls) -> Plan:
        torch = package_dir("torch")
        if torch is None or not (torch / "include" / "torch" / "csrc" / "stable").is_dir():
            raise BuildError(
                "torch >= 2.11 with its headers is not installed here: install it first "
                "(where the build has an environment of its own, as with uv: --no-build-isolation)"
            )
        bundled = package_dir("pybind11")
        pybind = bundled / "include" if bundled else torch / "include"
        cxx = os.environ.get("CXX", "") or "g++"
        if shutil.which(cxx.split()[0]) is None:
            raise BuildError(f"no C++ compiler: {cxx!r} was not found (set CXX)")
        scripts = sysconfig.get_path("scripts")
        ninja = shutil.which("ninja", path=scripts) or shutil.which("ninja")
        if ninja is None:
            raise BuildError("ninja was not found (pip install ninja)")
        wanted = option("FLATKERN_CUDA", ("auto", "0", "1", "emulated"))
        nvcc = find_nvcc() if wanted in ("auto", "1") else None
        if wanted == "1" and nvcc is None:
            raise BuildError("FLATKERN_CUDA=1 but nvcc was not found (set CUDA_HOME or NVCC)")
        if wanted == "auto" and not (torch / "lib" / "libtorch_cuda.so").exists():
            nvcc = None
        architectures = cuda_architectures() if nvcc else []
        return cls(torch, pybind, cxx, ninja, nvcc, architectures, emulated=wanted == "emulated")

    @property
    def kind(self) -> str:
        """What sets this build apart from the others in `build/`."""
        if self.emulated:
            return "cuda-emulated"
        return f"cuda-{'-'.join(self.architectures)}" if self.nvcc else "cpu"

    @property
    def flags(self) -> str:
        return "-std=c++17 -O3 -fPIC -fvisibility=hidden -Wall -Wextra -Wno-psabi -Wno-ignored-attributes"

    def ninja_file(self, build: Path) -> str:
        """The build as text: one rule per compiler, one statement per source."""
        x86 = platform.machine() in ("x86_64", "AMD64")
        cuda_flag = " -DFLATKERN_CUDA -DUSE_CUDA" if self.nvcc else ""
        emulation = ROOT / "csrc" / "tests" / "emulation"
        if self.emulated:
            cuda_flag = " -DFLATKERN_CUDA -DFLATKERN_EMULATED_CUDA -Wno-unused-function"
        x86_flag = " -DFLATKERN_X86" if x86 else ""
        includes = f"-isystem {self.torch / 'include'}"
        python = f"-isystem {self.pybind11} -isystem {sysconfig.get_path('include')}"
        quoted = "-DFLATKERN_BUILD_FLAGS='\"-O3\"'"
        architectures = f"-DFLATKERN_CUDA_ARCHITECTURES='\"{' '.join(self.architectures)}\"'"
        torch_link = f"-L{self.torch / 'lib'} -Wl,--no-as-needed -ltorch -ltorch_cpu"
        link = f"{self.cxx} -shared -Wl,--exclude-libs,ALL -o $out $in"
        lines = [
            "ninja_required_version = 1.3",
            "rule cxx",
            f"  command = {self.cxx} {self.flags} $extra -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d\n  deps = gcc\n  description = compile $in",
            f"rule link_native\n  command = {link} -pthread\n  description = link $out",
        ]
        if self.nvcc:
            home = Path(self.nvcc).resolve().parent.parent
            dirs = " ".join(f"-L{d}" for d in (home / "lib64", home / "lib") if d.is_dir())
            codes = " ".join(self.gencode())
            nvlink = f"{self.nvcc} -shared -cudart static -ccbin {self.cxx.split()[-1]} {dirs}"
            lines += [
                "rule nvcc",  # what ptxas says of registers and spills stays beside the object
                f"  command = {self.nvcc} -Xptxas -v -std=c++17 -O3 -ccbin {self.cxx.split()[-1]} -Xcompiler "
                f"-fPIC,-fvisibility=hidden --expt-relaxed-constexpr {codes} "
                "--generate-dependencies-with-compile --dependency-output $out.d -c $in -o $out > $out.log 2>&1 || "
                "(cat $out.log; exit 1)",
                "  depfile = $out.d\n  deps = gcc\n  description = compile $in",
                f"rule link_torch\n  command = {nvlink} -Xlinker --exclude-libs,ALL -o $out $in "
                f"-L{self.torch / 'lib'} -Xlinker --no-as-needed -ltorch -ltorch_cpu",
                "  description = link $out",
            ]
        else:
            lines.append(f"rule link_torch\n  command = {link} {torch_link}\n  description = link $out")

        kernels: list[str] = []
        for source in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
            isa = source.stem.rpartition("_")[2]
            if not x86 and isa in ("avx2", "avx512"):
                continue
            flags = ISA_FLAGS.get(isa, "") + (
                " -ffp-contract=off -fno-math-errno -fno-trapping-math"
                if source.stem.startswith("probes")
                else ""
            )
            kernels.append(self.compile(lines, build, source, flags + x86_flag))
        cuda = [
            self.compile(lines, build, s, "", rule="nvcc", tag="_cu")
            for s in sorted((ROOT / "csrc" / "cuda").glob("*.cu") if self.nvcc else ())
        ]
        if self.emulated:  # nvcc is as silent about the first two
            quiet = "-Wno-unknown-pragmas -Wno-sign-compare"
            cuda = [
                self.compile(
                    lines, build, s, f"{quiet} -DFLATKERN_EMULATED_CUDA -I{emulation} -x c++", tag="_cu"
                )
                for s in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
            ]
            cuda.append(self.compile(lines, build, emulation / "block.cpp", ""))
        target = f"-DTORCH_TARGET_VERSION={TARGET_VERSION} -Wno-unused-parameter"
        about = f"{quoted} {architectures}"
        ops, doors = (
            " ".join(
                self.compile(lines, build, source, extra) for source in sorted((ROOT / "csrc").glob(names))
            )
            for names, extra in (
                ("*ops.cpp", f"{target} {includes}{cuda_flag}"),
                ("*bindings.cpp", f"{python}{cuda_flag} {about}"),
            )
        )
        lines.append(f"build {build / '_C.so'}: link_torch {ops} {' '.join(kernels + cuda)}")
        lines.append(f"build {build / native_name()}: link_native {doors} {' '.join(kernels)}")
        return "\n".join(lines) + "\n"

    def compile(
        self, lines: list[str], build: Path, source: Path, extra: str, rule: str = "cxx", tag: str = ""
    ) -> str:
        out = build / f"{source.stem}{tag}.o"
        lines.append(f"build {out}: {rule} {source}\n  extra = {extra.strip()}")
        return str(out)

    def gencode(self) -> list[str]:
        out = []
        for a in self.architectures:
            number = a.removesuffix("+PTX")
            code = f"compute_{number}" if a.endswith("+PTX") else f"sm_{number}"
            out.append(f"-gencode=arch=compute_{number},code={code}")
        return out

    def info(self) -> dict[str, object]:
        """What the package says about its own build."""
        return {
            "status": "built",
            "reason": "",
            "cuda": self.nvcc is not None,
            "cuda_architectures": self.architectures,
            "compiler": version_of([*self.cxx.split(), "--version"], 0),
            "nvcc": version_of([self.nvcc, "--version"], -2) if self.nvcc else "",
            "torch": torch_version(self.torch),
            "flags": self.flags,
        }


def native_name() -> str:
    return "_native" + str(sysconfig.get_config_var("EXT_SUFFIX"))


def version_of(command: list[str], line: int) -> str:
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return text.splitlines()[line] if text else "unknown"


def torch_version(torch: Path) -> str:
    for line in (torch / "version.py").read_text().splitlines():
        if line.startswith("__version__"):
            return line.split("=")[1].strip().strip("'\"")
    return "unknown"


def compile_all() -> tuple[list[Path], dict[str, object]]:
    """Runs ninja in `build/` (kept, so that a second run compiles only what changed)."""
    plan = Plan.make()
    build = ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-{plan.kind}"
    build.mkdir(parents=True, exist_ok=True)
    text = plan.ninja_file(build)
    file = build / "build.ninja"
    if not file.exists() or file.read_text() != text:
        file.write_text(text)
    jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
    done = subprocess.run([plan.ninja, "-C", str(build), *jobs], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-40:])
        raise BuildError(f"the compiler failed:\n{tail}")
    print(done.stdout.strip().splitlines()[-1])
    return [build / "_C.so", build / native_name()], plan.info()


class NinjaBuildExt(build_ext):
    """Both libraries at once, copied into the source tree (editable) or the wheel's."""

    def run(self) -> None:
        mode = option("FLATKERN_BUILD", ("auto", "required", "skip"))
        built: list[Path] = []
        if mode == "skip":
            info: dict[str, object] = {"status": "skipped", "reason": "built with FLATKERN_BUILD=skip"}
        else:
            try:
                built, info = compile_all()
            except (BuildError, OSError) as error:
                if mode == "required":
                    raise SystemExit(
                        f"flatkern: FLATKERN_BUILD=required and the build failed: {error}"
                    ) from error
                info = {"status": "failed", "reason": str(error)}
                print(f"flatkern: installing without compiled kernels: {error}", file=sys.stderr)
        in_place = self.inplace or getattr(self, "editable_mode", False)
        to = (ROOT if in_place else Path(self.build_lib)) / "flatkern"
        to.mkdir(parents=True, exist_ok=True)
        for old in [*to.glob("_C*.so"), *to.glob("_native*.so")]:
            old.unlink()  # never a library of another build beside the record of this one
        for library in built:
            shutil.copy2(library, to / library.name)
        (to / "_build_info.json").write_text(json.dumps(info, indent=1) + "\n")
        self.written = [str(to / p.name) for p in built] + [str(to / "_build_info.json")]

    def get_outputs(self) -> list[str]:
        return list(getattr(self, "written", []))

    def get_output_mapping(self) -> dict[str, str]:
        return {}


setup(
    ext_modules=[Extension("flatkern._C", []), Extension("flatkern._native", [])],
    cmdclass={"build_ext": NinjaBuildExt},
)
