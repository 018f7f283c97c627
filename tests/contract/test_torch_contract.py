"""The wrapper is a true torch optimizer: one section for each line of the contract, numbered as there.

The yardstick is always the bare optimizer. A wrapped one trains and writes down the gradients it left in ``.grad``; a
twin of the model, stepped by the bare optimizer, replays them. Parameters and optimizer state must then agree bit for
bit: whatever a scheduler, a scaler, a hook or a checkpoint does, it must do to both in the same way.
"""

from __future__ import annotations

import copy
import inspect
import io
import os
import pickle
import re
import subprocess
import sys
import warnings
import weakref
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.func import functional_call
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop, lr_scheduler, swa_utils
from torch.optim import optimizer as torch_optimizer

import gradsurgery
from gradsurgery import MGDA, AdaTask, GradNormWeighter, MTAdam, MultiAdam, PCGrad
from gradsurgery.optimizer import MultiLossOptimizer
from gradsurgery.surgery.per_loss_adam import Descent, PerLossAdam

pytestmark = pytest.mark.filterwarnings("error")

# ----------------------------------------------------------------------------------------------------------- the tables

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda params: SGD(params, lr=0.05, momentum=0.9),
    "adam": lambda params: Adam(params, lr=0.02),
    "adamw": lambda params: AdamW(params, lr=0.02),
    "adamw-fused": lambda params: AdamW(params, lr=0.02, fused=True),
    "rmsprop": lambda params: RMSprop(params, lr=0.01, momentum=0.5),
    "adagrad": lambda params: Adagrad(params, lr=0.05),
    "lbfgs": lambda params: LBFGS(params, lr=0.2, max_iter=2),
}

METHODS: dict[str, Callable[[Optimizer, nn.Module], MultiLossOptimizer]] = {
    "pcgrad": lambda base, model: PCGrad(base),
    "mgda": lambda base, model: MGDA(base),
    "gradnorm": lambda base, model: GradNormWeighter(base, model.trunk.parameters()),
    "composed": lambda base, model: PCGrad(GradNormWeighter(base, model.trunk.parameters())),
    "cadence": lambda base, model: PCGrad(base, every=2, warmup=1),
}
# The optimizers with moments for each loss take the place of a torch optimizer. What steps along the direction that
# they leave in `.grad` is the yardstick here.
MOMENTS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
MOMENTS_3: dict[str, Any] = {**MOMENTS, "betas": (0.9, 0.99, 0.8)}
OWN: dict[str, Callable[[Any], PerLossAdam]] = {
    "multiadam": lambda params: MultiAdam(params, **MOMENTS),
    "adatask": lambda params: AdaTask(params, **MOMENTS),
    "mtadam": lambda params: MTAdam(params, **MOMENTS_3),
}
OWN_BASES = {"multiadam": "moments", "adatask": "moments", "mtadam": "moments-3"}
STEPS_ALONG: dict[str, Callable[[Any], Optimizer]] = {
    "moments": lambda params: Descent(params, {**MOMENTS}),
    "moments-3": lambda params: Descent(params, {**MOMENTS_3}),
}
# GradNorm is told its `shared_params`; the others find every parameter anew in each call.
FINDS_PARAMETERS = ["pcgrad", "mgda"]

# Every optimizer under PCGrad, and every method over optimizers of each kind. All pairs run in one test.
PAIRS = [("pcgrad", optimizer) for optimizer in OPTIMIZERS] + [
    ("mgda", "adam"),
    ("mgda", "lbfgs"),
    ("gradnorm", "sgd"),
    ("gradnorm", "adamw-fused"),
    ("gradnorm", "lbfgs"),
    ("composed", "adagrad"),
    ("composed", "adamw-fused"),
    ("cadence", "adam"),
    *OWN_BASES.items(),
]
# L-BFGS insists on a closure and on one group, and torch's pickling loses its parameter list, wrapped or not.
PLAIN_PAIRS = [pair for pair in PAIRS if pair[1] != "lbfgs"]


def _momentum(optimizer: Optimizer) -> bool:
    return "momentum" in optimizer.defaults or "betas" in optimizer.defaults


def _lr(optimizer: Optimizer) -> float:
    return float(optimizer.param_groups[0]["lr"])


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 1 / (1 + epoch)),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, step_size=2, gamma=0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, milestones=[1, 3], gamma=0.5),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, factor=0.5, total_iters=2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, start_factor=0.25, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, gamma=0.7),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, total_iters=4, power=2.0),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, T_0=2),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, factor=0.5), lr_scheduler.ExponentialLR(o, gamma=0.8)], milestones=[2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, gamma=0.8), lr_scheduler.StepLR(o, step_size=2, gamma=0.5)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, factor=0.5, patience=0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, base_lr=_lr(o) / 4, max_lr=_lr(o), step_size_up=2, cycle_momentum=_momentum(o)
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=2 * _lr(o), total_steps=8, cycle_momentum=_momentum(o)),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.5 * _lr(o), anneal_epochs=3),
}


