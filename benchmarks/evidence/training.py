"""One training, from a seed to its errors."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.evidence import contenders, images, physics, tables, toys
from benchmarks.evidence.contenders import ALONE, SUM, TUNED
from benchmarks.evidence.problem import Problem, score

PROBLEMS: dict[str, Problem] = {
    problem.name: problem
    for problem in (*images.PROBLEMS[:3], *physics.PROBLEMS, *tables.PROBLEMS, images.PROBLEMS[3], *toys.PROBLEMS)
}


@dataclass(frozen=True)
class Plan:
    """What is trained.

    Attributes:
        problems: Names of the problems.
        contenders: Names of the contenders.
        rates: Learning rates in the grid.
        vectors: Weight vectors that the tuned fixed weights choose from.
        seeds: Seeds that are tested. Seed 0 is for tuning alone.
        share: Steps, in shares of the problem's own.
    """

    problems: tuple[str, ...]
    contenders: tuple[str, ...]
    rates: int = 5
    vectors: int = 12
    seeds: tuple[int, ...] = (1, 2, 3)
    share: float = 1.0

    def problem(self, name: str) -> Problem:
        """A problem with the plan's number of steps."""
        problem = PROBLEMS[name]
        return replace(problem, steps=max(2, round(self.share * problem.steps)))


@dataclass(frozen=True)
class Training:
    """One training of the plan.

    Attributes:
        problem: Name of the problem.
        contender: Name of the contender.
        rate: Which rate of the grid.
        seed: The seed.
        vector: Which weight vector; 0 for all but the tuned fixed weights.
    """

    problem: str
    contender: str
    rate: int
    seed: int
    vector: int = 0

    @property
    def key(self) -> str:
        """What it is found by in the file of results."""
        return "|".join(map(str, (self.problem, self.contender, self.rate, self.seed, self.vector)))


def schedule(step: int, steps: int) -> float:
    """Share of the learning rate: it rises over the first tenth of the steps, then falls to zero in a line."""
    rise = max(1, steps // 10)
    return min((step + 1) / rise, (steps - step) / max(1, steps - rise), 1.0)


def vector(problem: Problem, number: int) -> dict[str, float]:
    """A weight vector for the tuned fixed weights.

    Number 0 is the plain sum, 1 divides each loss by its value at the start (of seed 0). Even numbers are off the first
    by random factors between 1/30 and 30, odd ones off the second by factors between 1/10 and 10, both log-uniform. All
    are rescaled to a sum of m.

    Args:
        problem: The problem.
        number: Which vector.

    Returns:
        Weights by loss.
    """
    random = np.random.default_rng([number, zlib.crc32(problem.name.encode())])
    m = len(problem.losses)
    centre, decades = np.zeros(m), math.log10(30.0)
    if number % 2:
        with torch.no_grad():
            first = problem.begin(0).losses(0, 0)
        centre, decades = -np.log10([abs(float(first[name])) for name in problem.losses]), 1.0
    powers = centre + (decades * random.uniform(-1.0, 1.0, m) if number > 1 else 0.0)
    weights = 10.0 ** (powers - powers.max())
    return dict(zip(problem.losses, (m * weights / weights.sum()).tolist(), strict=True))


def train(training: Training, plan: Plan) -> dict[str, Any]:
    """Train, and evaluate.

    Args:
        training: What to train.
        plan: The plan it belongs to.

    Returns:
        Plain values: the key, the errors on validation and test data, or why it failed.
    """
    problem = plan.problem(training.problem)
    lr = problem.rates(plan.rates)[training.rate]
    weights = vector(problem, training.vector) if training.contender == TUNED else None
    record: dict[str, Any] = {"key": training.key}
    try:
        stepper = contenders.stepper(training.contender, problem, training.seed, lr, weights)
        groups = stepper.optimizer.param_groups
        for step in range(problem.steps):
            for group in groups:
                group["lr"] = lr * schedule(step, problem.steps)
            stepper.step(step)
        for split in ("validation", "test"):
            errors = stepper.start.errors(split)
            if training.contender.startswith(ALONE):
                task = training.contender.removeprefix(ALONE)
                errors = {task: errors[task]}
            record[split] = {task: _rounded(error) for task, error in errors.items()}
        if not all(map(math.isfinite, record["test"].values())):
            record = {"key": training.key, "failed": "diverged: the model's outputs are not finite"}
    except (ArithmeticError, RuntimeError, ValueError) as error:  # what a method does not stand is a result, too
        record = {"key": training.key, "failed": " ".join(str(error).split())[:200]}
    return record


def _rounded(error: float) -> float:
    return float(f"{error:.5g}")


def first_trainings(plan: Plan, name: str, contender: str) -> list[Training]:
    """The trainings that choose a learning rate, and weights, for a contender: all with seed 0."""
    vectors = range(plan.vectors if contender == TUNED else 1)
    return [Training(name, contender, rate, 0, v) for v in vectors for rate in range(plan.rates)]


def last_trainings(plan: Plan, trainings: list[Training], records: dict[str, dict[str, Any]]) -> list[Training]:
    """The trainings that are tested, with what did best on validation data.

    Args:
        plan: The plan.
        trainings: Those that choose.
        records: Their results, by key.

    Returns:
        One training run per seed.
    """
    best = min(trainings, key=lambda training: score(records[training.key].get("validation")))
    return [replace(best, seed=seed) for seed in plan.seeds]


def pairs(plan: Plan) -> list[tuple[str, str]]:
    """Problems and contenders that take part, baselines first."""
    found = []
    for name in plan.problems:
        problem = PROBLEMS[name]
        entrants = [*contenders.alone(problem), *plan.contenders]
        found += [(name, entrant) for entrant in entrants if contenders.refused(entrant, problem) is None]
    return found


__all__ = [
    "ALONE",
    "PROBLEMS",
    "SUM",
    "TUNED",
    "Plan",
    "Training",
    "first_trainings",
    "last_trainings",
    "pairs",
    "train",
]
