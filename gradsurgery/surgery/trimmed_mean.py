"""Trimmed mean: leave out the extremes of every coordinate."""

from __future__ import annotations

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


class TrimmedMean(Surgery):
    """In every coordinate leave out the k largest and the k smallest entries and average the others (definition 2).

    It bounds what k rows of any value can do; it is not meant for conflicts, and losses may rise to first order. It is
    positively homogeneous, and the order of the tasks does not matter.

    Paper: Yin, Chen, Ramchandran & Bartlett, Byzantine-Robust Distributed Learning: Towards Optimal Statistical Rates,
    ICML 2018, arXiv 1803.01498. The paper names the fraction k / m.

    Departure: the mean is multiplied by m under ``reduction="sum"``, so that m equal rows g give m·g; the paper's own
    length appears under "mean". A loss that does not reach a parameter counts there with a gradient of zero.

    Args:
        optimizer: The optimizer that makes the step.
        trim_number: k ≥ 0, how many entries are left out on either side. 0 makes the plain sum.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`. It has no weights, so those that need them are
            refused. With fewer than 2k + 1 present tasks the plain sum is taken, with the flag "too-few-tasks".

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> rows = torch.tensor([[1.0, 2.0], [2.0, -50.0], [3.0, 1.0]])
        >>> gradsurgery.TrimmedMean(torch.optim.SGD([torch.zeros(2)], lr=0.1), reduction="mean").combine(rows)
        tensor([2., 1.])
    """

    has_weights = False

    def __init__(self, optimizer: Optimizer, *, trim_number: int = 1, **switches: Unpack[SurgerySwitches]) -> None:
        super().__init__(optimizer, **switches)
        self.trim_number = self.check.count("trim_number", trim_number, least=0)

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        return np.ones(len(gram))

    def direct(
        self, column: Sequence[Tensor | None], applied: Sequence[float], like: Tensor, share: float
    ) -> Tensor | None:
        m, k = len(column), self.trim_number
        if m < 2 * k + 1:
            self.flag("too-few-tasks")
        if m < 2 * k + 1 or k == 0:
            return rows_module.combine(column, applied, like)
        terms = [None if g is None else rows_module.wide(g) * w for g, w in zip(column, applied, strict=True)]
        some = next((g for g in terms if g is not None), None)
        if some is None:
            return None
        entries = torch.stack([torch.zeros_like(some) if g is None else g for g in terms])
        middle = entries.sort(dim=0).values[k : m - k]
        return rows_module.combine([middle.sum(dim=0)], [m / (m - 2 * k)], like)
