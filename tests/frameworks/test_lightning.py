"""Real runs of Lightning's Trainer, under automatic and manual optimisation.

The yardstick is a loop written by hand: whatever the Trainer adds (precision, accumulation, clipping, schedulers,
checkpoints) must leave the same bits in parameters, optimizer state and the method's memory.
"""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import os
import runpy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer, lr_scheduler
from torch.utils.data import DataLoader, DistributedSampler

import gradsurgery
from gradsurgery.integrations.lightning import MultiLossModuleMixin
from tests.support.frameworks import METHODS, Net, assert_close, assert_same, dataset, losses_of
from tests.support.processes import run_cases, same_everywhere

#: What Lightning says of the small runs here, and of a torch newer than itself.
FOREIGN = [
    "`isinstance.treespec, LeafSpec.` is deprecated",
    "The 'train_dataloader' does not have many workers",
    "The number of training batches .* is smaller than the logging interval",
]
pytestmark = [pytest.mark.filterwarnings(f"ignore:{message}") for message in FOREIGN]
ROOT = Path(__file__).resolve().parents[2]

# ----------------------------------------------------------------------------------------- a small problem in conflict


class Resumable(DataLoader[Any]):
    """A loader that goes on where a checkpoint was written."""

    skip = seen = 0

    def __iter__(self) -> Iterator[Any]:
        self.skip, self.seen = 0, self.skip
        for batch in itertools.islice(super().__iter__(), self.seen, None):
            self.seen += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.skip = state["seen"] % len(self)


def loader(size: int = 56, batch: int = 8) -> DataLoader[Any]:
    return Resumable(dataset(size), batch)


Build = Callable[[Optimizer, Net], gradsurgery.MultiLossOptimizer]
METHOD_TABLE = pytest.mark.parametrize("method", METHODS)


class Module(MultiLossModuleMixin, lightning.LightningModule):
    """Automatic optimisation with a scheduler that moves in every step."""

    def __init__(self, build: Build, base: Callable[[Any], Optimizer] = lambda p: Adam(p, lr=0.02)) -> None:
        super().__init__()
        self.net, self.build, self.base = Net(), build, base
        self.seen: list[tuple[str, Any]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return {"losses": losses_of(self.net, batch), "size": len(batch[0])}

    def configure_optimizers(self) -> Any:
        optimizer = self.build(self.base(self.net.parameters()), self.net)
        scheduler = lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def trainer(**options: Any) -> lightning.Trainer:
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(**{"accelerator": "cpu", "logger": False, "max_epochs": 2, **quiet, **options})


def by_hand(
    module: Module,
    batches: DataLoader[Any],
    *,
    epochs: int = 2,
    parts: int = 1,
    clip: float | None = None,
    scaler: GradScaler | None = None,
    autocast: Callable[[], Any] = nullcontext,
) -> gradsurgery.MultiLossOptimizer:
    """The loop that the Trainer is to equal, with the window of accumulation as one batch where there is one."""
    optimizer = module.build(module.base(module.net.parameters()), module.net)
    scheduler = lr_scheduler.ExponentialLR(optimizer, gamma=0.9)
    for _ in range(epochs):
        for index, batch in enumerate(batches):
            if index % parts == 0:
                optimizer.zero_grad()
            with autocast():
                losses = losses_of(module.net, batch)
            steps = (index + 1) % parts == 0 or index + 1 == len(batches)
            divided = {name: loss / parts for name, loss in losses.items()}
            optimizer.backward(divided, scaler=scaler, accumulate=not steps)
            if not steps:
                continue
            if scaler is not None:
                scaler.unscale_(optimizer)
            if clip is not None:
                nn.utils.clip_grad_norm_(module.net.parameters(), clip)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            scheduler.step()
    return optimizer


def assert_same_training(module: Module, optimizer: Optimizer, twin: Module, other: Optimizer) -> None:
    start = Net()
    assert not torch.equal(module.net.trunk.weight, start.trunk.weight)
    assert_same(module.net.state_dict(), twin.net.state_dict())
    assert_same(optimizer.state_dict(), other.state_dict())


# --------------------------------------------------------------------------------------------- automatic optimisation


@METHOD_TABLE
def test_automatic_equals_the_loop_by_hand(method: str) -> None:
    module, twin = Module(METHODS[method]), Module(METHODS[method])
    run = trainer(gradient_clip_val=0.5)
    run.fit(module, loader())
    assert run.global_step == 14
    assert_same_training(module, run.optimizers[0], twin, by_hand(twin, loader(), clip=0.5))
    assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.02 * 0.9**14)