def table(pairs: list[tuple[str, str]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("method", "optimizer"), pairs, ids=map("-".join, pairs))


ALL_PAIRS = table([*((method, optimizer) for method in METHODS for optimizer in OPTIMIZERS), *OWN_BASES.items()])
PAIR_TABLE = table(PAIRS)
PLAIN_PAIR_TABLE = table(PLAIN_PAIRS)
METHOD_TABLE = pytest.mark.parametrize("method", [*METHODS, *OWN])
# Where the test brings the optimizer that is wrapped.
WRAPPER_TABLE = pytest.mark.parametrize("method", METHODS)


# ------------------------------------------------------------------------------------- a small problem full of conflict


class Net(nn.Module):
    """A trunk and three heads; the second head begins as the mirror image of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * 0.5)
            for mirror, p in zip(self.heads[1].parameters(), self.heads[0].parameters(), strict=True):
                mirror.copy_(-0.7 * p)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        z = torch.tanh(self.trunk(x))
        return tuple(head(z) for head in self.heads)


def losses(model: Callable[[Tensor], tuple[Tensor, ...]], step: int) -> dict[str, Tensor]:
    """Three regressions on the batch that belongs to the step."""
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(8, 3, generator=generator)
    left, right, middle = model(x)
    target = 1.5 + x[:, :1]
    return {
        "left": (left - target).square().mean(),
        "right": 3 * (right - target).square().mean(),
        "middle": (middle + target).abs().mean(),
    }


def innermost(optimizer: Optimizer) -> Optimizer:
    """The torch optimizer under all wrappers."""
    while isinstance(optimizer, MultiLossOptimizer):
        optimizer = optimizer.base
    return optimizer


def over(method: str, optimizer: str) -> str:
    """What a method is over: this optimizer, unless it brings its own."""
    return OWN_BASES.get(method, optimizer)


def make(method: str, optimizer: str, model: Net, params: Any = None) -> MultiLossOptimizer:
    """A method, over this optimizer unless it brings its own, of some parameters of a model, by default all."""
    params = model.parameters() if params is None else params
    return OWN[method](params) if method in OWN else METHODS[method](OPTIMIZERS[optimizer](params), model)


def make_bare(optimizer: str, params: Any) -> Optimizer:
    """An optimizer by itself."""
    return (OPTIMIZERS | STEPS_ALONG)[optimizer](params)


def build(method: str, optimizer: str) -> tuple[Net, MultiLossOptimizer]:
    """A fresh model and its wrapped optimizer."""
    model = Net()
    return model, make(method, optimizer, model)


def bare(optimizer: str) -> tuple[Net, Optimizer]:
    """A fresh model and its bare optimizer."""
    model = Net()
    return model, make_bare(optimizer, model.parameters())


def gradients(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


#: For every step, the value and the gradients of each evaluation in it: one, or as many as the closure was called.
Log = list[list[tuple[float, list["Tensor | None"]]]]


def train(optimizer: Any, model: nn.Module, steps: Sequence[int], scaler: GradScaler | None = None) -> Log:
    """Train with the wrapper, or with something that poses as one, and write down what it left in ``.grad``."""
    log: Log = []
    for step in steps:
        evaluations: list[tuple[float, list[Tensor | None]]] = []

        def closure(step: int = step, evaluations: list[Any] = evaluations) -> float:
            optimizer.zero_grad()
            report = optimizer.backward(losses(model, step), scaler=scaler)
            evaluations.append((report.objective, gradients(model)))
            return report.objective

        if isinstance(innermost(optimizer), LBFGS):
            optimizer.step(closure)
        else:
            closure()
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
        log.append(evaluations)
    return log


def replay(optimizer: Optimizer, model: nn.Module, log: Log) -> None:
    """Step a bare optimizer with the gradients that a wrapper wrote down; it must ask for each of them once."""
    for evaluations in log:
        left = iter(evaluations)

        def closure(left: Iterator[tuple[float, list[Tensor | None]]] = left) -> float:
            value, saved = next(left)
            for p, g in zip(model.parameters(), saved, strict=True):
                p.grad = None if g is None else g.clone()
            return value

        if isinstance(optimizer, LBFGS):
            optimizer.step(closure)
        else:
            closure()
            optimizer.step()
        assert next(left, None) is None, "the bare optimizer evaluated less often"


def difference(a: Any, b: Any, where: str = "") -> str | None:
    """Where two values differ in type or in any bit, through containers; None if nowhere."""
    if type(a) is not type(b):
        return f"{where}: {type(a).__name__} is not {type(b).__name__}"
    if isinstance(a, Tensor):
        if a.dtype == b.dtype and torch.equal(a, b):
            return None
    elif isinstance(a, (dict, list, tuple)):
        keys, others = (list(x) if isinstance(x, dict) else list(range(len(x))) for x in (a, b))
        if keys == others:
            found = (difference(a[key], b[key], f"{where}[{key!r}]") for key in keys)
            return next((text for text in found if text), None)
        a, b = keys, others
    elif a == b:
        return None
    return f"{where}: {a} is not {b}"


def same(a: Any, b: Any) -> bool:
    return difference(a, b) is None


def assert_same(a: Any, b: Any) -> None:
    found = difference(a, b)
    assert found is None, found


def assert_same_training(model: nn.Module, optimizer: Any, twin: nn.Module, other: Optimizer) -> None:
    """Parameters, and all that torch would save, agree bit for bit, and training did move."""
    moved = [not torch.equal(p, start) for p, start in zip(model.parameters(), Net().parameters(), strict=True)]
    assert all(moved)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q), f"{name} differs by {(p - q).abs().max():.1e}"
    assert_same(torchs_part(optimizer.state_dict()), torchs_part(other.state_dict()))


def carry_over(source: tuple[nn.Module, Optimizer], target: tuple[nn.Module, Optimizer]) -> None:
    """Bring a checkpoint from one model and optimizer to another; torch's loading by itself would share the tensors."""
    for one, other in zip(source, target, strict=True):
        other.load_state_dict(copy.deepcopy(one.state_dict()))


def torchs_part(state: dict[str, Any]) -> dict[str, Any]:
    return {key: state[key] for key in ("state", "param_groups")}


def ours(optimizer: Any) -> dict[str, Any]:
    """A private copy of what the method itself saves."""
    return copy.deepcopy(optimizer.state_dict()["gradsurgery"])


def assert_step_not_patched(optimizer: Optimizer) -> None:
    """No class of ours carries torch's profiling hook, which would run every hook a second time."""
    for cls in type(optimizer).__mro__:
        if issubclass(cls, MultiLossOptimizer):
            assert not hasattr(vars(cls).get("step"), "hooked"), f"{cls.__name__}.step was patched"


def test_the_problem_is_one_where_the_method_matters() -> None:
    # Without conflict a wrapper that ignored its method would pass most of what follows.
    model, wrapped = build("pcgrad", "sgd")
    report = wrapped.backward(losses(model, 0))
    assert report.conflict_rate == pytest.approx(2 / 3)
    surgery = model.trunk.weight.grad.clone()
    model.zero_grad()
    sum(losses(model, 0).values()).backward()
    assert (surgery - model.trunk.weight.grad).norm() > 0.1 * surgery.norm()


@ALL_PAIRS
def test_a_wrapped_optimizer_steps_as_the_bare_one(method: str, optimizer: str) -> None:
    model, wrapped = build(method, optimizer)
    twin, other = bare(optimizer)
    replay(other, twin, train(wrapped, model, range(4)))
    assert_same_training(model, wrapped, twin, other)


# ----------------------------------------------------------------------------------------------- row 1: is an Optimizer


@PAIR_TABLE
def test_row01_is_an_optimizer(method: str, optimizer: str) -> None:
    _, wrapped = build(method, optimizer)
    assert isinstance(wrapped, Optimizer)
    assert issubclass(MultiLossOptimizer, Optimizer)


# ---------------------------------------------------------------------------- row 2: param_groups are those of the base


@PAIR_TABLE
def test_row02_groups_are_the_bases_own_also_after_loading(method: str, optimizer: str) -> None:
    _, wrapped = build(method, optimizer)
    base = innermost(wrapped)

    def assert_shared() -> None:
        assert wrapped.param_groups is base.param_groups
        assert "param_groups" not in vars(wrapped)

    assert_shared()
    before = wrapped.param_groups
    wrapped.load_state_dict(wrapped.state_dict())  # torch puts a new list and new dicts in place
    assert base.param_groups is not before
    assert_shared()
    base.load_state_dict(base.state_dict())
    assert_shared()
    wrapped.param_groups[0]["lr"] = 0.125
    assert base.param_groups[0]["lr"] == 0.125


def test_row02_groups_can_be_assigned() -> None:
    model, wrapped = build("composed", "adam")
    groups = [dict(wrapped.param_groups[0], lr=0.25)]
    wrapped.param_groups = groups
    assert innermost(wrapped).param_groups is groups
    train(wrapped, model, range(1))
    moved = (model.trunk.weight - Net().trunk.weight).abs()
    assert torch.allclose(moved, torch.full_like(moved, 0.25), rtol=1e-3)  # Adam's first step has the length lr


def test_row02_repr_shows_the_groups() -> None:
    _, wrapped = build("pcgrad", "sgd")
    assert repr(wrapped).startswith("PCGrad (")
    assert "momentum: 0.9" in repr(wrapped)


@pytest.mark.parametrize("average", ["swa", "ema"])
@METHOD_TABLE
def test_row02_swa_and_ema(method: str, average: str) -> None:
    model, wrapped = build(method, "sgd")
    twin, other = bare(over(method, "sgd"))
    update = {"swa": None, "ema": swa_utils.get_ema_multi_avg_fn(0.9)}[average]
    averages = [swa_utils.AveragedModel(m, multi_avg_fn=update) for m in (model, twin)]
    schedulers = [swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=3) for o in (wrapped, other)]
    for step in range(5):
        replay(other, twin, train(wrapped, model, [step]))
        for averaged, source, scheduler in zip(averages, (model, twin), schedulers, strict=True):
            averaged.update_parameters(source)
            scheduler.step()
    assert_same_training(model, wrapped, twin, other)
    assert wrapped.param_groups[0]["lr"] == 0.01
    assert_averaged = [torch.equal(a, b) for a, b in zip(*(m.parameters() for m in averages), strict=True)]
    assert all(assert_averaged)
    assert not torch.equal(averages[0].module.trunk.weight, model.trunk.weight)


# ------------------------------------------------------------------------------- row 3: parameters are never remembered


@table([pair for pair in PLAIN_PAIRS if pair[0] in FINDS_PARAMETERS and pair[1] != "adagrad"])
def test_row03_replaced_parameters_are_found(method: str, optimizer: str) -> None:
    # What Accelerate does when it moves a model to a device that makes new parameters. (Adagrad makes its state when it
    # is constructed, so by itself it does not survive this.)
    model, wrapped = build(method, optimizer)
    wrapped.zero_grad()
    wrapped.backward(losses(model, 0))  # gives the wrapper every chance to remember the old ones
    wrapped.zero_grad()
    new = Net()
    mapping = dict(zip(model.parameters(), new.parameters(), strict=True))
    for group in wrapped.param_groups:
        group["params"] = [mapping.get(p, p) for p in group["params"]]
    twin, other = bare(optimizer)
    replay(other, twin, train(wrapped, new, range(3)))
    assert_same_training(new, wrapped, twin, other)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), Net().parameters(), strict=True))


@pytest.mark.parametrize("method", FINDS_PARAMETERS)
def test_row03_unfrozen_and_removed_parameters_are_noticed(method: str) -> None:
    model, wrapped = build(method, "sgd")
    model.trunk.bias.requires_grad_(False)
    wrapped.backward(losses(model, 0))
    assert model.trunk.bias.grad is None
    wrapped.zero_grad()
    model.trunk.bias.requires_grad_(True)
    wrapped.backward(losses(model, 0))
    assert model.trunk.bias.grad is not None
    wrapped.zero_grad()
    group = wrapped.param_groups[0]
    group["params"] = [p for p in group["params"] if p is not model.trunk.bias]
    with pytest.warns(UserWarning, match="outside the optimizer"):
        wrapped.backward(losses(model, 0))
    assert model.trunk.bias.grad is None
    assert model.trunk.weight.grad is not None


# -------------------------------------------------------------------------------------- row 4: state, read and assigned


@contextmanager
def swapped_in(optimizer: Optimizer, parameters: Sequence[Tensor], packed: dict[str, Any]) -> Iterator[None]:
    """Lend an optimizer other parameters and state: torch's recipe for tracing a step without touching the live one."""
    held_state, held_groups = optimizer.state, [dict(group) for group in optimizer.param_groups]
    tensors = iter(parameters)
    lent: defaultdict[Tensor, Any] = defaultdict(dict)
    for group, saved in zip(optimizer.param_groups, packed["param_groups"], strict=True):
        group["params"] = [next(tensors) for _ in saved["params"]]
        group.update({key: value for key, value in saved.items() if key != "params"})
        for p, index in zip(group["params"], saved["params"], strict=True):
            lent[p] = dict(packed["state"].get(index, {}))
    optimizer.state = lent
    try:
        yield
    finally:
        for group, held in zip(optimizer.param_groups, held_groups, strict=True):
            group.clear()
            group.update(held)
        optimizer.state = held_state


