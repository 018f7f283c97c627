"""What goes wrong between two steps leaves everything as it was: gradients, memory, optimizer and parameters."""

from __future__ import annotations

import copy
import errno
import io

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import gradsurgery
from tests.support.loops import (
    METHODS,
    NAMES,
    OPTIMIZERS,
    Net,
    end_epoch,
    gradients,
    inputs,
    losses_of,
    propose,
    same,
    train,
)

OVER_METHODS = pytest.mark.parametrize("name", METHODS)
STEPS = range(5)


class Fragile(torch.autograd.Function):
    """Passes on what it gets; a countdown says at which backward pass it fails, and with what."""

    countdown = 0
    error: BaseException = RuntimeError("the device is gone")

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        Fragile.countdown -= 1
        if Fragile.countdown == 0:
            raise Fragile.error
        return grad


@pytest.fixture(autouse=True)
def robust():
    Fragile.countdown = 0
    yield
    Fragile.countdown = 0


class FragileNet(Net):
    """The trunk may fail when it is differentiated."""

    def forward(self, x):
        z = Fragile.apply(torch.tanh(self.trunk(x)))
        targets = (1.0, -3.0, 9.0)
        return {name: head(z) - t for name, head, t in zip(NAMES, self.heads, targets, strict=True)}


def everything(net, optimizer):
    """All that a failed call could spoil, copied."""
    return copy.deepcopy([net.state_dict(), gradients(net), optimizer.state_dict()])


def fail_everywhere(optimizer, net, call, error=None):
    """Make each backward pass of a call fail in turn; returns how many there were."""
    Fragile.error = error or RuntimeError("the device is gone")
    for failing in range(1, 200):
        before = everything(net, optimizer)
        Fragile.countdown = failing
        try:
            call()
        except type(Fragile.error):
            assert Fragile.countdown == 0
            assert same(everything(net, optimizer), before)
        else:
            return failing - 1
    raise AssertionError("the call never came to its end")


@OVER_METHODS
def test_a_backward_pass_that_fails_leaves_no_trace(name):
    """Each pass of each of the first steps fails once. The run then ends as one in which nothing failed."""
    net, twin = FragileNet(), Net()
    optimizer, reference = (METHODS[name](OPTIMIZERS["adamw"](n.parameters())) for n in (net, twin))
    train(name, reference, twin, STEPS)
    failures = 0
    for t in STEPS:
        optimizer.zero_grad()

        def call(t=t):
            residuals = net(inputs(t))
            propose(optimizer, residuals, losses_of(residuals))

        failures += fail_everywhere(optimizer, net, call)
        Fragile.countdown = 0
        optimizer.step()
        end_epoch(name, optimizer)
    assert failures >= len(STEPS)
    assert same(net.state_dict(), twin.state_dict())
    assert same(optimizer.state_dict(), reference.state_dict())


ENGINES = {
    "rows": (gradsurgery.PCGrad, {}, {}),
    "one pass": (gradsurgery.UncertaintyWeighter, {}, {}),
    "coordinates": (gradsurgery.GradDrop, {}, {}),
    "kept rows": (gradsurgery.MoCo, {}, {}),
    "by parameter": (gradsurgery.MGDA, {"granularity": "parameter"}, {}),
    "logarithms": (gradsurgery.MGDA, {"log_losses": True}, {}),
    "norms": (gradsurgery.NormalizedGradientWeighter, {}, {}),
    "features": (gradsurgery.MGDA, {}, {"features": True}),
    "a retained graph": (gradsurgery.PCGrad, {}, {"retain_graph": True}),
    "cadence": (gradsurgery.MGDA, {"every": 2}, {}),
    "micro-batches": (gradsurgery.MGDA, {}, {"accumulate": True}),
    "functions": (gradsurgery.MGDA, {}, {"functions": True}),
    "reentrant checkpointing": (gradsurgery.MGDA, {}, {"reentrant": True}),
    "reentrant checkpointing, one pass": (gradsurgery.UncertaintyWeighter, {}, {"reentrant": True}),
}