@METHOD_TABLE
def test_accumulation_equals_the_loop_by_hand(method: str) -> None:
    # Seven batches in windows of three: Lightning steps on the last one of the epoch, and divides by three there too.
    module, twin = Module(METHODS[method]), Module(METHODS[method])
    run = trainer(accumulate_grad_batches=3, gradient_clip_val=0.5)
    run.fit(module, loader())
    assert run.global_step == 6
    assert_same_training(module, run.optimizers[0], twin, by_hand(twin, loader(), parts=3, clip=0.5))


def test_accumulation_is_one_surgery_on_the_whole_window() -> None:
    build = METHODS["pcgrad"]
    module, twin = Module(build, lambda p: SGD(p, lr=0.02)), Module(build, lambda p: SGD(p, lr=0.02))
    trainer(accumulate_grad_batches=4, max_epochs=1).fit(module, loader(32, 8))
    by_hand(twin, loader(32, 32), epochs=1)
    for p, q in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@METHOD_TABLE
def test_half_precision_without_a_scaler(method: str) -> None:
    module, twin = Module(METHODS[method]), Module(METHODS[method])
    run = trainer(precision="bf16-mixed")
    run.fit(module, loader())

    def autocast() -> Any:
        return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)

    assert_same_training(module, run.optimizers[0], twin, by_hand(twin, loader(), autocast=autocast))


@pytest.mark.parametrize("fused", [False, True])
@METHOD_TABLE
def test_half_precision_with_a_scaler(method: str, fused: bool) -> None:
    # The first steps overflow: the scaler skips them, and the method is to learn nothing from them.
    def base(params: Any) -> Optimizer:
        return AdamW(params, lr=0.02, fused=fused)

    def scaler() -> GradScaler:
        return GradScaler("cpu", init_scale=2.0**122, backoff_factor=2.0**-10)

    module, twin = Module(METHODS[method], base), Module(METHODS[method], base)
    run = trainer(plugins=[MixedPrecision("16-mixed", "cpu", scaler())], gradient_clip_val=0.5)
    with warnings.catch_warnings():
        # torch's own, where the first step is skipped and the scheduler moves.
        warnings.filterwarnings("ignore", message=r"Detected call of `lr_scheduler.step\(\)` before")
        run.fit(module, loader())

        def autocast() -> Any:
            return torch.autocast("cpu", torch.half, cache_enabled=False)

        hand = scaler()
        optimizer = by_hand(twin, loader(), clip=0.5, scaler=hand, autocast=autocast)
    assert hand.get_scale() < 2.0**120
    assert 0 < optimizer.state_dict()["gradsurgery"]["memory"]["step"] < 14
    assert_same_training(module, run.optimizers[0], twin, optimizer)
    assert run.precision_plugin.scaler.state_dict() == hand.state_dict()


