"""Nash-MTL: the Nash bargaining solution of the tasks."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch.optim import Optimizer

from gradsurgery import geometry
from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class NashMTL(Surgery):
    """Let the tasks bargain: the direction is the Nash solution Σ wᵢ gᵢ with G w = 1/w.

    d maximises Σ log ⟨gᵢ, d⟩ over a ball (eq. 2); its weights solve G w = 1/w (claim 3.2). So ⟨gᵢ, d⟩ = 1/wᵢ > 0: no
    loss rises to first order. Scaling single rows does not turn it. In the paper's form ‖d‖ = √m whatever the gradients
    are: the learning rate then means another thing than for the plain sum.

    Paper: Navon et al., Multi-Task Learning as a Bargaining Game, ICML 2022, arXiv 2202.01017.

    Departures: w minimises a strictly convex function and is found by Newton steps to rounding, not by rounds of a
    convex-concave procedure. Where the rows are Pareto stationary no solution exists and the direction is zero, with
    the flag "stationary"; a zero row is left out. Private parameters get their plain gradient; the official code
    weights the heads too. The official `max_norm` is left to gradient clipping: with 1 it always clips.

    Args:
        optimizer: The optimizer that makes the step.
        scale: "sum": w is multiplied by m / Σw, so that equal rows keep the length of the plain sum, and the result
            grows with the gradients. "paper": w as it is.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`. `preference` is the bargaining power of a task:
            G w = p/w.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
        >>> gradsurgery.NashMTL(torch.optim.SGD([torch.zeros(2)], lr=0.1), scale="paper", reduction="sum").combine(rows)
        tensor([1., 1.])
    """

    descends = sys.maxsize
    preference_scales_rows = False

    def __init__(
        self, optimizer: Optimizer, *, scale: Literal["sum", "paper"] = "sum", **switches: Unpack[SurgerySwitches]
    ) -> None:
        super().__init__(optimizer, **switches)
        self.scale = self.check.choice("scale", scale, ("sum", "paper"))
        self.degree = 1.0 if self.scale == "sum" else 0.0

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        weights, solved = geometry.power_fixed_point(
            gram, 1.0, self.factor, strength=self.preferences(), noise=self.noise, flag=self.flag
        )
        if not solved:
            self.flag("stationary")
            return weights
        return weights if self.scale == "paper" else weights * (len(gram) / weights.sum())
