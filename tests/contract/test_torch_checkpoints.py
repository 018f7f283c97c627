"""Checkpoints, added parameter groups and copies of the wrapper are those of a torch optimizer."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import SGD, lr_scheduler

import gradsurgery
from gradsurgery import MGDA, PCGrad
from gradsurgery.optimizer import MultiLossOptimizer
from tests.support.torch_contract import (
    COPIES,
    METHOD_TABLE,
    OPTIMIZERS,
    OWN,
    PAIR_TABLE,
    PLAIN_PAIR_TABLE,
    Net,
    assert_same,
    assert_same_training,
    assert_step_not_patched,
    bare,
    build,
    carry_over,
    innermost,
    learning_rate,
    losses,
    make,
    make_bare,
    ours,
    replay,
    torchs_part,
    train,
)

pytestmark = pytest.mark.filterwarnings("error")

# ---------------------------------------------------------------------------------------------------------- checkpoints


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
def test_state_dict_is_the_bases_and_one_key_more(method: str, optimizer: str) -> None:
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
def test_a_saved_run_goes_on_as_if_never_stopped(method: str, optimizer: str) -> None:
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
def test_the_bare_optimizer_loads_ours(method: str, optimizer: str) -> None:
    model, wrapped = build(method, optimizer)
    train(wrapped, model, range(2))
    twin, other = bare(optimizer)
    carry_over((model, wrapped), (twin, other))
    replay(other, twin, train(wrapped, model, range(2, 4)))
    assert_same_training(model, wrapped, twin, other)


@PAIR_TABLE
def test_we_load_the_bare_optimizers(method: str, optimizer: str) -> None:
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


def test_the_memory_of_another_method_is_refused_aloud() -> None:
    model, wrapped = build("pcgrad", "adam")
    train(wrapped, model, range(2))
    _, rewrapped = build("mgda", "adam")
    fresh = ours(rewrapped)
    with pytest.warns(UserWarning, match="PCGrad"):
        rewrapped.load_state_dict(wrapped.state_dict())
    assert_same(ours(rewrapped), fresh)
    assert_same(torchs_part(rewrapped.state_dict()), torchs_part(wrapped.state_dict()))


@METHOD_TABLE
def test_a_failed_load_changes_nothing(method: str) -> None:
    model, wrapped = build(method, "adam")
    train(wrapped, model, range(2))
    state = copy.deepcopy(wrapped.state_dict())
    wrong = copy.deepcopy(state)
    wrong["param_groups"][0]["params"].pop()
    with pytest.raises(ValueError, match="parameter group"):
        wrapped.load_state_dict(wrong)
    assert_same(wrapped.state_dict(), state)


@METHOD_TABLE
def test_loading_discards_what_was_pending(method: str) -> None:
    model, wrapped = build(method, "adam")
    train(wrapped, model, range(2))
    state = copy.deepcopy(wrapped.state_dict())
    wrapped.backward(losses(model, 2))
    wrapped.load_state_dict(state)
    wrapped.step()
    assert_same(ours(wrapped), state["gradsurgery"])


@pytest.mark.parametrize("flat", [False, True])
@PLAIN_PAIR_TABLE
def test_distributed_checkpoint_of_one_process(method: str, optimizer: str, flat: bool) -> None:
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


# ------------------------------------------------------------------------------------------------------ add_param_group


@PLAIN_PAIR_TABLE
def test_a_group_added_later_is_trained(method: str, optimizer: str) -> None:
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


def test_the_bases_override_is_called() -> None:
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


# ---------------------------------------------------------------------------------------------------- pickle and copies


@pytest.mark.parametrize("how", COPIES)
@PLAIN_PAIR_TABLE
def test_a_copy_goes_on_by_itself(method: str, optimizer: str, how: str) -> None:
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
def test_a_scheduler_is_pickled_with_its_optimizer(method: str) -> None:
    model, wrapped = build(method, "adam")
    scheduler = lr_scheduler.StepLR(wrapped, step_size=1, gamma=0.5)
    train(wrapped, model, range(1))
    scheduler.step()
    again, recopied, rescheduled = pickle.loads(pickle.dumps((model, wrapped, scheduler)))
    assert rescheduled.optimizer is recopied
    for m, o, s in ((model, wrapped, scheduler), (again, recopied, rescheduled)):
        train(o, m, range(1, 3))
        s.step()
    assert learning_rate(recopied) == 0.02 / 4
    assert_same_training(again, recopied, model, wrapped)


@METHOD_TABLE
def test_hooks_are_not_copied_just_as_in_torch(method: str) -> None:
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


def test_a_process_that_has_never_seen_the_class_can_unpickle_it() -> None:
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
