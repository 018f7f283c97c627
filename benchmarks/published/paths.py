"""Runs on a toy problem: many surgeries side by side, or one weighting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import gradsurgery
from gradsurgery.problems import Problem

# A run is over when it is on the front and the means of two stretches of steps differ by no more than this.
_AT_REST = 1e-3


class Run(NamedTuple):
    """One run: where it begins and how gradients are combined.

    Attributes:
        start: Point of shape (n,).
        method: A surgery, of which `combine` is used; None for the plain sum.
        max_norm: Longest direction that is handed to Adam, as in some official scripts; None: any.
    """

    start: Tensor
    method: gradsurgery.Surgery | None = None
    max_norm: float | None = None


class Path(NamedTuple):
    """What is kept of a run.

    Attributes:
        points: The start, the mean of each stretch of steps, and the end: (k, n).
        losses: The mean of each stretch of steps: (k − 2, m).
        steps: Number of steps made.
    """

    points: Tensor
    losses: Tensor
    steps: int


class Recorder:
    """Keeps the means of stretches of a path, and says when it is at rest on the front.

    Args:
        start: Point of shape (n,).
        on_front: Whether a point counts as one of the front.
    """

    def __init__(self, start: Tensor, on_front: Callable[[Tensor], bool]) -> None:
        self.points, self.losses, self.on_front = [start.clone()], [], on_front
        self.steps, self.over = 0, False

    def add(self, steps: int, points: Tensor, losses: Tensor, last: Tensor) -> None:
        """Take one more stretch.

        Args:
            steps: Its length.
            points: Sum of its points.
            losses: Sum of its losses.
            last: Its last point.
        """
        self.steps += steps
        mean = points / steps
        rests = len(self.points) > 1 and bool(((mean - self.points[-1]).abs() < _AT_REST).all())
        self.over = rests and self.on_front(last)
        self.points.append(mean)
        self.losses.append(losses / steps)

    def path(self, end: Tensor) -> Path:
        """The path, given the last point."""
        return Path(torch.stack([*self.points, end.clone()]), torch.stack(self.losses), self.steps)


def nowhere(point: Tensor) -> bool:
    """No point counts as one of the front: all steps are made."""
    return False


def follow(
    problem: Problem,
    runs: Sequence[Run],
    *,
    lr: float,
    steps: int,
    every: int,
    on_front: Callable[[Tensor], bool] = nowhere,
) -> list[Path]:
    """Let runs make their steps with Adam, side by side.

    Their points are the rows of one tensor. Adam works entry by entry, so that each run is as if it were alone, while
    losses and gradients are computed once for all.

    Args:
        problem: The losses.
        runs: Where each begins, and its method.
        lr: Learning rate of Adam.
        steps: Most steps of a run, a multiple of `every`.
        every: Length of the stretches whose means are kept.
        on_front: Whether a point counts as one of the front; a run that rests there is over.

    Returns:
        One path a run.
    """
    theta = torch.nn.Parameter(torch.stack([run.start for run in runs]))
    optimizer = torch.optim.Adam([theta], lr=lr)
    recorders = [Recorder(run.start, on_front) for run in runs]
    ends, going = theta.detach().clone(), list(range(len(runs)))
    m = len(problem.losses(ends))
    for _ in range(steps // every):
        points, sums = torch.zeros_like(ends), torch.zeros(len(runs), m, dtype=ends.dtype)
        for _ in range(every):
            losses, rows = _losses_and_rows(problem, theta.detach(), m)
            theta.grad = torch.zeros_like(ends)
            for i in going:
                theta.grad[i] = _direction(runs[i], rows[i])
            optimizer.step()
            points += theta.detach()
            sums += losses
        ends[going] = theta.detach()[going]
        for i in going:
            recorders[i].add(every, points[i], sums[i], ends[i])
        going = [i for i in going if not recorders[i].over]
        if not going:
            break
    return [recorder.path(end) for recorder, end in zip(recorders, ends, strict=True)]


def _losses_and_rows(problem: Problem, theta: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Losses (k, m) and their gradients (k, m, n) at k points."""
    # Each loss is read at a copy of its own, so that one backward pass gives all gradients.
    copies = theta.expand(m, *theta.shape).clone().requires_grad_()
    losses = torch.stack([loss[i] for i, loss in enumerate(problem.losses(copies))], dim=1)
    (rows,) = torch.autograd.grad(losses.sum(), copies)
    return losses.detach(), rows.transpose(0, 1)


def _direction(run: Run, rows: Tensor) -> Tensor:
    found = rows.sum(dim=0) if run.method is None else run.method.combine(rows)
    if run.max_norm is not None and (length := float(found.norm())) > run.max_norm:
        return found * (run.max_norm / length)
    return found


def follow_weighted(
    problem: Problem,
    start: Tensor,
    weighter: Callable[[torch.optim.Optimizer], gradsurgery.MultiLossOptimizer],
    *,
    lr: float,
    steps: int,
    every: int,
    max_norm: float,
    on_front: Callable[[Tensor], bool] = nowhere,
) -> Path:
    """One run of Adam with a weighting, which sees the values of losses and so runs alone.

    Args:
        problem: The losses.
        start: Point of shape (n,).
        weighter: Wraps Adam.
        lr: Learning rate of Adam.
        steps: Most steps of the run, a multiple of `every`.
        every: Length of the stretches whose means are kept.
        max_norm: Longest gradient that is handed to Adam.
        on_front: Whether a point counts as one of the front; a run that rests there is over.

    Returns:
        The path.
    """
    theta = torch.nn.Parameter(start.clone())
    optimizer = weighter(torch.optim.Adam([theta], lr=lr))
    recorder = Recorder(start, on_front)
    while recorder.steps < steps and not recorder.over:
        points, sums = torch.zeros_like(start), torch.zeros(len(problem.losses(start)), dtype=start.dtype)
        for _ in range(every):
            optimizer.zero_grad()
            losses = problem.losses(theta)
            optimizer.backward(losses)
            torch.nn.utils.clip_grad_norm_([theta], max_norm)
            optimizer.step()
            points += theta.detach()
            sums += torch.stack(losses).detach()
        recorder.add(every, points, sums, theta.detach())
    return recorder.path(theta.detach())
