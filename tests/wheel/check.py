"""`make wheel-check`: one wheel, built beside one torch, installed into fresh environments with several.

Everything happens in a temporary folder that is removed at the end: what a wheel needs is copied there, so that neither
the working tree nor its build folder plays a part. The wheel comes from a plain ``pip wheel`` in the first environment,
and must hold every file of the package. Each environment is removed before the next is made, as a CUDA build of torch
takes 5 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SMOKE = Path(__file__).with_name("smoke.py")
SOURCES = ("setup.py", "pyproject.toml", "LICENSE", "README.md", "csrc", "flatkern")
BUILT = ("*.so", "_build_info.json", "__pycache__")
GIGABYTES = 8
"""Free space that is asked for: a CUDA build of torch, its archives while they are unpacked, and the wheel."""


def run(*command: str | Path, cwd: Path) -> str:
    """A command's output; its whole output and exit where it fails. Nothing of this process's settings goes along."""
    ours = ("FLATKERN_", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        env={**clean, "FLATKERN_BUILD": "required"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"wheel-check: {' '.join(map(str, command))} failed\n{done.stdout}\n{done.stderr}")
    return done.stdout


def build(python: Path, folder: Path) -> Path:
    """The wheel, by a plain isolated ``pip wheel`` of a copy of the sources."""
    source = folder / "source"
    source.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns(*BUILT))
        else:
            shutil.copy(ROOT / name, source)
    files = {str(p.relative_to(source)) for p in (source / "flatkern").rglob("*") if p.is_file()}
    run(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source, cwd=folder)
    (wheel,) = folder.glob("flatkern-*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    files |= {"flatkern/_C.so", "flatkern/_build_info.json"}
    if missing := sorted(files - held):
        sys.exit(f"wheel-check: the wheel lacks {', '.join(missing)}")
    if not any(name.startswith("flatkern/_native.") for name in held):
        sys.exit("wheel-check: the wheel lacks flatkern/_native")
    return wheel


def check(versions: list[str], folder: Path) -> list[dict[str, str]]:
    """What `smoke.py` says in each environment."""
    wheel: Path | None = None
    results = []
    for version in versions:
        begun, place = time.monotonic(), folder / f"torch-{version}"
        print(f"wheel-check: an environment with torch {version} ...", flush=True)
        venv.create(place, with_pip=True)
        python = place / "bin" / "python"
        run(python, "-m", "pip", "install", "-q", "--no-cache-dir", f"torch=={version}", cwd=folder)
        if wheel is None:
            print("wheel-check: the wheel ...", flush=True)
            wheel = build(python, folder)
            print(f"wheel-check: {wheel.name}, {wheel.stat().st_size / 1e6:.1f} MB", flush=True)
        run(python, "-m", "pip", "install", "-q", "--no-cache-dir", wheel, cwd=folder)
        run(python, "-m", "pip", "check", cwd=folder)
        run(place / "bin" / "flatkern", "info", cwd=folder)
        found = json.loads(run(python, SMOKE, cwd=folder).splitlines()[-1])
        if found["torch"].split("+")[0] != version:
            sys.exit(f"wheel-check: torch {found['torch']} was installed, not {version}")
        results.append({**found, "minutes": f"{(time.monotonic() - begun) / 60:.1f}"})
        shutil.rmtree(place)
    return results


def table(rows: list[dict[str, str]]) -> str:
    """Columns as wide as their widest entry."""
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("versions", nargs="+", help="versions of torch; the wheel is built beside the first")
    parser.add_argument(
        "--tmp", type=Path, help="where the temporary folder goes; default that of the system"
    )
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="flatkern-wheel-", dir=given.tmp) as name:
        free = shutil.disk_usage(name).free / 1e9
        if free < GIGABYTES:
            sys.exit(
                f"wheel-check: {name} has {free:.1f} GB left and needs {GIGABYTES}; choose another by --tmp"
            )
        rows = check(given.versions, Path(name))
    print(table(rows))
    print("wheel-check: passed")


if __name__ == "__main__":
    main()
