"""Schedulers of torch, and closures, act on the wrapper as on the bare optimizer."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import Tensor
from torch.optim import LBFGS, Optimizer, lr_scheduler, swa_utils

from gradsurgery.optimizer import MultiLossOptimizer
from tests.support.torch_contract import (
    METHOD_TABLE,
    METHODS,
    OPTIMIZERS,
    OWN,
    PLAIN_PAIR_TABLE,
    SCHEDULERS,
    WRAPPER_TABLE,
    Net,
    assert_same,
    assert_same_training,
    bare,
    build,
    learning_rate,
    losses,
    ours,
    over,
    replay,
    same,
    torchs_part,
    train,
)

pytestmark = pytest.mark.filterwarnings("error")

# ----------------------------------------------------------------------------------------------------------- schedulers


def test_every_scheduler_of_torch_has_a_row() -> None:
    found = {
        name
        for module in (lr_scheduler, swa_utils)
        for name, cls in vars(module).items()
        if inspect.isclass(cls) and issubclass(cls, lr_scheduler.LRScheduler)
    }
    assert found - {"LRScheduler", "_LRScheduler"} == set(SCHEDULERS)


@pytest.mark.parametrize("optimizer", [*OPTIMIZERS, *OWN])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers_act_as_on_the_bare_optimizer(scheduler: str, optimizer: str) -> None:
    turn = list(METHODS)[list(SCHEDULERS).index(scheduler) % len(METHODS)]
    method = optimizer if optimizer in OWN else turn
    model, wrapped = build(method, optimizer)
    twin, other = bare(over(method, optimizer))
    pair = [SCHEDULERS[scheduler](o) for o in (wrapped, other)]
    rates = []
    for step in range(4):
        rates.append(learning_rate(wrapped))
        replay(other, twin, train(wrapped, model, [step]))
        for one in pair:
            one.step(1.0) if isinstance(one, lr_scheduler.ReduceLROnPlateau) else one.step()
        assert_same(*(one.get_last_lr() for one in pair))
        assert_same(*(torchs_part(o.state_dict())["param_groups"] for o in (wrapped, other)))
    assert len(set(rates)) > 1
    assert_same_training(model, wrapped, twin, other)


@METHOD_TABLE
def test_a_scheduler_sees_whether_the_optimizer_has_stepped(method: str) -> None:
    model, wrapped = build(method, "sgd")
    scheduler = lr_scheduler.StepLR(wrapped, step_size=1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()
    scheduler = lr_scheduler.StepLR(wrapped, step_size=1)
    train(wrapped, model, range(1))
    scheduler.step()  # silent: a warning would be an error here


@WRAPPER_TABLE
def test_a_scheduler_of_the_base_goes_on_after_wrapping(method: str) -> None:
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
def test_scheduler_checkpoints(method: str) -> None:
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


# ------------------------------------------------------------------------------------------------- step and its closure


@pytest.mark.parametrize("scheduled", [False, True])
@PLAIN_PAIR_TABLE
def test_the_closures_value_is_returned(method: str, optimizer: str, scheduled: bool) -> None:
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
def test_a_closure_that_raises_commits_nothing(method: str) -> None:
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
def test_lbfgs(method: str, search: str | None) -> None:
    def lbfgs(model: Net) -> Optimizer:
        return LBFGS(model.parameters(), lr=0.2, max_iter=4, line_search_fn=search)

    model, twin = Net(), Net()
    wrapped, other = METHODS[method](lbfgs(model), model), lbfgs(twin)
    log = train(wrapped, model, range(3))
    assert max(map(len, log)) > 2
    replay(other, twin, log)
    assert_same_training(model, wrapped, twin, other)


@WRAPPER_TABLE
def test_lbfgs_returns_its_first_value(method: str) -> None:
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
def test_the_evaluations_of_one_step_start_from_the_same_memory(method: str) -> None:
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
def test_a_step_counts_once_however_often_it_was_evaluated(method: str) -> None:
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
