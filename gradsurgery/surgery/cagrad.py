"""CAGrad: conflict-averse gradient descent."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch.optim import Optimizer

from gradsurgery import geometry
from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CAGrad(Surgery):
    """Within a ball around the mean gradient, take the direction that helps the worst-off task most.

    d maximises min ⟨gᵢ, d⟩ over ‖d − g₀‖ ≤ c ‖g₀‖, with g₀ the mean of the rows (eq. 4). The dual is min over the
    simplex of ⟨g_w, g₀⟩ + c ‖g₀‖ ‖g_w‖, and d = g₀ + c ‖g₀‖ g_w / ‖g_w‖ (algorithm 1). c = 0 is the mean; larger c
    listens more to the worst-off task. It is positively homogeneous. With c < 1 it is *not* a common-descent method: a
    loss may rise. With c ≥ 1 the ball holds 0, so that the best worst case is never negative and no loss rises to first
    order; as c grows d turns towards MGDA's direction, and grows with it.

    Which c to take (from memory, not checked against the paper): with c < 1 it converges to a minimum of the mean loss,
    with c ≥ 1 only to a Pareto-stationary point.

    Paper: Liu et al., Conflict-Averse Gradient Descent for Multi-task Learning, NeurIPS 2021, arXiv 2110.14048.

    Departures: solved exactly, by least-distance problems on its active sets, instead of by SLSQP. Zero rows count in
    the mean but not in the minimum. Where the dual has g_w = 0 (Pareto stationary; flag "stationary") many d are
    optimal and the one closest to g₀ is taken.

    Args:
        optimizer: The optimizer that makes the step.
        c: Radius of the ball relative to ‖g₀‖, c ≥ 0.
        rescale: What d is divided by, as in the official code: 0: nothing; 1: 1 + c²; 2: 1 + c, so that equal rows keep
            the length of the plain sum.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> rows = torch.tensor([[2.0, 1.0], [-10.0, 1.0]])
        >>> gradsurgery.CAGrad(torch.optim.SGD([torch.zeros(2)], lr=0.1), c=0.5, rescale=0).combine(rows)
        tensor([-4.3122,  3.8439])
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        c: float = 0.4,
        rescale: Literal[0, 1, 2] = 2,
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.c = self.check.number("c", c, least=0.0)
        self.descends = sys.maxsize if self.c >= 1 else 0
        self.rescale = self.check.choice("rescale", rescale, (0, 1, 2))

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        weights, degenerate = geometry.cagrad(gram, self.c, self.factor, noise=self.noise, flag=self.flag)
        if degenerate:
            self.flag("stationary")
        return weights * len(gram) / (1.0, 1 + self.c**2, 1 + self.c)[self.rescale]
