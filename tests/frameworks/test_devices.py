"""What a method keeps between steps moves with the model: to another device, and to another precision."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import gradsurgery
from tests.support import catalogue, weighting_catalogue

STATEFUL = [
    row
    for row in (*catalogue.CATALOGUE, *weighting_catalogue.CATALOGUE)
    if row.build(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)).stateful
]
every = pytest.mark.parametrize("row", STATEFUL, ids=lambda row: row.name)


class Elsewhere(torch.Tensor):
    """A tensor as if on another device: it can be sent to one, and takes part in nothing else."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.to and any(isinstance(a, torch.device) for a in (*args, *(kwargs or {}).values())):
            return torch.Tensor.to(args[0].as_subclass(torch.Tensor), *args[1:], **(kwargs or {})).clone()
        if func is torch.Tensor.as_subclass:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        raise RuntimeError(f"{func.__name__}: Expected all tensors to be on the same device.")


def mapped(memory, change):
    """The same memory with every tensor replaced."""
    if isinstance(memory, torch.Tensor):
        return change(memory)
    if isinstance(memory, dict):
        return {key: mapped(value, change) for key, value in memory.items()}
    if isinstance(memory, list):
        return [mapped(value, change) for value in memory]
    return memory


class Net(nn.Module):
    """A trunk and three heads, whose losses are positive and differ."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) / 2)

    def forward(self, t):
        p = self.trunk[0].weight
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(t), dtype=torch.float64).to(p)
        z = torch.tanh(self.trunk(x))
        return {
            f"t{i}": (h(z) - y).square().mean() + 0.1
            for i, (h, y) in enumerate(zip(self.heads, (1, -3, 9), strict=True))
        }


def started(row, state=None):
    """A model and the method around its optimizer; from a checkpoint, if there is one."""
    net = Net()
    optimizer = row.build(torch.optim.SGD(net.parameters(), lr=0.01))
    if state is not None:
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
    return net, optimizer


def train(row, net, optimizer, steps):
    for t in steps:
        optimizer.zero_grad()
        optimizer.backward(net(t))
        optimizer.step()
        if getattr(row, "epochs", False):
            optimizer.epoch_end()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def saved(row, steps=4):
    net, optimizer = started(row)
    train(row, net, optimizer, range(steps))
    return {"net": net.state_dict(), "optimizer": optimizer.state_dict()}


def check_change_of_device(row):
    net, optimizer = started(row)
    expected = train(row, net, optimizer, range(8))
    state = saved(row)
    away = mapped(state["optimizer"], lambda t: t.as_subclass(Elsewhere))
    net, optimizer = started(row, {"net": state["net"], "optimizer": away})
    assert torch.equal(train(row, net, optimizer, range(4, 8)), expected)
    mapped(optimizer.state_dict(), lambda t: pytest.fail("a tensor stayed behind") if type(t) is Elsewhere else t)


@every
def test_memory_from_another_device_is_moved_before_it_is_used(row):
    check_change_of_device(row)


class Homebody(gradsurgery.MoCo):
    """Uses what it kept where it is."""

    def row_state(self, key, name, params):
        kept = self.memory.get(key, {}).get(name, {})
        return [kept.get(self.place(p)) for p in params]


def test_the_check_rejects_a_method_that_uses_memory_where_it_is():
    row = catalogue.Row("Homebody", Homebody, "gram", golden=([], None, []))
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        check_change_of_device(row)


def test_some_methods_keep_tensors():
    seen = []
    for row in STATEFUL:
        mapped(saved(row, steps=2)["optimizer"]["gradsurgery"], seen.append)
    assert len(seen) > 50, "otherwise there is nothing to move"


@every
def test_memory_loads_onto_the_cpu(row):
    net, optimizer = started(row)
    expected = train(row, net, optimizer, range(8))
    file = io.BytesIO()
    torch.save(saved(row), file)
    file.seek(0)
    net, optimizer = started(row, torch.load(file, map_location="cpu", weights_only=True))
    assert torch.equal(train(row, net, optimizer, range(4, 8)), expected)


@every
@pytest.mark.parametrize(("before", "after"), [("float", "double"), ("double", "float"), ("float", "bfloat16")])
def test_memory_follows_a_change_of_precision(row, before, after):
    net, optimizer = started(row)
    getattr(net, before)()
    train(row, net, optimizer, range(4))
    getattr(net, after)()
    found = train(row, net, optimizer, range(4, 8))
    kept = []
    mapped(optimizer.state_dict()["gradsurgery"], kept.append)
    assert {t.dtype for t in kept} <= {torch.float64 if after == "double" else torch.float32}, "no better and no worse"
    net, optimizer = started(row)
    getattr(net, before)()
    expected = train(row, net, optimizer, range(8))
    tolerance = 0.05 if after == "bfloat16" else 1e-4
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)
