"""The wrapper is a true torch optimizer: groups, state, defaults, `step`, `zero_grad` and hooks."""

from __future__ import annotations

import copy
import inspect
import re
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim import optimizer as torch_optimizer

from gradsurgery import MGDA, AdaTask, GradNormWeighter, MTAdam, MultiAdam, PCGrad
from gradsurgery.optimizer import MultiLossOptimizer
from tests.support.torch_contract import (
    ALL_PAIRS,
    FINDS_PARAMETERS,
    METHOD_TABLE,
    METHODS,
    OPTIMIZERS,
    OWN,
    PAIR_TABLE,
    PLAIN_PAIRS,
    SCHEDULERS,
    WRAPPER_TABLE,
    Net,
    assert_same,
    assert_same_training,
    assert_step_not_patched,
    bare,
    build,
    carry_over,
    innermost,
    losses,
    make,
    ours,
    over,
    replay,
    same,
    table,
    torchs_part,
    train,
)

pytestmark = pytest.mark.filterwarnings("error")


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


# ------------------------------------------------------------------------------------------------------ is an Optimizer


@PAIR_TABLE
def test_is_an_optimizer(method: str, optimizer: str) -> None:
    _, wrapped = build(method, optimizer)
    assert isinstance(wrapped, Optimizer)
    assert issubclass(MultiLossOptimizer, Optimizer)


# ----------------------------------------------------------------------------------- param_groups are those of the base


@PAIR_TABLE
def test_groups_are_the_bases_own_also_after_loading(method: str, optimizer: str) -> None:
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


def test_groups_can_be_assigned() -> None:
    model, wrapped = build("composed", "adam")
    groups = [dict(wrapped.param_groups[0], lr=0.25)]
    wrapped.param_groups = groups
    assert innermost(wrapped).param_groups is groups
    train(wrapped, model, range(1))
    moved = (model.trunk.weight - Net().trunk.weight).abs()
    assert torch.allclose(moved, torch.full_like(moved, 0.25), rtol=1e-3)  # Adam's first step has the length lr


def test_repr_shows_the_groups() -> None:
    _, wrapped = build("pcgrad", "sgd")
    assert repr(wrapped).startswith("PCGrad (")
    assert "momentum: 0.9" in repr(wrapped)


@pytest.mark.parametrize("average", ["swa", "ema"])
@METHOD_TABLE
def test_swa_and_ema(method: str, average: str) -> None:
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


# -------------------------------------------------------------------------------------- parameters are never remembered


@table([pair for pair in PLAIN_PAIRS if pair[0] in FINDS_PARAMETERS and pair[1] != "adagrad"])
def test_replaced_parameters_are_found(method: str, optimizer: str) -> None:
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
def test_unfrozen_and_removed_parameters_are_noticed(method: str) -> None:
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


# --------------------------------------------------------------------------------------------- state, read and assigned


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
def test_state_is_the_bases_own_and_can_be_assigned(method: str, optimizer: str) -> None:
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
def test_parameters_and_state_can_be_lent(method: str, optimizer: str) -> None:
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
def test_state_entries_can_be_moved_one_by_one(method: str) -> None:
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


# -------------------------------------------------------------------------------- only parameters are keys of the state


@PAIR_TABLE
def test_only_parameters_are_keys_of_the_state(method: str, optimizer: str) -> None:
    model, wrapped = build(method, optimizer)
    train(wrapped, model, range(3))
    parameters = list(model.parameters())
    assert bool(wrapped.state) == (method not in OWN)
    assert all(any(key is p for p in parameters) for key in wrapped.state)
    assert set(wrapped.state_dict()["state"]) <= set(range(len(parameters)))


# --------------------------------------------------------------------------------------------------------- the defaults


@PAIR_TABLE
def test_defaults_are_the_bases_own(method: str, optimizer: str) -> None:
    _, wrapped = build(method, optimizer)
    base = innermost(wrapped)
    assert wrapped.defaults is base.defaults
    assert "defaults" not in vars(wrapped)
    wrapped.defaults = {**base.defaults, "lr": 0.5}
    assert base.defaults["lr"] == 0.5


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw", "adamw-fused", "rmsprop"])
@pytest.mark.parametrize("scheduler", ["CyclicLR", "OneCycleLR"])
def test_momentum_is_cycled(scheduler: str, optimizer: str) -> None:
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