class Saver(lightning.Callback):
    """Writes checkpoints within the first epoch, at its end, and within the second."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_batch_end(self, trainer: lightning.Trainer, *args: Any) -> None:
        if trainer.global_step in (4, 7, 10):
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


@METHOD_TABLE
def test_a_resumed_run_equals_an_uninterrupted_one(method: str, tmp_path: Path) -> None:
    module, whole = Module(METHODS[method]), trainer(callbacks=[Saver(tmp_path)])
    whole.fit(module, loader())
    for step in (4, 7, 10):
        resumed, again = Module(METHODS[method]), trainer()
        again.fit(resumed, loader(), ckpt_path=str(tmp_path / f"{step}.ckpt"))
        assert again.global_step == 14
        assert_same_training(resumed, again.optimizers[0], module, whole.optimizers[0])


class Recorder(Logger):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    name = property(lambda self: "recorder")
    version = property(lambda self: 0)

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.rows.append(metrics)


@pytest.mark.parametrize("parts", [1, 2])
def test_every_loss_and_weight_is_logged_once_a_step(parts: int) -> None:
    reports = []

    class Keeps(Module):
        def log_report(self, report: gradsurgery.Report) -> None:
            reports.append(report)
            super().log_report(report)

    recorder = Recorder()
    run = trainer(logger=recorder, log_every_n_steps=1, accumulate_grad_batches=parts, max_epochs=1)
    run.fit(Keeps(METHODS["pcgrad"]), loader(48))
    assert len(reports) == len(recorder.rows) == 6 // parts
    for row, report in zip(recorder.rows, reports, strict=True):
        for name in ("left", "right", "tie"):
            assert row[f"loss/{name}"] == pytest.approx(report.losses[name])
            assert row[f"weight/{name}"] == pytest.approx(report.weights[name])
        assert row["conflict_rate"] == pytest.approx(report.conflict_rate)
    # The mean over the window, as if it had been one batch.
    whole = losses_of(Net(), next(iter(loader(48, 8 * parts))))
    assert recorder.rows[0]["loss/left"] == pytest.approx(whole["left"].item(), rel=1e-5)


def test_hooks_see_what_they_always_see() -> None:
    class Hooks(lightning.Callback):
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def on_before_backward(self, trainer: Any, module: Any, loss: Tensor) -> None:
            self.seen += ["before", loss.item()]
            assert all(p.grad is None for p in module.parameters())

        def on_after_backward(self, trainer: Any, module: Any) -> None:
            self.seen.append("after")
            assert all(p.grad is not None for p in module.parameters())

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Optimizer) -> None:
            self.seen.append(optimizer)

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, index: int) -> None:
            self.seen.append(outputs)

    hooks = Hooks()
    run = trainer(max_steps=1, callbacks=[hooks])
    run.fit(Module(METHODS["pcgrad"]), loader())
    losses = {name: loss.detach() for name, loss in losses_of(Net(), next(iter(loader()))).items()}
    before, total, after, optimizer, outputs = hooks.seen
    assert (before, after) == ("before", "after")
    assert total == pytest.approx(sum(losses.values()).item())
    assert optimizer is run.optimizers[0]
    assert_same(outputs["losses"], losses)
    assert outputs["size"] == 8
    assert outputs["loss"].item() == pytest.approx(total)
    assert not outputs["loss"].requires_grad


def fitted(step: Callable[..., Any], base: type = lightning.LightningModule, **options: Any) -> tuple[Any, Any]:
    """Fit a module with this training step for one epoch of two batches."""

    class Small(MultiLossModuleMixin, base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return step(self, batch, batch_idx)

        def configure_optimizers(self) -> Any:
            return gradsurgery.PCGrad(SGD(self.net.parameters(), lr=0.02))

    module, run = Small(), trainer(max_epochs=1, **options)
    run.fit(module, loader(16))
    return module, run.optimizers[0]


def test_the_dict_itself_may_be_the_losses() -> None:
    bare, one = fitted(lambda self, batch, index: losses_of(self.net, batch))
    named, other = fitted(lambda self, batch, index: {"losses": losses_of(self.net, batch), "loss": torch.tensor(7.0)})
    assert_same(bare.net.state_dict(), named.net.state_dict())
    assert one.report.names == other.report.names == ("left", "right", "tie")


def test_a_task_may_be_absent() -> None:
    module, optimizer = fitted(lambda self, batch, index: {**losses_of(self.net, batch), "right": None})
    assert optimizer.report.names == ("left", "tie")
    assert module._named is None


def test_a_plain_loss_is_left_to_lightning() -> None:
    for wrap in (lambda loss: loss, lambda loss: {"loss": loss}):
        module, optimizer = fitted(lambda self, batch, index, wrap=wrap: wrap(sum(losses_of(self.net, batch).values())))
        assert optimizer.report is None
        net = Net()
        plain = SGD(net.parameters(), lr=0.02)
        for batch in loader(16):
            plain.zero_grad()
            sum(losses_of(net, batch).values()).backward()
            plain.step()
        assert_same(module.net.state_dict(), net.state_dict())


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_may_be_skipped() -> None:
    module, optimizer = fitted(lambda self, batch, index: None)
    assert_same(module.net.state_dict(), Net().state_dict())
    assert optimizer.report is None


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
@pytest.mark.parametrize("skipped", [0, 1, 2])
@METHOD_TABLE
def test_a_batch_of_a_window_may_be_skipped(method: str, skipped: int) -> None:
    """The last one too: the step is then that of the others, as with one loss."""

    class Skipping(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return None if batch_idx == skipped else super().training_step(batch, batch_idx)

    module, twin = Skipping(METHODS[method]), Module(METHODS[method])
    run = trainer(accumulate_grad_batches=3, max_epochs=1)
    run.fit(module, loader(24))
    optimizer = twin.build(twin.base(twin.net.parameters()), twin.net)
    batches = [batch for index, batch in enumerate(loader(24)) if index != skipped]
    for index, batch in enumerate(batches):
        losses = {name: loss / 3 for name, loss in losses_of(twin.net, batch).items()}
        optimizer.backward(losses, accumulate=index == 0)
    optimizer.step()
    assert_same(module.net.state_dict(), twin.net.state_dict())
    assert_same(run.optimizers[0].state_dict()["gradsurgery"], optimizer.state_dict()["gradsurgery"])


def test_deepspeed_is_refused() -> None:
    class DeepSpeedStrategy(SingleDeviceStrategy):
        pass

    with pytest.raises(RuntimeError, match=r"DeepSpeedStrategy takes over the backward pass.*fully_shard"):
        trainer(strategy=DeepSpeedStrategy(torch.device("cpu"))).fit(Module(METHODS["pcgrad"]), loader())


def test_a_step_may_extend_that_of_its_base() -> None:
    class Base(lightning.LightningModule):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return {"losses": losses_of(self.net, batch)}

        def configure_optimizers(self) -> Any:
            return gradsurgery.PCGrad(SGD(self.parameters(), lr=0.02))

    class First(MultiLossModuleMixin, Base):
        """Inherits the step from a class that knows nothing of the mixin."""

        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

    class Second(First):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            output = super().training_step(batch, batch_idx)
            assert output["losses"]["left"].requires_grad
            output["losses"]["decay"] = 0.1 * self.net.trunk.weight.square().sum()
            return output

    for kind, names in ((First, 3), (Second, 4)):
        run = trainer(max_epochs=1)
        run.fit(kind(), loader())
        assert len(run.optimizers[0].report.names) == names


def test_a_fitted_module_can_be_copied_and_pickled() -> None:
    module = Module(METHODS["pcgrad"])
    trainer(max_epochs=1).fit(module, loader())
    assert_same(copy.deepcopy(module.net).state_dict(), module.net.state_dict())
    assert module._named is None


def test_the_package_of_the_old_name_works() -> None:
    import pytorch_lightning

    class Old(MultiLossModuleMixin, pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return losses_of(self.net, batch)

        def configure_optimizers(self) -> Any:
            return gradsurgery.PCGrad(SGD(self.net.parameters(), lr=0.02))

    old = Old()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    run = pytorch_lightning.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet)
    run.fit(old, loader(16))
    new, optimizer = fitted(lambda self, batch, index: losses_of(self.net, batch))
    assert_same(old.net.state_dict(), new.net.state_dict())
    assert_same(run.optimizers[0].state_dict(), optimizer.state_dict())


def test_mistakes_are_named() -> None:
    with pytest.raises(TypeError, match="must stand before LightningModule among the bases"):
        type("Wrong", (lightning.LightningModule, MultiLossModuleMixin), {})
    with pytest.raises(TypeError, match=r"got float for 'right'"):
        fitted(lambda self, batch, index: {**losses_of(self.net, batch), "right": 0.0})
    with pytest.raises(TypeError, match=r"got list for 'losses'"):
        fitted(lambda self, batch, index: {"losses": list(losses_of(self.net, batch).values())})

    class Bare(Module):
        def configure_optimizers(self) -> Any:
            return Adam(self.parameters())

    with pytest.raises(TypeError, match="need an optimizer of gradsurgery, got Adam"):
        trainer().fit(Bare(METHODS["pcgrad"]), loader())


def test_a_hook_that_steps_by_itself_sees_accumulation() -> None:
    # The warm-up of Lightning's own pages: `optimizer_step` overridden without a call of super.
    class Warmup(Module):
        def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
            optimizer.step(closure=optimizer_closure)

    module, twin = Warmup(METHODS["gradvac"]), Module(METHODS["gradvac"])
    run = trainer(accumulate_grad_batches=3)
    run.fit(module, loader())
    assert_same_training(module, run.optimizers[0], twin, by_hand(twin, loader(), parts=3))


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "OneCycleLR": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=14),
    "CyclicLR": lambda optimizer: lr_scheduler.CyclicLR(optimizer, 0.01, 0.1, step_size_up=3, cycle_momentum=True),
    "ReduceLROnPlateau": lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_that_look_into_the_optimizer(name: str) -> None:
    class Scheduled(Module):
        def configure_optimizers(self) -> Any:
            optimizer = self.build(self.base(self.net.parameters()), self.net)
            # A scheduler may watch one of the losses by the name it is logged under.
            options = {"scheduler": SCHEDULERS[name](optimizer), "interval": "step", "monitor": "loss/left"}
            return {"optimizer": optimizer, "lr_scheduler": options}

    module, twin = Scheduled(METHODS["gradvac"]), Module(METHODS["gradvac"])
    run = trainer()
    run.fit(module, loader())
    optimizer = twin.build(twin.base(twin.net.parameters()), twin.net)
    scheduler = SCHEDULERS[name](optimizer)
    for batch in [*loader(), *loader()]:
        optimizer.zero_grad()
        report = optimizer.backward(losses_of(twin.net, batch))
        optimizer.step()
        scheduler.step(*([torch.tensor(report.losses["left"])] if name == "ReduceLROnPlateau" else []))
    assert_same_training(module, run.optimizers[0], twin, optimizer)


# ------------------------------------------------------------------------------------------------- manual optimisation


class Manual(Module):
    """The same training by manual optimisation, as the documentation shows it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        losses = losses_of(self.net, batch)
        optimizer.zero_grad()
        optimizer.backward(losses, scaler=getattr(self.trainer.precision_plugin, "scaler", None))
        optimizer.step()
        self.lr_schedulers().step()
        self.log_report(optimizer.report)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        # Here, since a precision plugin with a scaler has unscaled by now.
        nn.utils.clip_grad_norm_(self.parameters(), 0.5)