@PAIR_TABLE
def test_row04_state_is_the_bases_own_and_can_be_assigned(method: str, optimizer: str) -> None:
    model, wrapped = build(method, optimizer)
    base = innermost(wrapped)
    train(wrapped, model, range(2))
    assert wrapped.state is base.state
    assert bool(wrapped.state) == (method not in OWN)  # theirs is in the memory, by loss
    assert "state" not in vars(wrapped)
    wrapped.load_state_dict(wrapped.state_dict())
    assert wrapped.state is base.state
    fresh: defaultdict[Tensor, Any] = defaultdict(dict)
    wrapped.state = fresh
    assert base.state is fresh


@pytest.mark.parametrize("method", FINDS_PARAMETERS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "adamw-fused", "rmsprop"])
def test_row04_parameters_and_state_can_be_lent(method: str, optimizer: str) -> None:
    model, wrapped = build(method, optimizer)
    train(wrapped, model, range(2))
    live = [p.detach().clone() for p in model.parameters()]
    state, packed = wrapped.state, copy.deepcopy(torchs_part(wrapped.state_dict()))
    twin, other = bare(optimizer)
    carry_over((model, wrapped), (twin, other))

    lent = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with swapped_in(wrapped, list(lent.values()), packed):
        wrapped.zero_grad()
        report = wrapped.backward(losses(lambda x: functional_call(model, lent, (x,)), 2))
        replay(other, twin, [[(report.objective, [p.grad for p in lent.values()])]])
        wrapped.step()
    assert all(torch.equal(p, q) for p, q in zip(lent.values(), twin.parameters(), strict=True))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), live, strict=True))
    assert not torch.equal(lent["trunk.weight"], model.trunk.weight)
    assert wrapped.state is state
    carry_over((model, wrapped), (twin, other))
    replay(other, twin, train(wrapped, model, [3]))
    assert_same_training(model, wrapped, twin, other)


@WRAPPER_TABLE
def test_row04_state_entries_can_be_moved_one_by_one(method: str) -> None:
    # Fabric walks `optimizer.state.items()` and replaces the tensors of each entry, after loading a checkpoint.
    model, wrapped = build(method, "adam")
    train(wrapped, model, range(2))
    for entry in wrapped.state.values():
        for key, value in entry.items():
            if key != "step":
                entry[key] = torch.zeros_like(value)
    twin, other = bare("adam")
    carry_over((model, wrapped), (twin, other))
    replay(other, twin, train(wrapped, model, [2]))
    assert_same_training(model, wrapped, twin, other)


# ------------------------------------------------------------------------- row 5: only parameters are keys of the state


@PAIR_TABLE
def test_row05_only_parameters_are_keys_of_the_state(method: str, optimizer: str) -> None:
    model, wrapped = build(method, optimizer)
    train(wrapped, model, range(3))
    parameters = list(model.parameters())
    assert bool(wrapped.state) == (method not in OWN)
    assert all(any(key is p for p in parameters) for key in wrapped.state)
    assert set(wrapped.state_dict()["state"]) <= set(range(len(parameters)))


# -------------------------------------------------------------------------------------------------- row 6: the defaults


@PAIR_TABLE
def test_row06_defaults_are_the_bases_own(method: str, optimizer: str) -> None:
    _, wrapped = build(method, optimizer)
    base = innermost(wrapped)
    assert wrapped.defaults is base.defaults
    assert "defaults" not in vars(wrapped)
    wrapped.defaults = {**base.defaults, "lr": 0.5}
    assert base.defaults["lr"] == 0.5


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "adamw-fused", "rmsprop"])
@pytest.mark.parametrize("scheduler", ["CyclicLR", "OneCycleLR"])
def test_row06_momentum_is_cycled(scheduler: str, optimizer: str) -> None:
    model, wrapped = build("pcgrad", optimizer)
    cycle = SCHEDULERS[scheduler](wrapped)
    assert cycle.cycle_momentum
    seen = []
    for step in range(4):
        group = innermost(wrapped).param_groups[0]
        seen.append(group["betas"][0] if "betas" in group else group["momentum"])
        train(wrapped, model, [step])
        cycle.step()
    assert len(set(seen)) >= 3


# ------------------------------------------------------------------------- row 7: step is a method, and can be replaced


@METHOD_TABLE
def test_row07_step_is_a_plain_method(method: str) -> None:
    model, wrapped = build(method, "adam")
    for _ in range(2):  # before and after use
        assert "step" not in vars(wrapped)
        assert wrapped.step.__self__ is wrapped
        assert wrapped.step.__func__ is type(wrapped).step
        assert_step_not_patched(wrapped)
        train(wrapped, model, range(1))


@METHOD_TABLE
def test_row07_step_can_be_replaced_and_put_back(method: str) -> None:
    model, wrapped = build(method, "adam")
    twin, other = bare(over(method, "adam"))
    calls = []
    original = wrapped.step

    def patched(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return original(*args, **kwargs)

    wrapped.step = patched  # type: ignore[method-assign]
    replay(other, twin, train(wrapped, model, range(2)))
    wrapped.step = original  # type: ignore[method-assign]
    replay(other, twin, train(wrapped, model, range(2, 4)))
    assert len(calls) == 2
    assert_same_training(model, wrapped, twin, other)


@METHOD_TABLE
def test_row07_two_schedulers_share_one_wrapped_step(method: str) -> None:
    model, wrapped = build(method, "sgd")
    first = lr_scheduler.ConstantLR(wrapped, factor=0.5, total_iters=2)
    step = vars(wrapped)["step"]
    second = lr_scheduler.ExponentialLR(wrapped, gamma=0.5)
    assert vars(wrapped)["step"] is step
    before = ours(wrapped)
    twin, other = bare(over(method, "sgd"))
    schedulers = [
        lr_scheduler.ConstantLR(other, factor=0.5, total_iters=2),
        lr_scheduler.ExponentialLR(other, gamma=0.5),
    ]
    for i in range(3):
        replay(other, twin, train(wrapped, model, [i]))
        for scheduler in (first, second, *schedulers):
            scheduler.step()
    assert_same_training(model, wrapped, twin, other)
    assert not same(ours(wrapped), before)  # the wrapped step is still the one that commits


def test_row07_a_dropped_wrapper_is_collected_under_a_scheduler() -> None:
    _, wrapped = build("pcgrad", "sgd")
    scheduler = lr_scheduler.ExponentialLR(wrapped, gamma=0.5)
    alive = weakref.ref(wrapped)
    del wrapped, scheduler
    assert alive() is None  # by reference counting alone: neither of them made a cycle


# ---------------------------------------------------------------------------------------------------- row 8: schedulers


def test_row08_every_scheduler_of_torch_has_a_row() -> None:
    found = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, cls in vars(module).items()
        if inspect.isclass(cls) and issubclass(cls, lr_scheduler.LRScheduler)
    }
    assert found - {"LRScheduler", "_LRScheduler"} == set(SCHEDULERS)


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, *OWN])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_row08_schedulers_act_as_on_the_bare_optimizer(scheduler: str, optimizer: str) -> None:
    turn = list(METHODS)[list(SCHEDULERS).index(scheduler) % len(METHODS)]
    method = optimizer if optimizer in OWN else turn
    model, wrapped = build(method, optimizer)
    twin, other = bare(over(method, optimizer))
    pair = [SCHEDULERS[scheduler](o) for o in (wrapped, other)]
    rates = []
    for step in range(4):
        rates.append(_lr(wrapped))
        replay(other, twin, train(wrapped, model, [step]))
        for one in pair:
            one.step(1.0) if isinstance(one, lr_scheduler.ReduceLROnPlateau) else one.step()
        assert_same(*(one.get_last_lr() for one in pair))
        assert_same(*(torchs_part(o.state_dict())["param_groups"] for o in (wrapped, other)))
    assert len(set(rates)) > 1
    assert_same_training(model, wrapped, twin, other)


