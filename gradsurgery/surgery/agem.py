"""A-GEM: follow the primary gradient unless it hurts the others on average."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch.optim import Optimizer

from gradsurgery.geometry import EPS
from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class AGEM(Surgery):
    """Project the primary gradient on the half-space in which the mean of the other losses does not rise.

    With the primary gradient g and the mean g_ref of the others: d = g if ⟨g, g_ref⟩ ≥ 0, and otherwise
    d = g − ⟨g, g_ref⟩ / ‖g_ref‖² · g_ref (eq. 11). The other gradients never push: they only hold back.

    Neither the primary loss nor the *mean* of the others rises to first order. A single one of the others may, with
    three tasks or more. With two tasks this is PCGrad's projection of one gradient only. It is positively homogeneous.
    m equal rows g give g: the learning rate is that of the primary loss alone.

    Paper: Chaudhry, Ranzato, Rohrbach & Elhoseiny, Efficient Lifelong Learning with A-GEM, ICLR 2019, arXiv 1812.00420.

    Departures: the paper's reference is the gradient of one random batch from the memory of past tasks; here it is the
    mean of the rows of the other losses. Where nothing is left of g (it opposes g_ref) d is zero, with the flag
    "stationary". Where the others cancel each other d is g.

    Args:
        optimizer: The optimizer that makes the step.
        primary: Name of the primary loss; by default the first one in the first call. Where it is absent from a batch
            the plain sum of the others is taken, with the flag "primary-absent".
        **switches: See :class:`gradsurgery.surgery.base.Surgery`.

    Raises:
        ValueError: No loss of a call is called `primary`.

    Example:
        >>> rows = torch.tensor([[1.0, 1.0], [-1.0, 0.0]])
        >>> gradsurgery.AGEM(torch.optim.SGD([torch.zeros(2)], lr=0.1)).combine(rows)
        tensor([0., 1.])
    """

    scale = "priority"
    descends = 2

    def __init__(
        self, optimizer: Optimizer, *, primary: str | None = None, **switches: Unpack[SurgerySwitches]
    ) -> None:
        super().__init__(optimizer, **switches)
        self.primary = self.check.primary(primary)

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        m = len(gram)
        i = self.primary_row(self.primary)
        if i is None:
            return np.ones(m)
        weights = (np.arange(m) == i).astype(np.float64)
        # Their sum instead of their mean: the projection is the same.
        others = 1.0 - weights
        products = gram @ others
        dot, square, own = float(products[i]), float(others @ products), float(gram[i, i])
        if dot >= 0 or own == 0:
            return weights
        lengths = float(others @ np.sqrt(gram.diagonal()))
        # The part of g that is left, or the sum of the others, may be all rounding: then the rows decide.
        if (
            square <= 1e4 * m * self.noise * lengths**2
            or own * square - dot * dot <= 1e4 * m * self.noise * own * square
        ):
            rows = self.factor()
            tolerance = 16 * m * EPS if self.noise <= EPS else (m * EPS) ** 0.5
            reference = others @ rows
            dot, square = float(rows[i] @ reference), float(reference @ reference)
            if square <= (tolerance * lengths) ** 2:
                return weights
            left = rows[i] - dot / square * reference
            if left @ left <= (4 * tolerance) ** 2 * own:
                self.flag("stationary")
                return np.zeros(m)
        return np.asarray(weights - min(dot, 0.0) / square * others)
