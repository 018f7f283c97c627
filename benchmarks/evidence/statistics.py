"""How trainings are compared. Pure functions of numbers; errors and scores are better the lower they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
    """An estimate and its confidence interval.

    Attributes:
        value: The estimate.
        low: Lower end.
        high: Upper end.
    """

    value: float
    low: float
    high: float


def delta_m(errors: Mapping[str, float], alone: Mapping[str, float]) -> float:
    """Mean relative improvement over single-task models, Δm, in errors.

    Maninis et al., Attentive Single-Tasking of Multiple Tasks, CVPR 2019, for metrics that are all better the lower
    they are: the mean over the tasks of (bₖ − eₖ) / bₖ.

    Args:
        errors: e, of the model of all tasks.
        alone: b > 0, of a model for each task.

    Returns:
        Share by which errors are lower; below 0 they are higher.

    Raises:
        ValueError: The tasks differ, or there is none.
    """
    if not alone or errors.keys() != alone.keys():
        raise ValueError(
            f"delta_m: `errors` and `alone` must have the same tasks, got {list(errors)} and {list(alone)}."
        )
    return float(np.mean([1.0 - errors[task] / alone[task] for task in alone]))


def ranks(scores: Sequence[float]) -> list[float]:
    """Ranks from 1 for the lowest; equal scores share the mean of their ranks.

    Args:
        scores: (n,).

    Returns:
        (n,), with sum n (n + 1) / 2.
    """
    values = np.asarray(scores, dtype=float)
    below = (values[None, :] < values[:, None]).sum(axis=1)
    same = (values[None, :] == values[:, None]).sum(axis=1)
    return (below + (same + 1) / 2).tolist()


def resample(groups: Sequence[Sequence[float]], draws: int, seed: int) -> np.ndarray:
    """Bootstrap means of groups: problems are drawn with replacement, and seeds within each problem that is drawn.

    Args:
        groups: A group per problem, of a value per seed.
        draws: How often.
        seed: Of the random draws.

    Returns:
        Means over the groups of the means within them, (draws,).
    """
    random = np.random.default_rng(seed)
    sizes = np.array([len(group) for group in groups])
    table = np.full((len(groups), sizes.max()), np.nan)
    for i, group in enumerate(groups):
        table[i, : len(group)] = group
    total = np.zeros(draws)
    for _ in groups:
        which = random.integers(len(groups), size=draws)
        values = np.zeros(draws)
        # As many seeds as the problem has; a problem with fewer draws fewer.
        counts = sizes[which]
        for seed_number in range(sizes.max()):
            drawn = table[which, random.integers(counts)]
            values += np.where(seed_number < counts, drawn, 0.0)
        total += values / counts
    return total / len(groups)


def bootstrap(
    groups: Sequence[Sequence[float]], *, level: float = 0.95, draws: int = 10_000, seed: int = 0
) -> Interval:
    """Mean over problems, and a percentile interval that knows that both problems and seeds are samples.

    Args:
        groups: A group per problem, of a value per seed; at least one group, none empty.
        level: Of the interval.
        draws: How often to resample.
        seed: Of the random draws.

    Returns:
        The mean over the groups of the means within them, and its interval.

    Raises:
        ValueError: There is no group, or one is empty.
    """
    if not groups or not all(groups):
        raise ValueError("bootstrap: `groups` must hold at least one value for each problem.")
    drawn = resample(groups, draws, seed)
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return Interval(float(np.mean([np.mean(group) for group in groups])), float(low), float(high))


def relative(scores: Sequence[float], base: Sequence[float]) -> list[float]:
    """Logarithms of ratios of scores, seed by seed: paired, so that a seed that is hard for all does not matter.

    Args:
        scores: A score per seed, > 0.
        base: Those of the baseline with the same seeds.

    Returns:
        ln (score / base), below 0 where the score is better.
    """
    return [float(np.log(a / b)) for a, b in zip(scores, base, strict=True)]


def verdict(differences: Sequence[float], least: float = 0.01) -> int:
    """Whether one is better than the other on a problem.

    Args:
        differences: Logarithms of ratios, one per seed.
        least: A mean difference below this is none.

    Returns:
        1 for better, if that holds for every seed; −1 for worse, likewise; 0 if the seeds disagree.
    """
    if abs(float(np.mean(differences))) < least:
        return 0
    if all(d < 0 for d in differences):
        return 1
    return -1 if all(d > 0 for d in differences) else 0
