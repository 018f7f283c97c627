"""UPGrad: project each gradient on the dual cone, and add the projections."""

from __future__ import annotations

import sys

import numpy as np

from gradsurgery import geometry
from gradsurgery.surgery.base import Surgery


class UPGrad(Surgery):
    """Project each gradient on the cone of directions in which no loss rises, and add up the projections.

    d = Σ pᵢ Proj(gᵢ) on {d: ⟨gⱼ, d⟩ ≥ 0 for all j} (definition 3). No loss rises to first order. It is positively
    homogeneous; scaling one row scales its own term alone. Without conflict it is the plain sum; for two tasks it is
    PCGrad.

    With 48 tasks or more, at least twice as many as the rank of their gradients, the report has the flag
    "rank-deficient": hardly any direction helps all then, and finding the projections takes long.

    Paper: Quinton & Rey, Jacobian Descent for Multi-Objective Optimization, 2024, arXiv 2406.16232.

    Departures: the projections are exact non-negative least squares problems in unit rows, without regularisation.
    ``reduction="mean"`` gives the paper's p = 1/m.

    Args:
        optimizer: The optimizer that makes the step.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`. `preference` is p.

    Example:
        >>> rows = torch.tensor([[2.0, 1.0], [-10.0, 1.0]])
        >>> gradsurgery.UPGrad(torch.optim.SGD([torch.zeros(2)], lr=0.1)).combine(rows)
        tensor([-2.2812,  5.9881])
    """

    descends = sys.maxsize
    preference_scales_rows = False

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        if geometry.is_crowded(gram, self.noise):
            self.flag("rank-deficient")
        return geometry.dual_cone(gram, np.diag(self.preferences()), self.factor, noise=self.noise, flag=self.flag).sum(
            axis=0
        )
