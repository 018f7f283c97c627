"""AGDA: gradients of comparable length, and the second without what opposes the first."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch.optim import Optimizer

from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AGDA(Surgery):
    """Adaptive gradient descent for two losses: bring the lengths together at first, and project one row off the other.

    Lˢ ← γ Lˢ + (1 − γ) l, from 0 (eq. 16), and L̃ = Lˢ over its value at the last multiple of M steps (eq. 17);
    r = L̃ / Σ L̃ over all steps so far (eq. 18). With the mean E of the row lengths nᵢ, ḡᵢ = ωᵢ gᵢ with
    ωᵢ = (rᵢ (E − nᵢ) + nᵢ) / nᵢ; r = 1 in the first step, where both rows get the length E, and falls like 1/t: later
    the lengths are left alone. Where the rows conflict ḡ₂ loses its part along ḡ₁, and d is the sum. The first loss
    falls to first order, ⟨g₁, d⟩ ≥ ω₁ ‖g₁‖²; the second one may rise. It is positively homogeneous.

    Paper: Physics-informed neural network based on a new adaptive gradient descent algorithm for solving partial
    differential equations of flow problems, Physics of Fluids 35, 063608, 2023, doi 10.1063/5.0151244, as the official
    PaddleScience has it; equations are numbered as in its comments.

    Departures: that code raises where the number of the step is no multiple of M, since it forgets the last value; with
    the number left at its default, 0, L̃ is 1 in each step. Here the value is kept. It takes two losses; each further
    one is treated like the second. Steps in which one loss alone is present, and losses that are absent, change
    nothing. A zero row is left out of E, and its weight is 1.

    Args:
        optimizer: The optimizer that makes the step.
        gamma: γ, decay of the averages, 0 ≤ γ < 1.
        period: M ≥ 1, in steps.
        primary: Name of the loss whose row is kept whole, the residual of the equation in the paper; by default the
            first one in the first call. Where it is absent from a batch nothing is projected, with the flag
            "primary-absent".
        **switches: See :class:`gradsurgery.surgery.base.Surgery`.

    Raises:
        ValueError: An argument is out of range, a loss is not positive, or no loss is called `primary`.

    Example:
        >>> rows = torch.tensor([[4.0, 0.0], [0.0, 2.0]])
        >>> gradsurgery.AGDA(torch.optim.SGD([torch.zeros(2)], lr=0.1)).combine(rows, losses=[1.0, 1.0])
        tensor([3., 3.])
    """

    stateful = True
    needs_losses = True

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        gamma: float = 0.999,
        period: int = 100,
        primary: str | None = None,
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.gamma = self.check.number("gamma", gamma, least=0.0, below=1.0)
        self.period = self.check.count("period", period, least=1)
        self.primary = self.check.primary(primary)

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        lengths = np.sqrt(gram.diagonal())
        moving = lengths > 0
        usual = lengths[moving].mean() if moving.any() else 0.0
        weights = np.ones(len(gram))
        weights[moving] += self._ratios(losses)[moving] * (usual / lengths[moving] - 1)
        first = self.primary_row(self.primary)
        if first is not None and lengths[first] > 0:
            opposing = np.minimum(gram[first], 0.0) / gram[first, first]
            weights[first] -= weights @ opposing
        return weights

    def _ratios(self, losses: np.ndarray) -> np.ndarray:
        """The rates r of this step, (m,)."""
        self.require_positive(losses, "its average is divided by an earlier one")
        counts = self.recall("counts", 0.0)
        smooth = self.gamma * self.recall("smooth", 0.0) + (1 - self.gamma) * losses  # equation (16)
        anchors = np.where(counts % self.period == 0, smooth, self.recall("anchors", smooth))
        relative = smooth / anchors  # equation (17)
        sums = self.recall("sums", 0.0) + relative
        for key, values in (("counts", counts + 1), ("smooth", smooth), ("anchors", anchors), ("sums", sums)):
            self.keep(key, values)
        return relative / sums  # equation (18)
