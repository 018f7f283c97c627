"""MGDA: the shortest vector in the convex hull of the gradients."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch.optim import Optimizer

from gradsurgery import geometry
from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MGDA(Surgery):
    """Follow the min-norm point of the convex hull of the gradients: argmin ‖Jᵀα‖ over the simplex.

    The direction d = Jᵀα has ⟨gᵢ, d⟩ ≥ ‖d‖² for every task, so no loss rises to first order, and it is zero exactly
    where no common descent direction exists (Pareto stationary; flag "stationary"; also if one row is zero). It is
    never longer than the shortest row, which therefore dominates: `normalize` is for rows of very different lengths.

    Papers: Désidéri 2012, Multiple-gradient descent algorithm; Sener & Koltun, Multi-Task Learning as Multi-Objective
    Optimization, NeurIPS 2018, arXiv 1810.04650, eq. 3 and algorithm 2.

    Departures: solved exactly instead of by Frank-Wolfe. With ``reduction="sum"`` the simplex weights are multiplied by
    m, so that m equal rows g give m·g; the paper's own weights appear under "mean". With `normalize` the weights α of
    the scaled rows gᵢ/sᵢ are applied to them, as αᵢ/sᵢ to the raw gradients; public code applies αᵢ to the raw
    gradients, which loses common descent.

    Args:
        optimizer: The optimizer that makes the step.
        solver: "exact", or "frank-wolfe" for comparison with the paper's algorithm.
        max_iterations: Limit of Frank-Wolfe. Reaching it sets the flag "not-converged".
        tolerance: Frank-Wolfe stops when no weight moves by more than this.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`, with the paper's `normalize` among them.

    Raises:
        ValueError: An argument is out of range, or a loss is not positive where the method divides by it.

    Example:
        >>> rows = torch.tensor([[2.0, 1.0], [-1.0, 1.0]])
        >>> gradsurgery.MGDA(torch.optim.SGD([torch.zeros(2)], lr=0.1), reduction="mean").combine(rows)
        tensor([0., 1.])
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        solver: Literal["exact", "frank-wolfe"] = "exact",
        max_iterations: int = 250,
        tolerance: float = 1e-5,
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.solver = self.check.choice("solver", solver, ("exact", "frank-wolfe"))
        self.descends = sys.maxsize if solver == "exact" else 0
        self.max_iterations = self.check.count("max_iterations", max_iterations, least=1)
        self.tolerance = self.check.number("tolerance", tolerance, above=0.0)

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        m = len(gram)
        if self.solver == "frank-wolfe" and gram.diagonal().all():
            alpha, iterations = geometry.frank_wolfe(gram, self.max_iterations, self.tolerance)
            if iterations >= self.max_iterations:
                self.flag("not-converged")
            return m * alpha
        alpha, stationary = geometry.min_norm(gram, self.factor, noise=self.noise, flag=self.flag)
        if stationary:
            self.flag("stationary")
            return np.zeros(m)
        return m * alpha
