"""What a toy conflict problem is: losses of one vector, starts, and the set of its Pareto points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from gradsurgery.geometry.nonnegative import nonnegative


@dataclass(frozen=True)
class Problem:
    """Losses of one small vector θ, with starting points and a known Pareto set.

    It works in the dtype of θ; float64 is the natural one. It holds no state and draws nothing at random.

    Args:
        name: What it is called.
        losses: Maps θ of shape (n,) to m scalar tensors, ready for ``backward``; and θ of shape (…, n) to m tensors of
            shape (…), so that a grid gives whole landscapes.
        pareto: The Pareto set as a curve: maps t of shape (k,), in [0, 1], to points of shape (k, n).
        start_points: Where trajectories begin: tuples of n numbers.
        frame: (left, right, bottom, top) of a window that shows a problem in the plane; None for others.

    Example:
        >>> from gradsurgery.problems import quadratics
        >>> problem = quadratics(condition=10.0)
        >>> theta = torch.nn.Parameter(problem.starts[0])
        >>> optimizer = gradsurgery.MGDA(torch.optim.SGD([theta], lr=0.5))
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     report = optimizer.backward(problem.losses(theta))
        ...     optimizer.step()
        >>> problem.distance_to_pareto(theta) < 1e-3
        True
    """

    name: str
    losses: Callable[[Tensor], tuple[Tensor, ...]]
    pareto: Callable[[Tensor], Tensor]
    start_points: tuple[tuple[float, ...], ...]
    frame: tuple[float, float, float, float] | None = None

    @property
    def starts(self) -> tuple[Tensor, ...]:
        """The starting points, as new float64 tensors of shape (n,) that may be trained in place."""
        return tuple(torch.tensor(point, dtype=torch.float64) for point in self.start_points)

    def pareto_set(self, n: int = 101) -> Tensor:
        """Points along the Pareto set, both ends included.

        Args:
            n: How many, at least 2.

        Returns:
            Tensor of shape (n, dimension), float64.

        Raises:
            ValueError: If `n` is below 2.
        """
        if n < 2:
            raise ValueError(f"Problem.pareto_set: `n` must be at least 2, got {n}. Two points are its ends.")
        return self.pareto(torch.linspace(0.0, 1.0, n, dtype=torch.float64))

    def rows(self, theta: Tensor) -> Tensor:
        """The gradients of the losses at a point.

        Args:
            theta: Point of shape (n,). It is left alone, and so is its ``.grad``.

        Returns:
            Tensor of shape (m, n), in the dtype of `theta`.
        """
        with torch.enable_grad():
            point = theta.detach().clone().requires_grad_()
            rows = [torch.autograd.grad(loss, point, retain_graph=True)[0] for loss in self.losses(point)]
        return torch.stack(rows)

    def stationarity(self, theta: Tensor) -> float:
        """How far a point is from Pareto stationarity: the shortest vector that the gradients' convex hull holds.

        That is min ‖Jᵀw‖ over the simplex, divided by the longest row. It is 0 exactly where no direction lowers all
        losses to first order, so also where one gradient is zero, and 1 where all gradients are equal. A common factor
        of the losses does not matter.

        Args:
            theta: Point of shape (n,).

        Returns:
            Number between 0 and 1.
        """
        return relative_min_norm(self.rows(theta.detach().double()))

    def distance_to_pareto(self, theta: Tensor) -> float:
        """Euclidean distance between a point and the Pareto set, in the space of parameters.

        Args:
            theta: Point of shape (n,).

        Returns:
            The distance, to about 1e-12.
        """
        point = theta.detach().double().cpu()
        return self._least(lambda points: torch.linalg.vector_norm(points - point, dim=-1))

    def gap(self, theta: Tensor) -> float:
        """By how much all losses could be lower at once: max over Pareto points p of minᵢ (fᵢ(θ) − fᵢ(p)).

        It is 0 exactly where no loss can be lowered without raising another (weak Pareto optimality), however flat the
        losses are there, while a distance in parameters says nothing about losses.

        Args:
            theta: Point of shape (n,).

        Returns:
            The gap, at least 0, in the units of the losses.
        """
        values = torch.stack(self.losses(theta.detach().double().cpu()))
        return max(0.0, -self._least(lambda points: (torch.stack(self.losses(points), dim=-1) - values).amax(dim=-1)))

    def breadth(self) -> float:
        """How far a loss varies along the Pareto front, by which a gap can be judged.

        Returns:
            The widest range of a loss there, in its units; its size, if the front is one point.
        """
        front = torch.stack(self.losses(self.pareto_set()))
        return float((front.amax(dim=1) - front.amin(dim=1)).max()) or float(front.abs().max())

    def _least(self, measure: Callable[[Tensor], Tensor]) -> float:
        """Smallest value of a function of points on the Pareto curve, by ten looks that close in on it."""
        low, high, n = 0.0, 1.0, 129
        for _ in range(10):
            t = torch.linspace(low, high, n, dtype=torch.float64)
            values = measure(self.pareto(t))
            best = int(values.argmin())
            low, high = float(t[max(best - 1, 0)]), float(t[min(best + 1, n - 1)])
        return float(values.min())

    def trajectory(
        self, start: Tensor, optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer], steps: int
    ) -> Tensor:
        """The path of an optimizer.

        Args:
            start: Point of shape (n,) where it begins. It is copied.
            optimizer: Makes an optimizer from a list of parameters. One of this library gets the losses through its
                ``backward``; a plain one of torch follows the plain sum.
            steps: Number of steps.

        Returns:
            Tensor of shape (steps + 1, n), the start and the point after each step.
        """
        theta = nn.Parameter(start.detach().clone())
        opt = optimizer([theta])
        path = [theta.detach().clone()]
        for _ in range(steps):
            opt.zero_grad()
            losses = self.losses(theta)
            if hasattr(opt, "backward"):
                opt.backward(losses)
            else:
                torch.stack(losses).sum().backward()
            opt.step()
            path.append(theta.detach().clone())
        return torch.stack(path)


def relative_min_norm(rows: Tensor) -> float:
    """Length of the shortest vector in the convex hull of the rows, divided by the longest row.

    One non-negative least-squares problem: Σ vᵢ uᵢ ≈ 0 in unit rows u, with Σ vᵢ / ‖gᵢ‖ ≈ 1 beside it; its solution is
    the min-norm point up to its length. Nothing of it but that solver, which checks the conditions of its answer, is
    shared with the methods, so that it can judge them.

    Args:
        rows: Matrix of shape (m, n).

    Returns:
        Number between 0 and 1; 0 if a row is zero.
    """
    norms = torch.linalg.vector_norm(rows.double(), dim=1).cpu().numpy()
    if not norms.all():
        return 0.0
    units = rows.double().cpu().numpy() / norms[:, None]
    share = norms.min() / norms
    v, _ = nonnegative(np.vstack([units.T, share]), np.append(np.zeros(units.shape[1]), 1.0))
    return float(np.linalg.norm(v @ units) / (share @ v) * norms.min() / norms.max())
