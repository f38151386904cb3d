"""A strict reader of IDX files, the format of MNIST and its relatives, plain or gzipped.

Layout: two zero bytes, a type code, the number of dimensions, then each dimension as a big-endian 32-bit integer, then
the values. A file that is not exactly this is refused: a picture shifted by one byte still looks like a picture.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flatkern.experiments.errors import UserError

__all__ = ["find_idx", "read_idx"]

_TYPES = {
    0x08: "unsigned byte",
    0x09: "signed byte",
    0x0B: "16-bit integer",
    0x0C: "32-bit integer",
    0x0D: "32-bit float",
    0x0E: "64-bit float",
}


def find_idx(root: Path, stem: str, dims: int) -> Path:
    """The file of ``root`` called ``<stem>-idx<dims>-ubyte`` or ``<stem>.idx<dims>-ubyte``, plain or ``.gz``."""
    names = [f"{stem}{sep}idx{dims}-ubyte{end}" for end in ("", ".gz") for sep in ("-", ".")]
    for name in names:
        if (root / name).is_file():
            return root / name
    raise UserError(f"{root}: there is no {names[0]} or {names[0]}.gz in this folder")


def read_idx(path: Path, dims: int) -> NDArray[np.uint8]:
    """The unsigned bytes of an IDX file with ``dims`` dimensions; :class:`UserError` where anything is amiss."""
    raw = _bytes(path)
    if len(raw) < 4:
        raise UserError(f"{path}: not an IDX file: {len(raw)} bytes are too few for a header")
    if raw[0] or raw[1]:
        raise UserError(
            f"{path}: not an IDX file: it starts with {raw[:4].hex(' ')}, not with two zero bytes"
        )
    code, found = raw[2], raw[3]
    if code not in _TYPES:
        raise UserError(f"{path}: unknown IDX type code 0x{code:02x}")
    if code != 0x08:
        raise UserError(f"{path}: holds values of type {_TYPES[code]}; unsigned bytes are needed")
    if found != dims:
        raise UserError(f"{path}: has {found} dimensions where {dims} are needed")
    start = 4 + 4 * dims
    if len(raw) < start:
        raise UserError(f"{path}: truncated inside the header ({len(raw)} of {start} bytes)")
    shape = struct.unpack(f">{dims}I", raw[4:start])
    need, have = math.prod(shape), len(raw) - start
    if have != need:
        what = "truncated" if have < need else "too long"
        raise UserError(
            f"{path}: {what}: the header {shape} promises {need} bytes of values, the file has {have}"
        )
    if need == 0:
        raise UserError(f"{path}: empty: the header says {shape}")
    return np.frombuffer(raw, dtype=np.uint8, offset=start).reshape(shape)


def _bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from None
    # told by content, not by name: a gunzipped file often keeps its .gz
    if raw[:2] == b"\x1f\x8b":
        try:
            return gzip.decompress(raw)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path}: damaged gzip file: {error}") from None
    if path.suffix == ".gz":
        raise UserError(
            f"{path}: named .gz, but it is not a gzip file (it starts with {raw[:2].hex(' ') or 'nothing'})"
        )
    return raw
