"""Krum: average the gradients that have close neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch.optim import Optimizer

from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Krum(Surgery):
    """Average the gradients that lie closest to their neighbours, and leave out the outliers (Multi-Krum).

    The score of a row is the sum of its m − f − 2 smallest squared distances to other rows (section 4); the k rows with
    the lowest scores are averaged. Ties go to the row that comes first. It is positively homogeneous, and robust to f
    rows of any value; it is not meant for conflicts.

    Paper: Blanchard et al., Machine Learning with Adversaries: Byzantine Tolerant Gradient Descent, NeurIPS 2017, arXiv
    1703.02757. Distances are squared as in the paper; some public code adds the distances themselves.

    Args:
        optimizer: The optimizer that makes the step.
        n_byzantine: f ≥ 0, how many rows may be arbitrary.
        n_selected: k ≥ 1, how many rows are averaged.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`. With fewer than max(f + 3, k) present tasks the plain
            sum is taken, with the flag "too-few-tasks".

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [1.0, 0.2], [1.0, 0.1], [-50.0, 9.0]])
        >>> gradsurgery.Krum(torch.optim.SGD([torch.zeros(2)], lr=0.1), n_byzantine=1, reduction="mean").combine(rows)
        tensor([1., 0.])
    """

    def __init__(
        self, optimizer: Optimizer, *, n_byzantine: int, n_selected: int = 1, **switches: Unpack[SurgerySwitches]
    ) -> None:
        super().__init__(optimizer, **switches)
        self.n_byzantine = self.check.count("n_byzantine", n_byzantine, least=0)
        self.n_selected = self.check.count("n_selected", n_selected, least=1)

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        m = len(gram)
        if m < max(self.n_byzantine + 3, self.n_selected):
            self.flag("too-few-tasks")
            return np.ones(m)
        squares = gram.diagonal()
        distances = np.sort(squares + squares[:, None] - 2 * gram, axis=1)[:, 1:]  # without that to itself
        scores = distances[:, : m - self.n_byzantine - 2].sum(axis=1)
        weights = np.zeros(m)
        weights[np.argsort(scores, kind="stable")[: self.n_selected]] = m / self.n_selected
        return weights
