"""Writing results so that a folder never holds half of them."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from flatkern.experiments.errors import UserError

__all__ = ["staged"]


@contextmanager
def staged(output: Path) -> Iterator[Path]:
    """A temporary sibling of ``output``, moved into its place on success and removed on any failure.

    Opened before the work starts, so a place that cannot be written to is reported at once. Where ``output`` exists
    already, the files of the same name are replaced, one atomic move each, and others stay.
    """
    output = Path(os.path.abspath(output))
    if output.exists() and not output.is_dir():
        raise UserError(f"{output}: the output must be a folder, and this is a file")
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
        if output.is_dir():
            with tempfile.TemporaryFile(dir=output):
                pass
    except FileNotFoundError:
        raise UserError(f"{output}: the folder {output.parent} does not exist") from None
    except OSError as error:
        raise UserError(f"{output}: cannot be written to: {error.strerror or error}") from None
    try:
        yield folder
        _move(folder, output)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, output: Path) -> None:
    folder.chmod(0o777 & ~_umask())  # mkdtemp's 0700 is for secrets
    if not output.exists():
        folder.rename(output)
        return
    for item in sorted(folder.iterdir()):
        os.replace(item, output / item.name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
