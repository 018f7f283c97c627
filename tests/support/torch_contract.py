"""A wrapped optimizer beside a bare one, for the tests of torch's contract.

The yardstick is always the bare optimizer. A wrapped one trains and writes down the gradients it left in ``.grad``; a
twin of the model, stepped by the bare optimizer, replays them. Parameters and optimizer state must then agree bit for
bit: whatever a scheduler, a scaler, a hook or a checkpoint does, it must do to both in the same way.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop, lr_scheduler, swa_utils

from gradsurgery import MGDA, AdaTask, GradNormWeighter, MTAdam, MultiAdam, PCGrad
from gradsurgery.optimizer import MultiLossOptimizer
from gradsurgery.surgery.per_loss_adam import Descent, PerLossAdam

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


def has_momentum(optimizer: Optimizer) -> bool:
    return "momentum" in optimizer.defaults or "betas" in optimizer.defaults


def learning_rate(optimizer: Optimizer) -> float:
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
        o, base_lr=learning_rate(o) / 4, max_lr=learning_rate(o), step_size_up=2, cycle_momentum=has_momentum(o)
    ),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, max_lr=2 * learning_rate(o), total_steps=8, cycle_momentum=has_momentum(o)
    ),
    "SWALR": lambda o: swa_utils.SWALR(o, swa_lr=0.5 * learning_rate(o), anneal_epochs=3),
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


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
}


def overheated(model: Net, step: int) -> dict[str, Tensor]:
    """Losses that are finite but overflow once they are scaled."""
    return {name: 1e4 * loss for name, loss in losses(model, step).items()}