@METHOD_TABLE
def test_manual_equals_the_loop_by_hand(method: str) -> None:
    module, twin = Manual(METHODS[method]), Module(METHODS[method])
    run = trainer()
    run.fit(module, loader())
    assert run.global_step == 14
    assert "loss/left" in run.logged_metrics
    assert type(module.optimizers()).__name__ == "Lightning" + type(run.optimizers[0]).__name__
    assert module.optimizers().report is run.optimizers[0].report
    assert_same_training(module, run.optimizers[0], twin, by_hand(twin, loader(), clip=0.5))


@METHOD_TABLE
def test_manual_with_a_scaler(method: str) -> None:
    module, twin = Manual(METHODS[method]), Module(METHODS[method])
    run = trainer(plugins=[MixedPrecision("16-mixed", "cpu", GradScaler("cpu", init_scale=2.0**10))])
    run.fit(module, loader())

    def autocast() -> Any:
        return torch.autocast("cpu", torch.half, cache_enabled=False)

    hand = GradScaler("cpu", init_scale=2.0**10)
    optimizer = by_hand(twin, loader(), clip=0.5, scaler=hand, autocast=autocast)
    assert_same_training(module, run.optimizers[0], twin, optimizer)


def test_manual_with_two_optimizers_and_toggles() -> None:
    class Duel(lightning.LightningModule):
        """A generator and a critic, each with two losses; toggling freezes the other one."""

        def __init__(self, toggle: bool) -> None:
            super().__init__()
            self.automatic_optimization, self.toggle = False, toggle
            torch.manual_seed(3)
            self.maker, self.critic = nn.Linear(3, 2), nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))

        def configure_optimizers(self) -> Any:
            return [
                gradsurgery.PCGrad(Adam(self.maker.parameters(), lr=0.01)),
                gradsurgery.GradVac(Adam(self.critic.parameters(), lr=0.01)),
            ]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            x, y = batch
            made = [lambda: {"fool": -self.critic(self.maker(x)).mean(), "near": (self.maker(x) - y).square().mean()}]
            made += [
                lambda: {"fake": self.critic(self.maker(x).detach()).mean(), "real": -self.critic(y + x[:, :2]).mean()}
            ]
            for optimizer, other, losses in zip(self.optimizers(), reversed(self.optimizers()), made, strict=True):
                with optimizer.toggle_model() if self.toggle else nullcontext():
                    untouched = [p.grad for group in other.param_groups for p in group["params"]]
                    if self.toggle:
                        assert not any(p.requires_grad for group in other.param_groups for p in group["params"])
                    optimizer.zero_grad()
                    report = optimizer.backward(losses())
                    optimizer.step()
                    assert len(report.names) == 2
                    after = [p.grad for group in other.param_groups for p in group["params"]]
                    assert all(a is b for a, b in zip(untouched, after, strict=True))

    ends = []
    for toggle in (True, False):
        module = Duel(toggle)
        with warnings.catch_warnings():
            # Without toggling the library itself warns, once, that the critic is reached and gets nothing.
            warnings.filterwarnings("ignore" if not toggle else "error", message="PCGrad.backward: the losses reach 4")
            trainer().fit(module, loader())
        ends.append(module.state_dict())
    assert_same(*ends)


