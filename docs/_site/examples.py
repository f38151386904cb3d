"""Runs the examples for the gallery; what they gave is kept until an example or the package changes."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

CACHE = Path("build") / "gallery"
# how to run the scripts that take more than one command or a folder to write to; the others run as they are
COMMANDS = {
    "hessian_spectrum": [["{script}", "."]],
    "monitor_training": [["{script}", "."]],
    "measure_factory": [
        ["{script}", "checkpoints"],
        ["-m", "flatkern.cli", "measure", "{script}:make", "--checkpoint"]
        + [f"checkpoints/epoch-{epoch}.pt" for epoch in range(4)]
        + ["--output", "."],
    ],
}


@dataclass(frozen=True)
class Shown:
    """An example, what it printed and the figures it wrote."""

    path: Path
    output: str
    figures: list[Path]


def run_examples(root: Path) -> list[Shown]:
    """All of ``examples/*.py``, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted([*(root / "flatkern").rglob("*.py"), *root.glob("examples/*.py"), Path(__file__)]):
        digest.update(path.read_bytes())
    cache = root / CACHE / digest.hexdigest()[:16]
    with ThreadPoolExecutor(max_workers=2) as pool:  # each waits for a process of its own
        scripts = sorted(root.glob("examples/*.py"))
        return list(pool.map(lambda script: _shown(root, script, cache / script.stem), scripts))


def _shown(root: Path, script: Path, folder: Path) -> Shown:
    output = folder / "output.json"
    if not output.exists():
        folder.mkdir(parents=True, exist_ok=True)
        commands = COMMANDS.get(script.stem, [["{script}"]])
        texts = [_run(root, [word.format(script=script) for word in words], folder) for words in commands]
        output.write_text(json.dumps("".join(texts)), encoding="utf-8")
    return Shown(script, json.loads(output.read_text(encoding="utf-8")), sorted(folder.glob("*.png")))


def _run(root: Path, words: list[str], folder: Path) -> str:
    """The standard output of one command; a failure ends the build and shows what it wrote."""
    environment = os.environ | {
        "PYTHONPATH": str(root),
        "MPLBACKEND": "agg",
        "COLUMNS": "110",
        "NO_COLOR": "1",
    }
    environment.setdefault("OMP_NUM_THREADS", "1")  # small models: threads only wait for each other
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)} failed with {done.returncode}:\n{done.stderr[-2000:]}")
    return done.stdout
