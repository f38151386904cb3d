"""The direct way to every quantity of the paper: the baseline that flatkern is measured against.

One forward pass a sample; for each sample and output one ``torch.autograd.grad`` for all parameters and one for the
input of each linear or convolutional layer; nothing is copied to the host. It is the published experiment code's
algorithm in its cleanest form (that code, which also copies every gradient to the host, was about twice slower).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


def measure(model: nn.Module, x: Tensor, top: int = 3) -> dict[str, Tensor]:
    """Sharpness, log-volume, MLS, NMLS and local dimensionality of ``model`` on ``x`` [n, ...].

    Returns 0-d tensors (means over samples): ``sharpness`` (1/n) Σ ‖∂f_i/∂θ‖_F², ``log_volume`` ½ log det J Jᵀ,
    ``top_log_volume`` (its ``top`` largest singular values only), ``mls``, ``nmls`` and ``local_dimensionality``.
    """
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    parameters = list(model.parameters())
    inputs: list[Tensor] = []
    hooks = [m.register_forward_pre_hook(lambda _m, args: inputs.append(args[0])) for m in layers]
    sharpness, log_volume, top_volume, dimension = [], [], [], []
    sensitivity: list[list[Tensor]] = [[] for _ in layers]
    try:
        for sample in x:
            inputs.clear()
            point = sample.unsqueeze(0).clone().requires_grad_()
            output = model(point).flatten()
            squared = output.new_zeros(())
            rows: list[list[Tensor]] = [[] for _ in layers]
            for entry in output:
                for gradient in torch.autograd.grad(entry, parameters, retain_graph=True):
                    squared += gradient.square().sum()
                for layer, layer_input in enumerate(inputs):
                    (row,) = torch.autograd.grad(entry, layer_input, retain_graph=True)
                    rows[layer].append(row.flatten())
            sharpness.append(squared)
            for layer, layer_rows in enumerate(rows):
                singular = torch.linalg.svdvals(torch.stack(layer_rows))
                sensitivity[layer].append(singular[0])
                if layer == 0:
                    log_volume.append(singular.log().sum())
                    top_volume.append(singular[:top].log().sum())
                    energy = singular.square()
                    dimension.append(energy.sum().square() / energy.square().sum())
    finally:
        for hook in hooks:
            hook.remove()
    mean = [torch.stack(values).mean() for values in sensitivity]
    return {
        "sharpness": torch.stack(sharpness).mean(),
        "log_volume": torch.stack(log_volume).mean(),
        "top_log_volume": torch.stack(top_volume).mean(),
        "mls": mean[0],
        "nmls": torch.stack(mean).sum(),
        "local_dimensionality": torch.stack(dimension).mean(),
    }