def test_manual_with_a_closure() -> None:
    class Closing(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.automatic_optimization = Net(), False

        def configure_optimizers(self) -> Any:
            return gradsurgery.PCGrad(LBFGS(self.parameters(), lr=0.2, max_iter=4, line_search_fn="strong_wolfe"))

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            optimizer.step(closure_of(optimizer, self.net, batch))

    def closure_of(optimizer: Any, net: Net, batch: Any) -> Callable[[], float]:
        def closure() -> float:
            optimizer.zero_grad()
            return optimizer.backward(losses_of(net, batch)).objective

        return closure

    module, net = Closing(), Net()
    trainer().fit(module, loader())
    optimizer = module.configure_optimizers().base
    wrapped = gradsurgery.PCGrad(type(optimizer)(net.parameters(), **optimizer.defaults))
    for _ in range(2):
        for batch in loader():
            wrapped.step(closure_of(wrapped, net, batch))
    assert_same(module.net.state_dict(), net.state_dict())


def test_a_manual_run_resumes(tmp_path: Path) -> None:
    module = Manual(METHODS["gradvac"])
    whole = trainer()
    whole.fit(module, loader())
    first = trainer(max_epochs=1)
    first.fit(Manual(METHODS["gradvac"]), loader())
    first.save_checkpoint(tmp_path / "one.ckpt")
    resumed = Manual(METHODS["gradvac"])
    second = trainer()
    second.fit(resumed, loader(), ckpt_path=str(tmp_path / "one.ckpt"))
    assert_same_training(resumed, second.optimizers[0], module, whole.optimizers[0])


# -------------------------------------------------------------------------------------------------------------- Fabric


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_fabric_equals_the_loop_by_hand(precision: str, tmp_path: Path) -> None:
    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)
    net, twin = Net(), Net()
    wrapped = METHODS["gradvac"](Adam(net.parameters(), lr=0.02), net)

    model, optimizer = fabric.setup(net, wrapped)
    other = METHODS["gradvac"](Adam(twin.parameters(), lr=0.02), twin)
    for batch in fabric.setup_dataloaders(loader()):
        optimizer.zero_grad()
        with fabric.autocast():
            losses = losses_of(model.module if precision == "bf16-mixed" else model, batch)
        optimizer.backward(losses)
        fabric.clip_gradients(model, optimizer, max_norm=0.5)
        optimizer.step()

        other.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            losses = losses_of(twin, batch)
        other.backward(losses)
        nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
        other.step()
    assert type(optimizer).__name__ == "FabricGradVac"
    assert_same(net.state_dict(), twin.state_dict())
    assert_same(wrapped.state_dict(), other.state_dict())
    fabric.save(tmp_path / "state.ckpt", {"optimizer": optimizer})
    again = METHODS["gradvac"](Adam(net.parameters(), lr=0.02), net)
    fabric.load(tmp_path / "state.ckpt", {"optimizer": again})
    assert_same(again.state_dict(), other.state_dict())


