"""GCS: auxiliary gradients as far as they agree with the main one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch.optim import Optimizer

from gradsurgery import geometry
from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GCS(Surgery):
    """Weight each auxiliary gradient by its cosine with the main one, and leave it out where they conflict.

    d = g₁ + Σⱼ max(0, cos(g₁, gⱼ)) gⱼ over the auxiliary tasks j; switched, d = g₁ + Σⱼ 1[cos(g₁, gⱼ) > 0] gⱼ. Since
    ⟨gⱼ, g₁⟩ ≥ 0 for all that are added, ⟨d, g₁⟩ ≥ ‖g₁‖²: the main loss falls at least as fast as alone. The auxiliary
    ones may rise. Multiplying an auxiliary loss by a constant does not change its weight, but its part of d. It is
    positively homogeneous, and m equal rows g give m·g. The switched form jumps where a gradient is at a right angle to
    the main one.

    Paper: Du et al., Adapting Auxiliary Losses Using Gradient Similarity, 2018, arXiv 1812.02224.

    Departures: the abstract says that the cosine is the weight, and the switched form is that of public code
    (AvivNavon/AuxiLearn); that the weight is 0 below a cosine of 0 is from memory. The paper has one auxiliary loss;
    here each has its own cosine. A cosine within the rounding of the inner products is not > 0. Where the main gradient
    is zero d is zero, with the flag "primary-zero".

    Args:
        optimizer: The optimizer that makes the step.
        primary: Name of the main loss; by default the first one in the first call. Where it is absent from a batch
            the plain sum of the others is taken, with the flag "primary-absent".
        switched: Add whole gradients, or none of them.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`.

    Raises:
        ValueError: No loss of a call is called `primary`.

    Example:
        >>> rows = torch.tensor([[3.0, 4.0], [10.0, 0.0], [-1.0, 0.0]])
        >>> gradsurgery.GCS(torch.optim.SGD([torch.zeros(2)], lr=0.1)).combine(rows)
        tensor([9., 4.])
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        primary: str | None = None,
        switched: bool = False,
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.primary = self.check.primary(primary)
        self.switched = bool(switched)

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        first = self.primary_row(self.primary)
        if first is None:
            return np.ones(len(gram))
        norms, cosines = geometry.unit(gram)
        if norms[first] == 0:
            self.flag("primary-zero")
            return (np.arange(len(gram)) == first).astype(np.float64)
        weights = np.maximum(cosines[first], 0.0)
        return (weights > self.noise).astype(np.float64) if self.switched else weights
