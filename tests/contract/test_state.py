"""State moves with the update alone; a saved state is whole or refused; what was given in order keeps its names."""

from __future__ import annotations

import contextlib
import copy
import math
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.optim import SGD

import gradsurgery
from gradsurgery import transaction
from tests.support.loops import (
    METHODS,
    OPTIMIZERS,
    Net,
    end_epoch,
    inputs,
    losses_of,
    memory_of,
    propose,
    same,
    train,
    weights_of,
)

OVER_METHODS = pytest.mark.parametrize("name", METHODS)


class StopEarly(Exception):
    """What a hook raises to end a run."""


def stop(*_):
    raise StopEarly


def two(factory=gradsurgery.DWAWeighter, lr=0.01, **switches):
    """Two parameters and a method over them."""
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    return w, factory(SGD([w], lr=lr), **switches)


def pair(w, order="ab"):
    """Two losses, in an order."""
    losses = {"a": w[0] ** 2, "b": (w[1] - 5) ** 2 + w[0]}
    return {name: losses[name] for name in order}


def count(optimizer):
    return optimizer.state_dict()["gradsurgery"]["memory"]["step"]


# --------------------------------------------------------------------------- the update decides, whatever a hook raises


@OVER_METHODS
@pytest.mark.parametrize("base", OPTIMIZERS)
def test_an_update_is_committed_whatever_a_hook_raises_after_it(name, base):
    net, twin = Net(), Net()
    optimizer = METHODS[name](OPTIMIZERS[base](net.parameters()))
    same_run = METHODS[name](OPTIMIZERS[base](twin.parameters()))
    train(name, optimizer, net, range(2))
    train(name, same_run, twin, range(2))
    handle = optimizer.register_step_post_hook(stop)
    with pytest.raises(StopEarly):
        train(name, optimizer, net, [2])
    handle.remove()
    end_epoch(name, optimizer)
    optimizer.zero_grad()
    train(name, same_run, twin, [2])
    assert same(memory_of(optimizer), memory_of(same_run))
    train(name, optimizer, net, [3])
    train(name, same_run, twin, [3])
    assert same(net.state_dict(), twin.state_dict())


def test_a_hook_after_the_step_saves_the_state_that_belongs_to_the_parameters():
    w, optimizer = two()
    states = []
    optimizer.register_step_post_hook(lambda *_: states.append(count(optimizer)))
    for _ in range(3):
        optimizer.zero_grad()
        optimizer.backward(pair(w))
        optimizer.step()
    assert states == [1, 2, 3]


def test_a_hook_after_the_step_may_clear_the_gradients():
    w, optimizer = two()
    optimizer.register_step_post_hook(lambda *_: optimizer.zero_grad())
    optimizer.backward(pair(w))
    optimizer.step()
    assert count(optimizer) == 1


def test_a_callback_of_the_monitor_that_raises_leaves_state_and_record_in_step():
    w, optimizer = two(lambda base: gradsurgery.MoCo(gradsurgery.DWAWeighter(base)))
    monitor = gradsurgery.Monitor(optimizer, callback=stop)
    optimizer.backward(pair(w))
    with pytest.raises(StopEarly):
        optimizer.step()
    optimizer.zero_grad()
    assert count(optimizer) == count(optimizer.base) == 1
    assert monitor.steps == [1]
    assert monitor.skipped == 0


@pytest.mark.parametrize("where", ["pre-hook", "closure", "base"])
def test_without_an_update_nothing_is_committed(where, monkeypatch):
    w, optimizer = two()
    optimizer.backward(pair(w))
    optimizer.step()
    optimizer.zero_grad()
    before, here = memory_of(optimizer), w.detach().clone()
    optimizer.backward(pair(w))
    if where == "pre-hook":
        optimizer.register_step_pre_hook(stop)
    if where == "base":
        monkeypatch.setattr(optimizer.base, "step", stop)
    with pytest.raises(StopEarly):
        optimizer.step(stop if where == "closure" else None)
    assert torch.equal(w, here)
    assert same(memory_of(optimizer), before)
    monkeypatch.undo()
    if where != "pre-hook":  # nor is a later step of the wrapped optimizer taken for ours
        with pytest.warns(UserWarning, match="step\\(\\) of the wrapped SGD"):
            optimizer.base.step()
        assert same(memory_of(optimizer), before)


