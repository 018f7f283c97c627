"""What is said to somebody who takes one thing for another, and what is refused because it would do nothing."""

from __future__ import annotations

import copy
import inspect
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

import gradsurgery
from gradsurgery import MGDA, DWAWeighter, FixedWeighter, GradNormWeighter, PCGrad, RealTimeWeighter

BOTH = pytest.mark.parametrize("factory", [PCGrad, FixedWeighter, lambda base: PCGrad(FixedWeighter(base))])


class Net(nn.Module):
    """A trunk and two heads."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in "ab")

    def losses(self):
        z = self.trunk(torch.ones(2, 3)).tanh()
        return {
            name: (head(z) - 3 * i).square().mean() for i, (name, head) in enumerate(zip("ab", self.heads, strict=True))
        }


def made(factory=PCGrad, **switches):
    net = Net()
    return net, factory(SGD(net.parameters(), lr=0.1), **switches)


def grads(net):
    return [None if p.grad is None else p.grad.clone() for p in net.parameters()]


def same_gradients(factory, call, plain=lambda losses: losses):
    """What a call writes equals what plain losses do."""
    net, optimizer = made(factory)
    twin = copy.deepcopy(net)
    other = factory(SGD(twin.parameters(), lr=0.1))
    other.backward(plain(twin.losses()))
    call(net, optimizer)
    for a, b in zip(grads(net), grads(twin), strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------------- calls that are right


FORMS = {
    "scalars": lambda losses: losses,
    "of shape (1,)": lambda losses: {name: loss.reshape(1) for name, loss in losses.items()},
    "stacked": lambda losses: torch.stack(list(losses.values())),
    "joined": lambda losses: torch.cat([loss.reshape(1) for loss in losses.values()]),
    "unbound": lambda losses: list(torch.stack(list(losses.values())).unbind()),
}


@BOTH
@pytest.mark.parametrize("form", FORMS)
def test_backward_may_stand_under_no_grad(factory, form):
    def call(net, optimizer):
        losses = FORMS[form](net.losses())
        with torch.no_grad():
            optimizer.backward(losses)

    same_gradients(factory, call, FORMS[form])


class Labelled(Tensor):
    """A tensor with names of its columns, as libraries for physics have: arithmetic without labels is an error."""

    labels: tuple[str, ...] = ("u",)

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in ("stack", "cat", "reshape", "detach", "unbind", "to", "item", "float"):
            raise AttributeError(f"labels of {func.__name__} are not known")
        return super().__torch_function__(func, types, args, kwargs or {})


@BOTH
@pytest.mark.parametrize("form", FORMS)
def test_losses_may_be_of_a_subclass_of_tensor(factory, form):
    def call(net, optimizer):
        losses = FORMS[form](net.losses())
        if form in ("stacked", "joined"):
            losses = losses.as_subclass(Labelled)
        elif form == "unbound":
            losses = [loss.as_subclass(Labelled) for loss in losses]
        else:
            losses = {name: loss.as_subclass(Labelled) for name, loss in losses.items()}
        optimizer.backward(losses)

    # A subclass puts a node between a stack and the losses.
    same_gradients(factory, call, FORMS["joined" if form == "stacked" else form])


def test_a_subclass_survives_accumulation_and_a_scaler():
    net, optimizer = made(RealTimeWeighter)
    losses = {name: loss.as_subclass(Labelled) for name, loss in net.losses().items()}
    optimizer.backward(losses, accumulate=True, scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    losses = {name: loss.as_subclass(Labelled) for name, loss in net.losses().items()}
    assert set(optimizer.backward(losses, scaler=torch.amp.GradScaler("cpu", init_scale=4.0)).losses) == {"a", "b"}


@BOTH
def test_parameters_may_be_of_a_subclass_of_parameter(factory):
    class Special(nn.Parameter):
        pass

    def call(net, optimizer):
        optimizer.backward(net.losses())

    net = Net()
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.weight = Special(module.weight.detach().clone())
    twin = Net()
    twin.load_state_dict(net.state_dict())
    optimizer, other = factory(SGD(net.parameters(), lr=0.1)), factory(SGD(twin.parameters(), lr=0.1))
    optimizer.backward(net.losses())
    other.backward(twin.losses())
    for a, b in zip(grads(net), grads(twin), strict=True):
        torch.testing.assert_close(a, b)


def test_a_hook_that_takes_the_gradients_is_left_alone():
    """As in those that make the step of each parameter as soon as its gradient is there."""
    net, optimizer = made(FixedWeighter)
    taken = []

    def take(p):
        taken.append(p.grad.clone())
        p.grad = None

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(take)
    optimizer.backward(net.losses())
    assert len(taken) == len(list(net.parameters()))


@pytest.mark.parametrize("factory", [GradNormWeighter, gradsurgery.LRAnnealingWeighter, PCGrad, MGDA])
def test_shared_params_may_be_a_module(factory):
    net = Net()
    by_module = factory(SGD(net.parameters(), lr=0.1), shared_params=net.trunk)
    assert set(by_module.shared_params) == set(net.trunk.parameters())
    by_module.backward(net.losses())


def test_what_a_sharded_optimizer_needs_before_it_is_saved_is_handed_through():
    class Sharded(SGD):
        def consolidate_state_dict(self, to=0):
            return ("collected", to)

    net = Net()
    assert PCGrad(FixedWeighter(Sharded(net.parameters(), lr=0.1))).consolidate_state_dict(to=3) == ("collected", 3)
    assert not hasattr(made()[1], "consolidate_state_dict")


# ------------------------------------------------------------------------------------------------ calls that are not


def raises(error, *said):
    """The error, whose text has all of these."""

    class Told:
        def __enter__(self):
            self.inside = pytest.raises(error)
            self.found = self.inside.__enter__()

        def __exit__(self, *problem):
            result = self.inside.__exit__(*problem)
            for words in said:
                assert words in str(self.found.value), str(self.found.value)
            return result

    return Told()


@pytest.mark.parametrize("factory", [PCGrad, FixedWeighter, gradsurgery.MoDo])
def test_losses_that_are_not_in_one_argument(factory):
    net, optimizer = made(factory)
    a, b = net.losses().values()
    name = type(optimizer).__name__
    with raises(TypeError, f"{name}.backward: takes all losses in one argument", "Pass a dict or a list"):
        optimizer.backward(a=a, b=b)
    with raises(TypeError, f"{name}.backward: takes all losses in one argument, got 2. Pass a dict or a list"):
        optimizer.backward(a, b)
    with raises(TypeError, 'backward({"a": a, "b": b})'):
        optimizer.backward(a=a, b=b)
    with raises(TypeError, "`losses` must be given once"):
        optimizer.backward()
    with raises(TypeError, "there is no argument `acumulate` (did you mean `accumulate`?)"):
        optimizer.backward([a, b], acumulate=True)
    with raises(TypeError, "there is no argument `quux`."):
        optimizer.backward([a, b], quux=True)
    assert grads(net) == [None] * 6
    optimizer.backward(losses=[a, b])


def test_the_signature_of_backward_says_what_it_takes():
    found = inspect.signature(PCGrad.backward).parameters
    assert list(found)[:4] == ["self", "losses", "names", "accumulate"]
    assert {p.kind for p in list(found.values())[2:]} == {inspect.Parameter.KEYWORD_ONLY}
    assert PCGrad.backward.__doc__.startswith("Turn the losses into gradients")


@pytest.mark.parametrize("factory", [PCGrad, FixedWeighter])
def test_what_is_no_optimizer(factory):
    name, net = factory.__name__, Net()
    for wrong in (net.parameters(), list(net.parameters()), net, net.trunk.weight):
        with raises(TypeError, f"{name}: `optimizer` must be", f"{name}(torch.optim.AdamW(model.parameters()"):
            factory(wrong)
    with raises(TypeError, "got the class SGD", "not the class", f"lambda params, **options: {name}(SGD(params"):
        factory(SGD)
    with raises(TypeError, "got an object of type int."):
        factory(3)


def test_modules_and_metrics_are_no_losses():
    net, optimizer = made()
    a, b = net.losses().values()
    with raises(TypeError, "loss 'box' is the module MSELoss, not what it computes", "MSELoss()(outputs, targets)"):
        optimizer.backward({"box": nn.MSELoss(), "class": a})
    with raises(RuntimeError, "loss 'error' has no graph", "If it is a metric and not a loss, leave it out"):
        optimizer.backward({"a": a, "b": b, "error": torch.tensor(3.0)})
    with raises(TypeError, "loss 'error' must be a scalar tensor", "If it is a metric and not a loss, leave it out"):
        optimizer.backward({"a": a, "b": b, "error": 3.0})


@BOTH
def test_an_optimizer_that_was_copied_without_its_model(factory):
    net, optimizer = made(factory)
    copied = copy.deepcopy(optimizer)
    with raises(
        RuntimeError, "reaches no parameter", "6 parameters of the same shapes outside of it", "copy.deepcopy(("
    ):
        copied.backward(net.losses())
    other, both = copy.deepcopy((net, optimizer))
    both.backward(other.losses())


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("GradNorm", "GradNormWeighter"),
        ("pcgrad", "PCGrad"),
        ("UW", None),
        ("MGDAA", "MGDA"),
        ("Uncertainty", "UncertaintyWeighter"),
        ("diagnos", "diagnose"),
    ],
)
def test_a_name_that_the_module_lacks(asked, meant):
    with pytest.raises(AttributeError) as raised:
        getattr(gradsurgery, asked)
    assert f"module 'gradsurgery' has no attribute {asked!r}." in str(raised.value)
    assert (f" Did you mean {meant}" in str(raised.value)) if meant else True
    with pytest.raises(ImportError):
        exec(f"from gradsurgery import {asked}")
    assert not hasattr(gradsurgery, "__wrapped__")


# ----------------------------------------------------------------------------------- accepted, and of no effect


@pytest.mark.parametrize(
    "switches",
    [{"granularity": "group"}, {"granularity": "parameter"}, {"row_dtype": torch.bfloat16}, {"row_device": "cpu"}],
)
def test_features_exclude_switches_that_say_where_rows_are(switches):
    net, optimizer = made(MGDA, **switches)
    z = net.trunk(torch.ones(2, 3)).tanh()
    losses = [head(z).square().mean() for head in net.heads]
    with raises(ValueError, "MGDA.backward: `features` excludes", next(iter(switches)), "Leave out one of the two"):
        optimizer.backward(losses, features=z)
    assert grads(net) == [None] * 6


def test_shared_params_outside_the_optimizer_or_empty():
    net, other = Net(), Net()
    base = SGD(net.parameters(), lr=0.1)
    with raises(ValueError, "MGDA: `shared_params` has 2 of 4 parameters that are not in the optimizer", "shape (4"):
        MGDA(base, shared_params=[*net.trunk.parameters(), *other.trunk.parameters()])
    for factory in (MGDA, GradNormWeighter, gradsurgery.LRAnnealingWeighter):
        for empty in ([], (p for p in ()), nn.Tanh()):
            with raises(TypeError, f"{factory.__name__}: `shared_params` must be", "got nothing"):
                factory(base, shared_params=empty)
        with raises(TypeError, "got an object of type str"):
            factory(base, shared_params=["trunk"])
        with raises(TypeError, "got an object of type int"):
            factory(base, shared_params=3)


@pytest.mark.parametrize(
    "switches",
    [{"reduction": "mean"}, {"nonfinite": "skip"}, {"nonfinite": "drop"}, {"distributed": True}, {"debug": True}],
)
def test_what_only_the_method_outside_reads_is_refused_inside(switches):
    base = SGD(Net().parameters(), lr=0.1)
    (switch,) = switches
    with raises(ValueError, f"PCGrad: `{switch}`=", "of the FixedWeighter inside has no effect. Give it to PCGrad."):
        PCGrad(FixedWeighter(base, **switches))
    PCGrad(FixedWeighter(base), **switches)


BY_NAME = {
    "preference": lambda base, given: MGDA(base, preference=given),
    "weights": lambda base, given: FixedWeighter(base, weights=given),
    "priors": lambda base, given: gradsurgery.PriorLossWeighter(base, given),
    "gamma": lambda base, given: gradsurgery.RunningMaxWeighter(base, gamma=given),
    "leak": lambda base, given: gradsurgery.GradDrop(base, leak={name: x / 5 for name, x in given.items()}),
    "tau": lambda base, given: gradsurgery.PCD(base, tau={name: x / 5 for name, x in given.items()}),
}


@pytest.mark.parametrize("argument", BY_NAME)
def test_an_entry_for_a_loss_that_there_is_not(argument):
    net = Net()
    optimizer = BY_NAME[argument](SGD(net.parameters(), lr=0.1), {"a": 1.0, "b": 1.0, "bx": 5.0})
    said = rf"{type(optimizer).__name__}: `{argument}` has an entry for \['bx'\], and the losses are \['a', 'b'\]"
    if optimizer.stateful:
        with pytest.raises(ValueError, match=said):
            optimizer.backward(net.losses())
        return
    with pytest.warns(UserWarning, match=said + ".*passed as None"):
        optimizer.backward(net.losses())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.backward(net.losses())


def test_the_primary_loss_needs_no_tau_and_a_slip_is_an_error_all_the_same():
    net = Net()
    gradsurgery.PCD(SGD(net.parameters(), lr=0.1), tau={"b": 0.1}).backward(net.losses())
    optimizer = gradsurgery.PCD(SGD(net.parameters(), lr=0.1), tau={"b": 0.1, "bx": 0.1})
    with pytest.raises(ValueError, match=r"PCD: `tau` has an entry for \['bx'\]"):
        optimizer.backward(net.losses())
    assert "tasks" not in optimizer.state_dict()["gradsurgery"]["memory"]


@pytest.mark.parametrize("argument", BY_NAME)
def test_an_absent_task_keeps_its_entry_in_silence(argument):
    net = Net()
    optimizer = BY_NAME[argument](SGD(net.parameters(), lr=0.1), {"a": 1.0, "b": 1.0, "c": 5.0})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.backward({**net.losses(), "c": None})


# --------------------------------------------------------------------------------------------------------- reports


@pytest.mark.filterwarnings("ignore:.*grad holds the gradient of the sum")  # the calls are repeated on purpose
@pytest.mark.parametrize("factory", [PCGrad, FixedWeighter, DWAWeighter])
def test_a_loss_dropped_in_a_micro_batch_is_in_the_report_on_all(factory):
    net, optimizer = made(factory, nonfinite="drop")

    def bad():
        losses = net.losses()
        return {**losses, "b": losses["b"] * float("nan")}

    assert "dropped" in optimizer.backward(bad(), accumulate=True).flags
    assert "dropped" not in optimizer.backward(net.losses(), accumulate=True).flags
    assert "dropped" in optimizer.backward(net.losses()).flags
    optimizer.zero_grad()
    optimizer.backward(net.losses(), accumulate=True)
    assert "dropped" not in optimizer.backward(net.losses()).flags
    # All of the first micro-batch, then thrown away.
    worse = {name: loss * float("nan") for name, loss in net.losses().items()}
    assert "dropped" in optimizer.backward(worse, accumulate=True).flags
    state = copy.deepcopy(optimizer.state_dict())
    assert "dropped" in optimizer.backward(net.losses()).flags
    for forget in (optimizer.zero_grad, lambda: optimizer.load_state_dict(state)):
        optimizer.backward(bad(), accumulate=True)
        forget()
        assert "dropped" not in optimizer.backward(net.losses()).flags


@pytest.mark.parametrize("granularity", ["all", "group", "parameter"])
@pytest.mark.parametrize("accumulated", [False, True])
def test_weights_of_a_warm_up_step_are_reported(granularity, accumulated):
    net = Net()
    optimizer = MGDA(SGD([{"params": [p]} for p in net.parameters()], lr=0.1), warmup=1, granularity=granularity)
    if accumulated:
        optimizer.backward(net.losses(), accumulate=True)
    assert optimizer.backward(net.losses()).weights == {"a": 1.0, "b": 1.0}
    optimizer.step()
    optimizer.zero_grad()
    assert (optimizer.backward(net.losses()).weights is None) == (granularity != "all")