# -------------------------------------------------------------------------------- step is a method, and can be replaced


@METHOD_TABLE
def test_step_is_a_plain_method(method: str) -> None:
    model, wrapped = build(method, "adam")
    for _ in range(2):  # before and after use
        assert "step" not in vars(wrapped)
        assert wrapped.step.__self__ is wrapped
        assert wrapped.step.__func__ is type(wrapped).step
        assert_step_not_patched(wrapped)
        train(wrapped, model, range(1))


@METHOD_TABLE
def test_step_can_be_replaced_and_put_back(method: str) -> None:
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
def test_two_schedulers_share_one_wrapped_step(method: str) -> None:
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


def test_a_dropped_wrapper_is_collected_under_a_scheduler() -> None:
    _, wrapped = build("pcgrad", "sgd")
    scheduler = lr_scheduler.ExponentialLR(wrapped, gamma=0.5)
    alive = weakref.ref(wrapped)
    del wrapped, scheduler
    assert alive() is None  # by reference counting alone: neither of them made a cycle


# ------------------------------------------------------------------------------------------------------------ zero_grad


@pytest.mark.parametrize("name", ["zero_grad", "step", "state_dict", "load_state_dict", "add_param_group"])
@pytest.mark.parametrize("cls", [PCGrad, MGDA, GradNormWeighter, MultiAdam, AdaTask, MTAdam])
def test_zero_grad_and_the_others_have_torchs_signature(cls: type[Optimizer], name: str) -> None:
    ours, torchs = (inspect.signature(getattr(c, name)).parameters.values() for c in (cls, Optimizer))
    assert [(p.name, p.default, p.kind) for p in ours] == [(p.name, p.default, p.kind) for p in torchs]


@PAIR_TABLE
def test_zero_grad_clears_as_torch_does(method: str, optimizer: str) -> None:
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
def test_gradients_that_the_model_clears_take_the_proposal_with_them(method: str) -> None:
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


# ---------------------------------------------------------------------------------------------------------------- hooks

HOOKS: dict[str, Callable[[list[Any]], Callable[..., None]]] = {
    "register_step_pre_hook": lambda seen: lambda optimizer, args, kwargs: seen.append(optimizer),
    "register_step_post_hook": lambda seen: lambda optimizer, args, kwargs: seen.append(optimizer),
    "register_state_dict_pre_hook": lambda seen: lambda optimizer: seen.append(optimizer),
    "register_state_dict_post_hook": lambda seen: lambda optimizer, state: seen.append(optimizer),
    "register_load_state_dict_pre_hook": lambda seen: lambda optimizer, state: seen.append(optimizer),
    "register_load_state_dict_post_hook": lambda seen: lambda optimizer: seen.append(optimizer),
}
GLOBAL_HOOKS = ["register_optimizer_step_pre_hook", "register_optimizer_step_post_hook"]


def test_every_hook_of_torch_has_a_row() -> None:
    assert {name for name in dir(Optimizer) if re.fullmatch(r"register_\w+_hook", name)} == set(HOOKS)
    found = {name for name in vars(torch_optimizer) if re.fullmatch(r"register_optimizer_\w+_hook", name)}
    assert found == set(GLOBAL_HOOKS)


@METHOD_TABLE
def test_hook_tables_are_the_bases_own(method: str) -> None:
    _, wrapped = build(method, "adam")
    base = innermost(wrapped)
    tables = [name for name in vars(base) if re.fullmatch(r"_optimizer_\w+_hooks", name)]
    assert len(tables) == len(HOOKS)
    for name in tables:
        assert getattr(wrapped, name) is getattr(base, name)


@pytest.mark.parametrize("registered", ["on the wrapper", "on the base before wrapping"])
@PAIR_TABLE
def test_each_hook_fires_once_and_receives_the_base(method: str, optimizer: str, registered: str) -> None:
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
def test_global_hooks_fire_once_a_step(method: str, optimizer: str) -> None:
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
def test_hooks_that_change_something_are_obeyed(method: str) -> None:
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