def test_a_hook_that_was_there_first_may_raise_too():
    w = nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
    base = SGD([w], lr=0.01)
    base.register_step_post_hook(stop)
    optimizer = gradsurgery.MoCo(gradsurgery.DWAWeighter(base))
    optimizer.backward(pair(w))
    with pytest.raises(StopEarly):
        optimizer.step()
    assert count(optimizer) == count(optimizer.base) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_that_a_hook_makes_goes_on_from_the_step_that_was_made(copied):
    w, optimizer = two(lambda base: gradsurgery.MoCo(gradsurgery.DWAWeighter(base)))
    made = []
    handle = optimizer.register_step_post_hook(lambda *_: made.append(copied((w, optimizer))))
    optimizer.backward(pair(w))
    optimizer.step()
    handle.remove()
    for parameter, one in (*made, (w, optimizer)):
        one.zero_grad()
        one.backward(pair(parameter))
        one.step()
        assert count(one) == count(one.base) == 2
    assert torch.equal(made[0][0], w)


def test_a_hook_after_the_step_may_load_a_state():
    w, optimizer = two()
    start = copy.deepcopy(optimizer.state_dict())
    optimizer.register_step_post_hook(lambda *_: optimizer.load_state_dict(start))
    optimizer.backward(pair(w))
    optimizer.step()
    assert count(optimizer) == 0


@pytest.mark.parametrize("act", ["end_epoch", "update", "combine", "backward"])
def test_what_a_hook_does_after_the_step_is_as_if_done_after_it(act):
    """The memory that the hook sees, and changes, is that of the step that was made."""
    found = []
    for inside in (True, False):
        factory = {"update": gradsurgery.FAMOWeighter, "combine": gradsurgery.GradVac}.get(act, gradsurgery.DWAWeighter)
        w, optimizer = two(factory)

        def do(optimizer=optimizer, w=w):
            if act == "end_epoch":
                optimizer.epoch_end()
            if act == "update":
                optimizer.update(pair(w))
            if act == "combine":
                optimizer.combine(torch.tensor([[1.0, 0.0], [-1.0, 0.5]]), update=True)
            if act == "backward":
                optimizer.zero_grad()
                optimizer.backward(pair(w))

        for _ in range(2):
            handle = optimizer.register_step_post_hook(lambda *_, do=do: do()) if inside else None
            optimizer.zero_grad()
            optimizer.backward(pair(w))
            optimizer.step()
            handle.remove() if handle else do()
        optimizer.step()
        found.append((memory_of(optimizer), w.detach().clone()))
    assert same(*found)


def test_a_gradient_scaler_decides_whether_there_is_an_update():
    w, optimizer = two(lambda base: gradsurgery.MoCo(gradsurgery.DWAWeighter(base)))
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimizer.backward(pair(w), scaler=scaler)
    w.grad[0] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert count(optimizer) == count(optimizer.base) == 0
    optimizer.zero_grad()
    optimizer.register_step_post_hook(stop)
    optimizer.backward(pair(w), scaler=scaler)
    with pytest.raises(StopEarly):
        scaler.step(optimizer)
    assert count(optimizer) == count(optimizer.base) == 1


def test_an_optimizer_without_hooks_commits_too():
    class Bare(torch.optim.Optimizer):
        """As wrappers that never call the constructor of torch's class."""

        def __init__(self, inside):
            self.inside, self.defaults = inside, inside.defaults

        param_groups = property(lambda self: self.inside.param_groups)
        state = property(lambda self: self.inside.state)

        def step(self, closure=None):
            return self.inside.step(closure)

        def zero_grad(self, set_to_none=True):
            self.inside.zero_grad(set_to_none)

        def state_dict(self):
            return self.inside.state_dict()

        def load_state_dict(self, state):
            self.inside.load_state_dict(state)

    Bare.step.hooked = True  # or the class would be patched on its first use
    w, optimizer = two(lambda base: gradsurgery.DWAWeighter(Bare(base)))
    optimizer.backward(pair(w))
    optimizer.step()
    assert count(optimizer) == 1
    optimizer.load_state_dict(optimizer.state_dict())
    assert count(optimizer) == 1
    w, optimizer = two(lambda base: gradsurgery.PCGrad(Bare(base)))
    optimizer.combine(torch.eye(2), update=True)
    assert count(optimizer) == 1
    optimizer.backward(list(pair(w).values()))
    optimizer.step()
    assert count(optimizer) == 2