@METHOD_TABLE
def test_row08_a_scheduler_sees_whether_the_optimizer_has_stepped(method: str) -> None:
    model, wrapped = build(method, "sgd")
    scheduler = lr_scheduler.StepLR(wrapped, step_size=1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()
    scheduler = lr_scheduler.StepLR(wrapped, step_size=1)
    train(wrapped, model, range(1))
    scheduler.step()  # silent: a warning would be an error here


@WRAPPER_TABLE
def test_row08_a_scheduler_of_the_base_goes_on_after_wrapping(method: str) -> None:
    model, twin = Net(), Net()
    base, other = OPTIMIZERS["sgd"](model.parameters()), OPTIMIZERS["sgd"](twin.parameters())
    schedulers = [lr_scheduler.ExponentialLR(o, gamma=0.5) for o in (base, other)]
    wrapped = METHODS[method](base, model)
    for step in range(3):
        replay(other, twin, train(wrapped, model, [step]))
        for scheduler in schedulers:
            scheduler.step()
    assert_same_training(model, wrapped, twin, other)


@METHOD_TABLE
def test_row08_scheduler_checkpoints(method: str) -> None:
    def start() -> tuple[Net, MultiLossOptimizer, lr_scheduler.LRScheduler]:
        model, wrapped = build(method, "sgd")
        return model, wrapped, lr_scheduler.CosineAnnealingLR(wrapped, T_max=6)

    def run(model: Net, wrapped: MultiLossOptimizer, scheduler: lr_scheduler.LRScheduler, steps: range) -> None:
        for step in steps:
            train(wrapped, model, [step])
            scheduler.step()

    model, wrapped, scheduler = start()
    run(model, wrapped, scheduler, range(2))
    saved = copy.deepcopy([model.state_dict(), wrapped.state_dict(), scheduler.state_dict()])
    run(model, wrapped, scheduler, range(2, 5))
    again, rewrapped, rescheduled = resumed = start()
    for thing, state in zip(resumed, saved, strict=True):
        thing.load_state_dict(state)
    run(*resumed, range(2, 5))
    assert rescheduled.get_last_lr() == scheduler.get_last_lr()
    assert_same_training(again, rewrapped, model, wrapped)


# ------------------------------------------------------------------------------------------ row 9: step and its closure


@pytest.mark.parametrize("scheduled", [False, True])
@PLAIN_PAIR_TABLE
def test_row09_the_closures_value_is_returned(method: str, optimizer: str, scheduled: bool) -> None:
    model, wrapped = build(method, optimizer)
    scheduler = lr_scheduler.ExponentialLR(wrapped, gamma=0.9) if scheduled else None
    value = torch.tensor(1.25)
    calls: list[bool] = []

    def closure() -> Tensor:
        calls.append(torch.is_grad_enabled())
        wrapped.zero_grad()
        wrapped.backward(losses(model, 0))
        return value

    with torch.no_grad():
        assert wrapped.step(closure) is value
        assert wrapped.step(closure=closure) is value
    assert calls == [True, True]
    assert not torch.equal(model.trunk.weight, Net().trunk.weight)
    assert wrapped.step() is None
    assert wrapped.step(closure=None) is None
    del scheduler


@METHOD_TABLE
def test_row09_a_closure_that_raises_commits_nothing(method: str) -> None:
    for optimizer in ("sgd",) if method in OWN else ("sgd", "lbfgs"):
        model, wrapped = build(method, optimizer)
        train(wrapped, model, range(1))
        before = ours(wrapped)

        def closure(wrapped: MultiLossOptimizer = wrapped, model: Net = model) -> float:
            wrapped.zero_grad()
            wrapped.backward(losses(model, 1))
            raise KeyError("stopped")

        with pytest.raises(KeyError, match="stopped"):
            wrapped.step(closure)
        assert_same(ours(wrapped), before)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
@WRAPPER_TABLE
def test_row09_lbfgs(method: str, search: str | None) -> None:
    def lbfgs(model: Net) -> Optimizer:
        return LBFGS(model.parameters(), lr=0.2, max_iter=4, line_search_fn=search)

    model, twin = Net(), Net()
    wrapped, other = METHODS[method](lbfgs(model), model), lbfgs(twin)
    log = train(wrapped, model, range(3))
    assert max(map(len, log)) > 2
    replay(other, twin, log)
    assert_same_training(model, wrapped, twin, other)


@WRAPPER_TABLE
def test_row09_lbfgs_returns_its_first_value(method: str) -> None:
    model, wrapped = build(method, "lbfgs")
    values = []

    def closure() -> float:
        wrapped.zero_grad()
        values.append(wrapped.backward(losses(model, 0)).objective)
        return values[-1]

    assert wrapped.step(closure=closure) == values[0]
    assert len(values) > 1
    assert values[-1] < values[0]


@WRAPPER_TABLE
def test_row09_the_evaluations_of_one_step_start_from_the_same_memory(method: str) -> None:
    model, wrapped = build(method, "lbfgs")
    train(wrapped, model, range(2))
    before = ours(wrapped)
    seen = []

    def closure() -> float:
        wrapped.zero_grad()
        value = wrapped.backward(losses(model, 2)).objective
        seen.append(ours(wrapped))
        return value

    wrapped.step(closure)
    assert len(seen) > 1
    assert all(same(entry, before) for entry in seen)
    assert not same(ours(wrapped), before)


@METHOD_TABLE
def test_row09_a_step_counts_once_however_often_it_was_evaluated(method: str) -> None:
    """The same point gives the same gradient, as a line search needs it."""
    once, stepped = build(method, "sgd")
    twice, restepped = build(method, "sgd")
    train(stepped, once, range(3))
    for step in range(3):
        for _ in range(3):
            restepped.zero_grad()
            restepped.backward(losses(twice, step))
        restepped.step()
    assert_same_training(once, stepped, twice, restepped)
    assert_same(ours(stepped), ours(restepped))


# ---------------------------------------------------------------------------------------------------- row 10: zero_grad


@pytest.mark.parametrize("name", ["zero_grad", "step", "state_dict", "load_state_dict", "add_param_group"])
@pytest.mark.parametrize("cls", [PCGrad, MGDA, GradNormWeighter, MultiAdam, AdaTask, MTAdam])
def test_row10_zero_grad_and_the_others_have_torchs_signature(cls: type[Optimizer], name: str) -> None:
    ours, torchs = (inspect.signature(getattr(c, name)).parameters.values() for c in (cls, Optimizer))
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in torchs]


@PAIR_TABLE
def test_row10_zero_grad_clears_as_torch_does(method: str, optimizer: str) -> None:
    model, wrapped = build(method, optimizer)
    for call, expected in [
        (lambda: wrapped.zero_grad(), None),
        (lambda: wrapped.zero_grad(set_to_none=True), None),
        (lambda: wrapped.zero_grad(False), 0),
        (lambda: wrapped.zero_grad(set_to_none=False), 0),
    ]:
        wrapped.backward(losses(model, 0))
        held = [p.grad for p in model.parameters()]
        assert all(g is not None and g.any() for g in held)
        call()
        for p, g in zip(model.parameters(), held, strict=True):
            assert p.grad is (None if expected is None else g)
            assert expected is None or not g.any()
        assert_step_not_patched(wrapped)
    train(wrapped, model, range(1))  # after torch's own zero_grad had patched the class, this would raise


@METHOD_TABLE
def test_row10_gradients_that_the_model_clears_take_the_proposal_with_them(method: str) -> None:
    """Many loops call ``model.zero_grad()``. After a step that was skipped nothing of it may be learnt."""
    memories = []
    for lost in (False, True):
        model, wrapped = build(method, "sgd")
        train(wrapped, model, range(2))
        model.zero_grad()
        if lost:
            wrapped.backward(losses(model, 5))
            model.zero_grad()
        wrapped.backward(losses(model, 2))
        wrapped.step()
        memories.append(wrapped.state_dict()["gradsurgery"])
    assert_same(*memories)


# -------------------------------------------------------------------------------------------------------- row 11: hooks

HOOKS: dict[str, Callable[[list[Any]], Callable[..., None]]] = {
    "register_step_pre_hook": lambda seen: lambda optimizer, args, kwargs: seen.append(optimizer),
    "register_step_post_hook": lambda seen: lambda optimizer, args, kwargs: seen.append(optimizer),
    "register_state_dict_pre_hook": lambda seen: lambda optimizer: seen.append(optimizer),
    "register_state_dict_post_hook": lambda seen: lambda optimizer, state: seen.append(optimizer),
    "register_load_state_dict_pre_hook": lambda seen: lambda optimizer, state: seen.append(optimizer),
    "register_load_state_dict_post_hook": lambda seen: lambda optimizer: seen.append(optimizer),
}
GLOBAL_HOOKS = ["register_optimizer_step_pre_hook", "register_optimizer_step_post_hook"]


def test_row11_every_hook_of_torch_has_a_row() -> None:
    assert {name for name in dir(Optimizer) if re.fullmatch(r"register_\w+_hook", name)} == set(HOOKS)
    found = {name for name in vars(torch_optimizer) if re.fullmatch(r"register_optimizer_\w+_hook", name)}
    assert found == set(GLOBAL_HOOKS)


@METHOD_TABLE
def test_row11_hook_tables_are_the_bases_own(method: str) -> None:
    _, wrapped = build(method, "adam")
    base = innermost(wrapped)
    tables = [name for name in vars(base) if re.fullmatch(r"_optimizer_\w+_hooks", name)]
    assert len(tables) == len(HOOKS)
    for name in tables:
        assert getattr(wrapped, name) is getattr(base, name)


@pytest.mark.parametrize("registered", ["on the wrapper", "on the base before wrapping"])
@PAIR_TABLE
def test_row11_each_hook_fires_once_and_receives_the_base(method: str, optimizer: str, registered: str) -> None:
    model = Net()
    if registered == "on the wrapper" or method in OWN:
        wrapped = make(method, optimizer, model)
        base = innermost(wrapped)
    else:
        base = OPTIMIZERS[optimizer](model.parameters())
    seen: dict[str, list[Any]] = {name: [] for name in HOOKS}
    on = wrapped if registered == "on the wrapper" else base
    handles = [getattr(on, name)(HOOKS[name](seen[name])) for name in HOOKS]
    if on is base and method not in OWN:
        wrapped = METHODS[method](base, model)

    def all_events(wrapped: MultiLossOptimizer = wrapped) -> None:
        train(wrapped, model, range(1))
        wrapped.load_state_dict(wrapped.state_dict())

    all_events()
    for handle in handles:
        handle.remove()
    all_events()
    for name, optimizers in seen.items():
        assert len(optimizers) == 1, f"{name} fired {len(optimizers)} times"
        assert optimizers[0] is base


