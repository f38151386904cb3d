"""The state of a long run on disk: written atomically, refused where it belongs to another run."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
import zipfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from flatkern.operators.base import LinearOperator

__all__ = ["Checkpoint", "require_seed"]

_FORMAT = 1
_ABOUT = "__about__"  # the entry that says, as JSON in bytes, whose state it is
_write: Any = np.savez  # its stub takes the entries for options
_PROBE = "__product__"  # A v of an operator that cannot say what it is


def require_seed(path: str | os.PathLike[str] | None, generator: torch.Generator | None) -> None:
    """Refuse a checkpoint together with a generator: a later process could not tell where it stood."""
    if path is not None and generator is not None:
        raise ValueError("generator: a run with checkpoint= must be repeatable; give seed= instead")


class Checkpoint:
    """State that lets a killed run go on to bit-identical results.

    On construction an existing file is read into ``state``; the number of threads and the operator's engine
    (mode, block size) it was written under are taken over until :meth:`close`, since they decide rounding.
    An operator that does not know what it is (``_identity()`` is ``None``) is recognised by its product with
    one fixed pseudo-random vector, to 64 eps; that product is made whenever such a checkpoint is opened, and
    is not in any estimator's count.

    A file is replaced as a whole (temporary file in the same folder, fsync, ``os.replace``), so a kill at any
    moment leaves the old or the new one. It is an npz without pickles; numbers are checked by their CRC.
    One run a file at a time.

    Args:
        path: the file; ``None`` turns every call into a no-op.
        what: the estimator's name.
        op: the operator.
        settings: what the results depend on (seed, probes, steps ...): JSON values, or tensors, which are
            compared by hash.
        seconds: least time between two writes that :meth:`due` asks for.

    Attributes:
        state: the tensors of the earlier run, on the host, or ``None``. Set it to ``None`` once taken over,
            to free them.

    Raises:
        TypeError, ValueError: ``path`` or ``seconds`` cannot be used, or the file is that of another
            estimator, of other settings or of another operator, or is damaged; the message says which.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        *,
        what: str,
        op: LinearOperator,
        settings: Mapping[str, Any],
        seconds: float = 30.0,
    ) -> None:
        if isinstance(seconds, bool) or not isinstance(seconds, (int, float)) or not 0 <= seconds < math.inf:
            raise ValueError(f"checkpoint_seconds: expected seconds ≥ 0, got {seconds!r}")
        self.state: dict[str, Tensor] | None = None
        self._seconds, self._op, self._written = seconds, op, time.monotonic()
        self._before: tuple[int, dict[str, Any]] | None = None
        self._path = None if path is None else _usable(path)
        if self._path is None:
            return
        self._about: dict[str, Any] = {
            "format": _FORMAT,
            "what": what,
            "settings": {key: _plain(value) for key, value in settings.items()},
            "operator": {
                "shape": list(op.shape),
                "dtype": str(op.dtype),
                "device": op.device.type,
                "identity": op._identity(),
            },
        }
        self._probe: Tensor | None = None
        self._before = (torch.get_num_threads(), op._engine())
        try:
            op._freeze_engine()  # so that a run goes on as it would have gone on
            if self._path.exists():
                self._read(self._path)
            elif self._about["operator"]["identity"] is None:
                self._probe = self._product()
        except BaseException:
            self.close()
            raise

    @property
    def writes(self) -> bool:
        """Whether there is a file; asked before a state is put together that nobody would keep."""
        return self._path is not None

    def due(self) -> bool:
        """Whether it is time to write; looks at the clock only."""
        return self._path is not None and time.monotonic() - self._written >= self._seconds

    def save(self, /, **tensors: Tensor) -> None:
        """Write the state, replacing the earlier one.

        Raises:
            OSError: the disk is full or the folder is gone; the earlier file is still there.
        """
        if self._path is None:
            return
        about = {**self._about, "threads": torch.get_num_threads(), "engine": self._op._engine()}
        arrays = {key: value.detach().cpu().numpy() for key, value in tensors.items()}
        arrays[_ABOUT] = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
        if self._probe is not None:
            arrays[_PROBE] = self._probe.numpy()
        temporary = self._path.with_name(self._path.name + ".tmp")
        try:
            with open(temporary, "wb") as file:
                _write(file, **arrays)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self._path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(self._path.parent)
        self._written = time.monotonic()

    def close(self) -> None:
        """Give back the number of threads and the engine that were set before."""
        if self._before is not None:
            threads, engine = self._before
            self._before = None
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            self._op._use_engine(engine)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- an earlier run's file ----------------------------------------------------------------------
    def _read(self, path: Path) -> None:
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = {key: torch.from_numpy(np.array(file[key])) for key in file.files}
            about = json.loads(bytes(arrays.pop(_ABOUT).numpy()))
            written = {key: about[key] for key in ("format", "what", "settings", "operator")}
            threads, engine = int(about["threads"]), dict(about["engine"])
        except (OSError, EOFError, ValueError, KeyError, TypeError, MemoryError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"checkpoint: {path} cannot be read as a checkpoint ({type(error).__name__}: {error}); it is "
                "damaged or no such file; delete it, or give another path"
            ) from error
        self._compare(path, written)
        if threads != torch.get_num_threads():
            torch.set_num_threads(threads)
        self._op._use_engine(engine)
        self._op._freeze_engine()
        probe = arrays.pop(_PROBE, None)
        if probe is not None:
            now = self._product()
            allowed = 64 * torch.finfo(self._op.dtype).eps * float(torch.linalg.vector_norm(probe.double()))
            if not float(torch.linalg.vector_norm((now - probe).double())) <= allowed:
                self._refuse(
                    path, "the operator's product with a fixed vector differs (other weights or data)"
                )
            self._probe = probe
        self.state = arrays

    def _compare(self, path: Path, written: dict[str, Any]) -> None:
        if written["format"] != _FORMAT:
            self._refuse(path, f"its format is {written['format']} and this flatkern writes {_FORMAT}")
        if written["what"] != self._about["what"]:
            self._refuse(path, f"it holds a run of {written['what']}, not of {self._about['what']}")
        old, new = written["operator"], self._about["operator"]
        for key in ("shape", "dtype", "device"):
            if old.get(key) != new[key]:
                self._refuse(path, f"the operator's {key} was {old.get(key)} and is {new[key]}")
        if old.get("identity") != new["identity"]:
            self._refuse(path, "the operator is another one (other weights, data, loss or matrix entries)")
        old, new = written["settings"], self._about["settings"]
        differing = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
        if differing:
            said = "; ".join(f"{key} was {old.get(key)!r} and is {new.get(key)!r}" for key in differing)
            self._refuse(path, said)

    @staticmethod
    def _refuse(path: Path, why: str) -> None:
        raise ValueError(
            f"checkpoint: {path} belongs to another run: {why}; delete it, or give another path to start anew"
        )

    def _product(self) -> Tensor:
        generator = torch.Generator().manual_seed(0x5EED)
        vector = torch.randn(self._op.shape[1], generator=generator, dtype=self._op.dtype)
        return (self._op @ vector.to(self._op.device)).detach().cpu()


def _usable(path: str | os.PathLike[str]) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"checkpoint: expected a path, got {type(path).__name__}")
    usable = Path(path).absolute()
    if usable.is_dir():
        raise ValueError(f"checkpoint: {usable} is a folder; give a file in it")
    if not usable.parent.is_dir():
        raise ValueError(f"checkpoint: the folder {usable.parent} does not exist; create it first")
    if not os.access(usable.parent, os.W_OK):
        raise ValueError(f"checkpoint: the folder {usable.parent} cannot be written to")
    return usable


def _plain(value: Any) -> Any:
    """A setting as JSON gives it back; a tensor as its kind and hash."""
    if isinstance(value, Tensor):
        array = value.detach().cpu().contiguous().numpy()
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:16]
        return f"{value.dtype} {list(value.shape)} {digest}"
    return json.loads(json.dumps(value))


def _sync_folder(folder: Path) -> None:
    # makes the renaming itself durable; not every system can open a folder
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
