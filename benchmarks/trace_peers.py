"""The trace estimators of other packages, each its own function on its own Hessian operator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.trace_networks import LOSS

__all__ = ["PEERS", "Peer", "Run"]

Run = Callable[[int, int], float]
"""(products, seed) → estimate."""


@dataclass(frozen=True)
class Peer:
    """One estimator of one package."""

    package: str
    method: str
    """As :mod:`benchmarks.trace_products` names it."""
    make: Callable[[nn.Module, Tensor, Tensor], Run]
    batched: bool = False
    """Whether all vectors of a step go through one pass, whose memory grows with them."""

    @property
    def share(self) -> int:
        """What the number of products has to be a multiple of."""
        return {"hutchinson": 1, "hutch++": 3, "xtrace": 2}[self.method]

    @property
    def name(self) -> str:
        """Package and method."""
        return f"{self.package}, {self.method}"


def _pyhessian(model: nn.Module, x: Tensor, y: Tensor) -> Run:
    from pyhessian import hessian

    peer = hessian(model, LOSS, data=(x, y), cuda=False)

    def run(products: int, seed: int) -> float:
        torch.manual_seed(seed)
        # its own rule stops where the running mean rests for one step, and at once where the trace is negative
        values = peer.trace(maxIter=products, tol=float("-inf"))
        return sum(values) / len(values)

    return run


def _curvlinops(method: str) -> Callable[[nn.Module, Tensor, Tensor], Run]:
    def make(model: nn.Module, x: Tensor, y: Tensor) -> Run:
        from curvlinops import HessianLinearOperator, hutchpp_trace, xtrace

        peer = HessianLinearOperator(
            model, LOSS, list(model.parameters()), [(x, y)], check_deterministic=False
        )
        estimate = {"hutch++": hutchpp_trace, "xtrace": xtrace}[method]

        def run(products: int, seed: int) -> float:
            torch.manual_seed(seed)
            return float(estimate(peer, products))

        return run

    return make


def _eigenthings(method: str) -> Callable[[nn.Module, Tensor, Tensor], Run]:
    def make(model: nn.Module, x: Tensor, y: Tensor) -> Run:
        from hessian_eigenthings.algorithms.trace import trace
        from hessian_eigenthings.loss_fns import supervised_loss
        from hessian_eigenthings.operators import HessianOperator

        peer = HessianOperator(model, [(x, y)], supervised_loss(LOSS))
        return lambda products, seed: trace(peer, num_matvecs=products, method=method, seed=seed).estimate

    return make


PEERS = (
    Peer("PyHessian", "hutchinson", _pyhessian),
    Peer("curvlinops", "hutch++", _curvlinops("hutch++"), batched=True),
    Peer("curvlinops", "xtrace", _curvlinops("xtrace"), batched=True),
    Peer("hessian-eigenthings", "hutch++", _eigenthings("hutch++")),
    Peer("hessian-eigenthings", "hutchinson", _eigenthings("hutchinson")),
)
