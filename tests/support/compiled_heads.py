"""A model with three heads under torch.compile. What is joined inside of it cannot be read off the graph."""

from __future__ import annotations

import os

import torch
import torch._functorch.config
from torch import nn

import gradsurgery


class Net(nn.Module):
    """A trunk and three heads, whose outputs come joined (form "cat"), as losses joined ("losses"), or one by one.

    Under "break" the compiler cannot take the model as a whole.
    """

    def __init__(self, form: str):
        super().__init__()
        self.form = form
        self.trunk = nn.Linear(4, 8)
        self.heads = nn.ModuleList(nn.Linear(8, 1) for _ in range(3))

    def forward(self, x):
        z = self.trunk(x).tanh()
        ys = [head(z) for head in self.heads]
        if self.form == "break":
            torch._dynamo.graph_break()
        if self.form == "cat":
            return torch.cat(ys, 1)
        return torch.stack(losses(ys)) if self.form == "losses" else ys


def losses(ys):
    return [10**i * (y - i).square().mean() for i, y in enumerate(ys)]


def train(method, form, backend, compiled):
    """The gradients of four steps, with a checkpoint after two."""
    torch.manual_seed(0)
    net, told = Net(form), []
    if compiled == "heads":
        net.heads = nn.ModuleList(torch.compile(head, backend=backend) for head in net.heads)
    model = torch.compile(net, backend=backend) if compiled == "whole" else net
    optimizer = method(torch.optim.SGD(net.parameters(), lr=1e-3))
    for step in range(4):
        out = model(torch.randn(16, 4, generator=torch.Generator().manual_seed(step)))
        optimizer.zero_grad()
        optimizer.backward(out if form == "losses" else losses(out.unbind(1) if form == "cat" else out))
        told.append([p.grad.clone() for p in net.parameters()])
        optimizer.step()
        if step == 1:  # a checkpoint carries what was learnt about sharing
            saved = optimizer.state_dict()
            optimizer = method(torch.optim.SGD(net.parameters(), lr=1e-3))
            optimizer.load_state_dict(saved)
    return told


def trains_as_an_eager_one(rank, form, backend, compiled):
    """Assert that gradients are those without a compiler; for a process that has compiled nothing yet."""
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"
    torch._functorch.config.donated_buffer = False
    torch.set_num_threads(1)
    for method in (gradsurgery.MGDA, gradsurgery.NashMTL):
        found, wanted = (train(method, form, backend, what) for what in (compiled, ""))
        for step, expected in zip(found, wanted, strict=True):
            for a, b in zip(step, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 * float(b.abs().max()))
