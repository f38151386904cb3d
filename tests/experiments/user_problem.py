"""What a user of ``flatkern measure`` may have: factories, good and bad."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

X = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (30,), generator=torch.Generator().manual_seed(1))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3))


def make():
    return model(), nn.CrossEntropyLoss(), (X, Y)


def with_loader():
    loader = DataLoader(TensorDataset(X, Y), 7, shuffle=True)
    return {"model": model(), "loss_fn": nn.CrossEntropyLoss(), "data": loader, "params": "0.*"}


def own_loss(output, target):
    return (output - nn.functional.one_hot(target, 3)).square().sum() / 2


def with_own_loss():
    return {"model": model(), "loss_fn": own_loss, "data": [(X, Y)], "reduction": "sum"}


def more_outputs_than_inputs():
    return nn.Linear(2, 3), nn.CrossEntropyLoss(), (X[:, :2], Y)


def tokens():
    net = nn.Sequential(nn.Embedding(6, 4), nn.Flatten(), nn.Linear(8, 3))
    return net, nn.CrossEntropyLoss(), (torch.randint(6, (30, 2)), Y)


def two():
    return model(), (X, Y)


def no_model():
    return "net", nn.CrossEntropyLoss(), (X, Y)


def no_loss():
    return model(), "cross entropy", (X, Y)


def no_data():
    return model(), nn.CrossEntropyLoss(), X


def one_shot():
    return model(), nn.CrossEntropyLoss(), iter([(X, Y)])


def unknown_key():
    return {"model": model(), "loss": nn.CrossEntropyLoss(), "data": (X, Y)}


def fails():
    raise FileNotFoundError("data.bin\nis not here")


def wrong_shape():
    return model(), nn.CrossEntropyLoss(), (X[:, :4], Y)


def not_finite():
    net = model()
    nn.init.constant_(net[0].bias, float("nan"))
    return net, nn.CrossEntropyLoss(), (X, Y)


number = 3
