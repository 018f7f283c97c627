"""AND-mask: move only those coordinates on whose sign the losses agree."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.gradients import rows as rows_module
from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AndMask(Surgery):
    """Keep the mean gradient where enough of the losses agree on its sign, and divide it by the share that is kept.

    In each parameter tensor, with M = 1 in coordinates where ``|mean of sign gᵢ| ≥ τ`` and 0 elsewhere, d is M times
    the mean gradient, divided by the share of coordinates with M = 1. With τ = 1 all must agree, and no loss rises to
    first order; with τ < 1 a loss may rise. Where no coordinate is kept d is zero. It is positively homogeneous, and
    the order of the losses does not matter.

    It is meant for losses of one kind on data from different environments: what all of them ask for is what holds in
    all. Pitfalls: a gradient of 0 is no vote, so that with τ = 1 a coordinate that one loss does not move stays as it
    is. And d may be longer than the mean gradient by up to the number of entries of the tensor.

    Paper: Parascandolo et al., Learning Explanations That Are Hard to Vary, ICLR 2021, arXiv 2009.00329; the division
    by the share as in its code and in DomainBed, which adds 1e-10 to it.

    Departures: a loss whose gradient is zero altogether is left out, as if it was absent; in DomainBed it stops all
    training at τ = 1. Coordinates in which all gradients are 0 do not count in the share. A loss that does not reach a
    tensor has no part in it. The mean is multiplied by m under ``reduction="sum"``, so that m equal rows g give m·g.

    Args:
        optimizer: The optimizer that makes the step.
        tau: τ, from 0 to 1: how far the losses must agree. 0 makes the plain sum.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`. It has no weights, so those that need them are
            refused.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> rows = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
        >>> gradsurgery.AndMask(torch.optim.SGD([torch.zeros(2)], lr=0.1), reduction="mean").combine(rows)
        tensor([4., 0.])
    """

    has_weights = False
    lengthens = True

    def __init__(self, optimizer: Optimizer, *, tau: float = 1.0, **switches: Unpack[SurgerySwitches]) -> None:
        super().__init__(optimizer, **switches)
        self.tau = self.check.number("tau", tau, least=0.0, most=1.0)

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        return np.where(gram.diagonal() > 0, 1.0, 0.0)

    def mask(self, rows: Sequence[Tensor], votes: Tensor, unit: float) -> Tensor:
        """How much of each coordinate is kept.

        Args:
            rows: The gradients of those losses that reach a tensor, dense, divided by `unit`.
            votes: The sum of their signs, without its own sign.
            unit: A number > 0.

        Returns:
            From 0 to 1, of the shape of the tensor.
        """
        # The least number of votes, since a mean of signs in single precision may miss τ by its rounding.
        least = next(votes for votes in range(len(rows) + 1) if votes / len(rows) >= self.tau)
        return (votes >= least).to(votes.dtype)

    def direct(
        self, column: Sequence[Tensor | None], applied: Sequence[float], like: Tensor, share: float
    ) -> Tensor | None:
        terms = [(rows_module.wide(g), w) for g, w in zip(column, applied, strict=True) if g is not None and w]
        if not terms:
            return rows_module.combine(column, applied, like)
        # Signs are those of rows before anything multiplies them, since entries may underflow.
        signs = [g.sign() * math.copysign(1.0, w) for g, w in terms]
        moved = torch.stack([sign != 0 for sign in signs]).any(dim=0)
        unit = max(abs(w) for _, w in terms)
        rows = [g * (w / unit) for g, w in terms]
        kept = self.mask(rows, torch.stack(signs).sum(dim=0).abs(), unit / share) * moved
        total, left = self.over_pieces(torch.stack([moved.sum(dtype=torch.float64), kept.sum(dtype=torch.float64)]))
        longer = torch.where(left > 0, total / left, 0.0)
        # Who is left out counts in no mean either.
        voters = sum(w != 0 for w in applied)
        factor = len(applied) / voters if self.reduction == "mean" else 1.0
        found = rows_module.combine_wide(rows, [unit * factor] * len(rows), like)
        assert found is not None
        return rows_module.combine([torch.where(kept > 0, found * (kept * longer), 0.0)], [1.0], like)
