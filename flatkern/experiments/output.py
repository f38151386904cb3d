"""Writing results so that a folder never holds half of them, and numbers so that every reader gets them right."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flatkern.experiments.errors import UserError

__all__ = ["plain", "staged", "write_csv", "write_json"]


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


def plain(value: Any) -> Any:
    """A value in terms of JSON: NaN is null, infinities are the strings "Infinity" and "-Infinity"."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, str | bool | int) or value is None:
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Sequence):
        return [plain(v) for v in value]
    number = float(value)
    if math.isnan(number):
        return None
    if math.isinf(number):
        return "Infinity" if number > 0 else "-Infinity"
    return number


def write_json(path: Path, value: Any) -> None:
    """Write valid JSON (see :func:`plain`)."""
    path.write_text(
        json.dumps(plain(value), indent=1, allow_nan=False, ensure_ascii=False) + "\n", encoding="utf-8"
    )


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write one line a row; columns in order of first appearance, NaN and missing values empty, infinities ``inf``."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        for row in rows:
            writer.writerow([_cell(row.get(column)) for column in columns])


def _cell(value: Any) -> Any:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return repr(value) if isinstance(value, float) else value
