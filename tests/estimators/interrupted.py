"""Operators that fail or press Ctrl-C after some products, and matrices of known spectra."""

import os
import signal

import torch


def symmetric(values, seed=0):
    values = torch.as_tensor(values, dtype=torch.float64)
    g = torch.Generator().manual_seed(seed)
    q = torch.linalg.qr(torch.randn(len(values), len(values), generator=g, dtype=torch.float64)).Q
    matrix = (q * values) @ q.T
    return (matrix + matrix.T) / 2


class KilledError(Exception):
    pass


class Failing:
    """A matrix whose ``@`` raises once ``after`` block products with several columns have been made."""

    def __init__(self, matrix, after=None, *, interrupt=False):
        self.matrix, self.after, self.interrupt, self.blocks = matrix, after, interrupt, 0
        self.shape, self.dtype, self.device = matrix.shape, matrix.dtype, matrix.device

    def __matmul__(self, v):
        if self.after is not None and v.shape[1] > 1 and self.blocks >= self.after:
            if not self.interrupt:
                raise KilledError
            if self.blocks == self.after:
                os.kill(os.getpid(), signal.SIGINT)
        self.blocks += v.shape[1] > 1
        return self.matrix @ v
