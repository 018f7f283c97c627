"""The landscape of the PCGrad paper: Adam stalls in a valley, PCGrad goes on to where the valleys meet.

Yu et al., NeurIPS 2020, arXiv 2001.06782, section 2.2, figure 1 and appendix D: 500 000 steps of Adam at 1e-3 from
(0.5, −3). For so many steps the landscape, its gradients and Adam are written in Python's numbers here, which takes a
twentieth of the time; a test holds them against torch's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

import gradsurgery
from gradsurgery.problems import pcgrad_valleys

LR, STEPS, EVERY = 1e-3, 500_000, 1_000
FLOOR = 5e-6
Pair = tuple[float, float]


def landscape(x: float, y: float) -> tuple[Pair, Pair, Pair]:
    """Both losses at a point, the gradient of the first, and that of the second."""
    bend = math.tanh(y)
    slope = 1.0 - bend * bend
    first, by_first = _wall(20.0, 0.5 * x + bend)
    second, by_second = _wall(25.0, 0.5 * x - bend + 2.0)
    return (first, second), (0.5 * by_first, slope * by_first), (0.5 * by_second, -slope * by_second)


def _wall(height: float, distance: float) -> Pair:
    far = abs(distance) > FLOOR
    return height * math.log(max(abs(distance), FLOOR)), height / distance if far else 0.0


def plain(first: Pair, second: Pair) -> Pair:
    """The sum of two gradients."""
    return first[0] + second[0], first[1] + second[1]


def combined(method: gradsurgery.Surgery) -> Callable[[Pair, Pair], Pair]:
    """The direction of a surgery."""

    def direction(first: Pair, second: Pair) -> Pair:
        x, y = method.combine(torch.tensor((first, second), dtype=torch.float64)).tolist()
        return x, y

    return direction


def descend(start: Pair, direction: Callable[[Pair, Pair], Pair], steps: int, every: int) -> dict[str, Any]:
    """Follow a direction with Adam, until both components have been zero for a whole stretch or the steps are made.

    Args:
        start: Where it begins.
        direction: Combines two gradients.
        steps: Most steps, a multiple of `every`.
        every: Length of the stretches whose means are kept.

    Returns:
        The number of steps, the mean point and the mean losses of the last stretch, and the means of all.
    """
    (x, y), (mx, my), (vx, vy) = start, (0.0, 0.0), (0.0, 0.0)
    path, losses, done, still = [list(start)], [0.0, 0.0], 0, False
    while done < steps and not still:
        sums, still = [0.0] * 4, True
        for t in range(done + 1, done + every + 1):
            values, first, second = landscape(x, y)
            gx, gy = direction(first, second)
            still = still and gx == gy == 0.0
            mx, my = 0.9 * mx + 0.1 * gx, 0.9 * my + 0.1 * gy
            vx, vy = 0.999 * vx + 0.001 * gx * gx, 0.999 * vy + 0.001 * gy * gy
            step, root = LR / (1.0 - 0.9**t), math.sqrt(1.0 - 0.999**t)
            x -= step * mx / (math.sqrt(vx) / root + 1e-8)
            y -= step * my / (math.sqrt(vy) / root + 1e-8)
            sums = [total + value for total, value in zip(sums, (x, y, *values), strict=True)]
        done += every
        path.append([sums[0] / every, sums[1] / every])
        losses = [sums[2] / every, sums[3] / every]
    return {"steps": done, "mean point": path[-1], "mean losses": losses, "path": path}


def run(quick: bool = False) -> dict[str, Any]:
    """Follow the plain sum, PCGrad and MGDA from the start of the paper.

    Args:
        quick: Two thousand steps.

    Returns:
        For each method the mean point and the mean losses of the last stretch of steps, and its path in short.
    """
    problem, steps = pcgrad_valleys(), 2_000 if quick else STEPS
    (start,) = problem.start_points
    base = torch.optim.SGD([torch.zeros(1)], lr=LR)
    methods = {
        "plain sum": plain,
        "PCGrad": combined(gradsurgery.PCGrad(base)),
        "MGDA": combined(gradsurgery.MGDA(base, reduction="mean")),
    }
    found = {name: descend(start, direction, steps, EVERY) for name, direction in methods.items()}
    for each in found.values():
        points = each["path"]
        kept = torch.linspace(0, len(points) - 1, min(80, len(points))).round().long().tolist()
        each["path"] = [[round(x, 3) for x in points[i]] for i in kept]
    return {
        "steps": steps,
        "floors": [float(loss[0]) for loss in problem.losses(problem.pareto_set(2))],
        "start losses": [float(loss) for loss in problem.losses(problem.starts[0])],
        "methods": found,
    }
