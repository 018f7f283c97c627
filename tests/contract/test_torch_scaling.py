"""Gradient scalers unscale, clip and skip as with the bare optimizer."""

from __future__ import annotations

import copy
from collections import OrderedDict, namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD

from gradsurgery.optimizer import MultiLossOptimizer
from tests.support.torch_contract import (
    METHOD_TABLE,
    METHODS,
    PAIR_TABLE,
    PLAIN_PAIR_TABLE,
    WRAPPER_TABLE,
    Net,
    assert_same,
    assert_same_training,
    build,
    gradients,
    innermost,
    losses,
    ours,
    overheated,
    torchs_part,
    train,
)

pytestmark = pytest.mark.filterwarnings("error")

# ------------------------------------------------------------------------------------------ no loss scaling in the step


@PAIR_TABLE
def test_does_not_claim_to_unscale_by_itself(method: str, optimizer: str) -> None:
    _, wrapped = build(method, optimizer)
    assert not hasattr(wrapped, "_step_supports_amp_scaling")
    assert not hasattr(wrapped, "grad_scale")
    if optimizer == "adamw-fused":
        assert innermost(wrapped)._step_supports_amp_scaling  # so the line above does say something


@WRAPPER_TABLE
def test_nothing_is_forwarded_wholesale(method: str) -> None:
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
def test_the_modes_of_schedule_free_optimizers_are_handed_through(method: str) -> None:
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
def test_training_with_a_scaler_is_training_without(method: str, optimizer: str, autocast: bool) -> None:
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


# ---------------------------------------------------------------------------------- the scaler knows us by our identity


@PLAIN_PAIR_TABLE
def test_unscale_and_clip(method: str, optimizer: str) -> None:
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
def test_the_scaler_guards_against_unscaling_twice(method: str) -> None:
    model, wrapped = build(method, "adamw-fused")
    scaler = GradScaler("cpu", init_scale=2.0**10)
    wrapped.backward(losses(model, 0), scaler=scaler)
    scaler.unscale_(wrapped)
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(wrapped)


# ----------------------------------------------------------------------------------------------------- what .grad holds


@PLAIN_PAIR_TABLE
def test_grad_holds_scaled_gradients(method: str, optimizer: str) -> None:
    model, wrapped = build(method, optimizer)
    wrapped.backward(losses(model, 0))
    expected = gradients(model)
    wrapped.zero_grad()
    wrapped.backward(losses(model, 0), scaler=GradScaler("cpu", init_scale=2.0**10))
    assert all(torch.equal(p.grad, 2.0**10 * g) for p, g in zip(model.parameters(), expected, strict=True))


@pytest.mark.parametrize("hot", ["all", "one"])
@PLAIN_PAIR_TABLE
def test_a_skipped_step_leaves_no_trace(method: str, optimizer: str, hot: str) -> None:
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
def test_gradients_exist_before_the_scaler_steps(method: str) -> None:
    # Computed inside `step` they would come too late: the scaler raises where it recorded no check.
    model, wrapped = build(method, "sgd")
    scaler = GradScaler("cpu")
    wrapped.backward(losses(model, 0), scaler=scaler)
    scaler.unscale_(wrapped)
    assert scaler._found_inf_per_device(wrapped)
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())


# ------------------------------------------------------------------------------------------ losses, and who scales them

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
def test_collections_of_losses(method: str, collection: str, scaled: bool) -> None:
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
def test_what_a_scaler_makes_of_a_dict_is_no_collection_of_losses(method: str) -> None:
    # GradScaler.scale walks over the keys of a dict, lazily: the error appears where the map is read.
    model, wrapped = build(method, "sgd")
    scaler = GradScaler("cpu")
    with pytest.raises((TypeError, ValueError)):
        wrapped.backward(scaler.scale(losses(model, 0)))  # type: ignore[arg-type]
    assert all(p.grad is None for p in model.parameters())
