"""Who takes part: how each method of the catalogue is built for a problem, and which do not apply, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.evidence.problem import Losses, Problem, Start
from gradsurgery import FAMOWeighter, MultiLossOptimizer
from gradsurgery.cli import catalogue
from gradsurgery.cli.catalogue import built
from gradsurgery.surgery.modo import DoubleSampling

SUM, TUNED, ALONE = "plain sum", "tuned fixed weights", "alone: "

#: What refuses a loss below zero; a test asks each method.
NEEDS_POSITIVE = frozenset(
    {
        "AGDA",
        "CoVWeighter",
        "DBMTL",
        "EPO",
        "DWAWeighter",
        "FAMOWeighter",
        "GO4AlignWeighter",
        "GeometricMeanWeighter",
        "GradNormWeighter",
        "IGBWeighter",
        "IMTLLWeighter",
        "InitialLossWeighter",
        "LossWeightedSoftAdaptWeighter",
        "ReLoBRaLoWeighter",
        "RealTimeWeighter",
        "RunningMaxWeighter",
        "UWSOWeighter",
        "UncertaintyWeighter",
    }
)
#: Methods that came after the results that are kept; the next whole run has them, and empties this.
LATER = frozenset(
    {
        "AGDA",
        "AdaTask",
        "AndMask",
        "BLUR",
        "ConicGrad",
        "FERERO",
        "GCS",
        "GRU",
        "IGBWeighter",
        "LDCMTLWeighter",
        "MTAdam",
        "MultiAdam",
        "PIVRG",
        "SAGO",
        "SandMask",
    }
)
#: Methods that give the plain sum for fewer losses.
LEAST_LOSSES = {"Krum": 3, "TrimmedMean": 3}
#: An epoch, for methods that work by epochs, and the time between two looks at the residuals, in shares of a training.
EPOCHS, LOOKS = 10, 4


def names() -> list[str]:
    """All contenders: the plain sum, the tuned weights, and every method of the catalogue."""
    return [SUM, TUNED, *catalogue.facts()]


def surgeries() -> set[str]:
    """Names of the methods that differentiate each loss by itself."""
    return {name for name, facts in catalogue.facts().items() if facts.kind == "surgery"}


def alone(problem: Problem) -> list[str]:
    """The single-task trainings of a problem."""
    return [ALONE + task for task in problem.tasks] if problem.alone else []


def refused(name: str, problem: Problem) -> str | None:
    """Why a method has no place on a problem.

    Args:
        name: The contender.
        problem: The problem.

    Returns:
        The reason, or None if it takes part.
    """
    least = LEAST_LOSSES.get(name, 1)
    if len(problem.losses) < least:
        return f"is the plain sum for fewer than {least} losses"
    if name in NEEDS_POSITIVE and not problem.positive:
        return "refuses losses below zero"
    if name == "PriorLossWeighter" and not problem.has_priors:
        return "needs the loss of a prior, and none is known here"
    if name == "NTKWeighter" and not problem.has_residuals:
        return "needs residuals, and not all losses are sums of squares"
    return None


def wrap(name: str, problem: Problem, start: Start, lr: float) -> torch.optim.Optimizer:
    """The optimizer of a contender, with the defaults of its class.

    Args:
        name: The contender; the baselines get the bare optimizer.
        problem: The problem.
        start: Its start.
        lr: The learning rate.

    Returns:
        The optimizer.
    """
    # M-ConFIG divides as Adam does, and wants plain SGD inside.
    base = torch.optim.SGD if name == "MConFIG" else problem.base
    optimizer = base(start.model.parameters(), lr=lr)
    if name not in catalogue.facts():
        return optimizer
    given: dict[str, Any] = {}
    if name in ("GradNormWeighter", "NormalizedGradientWeighter"):
        given["shared_params"] = start.last_shared
    if name == "PriorLossWeighter":
        given["priors"] = start.priors
    if (
        name == "MConFIG"
    ):  # as in its authors' package: heads would get bare SGD, at a rate that is meant for Adam's steps
        given["shared_params"] = list(start.model.parameters())
    return built(name, optimizer, len(problem.losses), **given)


@dataclass(frozen=True)
class Stepper:
    """Makes the steps of a training.

    Attributes:
        name: The contender.
        problem: The problem.
        start: The model and its data.
        optimizer: The contender's optimizer.
        weights: Constant factors of the losses, for the baselines: by loss; losses that are not named are left out.
    """

    name: str
    problem: Problem
    start: Start
    optimizer: torch.optim.Optimizer
    weights: dict[str, float]

    def step(self, number: int) -> None:
        """Make one step.

        Args:
            number: Its number, from 0.
        """
        self.optimizer.zero_grad()
        self.backward(self.start.losses(number, 0), number)
        self.optimizer.step()
        if isinstance(self.optimizer, FAMOWeighter):  # the paper's way: the same batch once more
            with torch.no_grad():
                self.optimizer.update(self.start.losses(number, 0))
        if self.name in ("DWAWeighter", "IGBWeighter") and (number + 1) % max(1, self.problem.steps // EPOCHS) == 0:
            self._method().epoch_end()  # type: ignore[attr-defined]

    def backward(self, losses: Losses, number: int) -> None:
        """Turn losses into gradients.

        Args:
            losses: The losses.
            number: Number of the step.
        """
        if not isinstance(self.optimizer, MultiLossOptimizer):
            torch.stack([factor * losses[name] for name, factor in self.weights.items()]).sum().backward()
            return
        options: dict[str, Any] = {}
        given: Losses | dict[str, Any] = losses
        if isinstance(self.optimizer, DoubleSampling) and self.problem.batches:
            options["independent"] = [self.start.losses(number, draw) for draw in (1, 2)]
        if self.name == "NTKWeighter" and number % max(1, self.problem.steps // LOOKS) == 0:
            assert self.start.residuals is not None
            options["residuals"] = self.start.residuals(number)
        if self.name == "MConFIG":  # one loss in turn
            turn = number % len(losses)
            given = {loss: value if i == turn else None for i, (loss, value) in enumerate(losses.items())}
        self.optimizer.backward(given, **options)

    def _method(self) -> MultiLossOptimizer:
        assert isinstance(self.optimizer, MultiLossOptimizer)
        return self.optimizer


def stepper(name: str, problem: Problem, seed: int, lr: float, weights: dict[str, float] | None = None) -> Stepper:
    """A contender at the start of a training.

    Args:
        name: The contender.
        problem: The problem.
        seed: Seed of model and data.
        lr: Learning rate.
        weights: Constant factors of the losses, by loss; None: all 1.

    Returns:
        What makes the steps.
    """
    start = problem.begin(seed)
    if name.startswith(ALONE):
        weights = {name.removeprefix(ALONE): 1.0}
    weights = weights or dict.fromkeys(problem.losses, 1.0)
    return Stepper(name, problem, start, wrap(name, problem, start, lr), weights)
