"""Accelerate around the wrapper: what ``prepare`` returns, and the loop of the documentation.

The yardstick is the same loop written by hand without Accelerate, to the last bit.
"""

from __future__ import annotations

import copy
import os
import runpy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.scheduler import AcceleratedScheduler
from accelerate.state import AcceleratorState, GradientState, PartialState
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import SGD, AdamW, Optimizer, lr_scheduler
from torch.utils.data import DataLoader

from tests.support.frameworks import METHODS, Net, assert_close, assert_same, dataset, losses_of
from tests.support.processes import run_cases, same_everywhere

ROOT = Path(__file__).resolve().parents[2]


def divided(model: Any, batch: Any, parts: int) -> dict[str, Tensor]:
    return {name: loss / parts for name, loss in losses_of(model, batch).items()}


def loader(size: int = 56) -> DataLoader[Any]:
    return DataLoader(dataset(size), 8)


METHOD_TABLE = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Accelerate keeps its state for the whole process."""
    yield
    reset()


def reset() -> None:
    AcceleratorState._reset_state()
    PartialState._reset_state()
    GradientState._reset_state()


class Run:
    """A prepared model, optimizer, scheduler and loader, and the loop of the documentation."""

    def __init__(
        self,
        method: str,
        parts: int = 1,
        scaler: GradScaler | None = None,
        base: Callable[[Any], Optimizer] = lambda params: AdamW(params, lr=0.02),
        data: DataLoader[Any] | None = None,
        precision: str = "no",
        **switches: Any,
    ) -> None:
        self.accelerator = Accelerator(cpu=True, mixed_precision=precision, gradient_accumulation_steps=parts)
        if scaler is not None:
            # Accelerate makes one where there is a GPU. All that it does with it goes by these two.
            self.accelerator.scaler, self.accelerator.native_amp = scaler, True
        self.net = Net()
        self.wrapped = METHODS[method](base(self.net.parameters()), self.net, **switches)
        self.scheduler: Any = lr_scheduler.ExponentialLR(self.wrapped, gamma=0.9)
        self.model, self.optimizer, self.scheduler, self.loader = self.accelerator.prepare(
            self.net, self.wrapped, self.scheduler, data or loader()
        )
        self.skipped: list[bool] = []

    def epoch(self) -> None:
        for x, y in self.loader:
            with self.accelerator.accumulate(self.model):
                losses = divided(self.model, (x, y), self.accelerator.gradient_accumulation_steps)
                self.optimizer.optimizer.backward(
                    losses, scaler=self.accelerator.scaler, accumulate=not self.accelerator.sync_gradients
                )
                if self.accelerator.sync_gradients:
                    self.accelerator.clip_grad_norm_(self.model.parameters(), 0.5)
                self.optimizer.step()
                self.scheduler.step()
                self.optimizer.zero_grad()
                if self.accelerator.sync_gradients:
                    self.skipped.append(self.accelerator.optimizer_step_was_skipped)


def by_hand(
    method: str,
    parts: int = 1,
    scaler: GradScaler | None = None,
    base: Callable[[Any], Optimizer] = lambda params: AdamW(params, lr=0.02),
    half: torch.dtype | None = None,
    epochs: int = 2,
) -> tuple[Net, Optimizer, Any]:
    net = Net()
    optimizer = METHODS[method](base(net.parameters()), net)
    scheduler = lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    for _ in range(epochs):
        for index, (x, y) in enumerate(loader()):
            steps = (index + 1) % parts == 0 or index + 1 == 7
            # Autocast ends with the model's forward, as under Accelerate.
            losses = divided(lambda x: cast(net, x, half), (x, y), parts)
            optimizer.backward(losses, scaler=scaler, accumulate=not steps)
            if not steps:
                continue
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(net.parameters(), 0.5)
            if scaler is None:
                optimizer.step()
                scheduler.step()
            else:
                scale = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                if scaler.get_scale() >= scale:
                    scheduler.step()
            optimizer.zero_grad()
    return net, optimizer, scheduler


def cast(net: Net, x: Tensor, half: torch.dtype | None) -> tuple[Tensor, ...]:
    with torch.autocast("cpu", half) if half else nullcontext():
        return tuple(out.float() for out in net(x))


def assert_same_training(run: Run, twin: tuple[Net, Optimizer, Any]) -> None:
    net, optimizer, scheduler = twin
    assert not torch.equal(net.trunk.weight, Net().trunk.weight)
    assert_same(run.net.state_dict(), net.state_dict())
    assert_same(run.optimizer.state_dict(), optimizer.state_dict())
    assert run.scheduler.get_last_lr() == scheduler.get_last_lr()


# -------------------------------------------------------------------------------------------------------- the loop


@pytest.mark.parametrize("parts", [1, 3])
@METHOD_TABLE
def test_the_loop_equals_that_without_accelerate(method: str, parts: int) -> None:
    # Seven batches in windows of three: Accelerate steps on the last one of an epoch.
    run = Run(method, parts)
    run.epoch()
    run.epoch()
    assert len(run.skipped) == (14 if parts == 1 else 6)
    assert_same_training(run, by_hand(method, parts))


@METHOD_TABLE
def test_bfloat16(method: str) -> None:
    run = Run(method, precision="bf16")
    run.epoch()
    run.epoch()
    assert_same_training(run, by_hand(method, half=torch.bfloat16))


@pytest.mark.parametrize("fused", [False, True])
@METHOD_TABLE
def test_float16_with_a_scaler(method: str, fused: bool) -> None:
    # The first steps overflow: Accelerate sees that they were skipped, and leaves the scheduler alone.
    def base(params: Any) -> Optimizer:
        return AdamW(params, lr=0.02, fused=fused)

    scalers = [GradScaler("cpu", init_scale=2.0**22, backoff_factor=2.0**-3) for _ in range(2)]
    run = Run(method, scaler=scalers[0], base=base, precision="fp16")
    run.epoch()
    run.epoch()
    assert run.skipped[0]
    assert not run.skipped[-1]
    assert run.wrapped.state_dict()["gradsurgery"]["memory"]["step"] == 14 - sum(run.skipped)
    assert_same_training(run, by_hand(method, scaler=scalers[1], base=base, half=torch.float16))
    assert scalers[0].get_scale() == scalers[1].get_scale()


@pytest.mark.parametrize("scaled", [False, True])
@METHOD_TABLE
def test_a_saved_run_goes_on(method: str, scaled: bool, tmp_path: Path) -> None:
    def made() -> Run:
        reset()
        return Run(method, 2, GradScaler("cpu", init_scale=2.0**10, growth_interval=3) if scaled else None)

    whole = made()
    whole.epoch()
    whole.accelerator.save_state(str(tmp_path))
    whole.epoch()
    wanted = copy.deepcopy((whole.net.state_dict(), whole.optimizer.state_dict(), whole.scheduler.get_last_lr()))
    again = made()
    again.accelerator.load_state(str(tmp_path))
    again.epoch()
    assert_same((again.net.state_dict(), again.optimizer.state_dict(), again.scheduler.get_last_lr()), wanted)


# ---------------------------------------------------------------------------------- what `prepare` makes of the wrapper


@METHOD_TABLE
def test_prepare_hands_through(method: str) -> None:
    run = Run(method)
    assert type(run.optimizer) is AcceleratedOptimizer
    assert type(run.scheduler) is AcceleratedScheduler
    assert run.optimizer.optimizer is run.wrapped
    assert run.scheduler.scheduler.optimizer is run.wrapped
    assert run.scheduler.optimizers == [run.optimizer]
    assert run.optimizer.param_groups is run.wrapped.param_groups
    assert run.optimizer.state is run.wrapped.state
    assert run.optimizer.defaults is run.wrapped.defaults
    assert not hasattr(run.optimizer, "backward")  # hence `optimizer.optimizer.backward`
    extra = nn.Parameter(torch.ones(2))
    run.optimizer.add_param_group({"params": [extra]})
    assert run.wrapped.param_groups[-1]["params"] == [extra]


@METHOD_TABLE
def test_prepare_loses_nothing_that_was_learnt(method: str) -> None:
    _, optimizer, _ = by_hand(method, epochs=1)
    before = copy.deepcopy(optimizer.state_dict())
    assert_same(Accelerator(cpu=True).prepare(optimizer).state_dict(), before)


def test_a_step_inside_a_window_is_withheld() -> None:
    run = Run("pcgrad", 2)
    start = copy.deepcopy(run.net.state_dict())
    x, y = next(iter(loader()))
    with run.accelerator.accumulate(run.model):
        assert not run.accelerator.sync_gradients
        report = run.optimizer.optimizer.backward(divided(run.model, (x, y), 2), accumulate=True)
        run.optimizer.step()
        run.optimizer.zero_grad()
    assert "accumulating" in report.flags
    assert_same(run.net.state_dict(), start)
    with run.accelerator.accumulate(run.model):
        report = run.optimizer.optimizer.backward(divided(run.model, (x, y), 2))
        run.optimizer.step()
    assert report.losses["left"] == pytest.approx(losses_of(Net(), (x, y))["left"].item())


# ------------------------------------------------------------------------------------------------------------ processes


def cases_of(rank: int, size: int) -> dict[str, Callable[[], None]]:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="127.0.0.1", MASTER_PORT="29998"
    )
    warnings.filterwarnings("ignore", ".*processes run, and nothing is exchanged")  # of the loop by hand
    folder = [tempfile.mkdtemp()]
    dist.broadcast_object_list(folder)

    def sgd(params: Any) -> Optimizer:
        return SGD(params, lr=0.02, momentum=0.9)

    def made(method: str, parts: int = 1, **options: Any) -> Run:
        reset()
        # Each process takes every other batch of four.
        run = Run(method, parts, base=sgd, data=DataLoader(dataset(), 4), distributed=True, **options)
        assert run.accelerator.num_processes == 2
        # Accelerate's scheduler moves once for each process, as if all batches had come to one.
        run.scheduler.scheduler.gamma = 0.9**0.5
        return run

    def together(method: str, parts: int) -> None:
        run = made(method, parts)
        run.epoch()
        run.epoch()
        same_everywhere([p.detach() for p in run.net.parameters()])
        net, _, scheduler = by_hand(method, parts, base=sgd)
        assert_close(run.net, net)
        assert run.scheduler.get_last_lr() == pytest.approx(scheduler.get_last_lr())

    def resumed() -> None:
        whole = made("gradvac")
        whole.epoch()
        whole.accelerator.save_state(folder[0])
        whole.epoch()
        wanted = copy.deepcopy((whole.net.state_dict(), whole.optimizer.state_dict()))
        again = made("gradvac")
        again.accelerator.load_state(folder[0])
        again.epoch()
        assert_same((again.net.state_dict(), again.optimizer.state_dict()), wanted)

    cases: dict[str, Callable[[], None]] = {}
    for method in METHODS:
        for parts in (1, 3):
            cases[f"{method}-{parts}"] = lambda method=method, parts=parts: together(method, parts)
    cases["resumed"] = resumed
    return cases


def test_two_processes(tmp_path: Path) -> None:
    told = {name: text for name, text in run_cases(cases_of, 2, tmp_path).items() if text}
    assert not told, "\n\n".join(f"{name}: {text}" for name, text in told.items())


# ------------------------------------------------------------------------------------------------------------- example


def test_the_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = ROOT / "examples" / "accelerate_loop.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    runpy.run_path(str(path), run_name="__main__")
    assert "conflict" in capsys.readouterr().out