def test_the_memory_may_be_read_between_calls():
    w, optimizer = two(gradsurgery.PCGrad, every=2, weight_momentum=0.5)
    assert optimizer.memory == {"step": 0}
    optimizer.backward(pair(w))
    assert optimizer.memory == {"step": 0}
    optimizer.step()
    learnt = optimizer.memory
    assert learnt["step"] == 1
    assert set(learnt["last_weights"]) == set(learnt["smoothed_weights"]) == {"a", "b"}
    optimizer.combine(torch.tensor([[1.0, 2.0], [-3.0, 1.0]]))
    assert optimizer.memory == learnt
    optimizer.combine(torch.eye(2), update=True)
    assert optimizer.memory["step"] == 2


def test_a_step_that_a_hook_makes_inside_a_step_counts_once_for_each_backward():
    w, optimizer = two()
    optimizer.backward(pair(w))
    handle = optimizer.register_step_post_hook(lambda base, *_: (handle.remove(), base.step()))
    optimizer.step()
    assert count(optimizer) == 1


# ------------------------------------------------------------------------------------------------------- saved states


def damaged(change, factory=gradsurgery.DWAWeighter):
    """An optimizer that has learnt something, and a state of it that was changed."""
    w, optimizer = two(factory)
    for _ in range(2):
        optimizer.zero_grad()
        optimizer.backward(pair(w))
        optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    change(state["gradsurgery"]["memory"])
    return optimizer, state


@pytest.mark.parametrize("step", [-5, math.nan, 2**63, 2**70, "x", None, True, 1.0, [1]])
def test_a_step_that_is_no_count_is_refused(step):
    optimizer, state = damaged(lambda memory: memory.update(step=step))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"DWAWeighter.load_state_dict: .*memory\['step'\].*Nothing was loaded"):
        optimizer.load_state_dict(state)
    assert same(optimizer.state_dict(), before)


@pytest.mark.parametrize(
    "entry",
    [
        {"tasks": "ab"},
        {"tasks": ["a", "a"]},
        {"tasks": ["a", 3]},
        {"epoch.sum": 3.0},
        {"epoch.sum": {"a": "x"}},
        {"epoch.sum": {"a": math.nan}},
        {"epoch.count": {0: 1.0}},
        {3: {"a": 1.0}},
        {"last_weights": [1.0]},
        {"last_weights": {"a": True}},
        {"last_private": ["a"]},
        {"last_private": [-1]},
        {"last_private": 3},
        {"nonzero": [[0]]},
        {"window": {"a": [math.nan]}},
        {"winners": "ab"},
        {"winners": [3]},
        {"pseudo": {0: 1.0}},
        {"pseudo": torch.ones(2)},
    ],
    ids=str,
)
def test_an_entry_of_a_wrong_kind_is_refused(entry):
    optimizer, state = damaged(lambda memory: memory.update(entry))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"DWAWeighter.load_state_dict: .*memory.*Nothing was loaded"):
        optimizer.load_state_dict(state)
    assert same(optimizer.state_dict(), before)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"step": -5}, f"memory['step'] = -5, which is no whole number from 0 to {2**63 - 1}"),
        ({"tasks": "ab"}, "memory['tasks'] = 'ab', which is no list of different names"),
        ({"last_weights": [1.0]}, "memory['last_weights'] = a list, which is no number by name"),
        ({"last_weights": "x" * 57}, f"memory['last_weights'] = {'x' * 57!r}, which"),
        ({"last_weights": "x" * 58}, f"memory['last_weights'] = '{'x' * 55}…, which"),
    ],
    ids=["number", "text", "object", "almost too long", "too long"],
)
def test_what_an_entry_is_and_should_be_is_told(entry, said):
    optimizer, state = damaged(lambda memory: memory.update(entry))
    with pytest.raises(ValueError, match="Nothing was loaded") as error:
        optimizer.load_state_dict(state)
    assert said in str(error.value)


def test_the_largest_number_of_steps_is_taken():
    optimizer, state = damaged(lambda memory: memory.update(step=2**63 - 1))
    optimizer.load_state_dict(state)
    assert optimizer.state_dict()["gradsurgery"]["memory"]["step"] == 2**63 - 1


class Own(gradsurgery.PCGrad):
    """A method from outside, which may remember what it likes."""


