"""Ways to a Hessian-vector product: raw torch, flatkern, and other packages. Each takes and gives what is its own.

A way is made from a model of its own, a list of batches and vectors as rows [k, P]; it returns a function to be
timed. The raw ways and flatkern give flat vectors; PyHessian works on lists of tensors and is not charged for
flattening.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flatkern as fk
from benchmarks.operator_problems import Batch
from flatkern.operators.choosing import SINGLES

Way = Callable[[nn.Module, list[Batch], Tensor], Callable[[], Any]]


def flat(parts: Any) -> Tensor:
    """What a way returned, as one tensor: [P], or [P, k] for several vectors."""
    if isinstance(parts, Tensor):
        return parts
    return torch.cat([t.detach().reshape(-1) for t in parts])


def split(v: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """A flat vector [P], or several [k, P], as views in the parameters' shapes."""
    pieces = v.split([p.numel() for p in parameters], dim=-1)
    return [t.unflatten(-1, p.shape) for t, p in zip(pieces, parameters, strict=True)]


def gradient(model: nn.Module, batches: list[Batch], rows: Tensor) -> Callable[[], Any]:
    """The unit of cost: one gradient of the loss on the same data."""
    parameters = list(model.parameters())

    def run() -> Any:
        for x, y in batches:
            result = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
        return result

    return run


def _kept(model: nn.Module, batches: list[Batch]) -> tuple[list[nn.Parameter], list[tuple[Tensor, ...]]]:
    parameters = list(model.parameters())
    return parameters, [
        torch.autograd.grad(F.cross_entropy(model(x), y), parameters, create_graph=True) for x, y in batches
    ]


def raw_kept(model: nn.Module, batches: list[Batch], rows: Tensor) -> Callable[[], Tensor]:
    """A double-backward graph a batch, kept; the image is flattened as an algorithm on flat vectors needs it."""
    parameters, graphs = _kept(model, batches)

    def one(v: Tensor) -> Tensor:
        total = None
        for gradients in graphs:
            images = torch.autograd.grad(
                gradients, parameters, grad_outputs=split(v, parameters), retain_graph=True
            )
            image = torch.cat([t.reshape(-1) for t in images])
            total = image if total is None else total.add_(image)
        assert total is not None
        return total if len(graphs) == 1 else total.div_(len(graphs))

    return lambda: one(rows[0]) if len(rows) == 1 else torch.stack([one(v) for v in rows]).mT


def raw_batched(model: nn.Module, batches: list[Batch], rows: Tensor) -> Callable[[], Tensor]:
    """The same graph with ``is_grads_batched=True``, that is under vmap: all vectors in one pass."""
    parameters, (gradients,) = _kept(model, batches)

    def run() -> Tensor:
        images = torch.autograd.grad(
            gradients,
            parameters,
            grad_outputs=split(rows, parameters),
            retain_graph=True,
            is_grads_batched=True,
        )
        return torch.cat([t.reshape(len(rows), -1) for t in images], dim=-1).mT

    return run


def _times(op: Any, rows: Tensor) -> Callable[[], Any]:
    vectors = rows[0] if len(rows) == 1 else rows.mT
    for _ in range(1 if len(rows) > 1 else SINGLES + 1):  # a choice of mode or block size is made once
        op @ vectors
    return lambda: op @ vectors


def flatkern_hessian(model: nn.Module, batches: list[Batch], rows: Tensor) -> Callable[[], Any]:
    """``fk.hessian(...) @ v``, graphs kept."""
    return _times(fk.hessian(model, nn.CrossEntropyLoss(), batches), rows)


def flatkern_graphs(model: nn.Module, batches: list[Batch], rows: Tensor) -> Callable[[], Any]:
    """``fk.hessian(..., mode="kept") @ v``: autograd's graphs and not tangent programs."""
    return _times(fk.hessian(model, nn.CrossEntropyLoss(), batches, mode="kept"), rows)


def flatkern_rebuilt(model: nn.Module, batches: list[Batch], rows: Tensor) -> Callable[[], Any]:
    """``fk.hessian(..., max_memory=0) @ v``: nothing is kept between products."""
    return _times(fk.hessian(model, nn.CrossEntropyLoss(), batches, max_memory=0), rows)


def flatkern_ggn(model: nn.Module, batches: list[Batch], rows: Tensor) -> Callable[[], Any]:
    """``fk.ggn(...) @ v``: another matrix, for comparison of cost."""
    return _times(fk.ggn(model, nn.CrossEntropyLoss(), batches), rows)


def pyhessian_kept(model: nn.Module, batches: list[Batch], rows: Tensor) -> Callable[[], Any]:
    """PyHessian's ``data=`` path: a kept graph, one batch."""
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    (batch,) = batches
    peer = hessian(model, nn.CrossEntropyLoss(), data=batch, cuda=False)
    vectors = split(rows[0], peer.params)
    return lambda: hessian_vector_product(peer.gradsH, peer.params, vectors)


def pyhessian_loader(model: nn.Module, batches: list[Batch], rows: Tensor) -> Callable[[], Any]:
    """PyHessian's ``dataloader=`` path: graphs rebuilt in every product."""
    from pyhessian import hessian

    peer = hessian(model, nn.CrossEntropyLoss(), dataloader=batches, cuda=False)
    vectors = split(rows[0], peer.params)
    return lambda: peer.dataloader_hv_product(vectors)[1]


def hessian_eigenthings(model: nn.Module, batches: list[Batch], rows: Tensor) -> Callable[[], Any]:
    """hessian-eigenthings' operator: graphs rebuilt in every product."""
    from hessian_eigenthings.loss_fns import supervised_loss
    from hessian_eigenthings.operators import HessianOperator

    peer = HessianOperator(model, batches, supervised_loss(nn.CrossEntropyLoss()))
    return lambda: peer @ rows[0]


def curvlinops(model: nn.Module, batches: list[Batch], rows: Tensor) -> Callable[[], Any]:
    """Curvlinops' operator: forward over reverse under vmap."""
    from curvlinops import HessianLinearOperator

    peer = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), list(model.parameters()), batches, check_deterministic=False
    )
    return _times(peer, rows)


ONE: dict[str, Way] = {
    "gradient": gradient,
    "raw torch, kept graph": raw_kept,
    "flatkern": flatkern_hessian,
    "flatkern, kept graphs": flatkern_graphs,
    "flatkern, nothing kept": flatkern_rebuilt,
    "flatkern GGN": flatkern_ggn,
    "PyHessian, data=": pyhessian_kept,
    "PyHessian, dataloader=": pyhessian_loader,
    "hessian-eigenthings": hessian_eigenthings,
    "curvlinops": curvlinops,
}
LOADER: dict[str, Way] = {
    name: way for name, way in ONE.items() if name not in ("PyHessian, data=", "flatkern GGN")
}
EIGHT: dict[str, Way] = {
    "gradient": gradient,
    "raw torch, loop": raw_kept,
    "raw torch, batched": raw_batched,
    "flatkern": flatkern_hessian,
    "flatkern, kept graphs": flatkern_graphs,
    "flatkern GGN": flatkern_ggn,
    "curvlinops": curvlinops,
}