# ----------------------------------------------------------------------------------------------------------- processes


def halves() -> DataLoader[Any]:
    """Half of every batch of eight for each process; Lightning's own sampler would shuffle."""
    return DataLoader(dataset(), 4, sampler=DistributedSampler(dataset(), shuffle=False))


def in_two(module: Module, folder: str, *, strategy: Any = None, precise: Any = None, **options: Any) -> Any:
    """Fit in this process and another one."""
    strategy = strategy or DDPStrategy(process_group_backend="gloo")
    plugins = [LightningEnvironment(), *([precise] if precise else [])]
    run = trainer(devices=2, strategy=strategy, plugins=plugins, default_root_dir=folder, **options)
    run.fit(module, halves())
    assert run.world_size == 2
    same_everywhere([p.detach() for p in module.parameters()])
    return run


def sgd(params: Any) -> Optimizer:
    return SGD(params, lr=0.02, momentum=0.9)  # Adam would blow up the rounding that processes differ by


def distributed(method: str) -> Build:
    return functools.partial(METHODS[method], distributed=True)


def assert_close_training(module: Module, twin: Module, run: Any, optimizer: Optimizer) -> None:
    assert_close(module, twin)
    steps = [o.state_dict()["gradsurgery"]["memory"]["step"] for o in (run.optimizers[0], optimizer)]
    assert steps[0] == steps[1]


