"""‖W‖₂ of dense layers and ‖conv‖₂ of convolutions as the operators they are, with a residual and a certain bound."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from flatkern.bidiagonal import LockstepBidiagonalization

__all__ = ["OperatorNorm", "operator_norm"]

_EXACT_SIDE = 192
"""Dense matrices whose smaller side is at most this: all eigenvalues of their Gram matrix cost less than iterating."""
_ROOM = 64
_RESTARTS = 20
_STARTS: WeakKeyDictionary[nn.Module, Tensor] = WeakKeyDictionary()
"""The last leading vector of each layer, to start the next search from: weights move little between measurements."""


@dataclass(frozen=True)
class OperatorNorm:
    """A layer's largest singular value as a linear map from its input (of one sample) to its output."""

    value: float
    """Never too small by more than rounding where ``residual`` is 0; else a Ritz value, too small by less than that."""
    residual: float
    """A singular value lies within it of ``value``; the search starts at random, so it is the largest."""
    upper: float
    """A bound that holds for certain: ``value`` where exact, √(copies of a pixel) · ‖W as a matrix‖₂ for a
    convolution, ‖W‖_F for a large dense layer."""
    steps: int = 0

    @property
    def safe(self) -> float:
        """``value`` + ``residual``, at most ``upper``: what an upper bound multiplies with."""
        return min(self.value + self.residual, max(self.upper, self.value))


def operator_norm(module: nn.Module, input_shape: torch.Size) -> OperatorNorm:
    """The norm of a linear or convolutional layer on inputs of this shape (of one sample).

    Dense: by eigenvalues of the smaller Gram matrix in float64, or Golub–Kahan where that is larger than 192.
    Convolution: Golub–Kahan on the convolution with its padding, stride, dilation and groups, and its adjoint.
    Iteration goes to a relative residual of 1e-7 for weights in float64, 1e-4 for others (in float32). The norm of the
    kernel reshaped to a matrix is another number: the convolution's is up to √∏⌈k/s⌉ times as large.
    The search starts at the layer's last result with a random part mixed in, so that repeated calls take few steps.
    """
    layer: Any = module
    weight: Tensor = layer.weight.detach()
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    if isinstance(module, nn.Linear):
        if min(weight.shape) <= _EXACT_SIDE:
            value = _matrix_norm(weight)
            return OperatorNorm(value, 0.0, value)
        w = weight.to(dtype)
        frobenius = float(torch.linalg.matrix_norm(w))
        if w.shape[0] > w.shape[1]:
            w = w.T
        return _search(module, w.shape[0], w.dtype, w.device, lambda u: u @ w, lambda v: v @ w.T, frobenius)
    entries = input_shape.numel()
    w = weight.to(dtype)
    point = torch.zeros(1, *input_shape, dtype=dtype, device=weight.device)
    with torch.inference_mode(False), torch.enable_grad():
        point = point.clone().requires_grad_()
        image = layer._conv_forward(point, w.clone() if w.is_inference() else w, None)

    def there(v: Tensor) -> Tensor:
        with torch.no_grad():
            result: Tensor = layer._conv_forward(v.reshape(1, *input_shape), w, None)
        return result.reshape(1, -1)

    def back(u: Tensor) -> Tensor:
        return torch.autograd.grad(image, point, u.reshape(image.shape), retain_graph=True)[0].reshape(1, -1)

    small = min(entries, image.numel())
    pull, push = (back, there) if image.numel() <= entries else (there, back)
    return _search(module, small, dtype, weight.device, pull, push, _certain(layer, weight, point))


def _matrix_norm(weight: Tensor) -> float:
    """‖W‖₂ exactly, by the smaller Gram matrix in float64."""
    w = weight.double()
    gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
    return float(torch.linalg.eigvalsh(gram)[-1].clamp_min(0).sqrt())


def _certain(layer: Any, weight: Tensor, point: Tensor) -> float:
    """√(patches a pixel is in) · (norm of the padding) · max over groups ‖W as a matrix‖₂."""
    matrices = weight.reshape(layer.groups, weight.shape[0] // layer.groups, -1)
    norm = max(_matrix_norm(m) for m in matrices)
    patches = 1
    for kernel, stride, dilation in zip(layer.kernel_size, layer.stride, layer.dilation, strict=True):
        apart = stride // math.gcd(stride, dilation)  # every so many taps fall on the same pixel
        patches *= -(-kernel // apart)
    copies = 1.0
    if layer.padding_mode != "zeros":
        with torch.inference_mode(False), torch.enable_grad():
            padded = nn.functional.pad(point, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            (count,) = torch.autograd.grad(padded.sum(), point)
        copies = float(count.max())  # the padding's Gram matrix is diagonal
    return norm * math.sqrt(patches * copies)


def _search(
    module: nn.Module,
    size: int,
    dtype: torch.dtype,
    device: torch.device,
    pull: Callable[[Tensor], Tensor],
    push: Callable[[Tensor], Tensor],
    certain: float,
) -> OperatorNorm:
    """Restarted Golub–Kahan with one row."""
    rtol = 1e-7 if dtype == torch.float64 else 1e-4
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, size, generator=generator, dtype=torch.float64).to(device, dtype)
    start /= torch.linalg.vector_norm(start)
    known = _STARTS.get(module)
    if known is not None and known.shape == start.shape:
        start = known.to(start) + 0.05 * start  # another direction that has become the largest is seen
    room, steps = min(_ROOM, size), 0
    for _ in range(_RESTARTS):
        run = LockstepBidiagonalization(pull, push, start, room)
        while True:
            run.step()
            if run.steps == room or run.steps % 6 == 0:
                found = run.bidiagonals()
                value, residual = float(found.values[0, 0]), float(found.residuals[0, 0])
                if residual <= rtol * value or run.steps == room:
                    break
        steps += run.steps
        if value == 0:
            return OperatorNorm(0.0, 0.0, certain, steps)
        left = torch.linalg.svd(found.lower[0])[0][:, 0]
        start = (left.to(run.basis) @ run.basis[0])[None]
        if residual <= rtol * value:
            break
    _STARTS[module] = start
    return OperatorNorm(value, residual, certain, steps)
