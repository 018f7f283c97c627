"""ConicGrad: the best worst case within a cone around the mean gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch.optim import Optimizer

from gradsurgery import geometry
from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class ConicGrad(Surgery):
    """Within a cone around the mean gradient, take the direction that helps the worst-off task most.

    With g₀ the mean of the rows, d maximises min ⟨gᵢ, d⟩ over cos(d, g₀) ≥ c and ‖d‖ = ‖g₀‖. It points to the shortest
    vector of the convex hull of the gᵢ + μ g₀: μ = 0, which is MGDA's direction, if that lies in the cone; otherwise
    the μ for which the cosine is c. So c = 1 is the mean and c = 0 has the direction of MGDA. It is positively
    homogeneous. The *mean* loss always falls, ⟨g₀, d⟩ ≥ c ‖g₀‖². It is *not* a common-descent method: where MGDA's
    direction lies outside the cone a single loss may rise.

    Paper: Hassanpour et al., Fantastic Multi-Task Gradient Updates and How to Find Them In a Cone, 2025,
    arXiv 2502.00217.

    Departures: what could be read of the paper is the problem: the best worst case under an angular constraint around
    the mean gradient, and that length and direction are set apart. This class solves that problem exactly. The paper's
    own update of the weights, its rule for the length and its default for c are not confirmed: the length ‖g₀‖ and the
    default are choices of this library. Zero rows count in g₀ only. Where the rows are Pareto stationary and the
    constraint does not bind, the flag is "stationary": if directions of the cone raise no loss, d is the one closest to
    g₀; if the shortest vector vanishes before the cosine has come down to c, as of opposite rows, d = g₀.

    Args:
        optimizer: The optimizer that makes the step.
        c: The least cosine between d and g₀, 0 ≤ c ≤ 1.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> rows = torch.tensor([[10.0, 0.0], [-1.0, 1.0]])
        >>> gradsurgery.ConicGrad(torch.optim.SGD([torch.zeros(2)], lr=0.1), c=0.5).combine(rows)
        tensor([3.6340, 8.2942])
    """

    def __init__(self, optimizer: Optimizer, *, c: float = 0.5, **switches: Unpack[SurgerySwitches]) -> None:
        super().__init__(optimizer, **switches)
        self.c = self.check.number("c", c, least=0.0, most=1.0)

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        weights, degenerate = geometry.conic(gram, self.c, self.factor, noise=self.noise, flag=self.flag)
        if degenerate:
            self.flag("stationary")
        return weights * len(gram)
