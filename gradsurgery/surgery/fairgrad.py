"""FairGrad: α-fair improvement of all losses."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch.optim import Optimizer

from gradsurgery import geometry
from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class FairGrad(Surgery):
    """Share the improvement fairly: the direction Σ wᵢ gᵢ maximises Σ ⟨gᵢ, d⟩^(1−α) / (1−α) over a ball.

    Its weights solve G w = w^(−1/α) (eq. 8). α = 1 is Nash-MTL, α → ∞ the best worst case. Since ⟨gᵢ, d⟩ = wᵢ^(−1/α) >
    0, no loss rises to first order. In the paper's form d(sJ) = s^((1−α)/(1+α)) d(J): for α > 1 longer gradients give
    shorter steps.

    As α goes to 0 the weights go to 1 + λ with λ ≥ 0, G w ≥ 0 and λᵀ G w = 0, which is what α = 0 stands for: the plain
    sum without conflict, and otherwise its projection on the directions in which no loss rises, DualProj.

    Paper: Ban & Ji, Fair Resource Allocation in Multi-Task Learning, ICML 2024, arXiv 2402.15638.

    Departures: w minimises a strictly convex function and is found by Newton steps to rounding, not by a general
    least-squares routine. Where the rows are Pareto stationary no solution exists and the direction is zero, with the
    flag "stationary"; a zero row is left out. The official code divides by zero at α = 0, where there is always an
    answer.

    Args:
        optimizer: The optimizer that makes the step.
        alpha: α ≥ 0. The paper's scripts use 2.
        scale: "sum": w is multiplied by m / Σw, so that equal rows keep the length of the plain sum, and the result
            grows with the gradients. "paper": w as it is. With α = 0 both hold for w as it is, which DualProj has too.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
        >>> gradsurgery.FairGrad(torch.optim.SGD([torch.zeros(2)], lr=0.1), alpha=1.0, scale="paper").combine(rows)
        tensor([1., 1.])
    """

    descends = sys.maxsize

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        alpha: float = 2.0,
        scale: Literal["sum", "paper"] = "sum",
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.alpha = self.check.number("alpha", alpha, least=0.0)
        self.scale = self.check.choice("scale", scale, ("sum", "paper"))
        self.degree = 1.0 if self.scale == "sum" else (1 - self.alpha) / (1 + self.alpha)

    def strength(self) -> np.ndarray:
        """How much each task asks for: the s in G w = s w^(−1/α).

        Returns:
            (m,).
        """
        return np.ones(len(self.names))

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        if self.alpha == 0:
            return geometry.dual_cone(gram, np.ones(len(gram)), self.factor, noise=self.noise, flag=self.flag)
        weights, solved = geometry.power_fixed_point(
            gram, self.alpha, self.factor, strength=self.strength(), noise=self.noise, flag=self.flag
        )
        if not solved:
            self.flag("stationary")
            return weights
        return weights if self.scale == "paper" else weights * (len(gram) / weights.sum())
