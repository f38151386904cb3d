"""Any object with ``shape``, ``dtype`` and ``@`` as a linear operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flatkern.operators.base import LinearOperator
from flatkern.operators.identity import digest

__all__ = ["as_operator"]

_FLOATS = (torch.float32, torch.float64)


def as_operator(obj: Any, *, name: str = "op") -> LinearOperator:
    """Adapt a matrix or operator-like object; a :class:`LinearOperator` comes back as it is.

    Args:
        obj: a 2-d torch tensor (dense or sparse), a NumPy array, a SciPy sparse matrix or
            ``scipy.sparse.linalg.LinearOperator``, or any object with ``shape`` (two sizes), ``dtype`` (of
            torch or NumPy; float32 or float64) and ``@`` on [P, k] arrays of its own kind. ``device`` is read
            where it exists.
        name: what to call it in error messages.

    Returns:
        An operator on torch tensors; NumPy-like objects are applied on the CPU, without copies where memory
        can be shared.

    Raises:
        TypeError: a part is missing, or the dtype is not float32 or float64.
        ValueError: not two-dimensional, or an empty shape.

    Example:
        >>> import numpy as np, torch
        >>> from flatkern.operators import as_operator
        >>> as_operator(np.diag([1.0, 2.0])) @ torch.ones(2, dtype=torch.float64)
        tensor([1., 2.], dtype=torch.float64)
    """
    if isinstance(obj, LinearOperator):
        _check_shape(obj.shape, name)
        return obj
    for part in ("shape", "dtype", "__matmul__"):
        if not hasattr(obj, part):
            missing = "@" if part == "__matmul__" else part
            raise TypeError(
                f"{name}: {type(obj).__name__} has no {missing}; expected an operator or a matrix"
            )
    _check_shape(obj.shape, name)
    dtype = obj.dtype if isinstance(obj.dtype, torch.dtype) else _torch_dtype(obj.dtype, name)
    if dtype not in _FLOATS:
        raise TypeError(f"{name}: dtype {obj.dtype} is not float32 or float64; convert it first")
    if isinstance(obj.dtype, torch.dtype):
        return _TorchLike(obj, dtype)
    return _NumpyLike(obj, dtype)


def _check_shape(shape: Any, name: str) -> None:
    if len(shape) != 2:
        raise ValueError(f"{name}: expected two dimensions, got shape {tuple(shape)}")
    if 0 in tuple(shape):
        raise ValueError(f"{name}: shape {tuple(shape)} is empty")


def _torch_dtype(dtype: Any, name: str) -> torch.dtype | None:
    try:
        return {np.dtype("float32"): torch.float32, np.dtype("float64"): torch.float64}.get(np.dtype(dtype))
    except TypeError:
        raise TypeError(f"{name}: dtype {dtype!r} is neither a torch nor a NumPy dtype") from None


class _TorchLike(LinearOperator):
    def __init__(self, obj: Any, dtype: torch.dtype) -> None:
        device = getattr(obj, "device", torch.device("cpu"))
        super().__init__(tuple(obj.shape), dtype, device, layout=getattr(obj, "layout", None))
        if isinstance(obj, Tensor):
            self.layout = None  # torch's `layout` says how a tensor is stored, not where parameters lie
            obj = obj.detach()
        self.obj = obj

    def _identity(self) -> str | None:
        return digest(self.obj) if isinstance(self.obj, Tensor) else None

    def _rows(self, rows: Tensor) -> Tensor:
        return _images(self.obj @ rows.mT, len(rows), self.shape[0])

    def _adjoint_rows(self, rows: Tensor) -> Tensor:
        return _images(_transpose(self.obj) @ rows.mT, len(rows), self.shape[1])


class _NumpyLike(LinearOperator):
    def __init__(self, obj: Any, dtype: torch.dtype) -> None:
        super().__init__(tuple(obj.shape), dtype)
        self.obj = obj

    def _identity(self) -> str | None:
        return digest(self.obj) if isinstance(self.obj, np.ndarray) else None

    def _rows(self, rows: Tensor) -> Tensor:
        return self._images(self.obj @ rows.numpy().T, len(rows), self.shape[0])

    def _adjoint_rows(self, rows: Tensor) -> Tensor:
        return self._images(_transpose(self.obj) @ rows.numpy().T, len(rows), self.shape[1])

    def _images(self, image: Any, k: int, size: int) -> Tensor:
        # an object may compute in another precision than it declares; what it declares is what it gives
        return _images(torch.as_tensor(np.asarray(image)).to(self.dtype), k, size)


def _transpose(obj: Any) -> Any:
    if not hasattr(obj, "T"):
        raise NotImplementedError(f"{type(obj).__name__} has no transpose (.T)")
    return obj.T


def _images(image: Tensor, k: int, size: int) -> Tensor:
    if tuple(image.shape) != (size, k):
        raise ValueError(f"op: its @ on {k} columns gave shape {tuple(image.shape)}, expected {(size, k)}")
    return image.mT
