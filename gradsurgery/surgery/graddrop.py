"""GradDrop: keep one sign of the gradient in every coordinate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.gradients import rows as rows_module
from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GradDrop(Surgery):
    """In every coordinate keep the entries of one sign, drawn with the probability that the sign has in the sum.

    P = ``½ (1 + Σ gᵢ / Σ |gᵢ|)`` is the purity of the positive sign (eq. 1). With U uniform on [0, 1) the positive
    entries stay if P > U, else the negative ones (eq. 2), and task i gives (lᵢ + (1 − lᵢ) Mᵢ) gᵢ for its leak lᵢ
    (algorithm 1). In expectation a coordinate becomes P S₊ − (1 − P) S₋, for the sums S₊ and S₋ of its positive entries
    and of the sizes of its negative ones.

    Where all entries have one sign they are kept whole. Losses may rise to first order. It is positively homogeneous,
    and the order of the tasks does not matter. Draws depend on the seed, the number of committed steps and the
    parameter only: they are equal on every device and rank, and in every evaluation of one step.

    Paper: Chen et al., Just Pick a Sign: Optimizing Deep Multitask Models with Gradient Sign Dropout, NeurIPS 2020,
    arXiv 2010.06808.

    Departure: it acts on the gradients of the parameters, one draw per coordinate, as much public code does. The paper
    acts on those of a shared feature, multiplied by the sign of the feature and summed over the batch.

    Args:
        optimizer: The optimizer that makes the step.
        leak: How much of what would be dropped stays, 0 to 1, for all tasks or by name. 0 drops all of it; 1 makes the
            plain sum.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`. It has no weights, so those that need them are
            refused.

    Raises:
        ValueError: An argument is out of range, or `leak` does not name every loss.

    Example:
        >>> rows = torch.tensor([[2.0, 1.0, 3.0], [1.0, 2.0, -3.0]])
        >>> gradsurgery.GradDrop(torch.optim.SGD([torch.zeros(3)], lr=0.1)).combine(rows)
        tensor([3., 3., 3.])
    """

    has_weights = False

    def __init__(
        self, optimizer: Optimizer, *, leak: float | Mapping[str, float] = 0.0, **switches: Unpack[SurgerySwitches]
    ) -> None:
        super().__init__(optimizer, **switches)
        self.leak: float | dict[str, float] = (
            self.check.numbers("leak", leak, least=0.0, most=1.0)
            if isinstance(leak, Mapping)
            else self.check.number("leak", leak, least=0.0, most=1.0)
        )

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        return np.ones(len(gram))

    def direct(
        self, column: Sequence[Tensor | None], applied: Sequence[float], like: Tensor, share: float
    ) -> Tensor | None:
        leaks = self.each("leak", self.leak) if isinstance(self.leak, dict) else [self.leak] * len(self.names)
        terms = [(rows_module.wide(g) * w, x) for g, w, x in zip(column, applied, leaks, strict=True) if g is not None]
        if not terms:
            return None
        zero = torch.zeros_like(terms[0][0])
        ups, downs, up, down, kept = zero, zero, zero, zero, zero
        for g, leak in terms:
            positive, negative = g.clamp(min=0), g.clamp(max=0)
            ups, downs = ups + positive, downs - negative
            up, down = up + (1 - leak) * positive, down + (1 - leak) * negative
            if leak:
                kept = kept + leak * g
        # P > U without the division: a coordinate of zeros has no P, and gives 0.
        sizes = ups + downs
        drawn = torch.where(ups > self.uniform(like) * sizes, up, down)
        drawn = torch.where(sizes < math.inf, drawn, sizes)  # what overflows has no sign, and is told of later
        return rows_module.combine([drawn + kept], [1.0], like)