@PAIR_TABLE
def test_row11_global_hooks_fire_once_a_step(method: str, optimizer: str) -> None:
    model, wrapped = build(method, optimizer)
    seen: dict[str, list[Any]] = {name: [] for name in GLOBAL_HOOKS}
    handles = [
        getattr(torch_optimizer, name)(lambda optimizer, args, kwargs, name=name: seen[name].append(optimizer))
        for name in GLOBAL_HOOKS
    ]
    try:
        train(wrapped, model, range(2))
        wrapped.load_state_dict(wrapped.state_dict())
    finally:
        for handle in handles:
            handle.remove()
    for optimizers in seen.values():
        assert len(optimizers) == 2
        assert all(entry is innermost(wrapped) for entry in optimizers)


@METHOD_TABLE
def test_row11_hooks_that_change_something_are_obeyed(method: str) -> None:
    model, wrapped = build(method, "adam")
    train(wrapped, model, range(1))
    wrapped.register_state_dict_post_hook(lambda optimizer, state: {**state, "note": 7})
    state = wrapped.state_dict()
    assert state["note"] == 7
    assert_same(state["gradsurgery"], ours(wrapped))

    def halve(optimizer: Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        return {**state, "param_groups": [{**group, "lr": group["lr"] / 2} for group in state["param_groups"]]}

    wrapped.register_load_state_dict_pre_hook(halve)
    wrapped.load_state_dict(state)
    assert wrapped.param_groups[0]["lr"] == 0.01
    assert_same(ours(wrapped), state["gradsurgery"])

    def swap_closure(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        return (args[0], lambda: 3.0), {}

    wrapped.register_step_pre_hook(swap_closure)
    assert wrapped.step() == 3.0


# -------------------------------------------------------------------------------------------------- row 12: checkpoints


def assert_plain(value: Any) -> None:
    """Only what a weights-only load accepts, and what Accelerate can rebuild with ``type(x)(...)``."""
    if isinstance(value, dict):
        assert type(value) is dict
        for key, entry in value.items():
            assert type(key) in (str, int)
            assert_plain(entry)
    elif isinstance(value, (list, tuple)):
        assert type(value) in (list, tuple)
        for entry in value:
            assert_plain(entry)
    else:
        assert value is None or type(value) in (bool, int, float, str, Tensor), type(value)
        assert not isinstance(value, Tensor) or not value.requires_grad


@PAIR_TABLE
def test_row12_state_dict_is_the_bases_and_one_key_more(method: str, optimizer: str) -> None:
    model, wrapped = build(method, optimizer)
    for _ in range(2):  # fresh and used
        state = wrapped.state_dict()
        assert set(state) == {"state", "param_groups", "gradsurgery"}
        assert_same(torchs_part(state), innermost(wrapped).state_dict())
        assert set(state["gradsurgery"]) == {"class", "version", "memory", "inner"}
        assert state["gradsurgery"]["class"] == type(wrapped).__name__
        assert (state["gradsurgery"]["inner"] is not None) == (method == "composed")
        assert_plain(state["gradsurgery"])
        train(wrapped, model, range(3))


@PAIR_TABLE
def test_row12_a_saved_run_goes_on_as_if_never_stopped(method: str, optimizer: str) -> None:
    model, wrapped = build(method, optimizer)
    train(wrapped, model, range(3))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": wrapped.state_dict()}, file)
    train(wrapped, model, range(3, 6))

    saved = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    given = copy.deepcopy(saved)
    again, rewrapped = build(method, optimizer)
    again.load_state_dict(saved["model"])
    rewrapped.load_state_dict(saved["optimizer"])
    assert_same(saved, given)  # loading does not write into what it was given
    train(rewrapped, again, range(3, 6))
    assert_same(ours(rewrapped), ours(wrapped))
    assert_same_training(again, rewrapped, model, wrapped)
    train(rewrapped, again, range(6, 7))
    assert_same(saved["optimizer"]["gradsurgery"], given["optimizer"]["gradsurgery"])  # nor does training afterwards


@PAIR_TABLE
def test_row12_the_bare_optimizer_loads_ours(method: str, optimizer: str) -> None:
    model, wrapped = build(method, optimizer)
    train(wrapped, model, range(2))
    twin, other = bare(optimizer)
    carry_over((model, wrapped), (twin, other))
    replay(other, twin, train(wrapped, model, range(2, 4)))
    assert_same_training(model, wrapped, twin, other)


@PAIR_TABLE
def test_row12_we_load_the_bare_optimizers(method: str, optimizer: str) -> None:
    model, wrapped = build(method, optimizer)
    twin, other = bare(optimizer)
    replay(other, twin, train(wrapped, model, range(2)))

    again, rewrapped = build(method, optimizer)
    fresh = ours(rewrapped)
    train(rewrapped, again, range(3))  # so that there is a memory to forget
    carry_over((twin, other), (again, rewrapped))
    assert_same(ours(rewrapped), fresh)
    replay(other, twin, train(rewrapped, again, range(2, 4)))
    assert_same_training(again, rewrapped, twin, other)


def test_row12_the_memory_of_another_method_is_refused_aloud() -> None:
    model, wrapped = build("pcgrad", "adam")
    train(wrapped, model, range(2))
    _, rewrapped = build("mgda", "adam")
    fresh = ours(rewrapped)
    with pytest.warns(UserWarning, match="PCGrad"):
        rewrapped.load_state_dict(wrapped.state_dict())
    assert_same(ours(rewrapped), fresh)
    assert_same(torchs_part(rewrapped.state_dict()), torchs_part(wrapped.state_dict()))


@METHOD_TABLE
def test_row12_a_failed_load_changes_nothing(method: str) -> None:
    model, wrapped = build(method, "adam")
    train(wrapped, model, range(2))
    state = copy.deepcopy(wrapped.state_dict())
    wrong = copy.deepcopy(state)
    wrong["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="parameter group"):
        wrapped.load_state_dict(wrong)
    assert_same(wrapped.state_dict(), state)


@METHOD_TABLE
def test_row12_loading_discards_what_was_pending(method: str) -> None:
    model, wrapped = build(method, "adam")
    train(wrapped, model, range(2))
    state = copy.deepcopy(wrapped.state_dict())
    wrapped.backward(losses(model, 2))
    wrapped.load_state_dict(state)
    wrapped.step()
    assert_same(ours(wrapped), state["gradsurgery"])


@pytest.mark.parametrize("flat", [False, True])
@PLAIN_PAIR_TABLE
def test_row12_distributed_checkpoint_of_one_process(method: str, optimizer: str, flat: bool) -> None:
    # DCP keeps torch's two keys and drops ours; it also steps a fresh optimizer once, with lr 0 and zero gradients.
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, wrapped = build(method, optimizer)
    twin, other = bare(optimizer)
    train(wrapped, model, range(2))
    carry_over((model, wrapped), (twin, other))
    saved = get_optimizer_state_dict(model, wrapped, options=options)
    assert_same(saved, get_optimizer_state_dict(twin, other, options=options))
    assert not any("gradsurgery" in key for key in saved)

    again, rewrapped = build(method, optimizer)
    fresh = ours(rewrapped)
    again.load_state_dict(model.state_dict())
    set_optimizer_state_dict(again, rewrapped, copy.deepcopy(saved), options=options)
    assert_same(ours(rewrapped), fresh)  # a step that no backward proposed commits nothing
    assert_same(torchs_part(rewrapped.state_dict()), torchs_part(wrapped.state_dict()))
    replay(other, twin, train(rewrapped, again, range(2, 4)))
    assert_same_training(again, rewrapped, twin, other)


# ---------------------------------------------------------------------------------------------- row 13: add_param_group


@PLAIN_PAIR_TABLE
def test_row13_a_group_added_later_is_trained(method: str, optimizer: str) -> None:
    model, twin = Net(), Net()
    early = [[p for name, p in m.named_parameters() if not name.startswith("heads.2")] for m in (model, twin)]
    wrapped, other = make(method, optimizer, model, early[0]), make_bare(optimizer, early[1])
    model.heads[2].requires_grad_(False)
    replay(other, twin, train(wrapped, model, range(2)))
    assert model.heads[2].weight.grad is None
    model.heads[2].requires_grad_(True)
    for o, m in ((wrapped, model), (other, twin)):
        o.add_param_group({"params": m.heads[2].parameters(), "lr": 0.004})
    assert wrapped.param_groups is innermost(wrapped).param_groups
    assert [group["lr"] for group in wrapped.param_groups] == [wrapped.defaults["lr"], 0.004]
    replay(other, twin, train(wrapped, model, range(2, 4)))
    assert_same_training(model, wrapped, twin, other)


def test_row13_the_bases_override_is_called() -> None:
    calls = []

    class Counting(SGD):
        def add_param_group(self, param_group: dict[str, Any]) -> None:
            calls.append(param_group)
            super().add_param_group(param_group)

    model = Net()
    wrapped = PCGrad(Counting(model.trunk.parameters(), lr=0.1))
    calls.clear()
    group = {"params": list(model.heads.parameters())}
    wrapped.add_param_group(group)
    assert len(calls) == 1
    assert calls[0] is group
    assert wrapped.param_groups[1] is group


# -------------------------------------------------------------------------------------------- row 14: pickle and copies

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
}


@pytest.mark.parametrize("how", COPIES)
@PLAIN_PAIR_TABLE
def test_row14_a_copy_goes_on_by_itself(method: str, optimizer: str, how: str) -> None:
    model, wrapped = build(method, optimizer)
    twin, other = bare(optimizer)
    schedulers = [lr_scheduler.StepLR(o, step_size=1, gamma=0.9) for o in (wrapped, other)]
    replay(other, twin, train(wrapped, model, range(2)))
    for scheduler in schedulers:
        scheduler.step()
    assert "step" in vars(wrapped)  # put there by the scheduler; in a copy it would step the original's parameters

    again, recopied = COPIES[how]((model, wrapped))
    assert type(recopied) is type(wrapped)
    assert "step" not in vars(recopied)
    assert recopied.param_groups is innermost(recopied).param_groups
    assert innermost(recopied) is not innermost(wrapped)
    before = [p.detach().clone() for p in model.parameters()]
    replay(other, twin, train(recopied, again, range(2, 4)))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))  # the original stood still
    assert_same_training(again, recopied, twin, other)

    train(wrapped, model, range(2, 4))  # and then goes the same way
    assert_same_training(model, wrapped, again, recopied)
    assert_same(ours(wrapped), ours(recopied))

    third, unpoisoned = build(method, optimizer)  # torch's own __setstate__ would have patched the class
    assert_step_not_patched(unpoisoned)
    train(unpoisoned, third, range(4))


