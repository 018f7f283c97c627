"""What a user may pass as losses, and what a bad one is told. A bad call must change nothing."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

import gradsurgery

METHODS = {
    "PCGrad": lambda base, model: gradsurgery.PCGrad(base),
    "MGDA": lambda base, model: gradsurgery.MGDA(base),
    "GradNormWeighter": lambda base, model: gradsurgery.GradNormWeighter(base, model.trunk.weight),
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x):
        z = torch.tanh(self.trunk(x))
        return self.left(z).square().mean(), (self.right(z) - 1).square().mean()


@pytest.fixture(params=METHODS)
def setting(request):
    model = Model().double()
    optimizer = METHODS[request.param](torch.optim.SGD(model.parameters(), lr=0.1), model)
    return model, optimizer, torch.randn(8, 3, dtype=torch.float64)


def grads(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


CONTAINERS = {
    "list": (lambda a, b: [a, b], ("0", "1")),
    "tuple": (lambda a, b: (a, b), ("0", "1")),
    "generator": (lambda a, b: (x for x in (a, b)), ("0", "1")),
    "dict": (lambda a, b: {"left": a, "right": b}, ("left", "right")),
    "named tuple": (Pair, ("left", "right")),
    "1-d tensor": (lambda a, b: torch.stack([a, b]), ("0", "1")),
    "one-element losses": (lambda a, b: [a.reshape(1), b.reshape(1, 1)], ("0", "1")),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_every_container_gives_the_same_gradients_and_its_own_names(setting, kind):
    model, optimizer, x = setting
    optimizer.backward(list(model(x)))
    expected = grads(model)
    optimizer.zero_grad()
    build, names = CONTAINERS[kind]
    report = optimizer.backward(build(*model(x)))
    assert tuple(report.losses) == names
    assert tuple(report.weights) == names
    for got, want in zip(grads(model), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_stacked_tensor_keeps_heads_private():
    model = Model().double()
    optimizer = gradsurgery.PCGrad(torch.optim.SGD(model.parameters(), lr=0.1))
    x = torch.randn(8, 3, dtype=torch.float64)
    report = optimizer.backward(torch.stack(model(x)))
    trunk = list(model.trunk.parameters())
    trunk_only = [torch.autograd.grad(model(x)[i], trunk) for i in range(2)]
    norms = [sum(g.square().sum() for g in row).sqrt() for row in trunk_only]
    assert list(report.norms.values()) == pytest.approx([float(n) for n in norms], rel=1e-12)


def test_absent_tasks_are_left_out(setting):
    model, optimizer, x = setting
    report = optimizer.backward({"left": None, "right": model(x)[1]})
    assert tuple(report.losses) == ("right",)
    assert model.left.weight.grad is None
    assert model.right.weight.grad is not None


def detached(model, x):
    with torch.no_grad():
        return model(x)[0] * 0.5


BAD = {
    "detached": (
        lambda m, x: {"good": m(x)[1], "bad": detached(m, x)},
        RuntimeError,
        r"'bad'.*no_grad\(\).*\.detach\(\)",
    ),
    "detached 1-d tensor": (lambda m, x: torch.stack(m(x)).detach(), RuntimeError, r"no_grad\(\).*\.detach\(\)"),
    "not a scalar": (
        lambda m, x: {"good": m(x)[1], "bad": m.trunk(x)},
        ValueError,
        r"'bad' must be a scalar.*\(8, 4\)",
    ),
    "not floating point": (lambda m, x: {"bad": torch.tensor(3)}, TypeError, r"'bad'.*floating point.*int64"),
    "complex": (lambda m, x: {"bad": m(x)[0] * 1j}, TypeError, r"'bad'.*floating point.*complex"),
    "not a tensor": (lambda m, x: {"good": m(x)[1], "bad": 0.5}, TypeError, r"'bad'.*tensor.*float"),
    "a string": (lambda m, x: "loss", TypeError, r"`losses`.*str"),
    "one scalar": (lambda m, x: m(x)[0], TypeError, r"`losses`.*shape \(\)"),
    "a name that is no string": (lambda m, x: {1: m(x)[0]}, TypeError, r"strings, got 1"),
    "empty list": (lambda m, x: [], ValueError, r"empty"),
    "empty dict": (lambda m, x: {}, ValueError, r"empty"),
    "empty tensor": (lambda m, x: torch.zeros(0, requires_grad=True), ValueError, r"empty"),
    "all None": (lambda m, x: {"a": None, "b": None}, ValueError, r"every loss is None"),
    "twice the same": (lambda m, x: dict.fromkeys("ab", m(x)[0]), ValueError, r"'a' and 'b' are the same tensor"),
    "reaches nothing": (
        lambda m, x: {"good": m(x)[1], "bad": nn.Linear(3, 1).double()(x).mean()},
        RuntimeError,
        r"'bad' reaches no parameter",
    ),
    "meta and real": (
        lambda m, x: {"good": m(x)[1], "bad": torch.zeros((), device="meta", requires_grad=True)},
        ValueError,
        r"'bad' on meta",
    ),
    "not finite": (lambda m, x: {"good": m(x)[1], "bad": m(x)[0] * float("inf")}, RuntimeError, r"value of 'bad'"),
    "gradient not finite": (
        lambda m, x: {"good": m(x)[1], "bad": (m.trunk.weight.sum() * 0).sqrt() + m.left.weight.sum()},
        RuntimeError,
        r"gradient of 'bad'",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_loss_is_named_and_nothing_changes(setting, kind):
    model, optimizer, x = setting
    optimizer.backward(dict(zip(("good", "bad"), reversed(model(x)), strict=True)))
    optimizer.step()
    before, memory = grads(model), optimizer.state_dict()["gradsurgery"]
    build, error, message = BAD[kind]
    with pytest.raises(error, match=rf"{type(optimizer).__name__}\.backward.*{message}"):
        optimizer.backward(build(model, x))
    for now, then in zip(grads(model), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)
    assert optimizer.state_dict()["gradsurgery"] == memory
    optimizer.step()
    assert optimizer.state_dict()["gradsurgery"] == memory, "a failed call must leave nothing to commit"


def test_a_freed_graph_is_explained(setting):
    model, optimizer, x = setting
    losses = model(x)
    optimizer.backward(losses)
    before = grads(model)
    with pytest.raises(RuntimeError, match=r"already freed.*retain_graph=True"):
        optimizer.backward(losses)
    for now, then in zip(grads(model), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)
    optimizer.zero_grad()
    losses = model(x)
    optimizer.backward(losses, retain_graph=True)
    optimizer.backward(losses)


def test_names_must_stay_for_a_method_with_state():
    model = Model()
    optimizer = gradsurgery.GradNormWeighter(torch.optim.SGD(model.parameters(), lr=0.1), model.trunk.weight)
    x = torch.randn(8, 3)
    optimizer.backward(dict(zip("ab", model(x), strict=True)))
    optimizer.step()
    with pytest.raises(ValueError, match=r"names of the losses must stay the same.*\['a', 'b'\].*\['a', 'c'\].*None"):
        optimizer.backward(dict(zip("ac", model(x), strict=True)))
    with pytest.raises(ValueError, match="Pass a dict"):
        optimizer.backward([*model(x), model(x)[0]])
    optimizer.backward({"b": model(x)[1], "a": None})


def test_losses_by_group():
    values = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    ids = torch.tensor([0, 2, 2])
    losses = gradsurgery.losses_by_group(values, ids, groups=["day", "night", "rain"])
    assert list(losses) == ["day", "night", "rain"]
    assert losses["night"] is None
    losses["rain"].backward()
    assert values.grad.tolist() == [0.0, 0.5, 0.5]
    assert list(gradsurgery.losses_by_group(values, ids)) == ["0", "2"]
    for arguments, message in (
        ((values, ids, 2), r"`group_ids` must be among 0 … 1, got \[2\]"),
        ((values[:2], ids), "same shape"),
        ((values, ids.float()), "integers"),
    ):
        with pytest.raises(ValueError, match=message):
            gradsurgery.losses_by_group(*arguments)


def test_a_function_may_find_its_task_absent():
    p = torch.nn.Parameter(torch.ones(2))
    optimizer = gradsurgery.PCGrad(torch.optim.SGD([p], lr=0.1))
    assert optimizer.backward({"a": lambda: p.sum(), "b": lambda: None}).names == ("a",)
    with pytest.raises(ValueError, match="every loss is None"):
        optimizer.backward([lambda: None])


# ------------------------------------------------------------------------------------------- the other arguments

ARGUMENTS = {
    "other_optimizers: a module": (
        {"other_optimizers": [nn.Linear(1, 1)]},
        r"`other_optimizers` must be optimizers.*Linear",
    ),
    "others: parameters": (
        {"others": list(nn.Linear(1, 1).parameters())},
        r"`other_optimizers` must be optimizers.*Parameter",
    ),
    "other_optimizers: None": ({"other_optimizers": None}, r"`other_optimizers` must be optimizers.*NoneType"),
    "features: a name": ({"features": "z"}, r"`features` must be .*str"),
    "features: a number": ({"features": 3}, r"`features` must be .*int"),
    "features: None in a list": ({"features": [None]}, r"`features` must be .*NoneType"),
    "features: without a graph": ({"features": torch.zeros(3)}, r"`features` must .*graph"),
    "features: a dict": ({"features": {"z": torch.zeros(3)}}, r"`features` must be .*str"),
    "scaler: a scale": ({"scaler": 1024.0}, r"`scaler` must be a gradient scaler.*1024\.0"),
}


@pytest.mark.parametrize("kind", ARGUMENTS)
def test_arguments_that_cannot_be_used_are_named(setting, kind):
    model, optimizer, x = setting
    options, message = ARGUMENTS[kind]
    with pytest.raises(TypeError, match=rf"{type(optimizer).__name__}\.backward: {message}"):
        optimizer.backward(list(model(x)), **options)
    assert all(g is None for g in grads(model))


def test_one_other_optimizer_needs_no_list():
    found = []
    for listed in (True, False):
        model, x = Model().double(), torch.ones(2, 3, dtype=torch.float64)
        torch.nn.init.ones_(model.right.weight)
        other = torch.optim.SGD(model.right.parameters(), lr=0.1)
        rest = [*model.trunk.parameters(), *model.left.parameters()]
        optimizer = gradsurgery.PCGrad(torch.optim.SGD(rest, lr=0.1))
        optimizer.backward(list(model(x)), other_optimizers=[other] if listed else other)
        found.append(model.right.weight.grad is not None)
    assert found == [True, True]
