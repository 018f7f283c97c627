"""Objects that pose as the wrapper, or hold it, in Lightning, Fabric, Accelerate and DistributedDataParallel."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer, lr_scheduler

from gradsurgery.optimizer import MultiLossOptimizer
from tests.support.processes import group_of_one
from tests.support.torch_contract import (
    COPIES,
    METHOD_TABLE,
    OWN,
    PAIR_TABLE,
    PLAIN_PAIR_TABLE,
    SCHEDULERS,
    Log,
    Net,
    assert_same,
    assert_same_training,
    assert_step_not_patched,
    build,
    gradients,
    innermost,
    losses,
    ours,
    overheated,
    same,
    torchs_part,
    train,
)

pytestmark = pytest.mark.filterwarnings("error")

# -------------------------------------------------------------------------- an object of Lightning's that poses as ours


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
def test_methods_run_on_lightnings_object(method: str, optimizer: str, poser: type[_Poser]) -> None:
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
def test_checkpoints_through_lightnings_object(method: str, poser: type[_Poser]) -> None:
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
def test_the_rest_of_the_contract_on_lightnings_object(method: str, poser: type[_Poser]) -> None:
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
def test_discarding_on_either_object_is_discarding_on_both(method: str) -> None:
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
def test_no_attribute_has_a_name_that_lightning_uses(method: str) -> None:
    _, wrapped = build(method, "sgd")
    for name in ("_optimizer", "_strategy", "_callbacks", "optimizer", "_on_before_step", "_on_after_step"):
        assert not hasattr(wrapped, name)
    assert all("__slots__" not in vars(cls) for cls in type(wrapped).__mro__)


# -------------------------------------------------------------------------------------- the object that schedulers name


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
def test_the_schedulers_optimizer_is_the_wrapper(method: str) -> None:
    _, wrapped = build(method, "adam")
    assert isinstance(wrapped, Optimizable)
    for scheduler in SCHEDULERS.values():
        assert scheduler(wrapped).optimizer is wrapped


@METHOD_TABLE
def test_the_wrapper_is_not_taken_for_its_base(method: str) -> None:
    # Lightning looks for a scheduler's optimizer with `in`, Accelerate with `==`.
    _, wrapped = build(method, "adam")
    assert wrapped in [wrapped]
    assert wrapped not in [wrapped.base, innermost(wrapped), build(method, "adam")[1]]
    assert len({wrapped, wrapped.base, wrapped}) == 2


# --------------------------------------------------------------------------------------------------- Accelerate's layer


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
def test_under_accelerate(method: str, optimizer: str, scaled: bool) -> None:
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
def test_accelerate_sees_a_skipped_step(method: str) -> None:
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
def test_a_copy_after_accelerate_put_the_step_back(method: str, how: str) -> None:
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


# -------------------------------------------------------------------------------------------- distributed data parallel


@pytest.mark.parametrize("method", ["pcgrad", "mgda", "composed", *OWN])
def test_the_rows_pass_by_the_reducers(method: str) -> None:
    # DDP and FSDP hang their reducers on the accumulation into `.grad`. Were it to run once a loss, replicas would
    # average some losses and not others. Rows come from torch.autograd.grad instead, and no reducer waits for another.
    model, wrapped = build(method, "sgd")
    assert reductions(wrapped, model) == []


def test_a_weighting_meets_each_reducer_once() -> None:
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
    with group_of_one():
        yield


@pytest.mark.parametrize("options", [{}, {"find_unused_parameters": True}, {"gradient_as_bucket_view": True}], ids=str)
@METHOD_TABLE
def test_a_model_under_ddp_trains_as_without(method: str, options: dict[str, bool], one_process_group: None) -> None:
    model, wrapped = build(method, "sgd")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own, about unused parameters that were not found
        parallel = nn.parallel.DistributedDataParallel(model, **options)
        log = train(wrapped, parallel, range(4))
    twin, alone = build(method, "sgd")
    assert_same(train(alone, twin, range(4)), log)
    assert_same_training(model, wrapped, twin, alone)