def cases_of(rank: int, size: int) -> dict[str, Callable[[], None]]:
    os.environ.update(LOCAL_RANK=str(rank), NODE_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29999")
    for message in [*FOREIGN, ".*processes run, and nothing is exchanged", "Detected call of `lr_scheduler"]:
        warnings.filterwarnings("ignore", message)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    folder = tempfile.mkdtemp()
    cases: dict[str, Callable[[], None]] = {}

    def case(function: Callable[[], None], name: str) -> None:
        cases[name] = function

    for method in METHODS:

        def plain(method: str = method) -> None:
            module, twin = Module(distributed(method), sgd), Module(METHODS[method], sgd)
            run = in_two(module, folder, gradient_clip_val=0.5)
            assert_close_training(module, twin, run, by_hand(twin, loader(), clip=0.5))

        def accumulated(method: str = method) -> None:
            module, twin = Module(distributed(method), sgd), Module(METHODS[method], sgd)
            run = in_two(module, folder, accumulate_grad_batches=3)
            assert_close_training(module, twin, run, by_hand(twin, loader(), parts=3))

        def by_the_user(method: str = method) -> None:
            module, twin = Manual(distributed(method), sgd), Module(METHODS[method], sgd)
            run = in_two(module, folder)
            assert_close_training(module, twin, run, by_hand(twin, loader(), clip=0.5))

        case(plain, f"{method}-automatic")
        if method in ("gradvac", "gradnorm"):
            case(accumulated, f"{method}-accumulated")
            case(by_the_user, f"{method}-manual")

    for option in ("find_unused_parameters", "static_graph", "gradient_as_bucket_view"):

        def variant(option: str = option) -> None:
            module, twin = Module(distributed("pcgrad"), sgd), Module(METHODS["pcgrad"], sgd)
            strategy = DDPStrategy(process_group_backend="gloo", **{option: True})
            run = in_two(module, folder, strategy=strategy, accumulate_grad_batches=3)
            assert_close_training(module, twin, run, by_hand(twin, loader(), parts=3))

        case(variant, option)

    def scaled() -> None:
        # One process overflows first; both are to skip the step.
        module = Module(distributed("gradvac"), sgd)
        scaler = GradScaler("cpu", init_scale=2.0**122, backoff_factor=2.0**-10)
        run = in_two(module, folder, precise=MixedPrecision("16-mixed", "cpu", scaler))
        assert 0 < run.optimizers[0].state_dict()["gradsurgery"]["memory"]["step"] < 14

    def resumed() -> None:
        module, again = Module(distributed("gradvac"), sgd), Module(distributed("gradvac"), sgd)
        path = [f"{folder}/one.ckpt"]
        dist.broadcast_object_list(path)
        whole = in_two(module, folder)
        in_two(Module(distributed("gradvac"), sgd), folder, max_epochs=1).save_checkpoint(path[0])
        run = trainer(devices=2, strategy=DDPStrategy(process_group_backend="gloo"), plugins=[LightningEnvironment()])
        run.fit(again, halves(), ckpt_path=path[0])
        assert_same_training(again, run.optimizers[0], module, whole.optimizers[0])

    def forgotten() -> None:
        module = Module(METHODS["pcgrad"], sgd)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for message in FOREIGN:
                warnings.filterwarnings("ignore", message)
            with pytest.raises(UserWarning, match="Pass distributed=True"):
                in_two(module, folder)

    case(scaled, "scaler")
    case(resumed, "resumed")
    case(forgotten, "forgotten")
    return cases


def test_two_processes(tmp_path: Path) -> None:
    told = {name: text for name, text in run_cases(cases_of, 2, tmp_path).items() if text}
    assert not told, "\n\n".join(f"{name}: {text}" for name, text in told.items())


# ------------------------------------------------------------------------------------------------------------ examples


@pytest.mark.parametrize("name", ["lightning_automatic", "lightning_manual"])
def test_the_example_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    path = ROOT / "examples" / f"{name}.py"
    assert len(path.read_text(encoding="utf-8").splitlines()) < 60
    runpy.run_path(str(path), run_name="__main__")
    assert "conflict" in capsys.readouterr().out