def test_a_method_from_outside_may_remember_any_plain_values():
    kept = {"none": None, "flag": True, "pairs": [(1, "x"), {"y": [2.5, None]}], "row": torch.ones(2)}
    optimizer, state = damaged(lambda memory: memory.update(kept), Own)
    optimizer.load_state_dict(state)
    assert same({k: optimizer.state_dict()["gradsurgery"]["memory"][k] for k in kept}, kept)


@pytest.mark.parametrize("value", [{1, 2}, [{1, 2}], {"a": object}, (b"x",)], ids=["set", "list", "dict", "tuple"])
def test_a_method_from_outside_remembers_plain_values_alone(value):
    optimizer, state = damaged(lambda memory: memory.update(mine=value), Own)
    with pytest.raises(ValueError, match=r"Own.load_state_dict: .*memory\['mine'\] = a \w+, which is no plain value"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize(("count", "shown"), [(5, "'a', 'b', 'c', 'd', 'e'."), (6, "'a', 'b', 'c', 'd', 'e', ….")])
def test_five_keys_of_what_is_no_state_are_named(count, shown):
    _, optimizer = two(gradsurgery.PCGrad)
    with pytest.raises(ValueError, match="its keys are") as error:
        optimizer.load_state_dict(dict.fromkeys("abcdef"[:count]))
    assert f"its keys are {shown}" in str(error.value)


def test_an_entry_inside_a_weighter_or_a_part_is_looked_at_too():
    optimizer, state = damaged(lambda memory: None, lambda base: gradsurgery.MoCo(gradsurgery.DWAWeighter(base)))
    before = copy.deepcopy(optimizer.state_dict())
    state["gradsurgery"]["inner"]["memory"]["epoch.sum"] = 3.0
    with pytest.raises(ValueError, match=r"DWAWeighter.load_state_dict: "):
        optimizer.load_state_dict(state)
    assert same(optimizer.state_dict(), before)

    def parts(base):
        return gradsurgery.GradVac(base, granularity="group", shared_params=base.param_groups[0]["params"])

    optimizer, state = damaged(lambda memory: memory["group 0"].update(targets={"a": 1.0}), parts)
    with pytest.raises(ValueError, match=r"GradVac.load_state_dict: .*memory\['targets'\]"):
        optimizer.load_state_dict(state)


@OVER_METHODS
def test_what_a_method_saves_is_whole(name):
    net = Net()
    optimizer = METHODS[name](OPTIMIZERS["sgd"](net.parameters()), weight_momentum=0.5) if can_smooth(name) else None
    optimizer = optimizer or METHODS[name](OPTIMIZERS["sgd"](net.parameters()))
    train(name, optimizer, net, range(4))
    entry = optimizer.state_dict()["gradsurgery"]
    while entry is not None:
        assert not transaction.wrong_entry(entry)
        assert not transaction.wrong_memory(entry["memory"], known=True)
        entry = entry["inner"]
    optimizer.load_state_dict(optimizer.state_dict())


def can_smooth(name):
    """Whether a method takes `weight_momentum`."""
    try:
        METHODS[name](OPTIMIZERS["sgd"](Net().parameters()), weight_momentum=0.5)
    except (TypeError, ValueError):
        return False
    return True


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({}, "no 'state' and no 'param_groups'; its keys are none"),
        ({"layer.weight": torch.ones(1)}, "its keys are 'layer.weight'. Is it the state of a model"),
        ({"state": {}, "param_groups": 3}, "no 'param_groups'"),
        (7, "got an object of type int"),
        (None, "got an object of type NoneType"),
    ],
    ids=["empty", "model", "groups", "number", "None"],
)
def test_what_is_no_state_of_an_optimizer_is_refused(state, said):
    _, optimizer = two(lambda base: gradsurgery.PCGrad(gradsurgery.DWAWeighter(base)))
    with pytest.raises(ValueError if isinstance(state, dict) else TypeError) as raised:
        optimizer.load_state_dict(state)
    assert str(raised.value).startswith(
        "PCGrad.load_state_dict: `state_dict` must be what state_dict() of an optimizer"
    )
    assert said in str(raised.value)


def test_a_state_that_the_optimizer_inside_refuses_changes_nothing():
    optimizer, state = damaged(
        lambda memory: memory.update(step=9), lambda base: gradsurgery.MoCo(gradsurgery.DWAWeighter(base))
    )
    before = copy.deepcopy(optimizer.state_dict())
    state["param_groups"].append(state["param_groups"][0])
    with pytest.raises(ValueError, match="number of parameter groups"):
        optimizer.load_state_dict(state)
    assert same(optimizer.state_dict(), before)


