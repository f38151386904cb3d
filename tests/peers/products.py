"""Other packages' matrices, formed from their own products with unit vectors; each skips where it is missing."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn


def columns(product, size):
    """The matrix whose products these are, float64."""
    eye = torch.eye(size, dtype=torch.float64)
    return torch.stack([product(e).detach() for e in eye], dim=1)


def size_of(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def split(v, model):
    chosen = [p for p in model.parameters() if p.requires_grad]
    pieces = v.split([p.numel() for p in chosen])
    return [t.view(p.shape) for t, p in zip(pieces, chosen, strict=True)]


def flat(parts):
    return torch.cat([t.reshape(-1) for t in parts])


def pyhessian_operator(model, loss, **data):
    """PyHessian's class; it changes the model's mode and gradients, so it gets a copy."""
    pyhessian = pytest.importorskip("pyhessian")
    return pyhessian.hessian(copy.deepcopy(model), loss, cuda=False, **data)


def pyhessian_kept(model, loss, x, y):
    peer = pyhessian_operator(model, loss, data=(x, y))
    utils = pytest.importorskip("pyhessian.utils")
    return columns(
        lambda v: flat(utils.hessian_vector_product(peer.gradsH, peer.params, split(v, model))),
        size_of(model),
    )


def pyhessian_loader(model, loss, batches):
    peer = pyhessian_operator(model, loss, dataloader=batches)
    return columns(lambda v: flat(peer.dataloader_hv_product(split(v, model))[1]), size_of(model))


def eigenthings_operator(model, loss, batches, kind="hessian"):
    operators = pytest.importorskip("hessian_eigenthings.operators")
    losses = pytest.importorskip("hessian_eigenthings.loss_fns")
    if kind == "hessian":
        return operators.HessianOperator(model, batches, losses.supervised_loss(loss))
    if kind == "ggn":
        of_output = losses.supervised_loss_of_output(loss)
        return operators.GGNOperator(model, batches, losses.supervised_forward, of_output)
    return operators.EmpiricalFisherOperator(model, batches, losses.supervised_per_sample_loss(loss))


def eigenthings(model, loss, batches, kind="hessian"):
    peer = eigenthings_operator(model, loss, batches, kind)
    return columns(lambda v: peer @ v, size_of(model))


def curvlinops_operator(model, loss, batches, kind="hessian"):
    curvlinops = pytest.importorskip("curvlinops")
    make = {
        "hessian": curvlinops.HessianLinearOperator,
        "ggn": curvlinops.GGNLinearOperator,
        "empirical": curvlinops.EFLinearOperator,
    }[kind]
    chosen = [p for p in model.parameters() if p.requires_grad]
    return make(model, loss, chosen, batches, check_deterministic=False)


def curvlinops(model, loss, batches, kind="hessian"):
    peer = curvlinops_operator(model, loss, batches, kind)
    return (peer @ torch.eye(size_of(model), dtype=torch.float64)).detach()


def backpack_parts(model, loss, x, y):
    """The diagonal of the GGN [P] and the gradient of each sample's share of the loss [n, P]."""
    backpack = pytest.importorskip("backpack")
    extensions = pytest.importorskip("backpack.extensions")
    model, loss = backpack.extend(copy.deepcopy(model)), backpack.extend(copy.deepcopy(loss))
    with backpack.backpack(extensions.DiagGGNExact(), extensions.BatchGrad()):
        loss(model(x), y).backward()
    diagonal = flat([p.diag_ggn_exact for p in model.parameters()])
    return diagonal, torch.cat([p.grad_batch.flatten(1) for p in model.parameters()], dim=1)


def relative_error(peer, truth):
    """How far a peer's matrix is from the true one, or what it raises."""
    try:
        return float((peer() - truth).abs().max() / truth.abs().max())
    except pytest.skip.Exception:
        raise
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:200]


CLASSIFIER_LOSSES = {"ce": nn.CrossEntropyLoss(), "mse": nn.MSELoss(), "bce": nn.BCEWithLogitsLoss()}


def targets(loss, n):
    if isinstance(loss, nn.CrossEntropyLoss):
        return torch.arange(n) % 3
    y = torch.randn(n, 3, dtype=torch.float64)
    return y if isinstance(loss, nn.MSELoss) else y.sigmoid()
