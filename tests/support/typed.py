"""What a type checker says of the public interface. `make lint` checks it with mypy; nothing here is run.

A user's editor shows these types, and a type that became `Any` would hide mistakes without a word.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import assert_type

import gradsurgery
from gradsurgery import MGDA, GradNormWeighter, MultiLossOptimizer, PCGrad, Report, UncertaintyWeighter
from gradsurgery.surgery.base import Surgery
from gradsurgery.testing import Checked, check
from gradsurgery.weighting.base import Weighter


def what_is_built(base: Optimizer, model: torch.nn.Module) -> None:
    surgery = PCGrad(base, reduction="mean", every=2, preference={"a": 2.0}, shared_params=model.parameters())
    assert_type(surgery, PCGrad)
    over: Optimizer = MGDA(UncertaintyWeighter(base), normalize="l2")
    assert_type(PCGrad(base).base, Optimizer)
    several: list[MultiLossOptimizer] = [surgery, GradNormWeighter(base, list(model.parameters()))]
    torch.optim.lr_scheduler.StepLR(over, step_size=1)
    PCGrad(base, reduction="total")  # type: ignore[arg-type]
    PCGrad(model)  # type: ignore[arg-type]
    UncertaintyWeighter(base, engine="rows")  # type: ignore[call-arg]
    del several


def what_is_handed_over(optimizer: MultiLossOptimizer, loss: Tensor) -> None:
    optimizer.backward({"a": loss, "b": None})
    optimizer.backward([loss, None])
    optimizer.backward((loss, loss), names=("a", "b"))
    optimizer.backward(torch.stack([loss, loss]), names=["a", "b"])
    optimizer.backward([lambda: loss], accumulate=True, batch_size={"0": 3})
    optimizer.backward([loss], scaler=torch.amp.GradScaler("cpu"), features=[loss], others=[optimizer])
    optimizer.backward({"a": 1.0})  # type: ignore[arg-type]
    optimizer.backward([loss], retain="yes")  # type: ignore[call-arg]


def what_comes_back(optimizer: MultiLossOptimizer, loss: Tensor) -> None:
    report = optimizer.backward([loss])
    assert_type(report, Report)
    assert_type(optimizer.report, Report | None)
    assert_type(report.names, tuple[str, ...])
    assert_type(report.losses, dict[str, float])
    assert_type(report.total, float)
    assert_type(report.objective, float)
    assert_type(report.weights, dict[str, float] | None)
    assert_type(report.gram, Tensor | None)
    assert_type(report.norms, dict[str, float] | None)
    assert_type(report.cosines, Tensor | None)
    assert_type(report.conflict_rate, float | None)
    assert_type(report.flags, tuple[str, ...])
    assert_type(report.engine, str | None)
    assert_type(report.reason, str | None)
    assert_type(report.as_dict(), dict[str, Any])
    assert_type(optimizer.accumulated, tuple[str, ...])
    assert_type(optimizer.state_dict(), dict[str, Any])
    assert_type(optimizer.param_groups, list[dict[str, Any]])


def what_research_calls(optimizer: Surgery, rows: Tensor) -> None:
    assert_type(optimizer.combine(rows), Tensor)
    assert_type(optimizer.combine(rows, losses=[1.0, 2.0], update=True), Tensor)
    assert_type(optimizer.noise, float)
    assert_type(check(PCGrad, ["plain sum"]), Checked)
    assert_type(check(lambda base: PCGrad(base), {"common descent": 2}).inputs, dict[str, int])


class ASurgery(Surgery):
    """What authors write against."""

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        assert_type(self.names, tuple[str, ...])
        assert_type(self.recall("kept", 1.0), np.ndarray)
        self.keep("kept", self.recall("kept", np.ones(len(gram))))
        assert_type(self.rng(), np.random.Generator)
        assert_type(self.preferences(), np.ndarray)
        self.require_positive(losses, "there are logarithms")
        self.flag("stationary")
        return np.ones(len(gram))


class AWeighter(Weighter):
    def weights(self, losses: np.ndarray) -> np.ndarray:
        return losses

    def scalarize(self, losses: Tensor) -> Tensor:
        return losses.sum()


def what_is_public() -> None:
    assert_type(gradsurgery.__version__, str)
