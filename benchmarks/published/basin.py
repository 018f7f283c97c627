"""The toy of CAGrad, Nash-MTL and FAMO: who reaches the Pareto front from which start, and where on it.

The settings are those of the official scripts: Adam at 1e-3; for Nash-MTL and FAMO f₁ × 0.1, 50 000 steps and
gradients clipped to length 1 where their class does so; for CAGrad equal scales, c = 0.5 and 100 000 steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import gradsurgery
from benchmarks.published.paths import Path, Run, follow, follow_weighted
from gradsurgery.problems import Problem, cagrad_basin

# On the front: all losses together could be lower by no more than this. They are unscaled, and range over 19.6 there.
ON_FRONT = 0.01
# At the minimum: this close to the point of the front where the sum of the losses is smallest. The front is 14 long.
AT_MINIMUM = 0.25
LR, EVERY = 1e-3, 500
# CAGrad's third start; the other two are among the five.
CAGRAD_START = (-8.5, -5.0)
PROBLEM = cagrad_basin()


def _unused() -> torch.optim.Optimizer:
    """An optimizer for methods of which `combine` alone is used."""
    return torch.optim.SGD([torch.zeros(1)], lr=0.1)


def surgeries(c: float, clip: float | None) -> dict[str, tuple[gradsurgery.Surgery | None, float | None]]:
    """The methods as in the official code of Nash-MTL (`clip` 1) or of CAGrad (no clipping)."""
    return {
        "plain sum": (None, None),
        "PCGrad": (gradsurgery.PCGrad(_unused()), None),
        "MGDA": (gradsurgery.MGDA(_unused(), reduction="mean"), None),
        "CAGrad": (gradsurgery.CAGrad(_unused(), c=c, rescale=1 if clip else 2, reduction="mean"), clip),
        "IMTL-G": (gradsurgery.IMTLG(_unused(), reduction="mean"), None),
        "Nash-MTL": (gradsurgery.NashMTL(_unused(), scale="paper"), 1.0),
    }


def famo(scale: float) -> Callable[[torch.optim.Optimizer], gradsurgery.MultiLossOptimizer]:
    """FAMO as in its toy script: no decay, and lower bounds of −21."""
    return lambda base: gradsurgery.FAMOWeighter(
        base, lr=0.025, decay=0.0, min_losses=(-21.0 * scale, -21.0), reduction="mean"
    )


def on_front(point: Tensor) -> bool:
    """Whether a point counts as one of the front."""
    return PROBLEM.gap(point) < ON_FRONT


def minimum(problem: Problem) -> Tensor:
    """The point of the Pareto set where the sum of the losses is smallest, (2,)."""
    points = problem.pareto_set(20_001)
    return points[int(sum(problem.losses(points)).argmin())]


def end_of(path: Path, lowest: Tensor, every: int) -> dict[str, Any]:
    """What is reported of a run; losses are unscaled.

    Args:
        path: The run.
        lowest: Where the sum is smallest.
        every: Length of the stretches of the path.

    Returns:
        Numbers, and at most sixty points to draw. "on front after" is the number of steps at the first of these points
        that is on the front.
    """
    end, last = path.points[-1], len(path.points) - 1
    gap, distance = PROBLEM.gap(end), float((end - lowest).norm())
    kept = torch.linspace(0, last, min(60, last + 1)).round().long().tolist()
    points = [[round(float(x), 2) for x in path.points[i]] for i in kept]
    met = [i for i, point in zip(kept, points, strict=True) if on_front(torch.tensor(point, dtype=torch.float64))]
    return {
        "end": [round(float(x), 3) for x in end],
        "losses": [round(float(x), 3) for x in PROBLEM.losses(end)],
        "gap": round(gap, 4),
        "from minimum": round(distance, 3),
        "steps": path.steps,
        "on front": gap < ON_FRONT,
        "on front after": min(met[0] * every, path.steps) if met else None,
        "at minimum": distance < AT_MINIMUM,
        "path": points,
    }


def measure(
    scale: float, *, c: float, clip: float | None, steps: int, every: int = EVERY, weighting: bool = True
) -> dict[str, Any]:
    """Run all methods from all starts at one scale of f₁.

    Args:
        scale: Factor of f₁.
        c: CAGrad's c.
        clip: Longest direction of CAGrad, None: any.
        steps: Most steps of a run.
        every: Length of the stretches whose means are drawn.
        weighting: FAMO, too. Without it, CAGrad's third start is added to the five.

    Returns:
        The settings, and for each method what came of each start.
    """
    problem, lowest = cagrad_basin(scale), minimum(cagrad_basin(scale))
    starts = list(problem.starts)
    if not weighting:
        starts.append(torch.tensor(CAGRAD_START, dtype=torch.float64))
    methods = surgeries(c, clip)
    runs = [Run(start, *settings) for settings in methods.values() for start in starts]
    options = {"lr": LR, "steps": steps, "every": every, "on_front": on_front}
    one_by_one = iter(follow(problem, runs, **options))
    found = {name: [next(one_by_one) for _ in starts] for name in methods}
    if weighting:
        found["FAMO"] = [follow_weighted(problem, start, famo(scale), max_norm=1.0, **options) for start in starts]
    return {
        "scale": scale,
        "c": c,
        "steps": steps,
        "minimum": [round(float(x), 3) for x in lowest],
        "starts": [start.tolist() for start in starts],
        "methods": {name: [end_of(path, lowest, every) for path in paths] for name, paths in found.items()},
    }


def run(quick: bool = False) -> dict[str, Any]:
    """Both settings: that of Nash-MTL and FAMO, and that of CAGrad.

    Args:
        quick: Five hundred steps of each run, which lead nowhere.

    Returns:
        The results of both, "scaled" and "equal".
    """
    if quick:
        size = {"steps": 500, "every": 100}
        return {
            "scaled": measure(0.1, c=0.4, clip=1.0, **size),
            "equal": measure(1.0, c=0.5, clip=None, weighting=False, **size),
        }
    return {
        "scaled": measure(0.1, c=0.4, clip=1.0, steps=50_000),
        "equal": measure(1.0, c=0.5, clip=None, weighting=False, steps=100_000),
    }
