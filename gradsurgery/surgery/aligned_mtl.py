"""Aligned-MTL: make the gradients orthogonal and equally long, then add them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from torch.optim import Optimizer

from gradsurgery import geometry
from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AlignedMTL(Surgery):
    """Replace the rows by the closest system of orthogonal rows of one length, and add those up.

    With G = V Λ Vᵀ, B = σ V Λ^(−1/2) Vᵀ on the numerical range, and d = Jᵀ B p (eq. 14, algorithm 1). The rows of B J
    are orthogonal, all of length σ. p are the tasks' priorities. It is positively homogeneous. It is *not* a
    common-descent method for the raw rows. It is discontinuous where the rank of the rows changes: as the smallest
    singular value goes to zero so does d, and it jumps when that direction is dropped (flag "rank-deficient").

    Paper: Senushkin et al., Independent Component Alignment for Multi-Task Learning, CVPR 2023, arXiv 2305.19000.

    Departures: B is found from the rows themselves where the Gram matrix has lost digits. Zero rows are left out.

    Args:
        optimizer: The optimizer that makes the step.
        scale_mode: σ among the non-zero singular values of J: "min" (the paper's), "median" (the lower one), or "rmse"
            (root mean square).
        **switches: See :class:`gradsurgery.surgery.base.Surgery`. `preference` is p.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
        >>> gradsurgery.AlignedMTL(torch.optim.SGD([torch.zeros(2)], lr=0.1)).combine(rows)
        tensor([1., 1.])
    """

    preference_scales_rows = False

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        scale_mode: Literal["min", "median", "rmse"] = "min",
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.scale_mode = self.check.choice("scale_mode", scale_mode, ("min", "median", "rmse"))

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        balance, rank = geometry.align(gram, self.scale_mode, self.factor, noise=self.noise, flag=self.flag)
        if rank < np.count_nonzero(gram.diagonal()):
            self.flag("rank-deficient")
        return balance @ self.preferences()
