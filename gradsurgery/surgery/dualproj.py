"""DualProj: project the sum of the gradients on the dual cone."""

from __future__ import annotations

import sys

import numpy as np

from gradsurgery import geometry
from gradsurgery.surgery.base import Surgery


class DualProj(Surgery):
    """Project the sum of the gradients on the cone of directions in which no loss rises.

    d = Proj(Σ pᵢ gᵢ) on {d: ⟨gⱼ, d⟩ ≥ 0 for all j}: the projection of gradient episodic memory (eq. 11). No loss rises
    to first order, and no such direction is closer to the sum. It is positively homogeneous, and the plain sum without
    conflict.

    With 48 tasks or more, at least twice as many as the rank of their gradients, the report has the flag
    "rank-deficient": hardly any direction helps all then, and finding the projection takes longer.

    Paper: Lopez-Paz & Ranzato, Gradient Episodic Memory for Continual Learning, NeurIPS 2017, arXiv 1706.08840.

    Departures: an exact non-negative least squares problem in unit rows. All tasks are alike; the paper has one new
    task and old ones as constraints.

    Args:
        optimizer: The optimizer that makes the step.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`. `preference` is p.

    Example:
        >>> rows = torch.tensor([[2.0, 1.0], [-10.0, 1.0]])
        >>> gradsurgery.DualProj(torch.optim.SGD([torch.zeros(2)], lr=0.1)).combine(rows)
        tensor([-2.4000,  4.8000])
    """

    descends = sys.maxsize
    preference_scales_rows = False

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        if geometry.is_crowded(gram, self.noise):
            self.flag("rank-deficient")
        return geometry.dual_cone(gram, self.preferences(), self.factor, noise=self.noise, flag=self.flag)