def test_a_state_that_the_optimizer_inside_has_taken_is_loaded_whatever_a_hook_raises():
    optimizer, state = damaged(
        lambda memory: memory.update(step=9), lambda base: gradsurgery.MoCo(gradsurgery.DWAWeighter(base))
    )
    state["param_groups"][0]["lr"] = 7.0
    optimizer.register_load_state_dict_post_hook(stop)
    with pytest.raises(StopEarly):
        optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 7.0
    assert count(optimizer) == 9


def test_loading_throws_accumulated_gradients_away():
    w, optimizer = two()
    optimizer.backward(pair(w), accumulate=True)
    assert optimizer.accumulated == ("a", "b")
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.accumulated == ()
    optimizer.step()


def test_loading_throws_a_proposal_away():
    w, optimizer = two()
    optimizer.backward(pair(w))
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert count(optimizer) == 0


# ------------------------------------------------------------------------------------------ nothing outlives its call


class Watched(torch.autograd.Function):
    """Keeps a weak reference to its node and to each gradient that it hands on."""

    seen: list = []  # noqa: RUF012

    @staticmethod
    def forward(ctx, x):
        Watched.seen.append(weakref.ref(ctx))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        new = grad.clone()
        Watched.seen.append(weakref.ref(new))
        return new


PLACES = {
    "solve": "gradsurgery.step.solve",
    "write": "gradsurgery.gradients.rows.write",
    "stops": "gradsurgery.guard.Guard.stops",
}


def attributes(optimizer):
    """What an optimizer has for itself, and while a call lasts, and that is not None or empty."""
    own = {
        **vars(optimizer),
        **vars(getattr(optimizer, "_now", optimizer)),
        **vars(getattr(optimizer, "_found", optimizer)),
    }
    kept = {"base", "check", "descends", "settings", "transaction"}  # none holds a tensor
    return {key for key, value in own.items() if key not in kept and value is not None and value != []}


@OVER_METHODS
@pytest.mark.parametrize("fails", [None, "solve", "weights", "write", "stops"])
def test_no_row_or_graph_outlives_a_call(name, fails, monkeypatch):
    """The rows of the weight are watched, since they are what `Watched` hands on."""
    Watched.seen.clear()
    net = Net()
    optimizer = METHODS[name](OPTIMIZERS["sgd"](net.parameters()))
    before = attributes(optimizer)
    train(name, optimizer, net, range(1))
    if fails in PLACES:
        monkeypatch.setattr(PLACES[fails], stop)
    elif fails is not None and hasattr(optimizer, fails):
        monkeypatch.setattr(type(optimizer), fails, stop)
    nn.utils.parametrize.register_parametrization(net.trunk, "weight", Through())
    residuals = net(inputs(0))
    losses = losses_of(residuals)
    alive = [weakref.ref(x) for x in [*residuals.values(), *losses.values()]]
    with contextlib.suppress(StopEarly):
        propose(optimizer, residuals, losses)
    assert len(Watched.seen) > 1
    del residuals, losses
    optimizer.zero_grad()
    assert not [ref for ref in [*alive, *Watched.seen] if ref() is not None]
    assert attributes(optimizer) <= before


class Through(nn.Module):
    """Sends a weight through `Watched`."""

    def forward(self, weight):
        return Watched.apply(weight)


def test_numbers_that_a_method_measured_do_not_outlive_a_call_that_raised(monkeypatch):
    net = Net()
    optimizer = gradsurgery.ExcessMTL(SGD(net.parameters(), lr=0.1))
    monkeypatch.setattr("gradsurgery.communication.Communicator.fetch", stop)
    made = []
    real = optimizer.measure
    monkeypatch.setattr(optimizer, "measure", lambda numbers: (made.append(weakref.ref(numbers)), real(numbers)))
    with pytest.raises(StopEarly):
        optimizer.backward(losses_of(net(inputs(0))))
    assert made
    assert made[0]() is None


# -------------------------------------------------------------------------------------------- FAMO and steps not made


def famo():
    return two(gradsurgery.FAMOWeighter)


def test_famo_learns_nothing_from_a_step_that_was_skipped_and_cleared():
    w, optimizer = famo()
    optimizer.backward(pair(w))
    optimizer.zero_grad()  # no step was made
    optimizer.update(pair(w))  # as documented: nothing
    assert optimizer.state_dict()["gradsurgery"]["memory"] == {"step": 0}


