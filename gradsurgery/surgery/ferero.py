"""FERERO: towards losses in a given ratio, and down."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch.optim import Optimizer

from gradsurgery import geometry
from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class FERERO(Surgery):
    """Bring the losses to a given ratio at a given rate, and lower them with what is left free.

    With the unit ratio p, the losses l, and an orthonormal basis B of what is orthogonal to p, d = Jᵀ(λ_f + Bᵀ λ_h)
    minimises ½ ‖d‖² − κ λ_hᵀ B l over λ_f on the simplex and any λ_h. Hence B J d = κ B l: to first order a step of
    length η multiplies the error of the ratio, B l, by 1 − η κ, until lᵢ is proportional to pᵢ. λ_f decides how fast
    the losses fall along the ray. A loss that lies below its share is *meant* to rise.

    It is *not* homogeneous: the part that corrects the ratio has the length of κ l over that of the gradients, so κ is
    in units of one over the learning rate, and η κ should stay below 1. Losses may be negative. The ratio is reached
    with plain SGD; an optimizer that divides by lengths, such as Adam, makes another step than η d.

    Paper: Chen, Saif, Shen & Chen, FERERO: A Flexible Framework for Preference-Guided Multi-Objective Learning,
    NeurIPS 2024, arXiv 2412.01773, with the official code, of which this is the form for one absolute preference.

    Departures: the code is for two losses and makes 200 projected steps, off by up to 24 % on small matrices and
    diverging on rows of length 5. Here λ_f is found exactly, for any number of losses: it lies on an edge of the
    simplex. For dependent rows, zero ones among them, pseudo-inverses are taken, and the ratio is corrected as far as
    they allow (flag "rank-deficient"). Private parameters get their plain gradient.

    Args:
        optimizer: The optimizer that makes the step.
        kappa: κ ≥ 0.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`. `preference` is p, the ratio of the losses that is
            wanted, whatever its length: the loss with the largest entry ends *highest*, other than in EPO. Equal losses
            by default.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> optimizer = gradsurgery.FERERO(torch.optim.SGD([torch.zeros(2)], lr=0.1))
        >>> d = optimizer.combine(rows, losses=[4.0, 1.0])
        >>> d, (rows @ d).diff()
        (tensor([ 2., -1.]), tensor([-3.]))
    """

    needs_losses = True
    degree = None
    scale = "paper"
    preference_scales_rows = False

    def __init__(self, optimizer: Optimizer, *, kappa: float = 1.0, **switches: Unpack[SurgerySwitches]) -> None:
        super().__init__(optimizer, **switches)
        self.kappa = self.check.number("kappa", kappa, least=0.0)

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        weights, deficient = geometry.toward_ratio(
            gram, losses, self.preferences(), self.kappa, self.factor, noise=self.noise, flag=self.flag
        )
        if deficient:
            self.flag("rank-deficient")
        return weights