@METHOD_TABLE
def test_row14_a_scheduler_is_pickled_with_its_optimizer(method: str) -> None:
    model, wrapped = build(method, "adam")
    scheduler = lr_scheduler.StepLR(wrapped, step_size=1, gamma=0.5)
    train(wrapped, model, range(1))
    scheduler.step()
    again, recopied, rescheduled = pickle.loads(pickle.dumps((model, wrapped, scheduler)))
    assert rescheduled.optimizer is recopied
    for m, o, s in ((model, wrapped, scheduler), (again, recopied, rescheduled)):
        train(o, m, range(1, 3))
        s.step()
    assert _lr(recopied) == 0.02 / 4
    assert_same_training(again, recopied, model, wrapped)


@METHOD_TABLE
def test_row14_hooks_are_not_copied_just_as_in_torch(method: str) -> None:
    model, wrapped = build(method, "sgd")
    seen: list[Any] = []
    wrapped.register_step_post_hook(lambda *_: seen.append(1))
    again, recopied = copy.deepcopy((model, wrapped))
    train(recopied, again, range(1))
    assert seen == []
    recopied.register_step_post_hook(lambda *_: seen.append(2))
    train(recopied, again, range(1))
    train(wrapped, model, range(1))
    assert seen == [2, 1]


CHILD = """
import pickle, sys, warnings
warnings.simplefilter("error")
import torch
for params, wrapped in pickle.load(sys.stdin.buffer):
    wrapped.zero_grad()
    wrapped.backward({"left": params[0].square().sum(), "right": (params[0] - 1).square().sum()})
    wrapped.step()
    for cls in type(wrapped).__mro__:
        if cls.__module__.startswith("gradsurgery"):
            assert not hasattr(vars(cls).get("step"), "hooked")
    assert hasattr(type(wrapped.base).step, "hooked"), "unpickling did not prepare the base"
    pickle.dump(([p.detach().tolist() for p in params], wrapped.state_dict()), sys.stdout.buffer)
"""


def test_row14_a_process_that_has_never_seen_the_class_can_unpickle_it() -> None:
    # Worker processes get an optimizer as a pickle, before any optimizer was constructed there.
    def start(name: str) -> tuple[list[nn.Parameter], MultiLossOptimizer]:
        params = [nn.Parameter(torch.tensor([0.25, -0.5, 2.0]))]
        if name in OWN:
            return params, OWN[name](params)
        return params, {"sgd": PCGrad, "adam": MGDA, "adamw-fused": PCGrad}[name](OPTIMIZERS[name](params))

    def step(params: list[nn.Parameter], wrapped: MultiLossOptimizer) -> None:
        wrapped.zero_grad()
        wrapped.backward({"left": params[0].square().sum(), "right": (params[0] - 1).square().sum()})
        wrapped.step()

    jobs = [start(name) for name in ("sgd", "adam", "adamw-fused", *OWN)]
    for job in jobs:
        lr_scheduler.ExponentialLR(job[1], gamma=0.5)
        step(*job)
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=pickle.dumps(jobs),
        capture_output=True,
        env={**os.environ, "PYTHONPATH": str(Path(gradsurgery.__file__).parents[1])},
        timeout=300,
        check=False,
    )
    assert child.returncode == 0, child.stderr.decode()
    answers = io.BytesIO(child.stdout)
    for params, wrapped in jobs:
        step(params, wrapped)
        values, state = pickle.load(answers)
        assert values == [p.detach().tolist() for p in params]
        assert_same(state, wrapped.state_dict())


# ---------------------------------------------------------------------------------- row 15: no loss scaling in the step


@PAIR_TABLE
def test_row15_does_not_claim_to_unscale_by_itself(method: str, optimizer: str) -> None:
    _, wrapped = build(method, optimizer)
    assert not hasattr(wrapped, "_step_supports_amp_scaling")
    assert not hasattr(wrapped, "grad_scale")
    if optimizer == "adamw-fused":
        assert innermost(wrapped)._step_supports_amp_scaling  # so the line above does say something


@WRAPPER_TABLE
def test_row15_nothing_is_forwarded_wholesale(method: str) -> None:
    class Odd(SGD):
        def odd(self) -> None: ...

    model = Net()
    wrapped = METHODS[method](Odd(model.parameters(), lr=0.1), model)
    for cls in type(wrapped).__mro__:
        assert "__getattr__" not in vars(cls)
        assert cls is object or "__getattribute__" not in vars(cls)
    assert not hasattr(wrapped, "odd")
    with pytest.raises(AttributeError):
        wrapped.no_such_thing  # noqa: B018


@WRAPPER_TABLE
def test_row15_the_modes_of_schedule_free_optimizers_are_handed_through(method: str) -> None:
    """Such a base steps only after it was told to train. Frameworks ask with hasattr whether it has to be."""

    class ScheduleFree(SGD):
        mode = ""

        def train(self) -> None:
            self.mode = "train"

        def eval(self) -> None:
            self.mode = "eval"

    model = Net()
    wrapped: Any = METHODS[method](ScheduleFree(model.parameters(), lr=0.1), model)
    base: Any = innermost(wrapped)
    wrapped.train()
    assert base.mode == "train"
    wrapped.eval()
    assert base.mode == "eval"
    plain = METHODS[method](SGD(model.parameters(), lr=0.1), model)
    assert not hasattr(plain, "train")
    assert not hasattr(plain, "eval")


@pytest.mark.parametrize("autocast", [False, True])
@PLAIN_PAIR_TABLE
def test_row15_training_with_a_scaler_is_training_without(method: str, optimizer: str, autocast: bool) -> None:
    # Scales are powers of two, and double in every step: not one bit may depend on them.
    model, wrapped = build(method, optimizer)
    twin, rewrapped = build(method, optimizer)
    scaler = GradScaler("cpu", init_scale=2.0**10, growth_interval=1)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        train(wrapped, model, range(4), scaler)
        train(rewrapped, twin, range(4))
    assert scaler.get_scale() == 2.0**14
    assert_same_training(model, wrapped, twin, rewrapped)
    assert_same(ours(wrapped), ours(rewrapped))


# -------------------------------------------------------------------------- row 16: the scaler knows us by our identity


@PLAIN_PAIR_TABLE
def test_row16_unscale_and_clip(method: str, optimizer: str) -> None:
    def run(scaler: GradScaler) -> tuple[Net, MultiLossOptimizer, list[float]]:
        model, wrapped = build(method, optimizer)
        norms = []
        for step in range(4):
            wrapped.zero_grad()
            wrapped.backward(losses(model, step), scaler=scaler)
            scaler.unscale_(wrapped)
            norms.append(nn.utils.clip_grad_norm_(model.parameters(), 0.5).item())
            scaler.step(wrapped)  # were the bookkeeping lost, this would divide by the scale once more
            scaler.update()
        return model, wrapped, norms

    model, wrapped, norms = run(GradScaler("cpu", init_scale=2.0**12, growth_interval=2))
    twin, rewrapped, expected = run(GradScaler("cpu", enabled=False))
    assert norms == expected
    assert min(norms) > 0.5
    assert_same_training(model, wrapped, twin, rewrapped)


@METHOD_TABLE
def test_row16_the_scaler_guards_against_unscaling_twice(method: str) -> None:
    model, wrapped = build(method, "adamw-fused")
    scaler = GradScaler("cpu", init_scale=2.0**10)
    wrapped.backward(losses(model, 0), scaler=scaler)
    scaler.unscale_(wrapped)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(wrapped)


# --------------------------------------------------------------------------------------------- row 17: what .grad holds