@pytest.mark.parametrize("skipped", ["cleared", "nonfinite", "raised"])
def test_an_update_left_out_is_not_made_up_for_by_the_next_one(skipped):
    w, optimizer = two(gradsurgery.FAMOWeighter, nonfinite="skip")
    optimizer.backward(pair(w))
    optimizer.step()  # and no update
    optimizer.zero_grad()
    before = memory_of(optimizer)
    if skipped == "raised":
        with pytest.raises(ValueError, match="above its bound"):
            optimizer.backward({"a": w[0] - 9, "b": w[1]})
    else:
        optimizer.backward({"a": w[0] * math.inf, "b": w[1]} if skipped == "nonfinite" else pair(w))
        optimizer.zero_grad()
    optimizer.update(pair(w))
    assert same(memory_of(optimizer), before)


def test_famo_learns_once_from_a_step():
    w, optimizer = famo()
    optimizer.backward(pair(w))
    optimizer.step()
    before = memory_of(optimizer)
    with pytest.raises(ValueError, match="above its bound"):
        optimizer.update({"a": -1.0, "b": 2.0})
    assert same(memory_of(optimizer), before)
    optimizer.update(pair(w))
    assert not same(memory_of(optimizer), before)
    with pytest.raises(RuntimeError, match="no step to learn from"):
        optimizer.update(pair(w))


def test_famo_may_be_saved_between_a_step_and_its_update():
    w, optimizer = famo()
    optimizer.backward(pair(w))
    optimizer.step()
    _, other = famo()
    other.load_state_dict(optimizer.state_dict())
    optimizer.update(pair(w))
    other.update(pair(w))
    assert same(memory_of(optimizer), memory_of(other))


# --------------------------------------------------------------------------------------------- what was given in order

IN_ORDER = {
    "FixedWeighter": lambda base: gradsurgery.FixedWeighter(base, weights=[1.0, 5.0]),
    "FAMOWeighter": lambda base: gradsurgery.FAMOWeighter(base, min_losses=[0.0, 0.5]),
    "InitialLossWeighter": lambda base: gradsurgery.InitialLossWeighter(base, initial_losses=[1.0, 5.0]),
    "PriorLossWeighter": lambda base: gradsurgery.PriorLossWeighter(base, [1.0, 5.0]),
    "RunningMaxWeighter": lambda base: gradsurgery.RunningMaxWeighter(base, gamma=[1.0, 5.0]),
    "UncertaintyWeighter": lambda base: gradsurgery.UncertaintyWeighter(base, kind=["regression", "classification"]),
    "GradNormWeighter": lambda base: gradsurgery.GradNormWeighter(
        base, base.param_groups[0]["params"], initial_losses=[1.0, 5.0]
    ),
    "NormalizedGradientWeighter": lambda base: gradsurgery.NormalizedGradientWeighter(
        base, alpha=1.0, initial_losses=[1.0, 5.0]
    ),
    "STCHWeighter": lambda base: gradsurgery.STCHWeighter(base, reference=[0.0, 0.5], preference=[1.0, 5.0]),
    "COSMOSWeighter": lambda base: gradsurgery.COSMOSWeighter(base, preference=(1.0, 5.0)),
    "PBIWeighter": lambda base: gradsurgery.PBIWeighter(base, preference=torch.tensor([1.0, 5.0])),
    "MGDA": lambda base: gradsurgery.MGDA(base, preference=[1.0, 5.0]),
    "PMGDA": lambda base: gradsurgery.PMGDA(base, preference=[1.0, 5.0]),
    "PCGrad over FixedWeighter": lambda base: gradsurgery.PCGrad(gradsurgery.FixedWeighter(base, weights=[1.0, 5.0])),
    "CAGrad by groups": lambda base: gradsurgery.CAGrad(
        base, preference=[1.0, 5.0], granularity="group", shared_params=base.param_groups[0]["params"]
    ),
    "AGDA": gradsurgery.AGDA,
    "AGEM": gradsurgery.AGEM,
    "FERERO": lambda base: gradsurgery.FERERO(base, preference=[1.0, 5.0]),
    "GCS": gradsurgery.GCS,
    "PIVRG": lambda base: gradsurgery.PIVRG(base, scores=[1.0, 5.0], min_temperature=1.0),
    "PCD": gradsurgery.PCD,
    "Bloop": gradsurgery.Bloop,
    "SAGO": gradsurgery.SAGO,
    "BLUR": gradsurgery.BLUR,
    "GRU": gradsurgery.GRU,
    "LDCMTLWeighter": gradsurgery.LDCMTLWeighter,
    "MetaBalance": gradsurgery.MetaBalance,
    "LRAnnealingWeighter": gradsurgery.LRAnnealingWeighter,
}


