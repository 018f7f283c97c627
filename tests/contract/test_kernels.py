"""How many operations a step adds to m bare backward passes: each is a kernel on an accelerator, where small ones cost
as much as large ones. Counted on the CPU."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import gradsurgery


class Counter(TorchDispatchMode):
    """Counts what is dispatched and makes new numbers; views and allocations cost no kernel."""

    FREE = (
        *("empty", "detach", "view", "reshape", "slice", "select", "split", "unbind", "transpose", "as_strided"),
        *("squeeze", "alias", "expand", "permute", "t.default", "unflatten", "lift_fresh", "promote_types"),
        "_local_scalar_dense",
    )

    def __init__(self):
        super().__init__()
        self.count = 0
        self.syncs = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__ if hasattr(func, "__name__") else str(func)
        self.syncs += "_local_scalar_dense" in name or "nonzero" in name
        self.count += not any(free in name for free in self.FREE)
        return func(*args, **(kwargs or {}))


def deep(layers, tasks):
    torch.manual_seed(0)
    trunk = nn.Sequential(*(layer for _ in range(layers) for layer in (nn.Linear(6, 6), nn.Tanh())))
    return trunk, nn.ModuleList(nn.Linear(6, 1) for _ in range(tasks))


def beyond(layers, tasks, method=gradsurgery.PCGrad, **switches):
    """Operations and waits beyond those of m bare backward passes."""
    trunk, heads = deep(layers, tasks)
    params = [*trunk.parameters(), *heads.parameters()]
    x = torch.randn(4, 6)

    def losses():
        z = trunk(x)
        return [(head(z) - i).square().mean() for i, head in enumerate(heads)]

    optimizer = method(torch.optim.SGD(params, lr=0.1), **switches)
    optimizer.backward(losses())
    optimizer.zero_grad()
    given = losses()
    with Counter() as bare:
        for i, loss in enumerate(given):
            torch.autograd.grad(loss, params, retain_graph=i < tasks - 1, allow_unused=True)
    given = losses()
    with Counter() as ours:
        optimizer.backward(given)
    return ours.count - bare.count, ours.syncs


@pytest.mark.parametrize("method", [gradsurgery.PCGrad, gradsurgery.MGDA, gradsurgery.UPGrad])
def test_small_parameters_share_their_kernels(method):
    """Ten times the parameters, and the same number of operations beyond the backward passes."""
    (few, _), (many, _) = beyond(4, 5, method), beyond(40, 5, method)
    assert many == few
    assert few < 80


def test_operations_grow_with_the_losses_not_with_losses_times_parameters():
    (few, _), (many, _) = beyond(20, 2), beyond(20, 12)
    assert many - few < 10 * 20


@pytest.mark.parametrize("engine", ["rows", "ghosts", "blocks"])
def test_the_host_waits_for_nothing_but_one_transfer(engine):
    """On the CPU a transfer is no operation; anything else that reads a number is."""
    assert beyond(6, 4, engine=engine)[1] == 0