@PLAIN_PAIR_TABLE
def test_row17_grad_holds_scaled_gradients(method: str, optimizer: str) -> None:
    model, wrapped = build(method, optimizer)
    wrapped.backward(losses(model, 0))
    expected = gradients(model)
    wrapped.zero_grad()
    wrapped.backward(losses(model, 0), scaler=GradScaler("cpu", init_scale=2.0**10))
    assert all(torch.equal(p.grad, 2.0**10 * g) for p, g in zip(model.parameters(), expected, strict=True))


def overheated(model: Net, step: int) -> dict[str, Tensor]:
    """Losses that are finite but overflow once they are scaled."""
    return {name: 1e4 * loss for name, loss in losses(model, step).items()}


@pytest.mark.parametrize("hot", ["all", "one"])
@PLAIN_PAIR_TABLE
def test_row17_a_skipped_step_leaves_no_trace(method: str, optimizer: str, hot: str) -> None:
    model, wrapped = build(method, optimizer)
    twin, rewrapped = build(method, optimizer)
    train(wrapped, model, range(2))
    train(rewrapped, twin, range(2))
    memory, state = ours(wrapped), copy.deepcopy(torchs_part(wrapped.state_dict()))
    start = [p.detach().clone() for p in model.parameters()]

    scaler = GradScaler("cpu", init_scale=2.0**120, backoff_factor=2.0**-110, growth_interval=1)
    wrapped.zero_grad()
    batch = losses(model, 7)
    batch.update({name: loss for name, loss in overheated(model, 7).items() if hot == "all" or name == "right"})
    report = wrapped.backward(batch, scaler=scaler)
    assert all(value < 1e6 for value in report.losses.values())
    assert not all(torch.isfinite(p.grad).all() for p in model.parameters())
    scaler.step(wrapped)
    scaler.update()
    assert scaler.get_scale() == 2.0**10
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True))
    assert_same(ours(wrapped), memory)
    assert_same(torchs_part(wrapped.state_dict()), state)

    train(wrapped, model, range(2, 5), scaler)
    train(rewrapped, twin, range(2, 5))
    assert_same_training(model, wrapped, twin, rewrapped)
    assert_same(ours(wrapped), ours(rewrapped))


@METHOD_TABLE
def test_row17_gradients_exist_before_the_scaler_steps(method: str) -> None:
    # Computed inside `step` they would come too late: the scaler raises where it recorded no check.
    model, wrapped = build(method, "sgd")
    scaler = GradScaler("cpu")
    wrapped.backward(losses(model, 0), scaler=scaler)
    scaler.unscale_(wrapped)
    assert scaler._found_inf_per_device(wrapped)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


# ---------------------------------------------------------------------------------- row 18: losses, and who scales them

COLLECTIONS: dict[str, Callable[[dict[str, Tensor]], Any]] = {
    "dict": lambda named: named,
    "ordered dict": lambda named: OrderedDict(named),
    "list": lambda named: list(named.values()),
    "tuple": lambda named: tuple(named.values()),
    "named tuple": lambda named: namedtuple("Parts", list(named))(**named),
    "1-d tensor": lambda named: torch.stack(list(named.values())),
    "generator": lambda named: (loss for loss in named.values()),
}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("collection", COLLECTIONS)
@METHOD_TABLE
def test_row18_collections_of_losses(method: str, collection: str, scaled: bool) -> None:
    model, wrapped = build(method, "sgd")
    wrapped.backward(losses(model, 0))
    expected = gradients(model)
    raw = [loss.item() for loss in losses(model, 0).values()]
    again, rewrapped = build(method, "sgd")
    scaler = GradScaler("cpu", init_scale=2.0**10) if scaled else None
    report = rewrapped.backward(COLLECTIONS[collection](losses(again, 0)), scaler=scaler)
    factor = 2.0**10 if scaled else 1.0
    for p, g in zip(again.parameters(), expected, strict=True):
        assert torch.equal(p.grad, factor * g)
    assert list(report.losses.values()) == raw  # unscaled


@METHOD_TABLE
def test_row18_what_a_scaler_makes_of_a_dict_is_no_collection_of_losses(method: str) -> None:
    # GradScaler.scale walks over the keys of a dict, lazily: the error appears where the map is read.
    model, wrapped = build(method, "sgd")
    scaler = GradScaler("cpu")
    with pytest.raises((TypeError, ValueError)):
        wrapped.backward(scaler.scale(losses(model, 0)))  # type: ignore[arg-type]
    assert all(p.grad is None for p in model.parameters())


# ------------------------------------------------------------------ row 19: an object of Lightning's that poses as ours


class _Strategy:
    """What steps the real optimizer, with a precision plugin around it."""

    def __init__(self) -> None:
        self.steps = 0

    def optimizer_step(self, optimizer: Optimizer, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        self.steps += 1
        return optimizer.step(closure=closure, **kwargs)

    def get_optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()


class _Poser:
    """Takes the class of the optimizer it holds, but none of its attributes: those are read from the real one."""

    prefix = ""

    def __init__(self, optimizer: Optimizer, strategy: _Strategy) -> None:
        self._optimizer = optimizer
        self._strategy = strategy
        self._callbacks: list[Any] = []
        kind = type(optimizer)
        self.__class__ = type(self.prefix + kind.__name__, (type(self), kind), {})

    @property
    def optimizer(self) -> Optimizer:
        return self._optimizer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._optimizer, name)


class FakeLightningOptimizer(_Poser):
    """Lightning always hands the strategy a closure, an empty one in manual optimisation."""

    prefix = "Lightning"

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        return self._strategy.optimizer_step(self._optimizer, closure or (lambda: None), **kwargs)


class FakeFabricOptimizer(_Poser):
    """Fabric also takes the state dict over."""

    prefix = "Fabric"

    def state_dict(self) -> dict[str, Any]:
        return self._strategy.get_optimizer_state(self.optimizer)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state_dict)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        kwargs = {} if closure is None else {"closure": closure}
        return self._strategy.optimizer_step(self.optimizer, **kwargs)


POSERS = pytest.mark.parametrize("poser", [FakeLightningOptimizer, FakeFabricOptimizer])


@POSERS
@PAIR_TABLE
def test_row19_methods_run_on_lightnings_object(method: str, optimizer: str, poser: type[_Poser]) -> None:
    model, wrapped = build(method, optimizer)
    strategy = _Strategy()
    fake: Any = poser(wrapped, strategy)
    own = set(vars(fake))
    assert isinstance(fake, Optimizer)
    assert isinstance(fake, type(wrapped))
    if optimizer == "lbfgs":
        log = []
        for step in range(3):
            evaluations: list[Any] = []

            def closure(step: int = step, evaluations: list[Any] = evaluations) -> float:
                fake.zero_grad()
                report = fake.backward(losses(model, step))
                evaluations.append((report.objective, gradients(model)))
                return report.objective

            fake.step(closure)
            log.append(evaluations)
    else:
        log = train(fake, model, range(3))
    assert strategy.steps == 3

    # The log equals that of the real object alone: a memory kept on the fake would have begun anew in every step.
    twin, alone = build(method, optimizer)
    assert_same(train(alone, twin, range(3)), log)
    assert_same_training(model, wrapped, twin, alone)
    assert_same(ours(wrapped), ours(alone))
    assert set(vars(fake)) == own  # nothing of ours has been written onto their object
    assert fake.report is wrapped.report
    assert wrapped.report is not None


@POSERS
@METHOD_TABLE
def test_row19_checkpoints_through_lightnings_object(method: str, poser: type[_Poser]) -> None:
    model, wrapped = build(method, "adam")
    fake: Any = poser(wrapped, _Strategy())
    train(fake, model, range(3))
    state = copy.deepcopy(fake.state_dict())
    assert_same(state, wrapped.state_dict())  # not signed with the name of their class

    again, rewrapped = build(method, "adam")
    refake: Any = poser(rewrapped, _Strategy())
    own = set(vars(refake))
    refake.load_state_dict(state)
    assert set(vars(refake)) == own
    assert_same(rewrapped.state_dict(), wrapped.state_dict())
    again.load_state_dict(model.state_dict())
    train(refake, again, range(3, 5))
    train(fake, model, range(3, 5))
    assert_same_training(again, rewrapped, model, wrapped)


@POSERS
@METHOD_TABLE
def test_row19_the_rest_of_the_contract_on_lightnings_object(method: str, poser: type[_Poser]) -> None:
    model, wrapped = build(method, "adam")
    fake: Any = poser(wrapped, _Strategy())
    base = innermost(wrapped)
    assert fake.param_groups is base.param_groups
    assert fake.state is base.state
    assert fake.defaults is base.defaults
    seen: list[Any] = []
    fake.register_step_post_hook(lambda optimizer, args, kwargs: seen.append(optimizer))
    fake.state = defaultdict(dict)
    assert base.state is fake.state
    train(fake, model, range(1))
    assert seen == [base]
    extra = nn.Parameter(torch.ones(2))
    fake.add_param_group({"params": [extra]})
    assert base.param_groups[1]["params"][0] is extra
    assert_step_not_patched(wrapped)
    assert not hasattr(fake, "_step_supports_amp_scaling")