def run_of(factory, orders, resume=None):
    """The parameters after steps with losses in these orders; saved and loaded before one of them."""
    w, optimizer = two(factory)
    for t, order in enumerate(orders):
        if t == resume:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = factory(SGD([w], lr=0.01))
            optimizer.load_state_dict(state)
        optimizer.zero_grad()
        optimizer.backward(pair(w, order))
        optimizer.step()
    return w.detach()


@pytest.mark.parametrize("name", IN_ORDER)
def test_what_was_given_in_order_stays_with_its_names(name):
    expected = run_of(IN_ORDER[name], ["ab", "ab", "ab"])
    torch.testing.assert_close(run_of(IN_ORDER[name], ["ab", "ba", "ba"]), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", IN_ORDER)
def test_a_resumed_run_knows_the_names_of_what_was_given_in_order(name):
    expected = run_of(IN_ORDER[name], ["ab", "ab", "ab"])
    torch.testing.assert_close(run_of(IN_ORDER[name], ["ab", "ba", "ba"], resume=1), expected, rtol=1e-9, atol=0)


def test_the_first_call_gives_the_names():
    w, optimizer = two(gradsurgery.FixedWeighter, weights=[1.0, 5.0])
    assert optimizer.backward(pair(w, "ba")).weights == {"b": 1.0, "a": 5.0}


def test_micro_batches_are_calls():
    w, optimizer = two(gradsurgery.FixedWeighter, weights=[1.0, 5.0])
    optimizer.backward(pair(w), accumulate=True)
    assert optimizer.backward(pair(w, "ba")).weights == {"b": 5.0, "a": 1.0}


def test_losses_in_a_list_name_themselves():
    w, optimizer = two(gradsurgery.FixedWeighter, weights=[1.0, 5.0])
    for _ in range(2):
        optimizer.backward(list(pair(w).values()))
        optimizer.step()
    assert optimizer.state_dict()["gradsurgery"]["memory"] == {"step": 2}
    assert optimizer.backward([w[0]]).weights == {"0": 1.0}


def test_a_task_may_be_absent_later():
    w, optimizer = two(gradsurgery.FixedWeighter, weights=[1.0, 5.0])
    optimizer.backward(pair(w))
    optimizer.step()
    assert optimizer.backward({"b": w[1]}).weights == {"b": 5.0}
    assert optimizer.backward({"b": None, "a": w[0]}).weights == {"a": 3.0}
    with pytest.raises(ValueError, match=r"`weights` must name every loss, \['c'\] is missing"):
        optimizer.backward({"a": w[0], "c": w[1]})


def test_arguments_by_name_fix_no_order():
    w, optimizer = two(gradsurgery.FixedWeighter, weights={"a": 1.0, "b": 5.0})
    optimizer.backward(pair(w))
    optimizer.step()
    assert optimizer.state_dict()["gradsurgery"]["memory"] == {"step": 1}


def test_the_first_loss_of_the_first_call_stays_the_primary_one():
    w, optimizer = two(gradsurgery.AGEM)
    optimizer.backward(pair(w))
    optimizer.step()
    with pytest.raises(ValueError, match=r"got 'a' .which None stands for, as the first loss of the first call"):
        optimizer.backward({"x": w[0], "y": w[1] + w[0]})


# --------------------------------------------------------------------------------------------------- threads


@pytest.mark.parametrize("name", ["PCGrad", "UPGrad", "MoCo", "MConFIG", "GradVac", "MoDo", "FAMOWeighter"])
def test_two_optimizers_in_two_threads_do_not_meet(name):
    def run():
        net = Net()
        optimizer = METHODS[name](OPTIMIZERS["sgd"](net.parameters()))
        train(name, optimizer, net, range(6))
        return weights_of(net)

    expected = run()
    found = [None] * 4
    start = threading.Barrier(len(found))

    def work(k):
        start.wait()
        found[k] = run()

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(found))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for weights in found:
        torch.testing.assert_close(weights, expected, rtol=1e-9, atol=1e-12)