@pytest.mark.parametrize("error", [RuntimeError("the device is gone"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_from_before_are_still_there_after_a_failure(engine, error):
    """Two micro-batches are added up by hand; the second fails, is repeated, and counts once."""
    build, switches, options = ENGINES[engine]
    found = []
    for fragile in (False, True):
        net = FragileNet()
        optimizer = build(OPTIMIZERS["sgd"](net.parameters()), **switches)

        def losses_at(t, net=net):
            trunk = lambda x: Fragile.apply(torch.tanh(net.trunk(x)))  # noqa: E731
            x = inputs(t).requires_grad_()
            z = checkpoint(trunk, x, use_reentrant=True) if "reentrant" in options else trunk(x)
            return z, losses_of({n: head(z) - i for i, (n, head) in enumerate(zip(NAMES, net.heads, strict=True))})

        def call(t, optimizer=optimizer, net=net):
            given = {key: value for key, value in options.items() if key in ("retain_graph", "accumulate")}
            if "functions" in options:
                losses = {name: lambda name=name: losses_at(t, net)[1][name] for name in NAMES}
            else:
                z, losses = losses_at(t, net)
                given |= {"features": z} if "features" in options else {}
            optimizer.backward(losses, **given)

        call(0)
        if fragile:
            assert fail_everywhere(optimizer, net, lambda: call(1), error) >= 1
        else:
            call(1)
        Fragile.countdown = 0
        if "accumulate" in options:
            optimizer.backward(losses_at(2)[1])
        optimizer.step()
        found.append(everything(net, optimizer))
    assert same(*found)


def test_a_failure_while_a_checkpointed_block_is_computed_again():
    net = FragileNet()
    optimizer = gradsurgery.PCGrad(OPTIMIZERS["sgd"](net.parameters()))
    forwards = 0

    def trunk(x):
        nonlocal forwards
        forwards += 1
        if forwards > 2:  # once forward, once for the first loss
            raise RuntimeError("out of memory")
        return torch.tanh(net.trunk(x))

    z = checkpoint(trunk, inputs(0), use_reentrant=False)
    losses = losses_of({n: head(z) - i for i, (n, head) in enumerate(zip(NAMES, net.heads, strict=True))})
    before = everything(net, optimizer)
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.backward(losses)
    assert same(everything(net, optimizer), before)


def test_a_step_of_the_base_that_fails_commits_nothing():
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            raise RuntimeError("no step")

    net = Net()
    optimizer = gradsurgery.MoCo(Broken(net.parameters(), lr=0.1))
    optimizer.backward(losses_of(net(inputs(0))))
    before = everything(net, optimizer)
    with pytest.raises(RuntimeError, match="no step"):
        optimizer.step()
    assert same(everything(net, optimizer), before)


# ------------------------------------------------------------------------------------------------------- checkpoints


class FullDisk(io.RawIOBase):
    """Takes some bytes and then no more."""

    def __init__(self, room):
        self.room = room

    def writable(self):
        return True

    def write(self, data):
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(data)


@OVER_METHODS
def test_a_full_disk_harms_the_file_and_nothing_else(name):
    nets = [Net(), Net()]
    optimizers = [METHODS[name](OPTIMIZERS["adamw"](net.parameters())) for net in nets]
    for net, optimizer, full in zip(nets, optimizers, (False, True), strict=True):
        train(name, optimizer, net, range(2))
        # Between `backward` and `step`, where there is a proposal to lose.
        optimizer.zero_grad()
        residuals = net(inputs(2))
        propose(optimizer, residuals, losses_of(residuals))
        if full:
            before = everything(net, optimizer)
            with pytest.raises((OSError, RuntimeError), match=r"No space left|unexpected pos"):
                torch.save(optimizer.state_dict(), FullDisk(1000))
            assert same(everything(net, optimizer), before)
        optimizer.step()
        end_epoch(name, optimizer)
        train(name, optimizer, net, range(3, 5))
    assert same(everything(nets[0], optimizers[0]), everything(nets[1], optimizers[1]))


def trained(name="PCGrad over GradNormWeighter", steps=3):
    net = Net()
    optimizer = METHODS[name](OPTIMIZERS["adamw"](net.parameters()))
    train(name, optimizer, net, range(steps))
    return net, optimizer


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_file_cut_short_is_not_loaded(share, tmp_path):
    net, optimizer = trained()
    path = tmp_path / "checkpoint.pt"
    torch.save(optimizer.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    before = everything(net, optimizer)
    with pytest.raises((RuntimeError, OSError), match=r"PytorchStreamReader failed|Invalid argument"):
        optimizer.load_state_dict(torch.load(path, weights_only=True))
    assert same(everything(net, optimizer), before)


@pytest.mark.parametrize("lost", ["state", "param_groups", "class", "version", "memory", "inner"])
def test_a_state_that_lacks_a_part_is_refused_by_name(lost):
    _, source = trained()
    saved = copy.deepcopy(source.state_dict())
    (saved if lost in saved else saved["gradsurgery"]).pop(lost)
    net, optimizer = trained(steps=2)
    before = everything(net, optimizer)
    with pytest.raises((KeyError, ValueError), match=lost):
        optimizer.load_state_dict(saved)
    assert same(everything(net, optimizer), before)


def test_a_memory_without_its_count_of_steps_is_refused():
    net, optimizer = trained(steps=2)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["gradsurgery"]["memory"] = {}
    before = everything(net, optimizer)
    with pytest.raises(ValueError, match=r"lacks memory\['step'\]"):
        optimizer.load_state_dict(saved)
    assert same(everything(net, optimizer), before)


@pytest.mark.parametrize("broken", [None, 3, "cut", []])
@pytest.mark.parametrize("part", ["memory", "gradsurgery"])
def test_a_part_that_is_no_dict_is_refused_by_name(part, broken):
    _, source = trained()
    saved = copy.deepcopy(source.state_dict())
    (saved if part in saved else saved["gradsurgery"])[part] = broken
    net, optimizer = trained(steps=2)
    before = everything(net, optimizer)
    if part == "gradsurgery" and broken is None:  # as if it were not there
        optimizer.load_state_dict(saved)
        return
    with pytest.raises(ValueError, match=f"'{part}'.*Nothing was loaded"):
        optimizer.load_state_dict(saved)
    assert same(everything(net, optimizer), before)


def test_a_state_of_another_model_is_refused_and_nothing_moves():
    _, source = trained()
    net = nn.Linear(2, 2)
    optimizer = METHODS["PCGrad over GradNormWeighter"](OPTIMIZERS["adamw"](net.parameters()))
    before = everything(net, optimizer)
    with pytest.raises(ValueError, match="doesn't match the size of optimizer's group"):
        optimizer.load_state_dict(source.state_dict())
    assert same(everything(net, optimizer), before)