@METHOD_TABLE
def test_row19_discarding_on_either_object_is_discarding_on_both(method: str) -> None:
    model, wrapped = build(method, "sgd")
    fake: Any = FakeLightningOptimizer(wrapped, _Strategy())
    before = ours(wrapped)
    fake.backward(losses(model, 0))
    wrapped.zero_grad()
    fake.step()
    assert_same(ours(wrapped), before)
    wrapped.backward(losses(model, 0))
    fake.zero_grad()
    wrapped.step()
    assert_same(ours(wrapped), before)
    fake.backward(losses(model, 0))
    wrapped.step()
    assert not same(ours(wrapped), before)


@METHOD_TABLE
def test_row19_no_attribute_has_a_name_that_lightning_uses(method: str) -> None:
    _, wrapped = build(method, "sgd")
    for name in ("_optimizer", "_strategy", "_callbacks", "optimizer", "_on_before_step", "_on_after_step"):
        assert not hasattr(wrapped, name)
    assert all("__slots__" not in vars(cls) for cls in type(wrapped).__mro__)


# ------------------------------------------------------------------------------ row 20: the object that schedulers name


@runtime_checkable
class Optimizable(Protocol):
    """What Fabric asks of an optimizer."""

    param_groups: list[dict[Any, Any]]
    defaults: dict[Any, Any]
    state: defaultdict[Tensor, Any]

    def step(self, closure: Callable[[], float] | None = ...) -> float | None: ...
    def state_dict(self) -> dict[str, dict[Any, Any]]: ...
    def load_state_dict(self, state_dict: dict[str, dict[Any, Any]]) -> None: ...


@METHOD_TABLE
def test_row20_the_schedulers_optimizer_is_the_wrapper(method: str) -> None:
    _, wrapped = build(method, "adam")
    assert isinstance(wrapped, Optimizable)
    for scheduler in SCHEDULERS.values():
        assert scheduler(wrapped).optimizer is wrapped


@METHOD_TABLE
def test_row20_the_wrapper_is_not_taken_for_its_base(method: str) -> None:
    # Lightning looks for a scheduler's optimizer with `in`, Accelerate with `==`.
    _, wrapped = build(method, "adam")
    assert wrapped in [wrapped]
    assert wrapped not in [wrapped.base, innermost(wrapped), build(method, "adam")[1]]
    assert len({wrapped, wrapped.base, wrapped}) == 2


# ------------------------------------------------------------------------------------------- row 21: Accelerate's layer


def _moved(state: Any, device: str) -> Any:
    """Rebuild a state dict on a device, as Accelerate does: only dicts, lists, tuples and tensors are looked into."""
    if isinstance(state, (list, tuple)):
        entries = [_moved(entry, device) for entry in state]
        return type(state)(*entries) if hasattr(state, "_fields") else type(state)(entries)
    if isinstance(state, dict):
        return type(state)({key: _moved(entry, device) for key, entry in state.items()})
    return state.to(device) if isinstance(state, Tensor) else state


class FakeAcceleratedOptimizer(Optimizer):
    """No ``__getattr__``, a state dict sent round at construction, ``step`` patched while a scaler steps."""

    def __init__(self, optimizer: Optimizer, scaler: GradScaler | None = None) -> None:
        self.optimizer, self.scaler = optimizer, scaler
        self.skipped = self.called = False
        if scaler is not None:
            self._remember()
        optimizer.load_state_dict(_moved(optimizer.state_dict(), "cpu"))

    def _remember(self) -> None:
        self.original = original = self.optimizer.step

        def patched(*args: Any, **kwargs: Any) -> Any:
            self.called = True
            return original(*args, **kwargs)

        self.patched = patched

    @property
    def param_groups(self) -> Any:  # type: ignore[override]
        return self.optimizer.param_groups

    def zero_grad(self, set_to_none: bool | None = None) -> None:  # type: ignore[override]
        assert "set_to_none" in inspect.signature(self.optimizer.zero_grad).parameters
        self.optimizer.zero_grad(set_to_none=True if set_to_none is None else set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        if self.scaler is None:
            self.optimizer.step(closure)
            return
        self.optimizer.step = self.patched  # type: ignore[method-assign]
        self.scaler.step(self.optimizer, closure)
        self.scaler.update()
        self.skipped = not self.called
        self.optimizer.step = self.original  # type: ignore[method-assign]
        self.called = False

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("called", "original", "patched")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, called=False)
        if self.scaler is not None:
            self._remember()


def train_accelerated(prepared: FakeAcceleratedOptimizer, model: Net, steps: Sequence[int], clip: bool = False) -> Log:
    """The documented loop under Accelerate."""
    log: Log = []
    for step in steps:
        prepared.zero_grad()
        report = prepared.optimizer.backward(losses(model, step), scaler=prepared.scaler)  # type: ignore[attr-defined]
        if clip and prepared.scaler is not None:
            prepared.scaler.unscale_(prepared.optimizer)  # Accelerate peels its own layer off first
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        log.append([(report.objective, gradients(model))])
        prepared.step()
    return log


@pytest.mark.parametrize("scaled", [False, True])
@PLAIN_PAIR_TABLE
def test_row21_under_accelerate(method: str, optimizer: str, scaled: bool) -> None:
    model, wrapped = build(method, optimizer)
    train(wrapped, model, range(2))  # preparing must not lose what was learnt before
    twin, other = build(method, optimizer)
    train(other, twin, range(2))
    schedulers = [lr_scheduler.ExponentialLR(o, gamma=0.8) for o in (wrapped, other)]
    prepared = FakeAcceleratedOptimizer(wrapped, GradScaler("cpu", init_scale=2.0**10) if scaled else None)
    assert_same(ours(wrapped), ours(other))
    assert_same(torchs_part(wrapped.state_dict()), torchs_part(other.state_dict()))
    for step in range(2, 5):
        train_accelerated(prepared, model, [step], clip=True)
        assert not prepared.skipped
        train_accelerated(FakeAcceleratedOptimizer(other), twin, [step], clip=True)
        for scheduler in schedulers:
            scheduler.step()
    assert_same_training(model, wrapped, twin, other)
    assert_same(ours(wrapped), ours(other))


@METHOD_TABLE
def test_row21_accelerate_sees_a_skipped_step(method: str) -> None:
    model, wrapped = build(method, "adam")
    scaler = GradScaler("cpu", init_scale=2.0**120, backoff_factor=2.0**-110)
    prepared = FakeAcceleratedOptimizer(wrapped, scaler)
    before = ours(wrapped)
    prepared.zero_grad()
    wrapped.backward(overheated(model, 0), scaler=scaler)
    prepared.step()
    assert prepared.skipped
    assert_same(ours(wrapped), before)
    train_accelerated(prepared, model, range(1))
    assert not prepared.skipped
    assert not same(ours(wrapped), before)


@pytest.mark.parametrize("how", COPIES)
@METHOD_TABLE
def test_row21_a_copy_after_accelerate_put_the_step_back(method: str, how: str) -> None:
    # Accelerate leaves a bound method on the instance. In a copy it would step the original's parameters.
    model, wrapped = build(method, "adam")
    prepared = FakeAcceleratedOptimizer(wrapped, GradScaler("cpu", init_scale=2.0**10))
    train_accelerated(prepared, model, range(2))
    assert "step" in vars(wrapped)
    again, reprepared = COPIES[how]((model, prepared))
    before = [p.detach().clone() for p in model.parameters()]
    train_accelerated(reprepared, again, range(2, 4))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    train_accelerated(prepared, model, range(2, 4))
    assert_same_training(again, reprepared, model, prepared)


# ------------------------------------------------------------------------------------ row 22: distributed data parallel


@pytest.mark.parametrize("method", ["pcgrad", "mgda", "composed", *OWN])
def test_row22_the_rows_pass_by_the_reducers(method: str) -> None:
    # DDP and FSDP hang their reducers on the accumulation into `.grad`. Were it to run once a loss, replicas would
    # average some losses and not others. Rows come from torch.autograd.grad instead, and no reducer waits for another.
    model, wrapped = build(method, "sgd")
    assert reductions(wrapped, model) == []


def test_row22_a_weighting_meets_each_reducer_once() -> None:
    # One backward pass of the weighted sum, as with a plain loss; the passes that measure norms before it pass by.
    model, wrapped = build("gradnorm", "sgd")
    assert sorted(reductions(wrapped, model)) == sorted(name for name, _ in model.named_parameters())


def reductions(wrapped: MultiLossOptimizer, model: Net) -> list[str]:
    """Names of the parameters whose reducers one ``backward`` would start, once for every time."""
    fired: list[str] = []
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: fired.append(name))
    wrapped.backward(losses(model, 0))
    assert all(p.grad is not None for p in model.parameters())
    return fired


@pytest.fixture
def one_process_group() -> Iterator[None]:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}], ids=str)
@METHOD_TABLE
def test_row22_a_model_under_ddp_trains_as_without(
    method: str, options: dict[str, bool], one_process_group: None
) -> None:
    model, wrapped = build(method, "sgd")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own, about unused parameters that were not found
        parallel = nn.parallel.DistributedDataParallel(model, **options)
        log = train(wrapped, parallel, range(4))
    twin, alone = build(method, "sgd")
    assert_same(train(alone, twin, range(4)), log)
    assert_same_training(model, wrapped, twin, alone)
