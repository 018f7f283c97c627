"""A small model with a head for each task, and methods that show what a call does, for the tests of ``backward``."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

import gradsurgery


class Net(nn.Module):
    """A trunk and one head a task; the third head is used by no loss."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))
        self.to(dtype)

    def forward(self, x, targets=(1.0, -50.0)):
        z = torch.tanh(self.trunk(x))
        return {f"t{i}": (self.heads[i](z) - t).square().mean() for i, t in enumerate(targets)}

    @property
    def shared(self):
        return list(self.trunk.parameters())


def sgd(net, lr=0.1, **options):
    return torch.optim.SGD(net.parameters(), lr=lr, **options)


def grads(module):
    return [None if p.grad is None else p.grad.clone() for p in module.parameters()]


def same(a, b):
    return all((u is None and v is None) or torch.equal(u, v) for u, v in zip(a, b, strict=True))


class Halves(gradsurgery.Weighter):
    """Weights 1, 1/2, 1/4, …"""

    def weights(self, losses):
        return 0.5 ** np.arange(len(losses))


class Counting(gradsurgery.Surgery):
    """Remembers how many steps each task took part in, and draws a number."""

    stateful = True

    def weights(self, gram, losses):
        self.keep("count", self.recall("count", 0.0) + 1)
        self.memory["drawn"] = float(self.rng().random())
        return self.recall("count", 0.0) * (1 + self.memory["drawn"])


def memory_of(optimizer):
    return optimizer.state_dict()["gradsurgery"]["memory"]


def with_bad_row(net, x):
    losses = net(x)
    return {**losses, "t1": losses["t1"] + (net.trunk[0].weight.sum() * 0).sqrt()}


class Nothing(torch.autograd.Function):
    """Passes a tensor on, and no gradient back, which the graph does not tell."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return None
