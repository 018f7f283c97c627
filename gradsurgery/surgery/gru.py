"""GRU: forget without what opposes an average of the retain gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.gradients import rows as rows_module
from gradsurgery.surgery.base import SurgerySwitches
from gradsurgery.surgery.unlearning import Unlearning

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GRU(Unlearning):
    """Take out of the forget gradient what opposes an average of the retain gradient, and add the retain gradient.

    With the forget gradient f, the retain gradient r and its average M ← s r + (1 − s) M, which starts at 0: where
    ⟨f, M⟩ < 0, f' = f − max(cos(f, M), c) ‖f‖ / ‖M‖ · M for the floor c, and d = f' + r. Without a floor f' is at a
    right angle to M. With one, where the cosine is below it, f' still opposes M. Any loss may rise to first order. It
    is positively homogeneous.

    Paper: Wang et al., GRU: Mitigating the Trade-off between Unlearning and Retention for Large Language Models, ICML
    2025, arXiv 2503.09117. s and its meaning as in the authors' code, which has it multiply the new gradient, and which
    does not correct the average for its start.

    Departures: the paper has one retained loss; of several, r is the sum. Where all of these are absent the average
    stays, and f is still projected; where the forget loss is absent the average moves on and d = r, with the flag
    "forget-absent".

    Args:
        optimizer: The optimizer that makes the step.
        forget: Name of the forget loss; by default the first one in the first call. It is minimised, as all losses are.
        smoothing: s, the share of the new gradient, 0 < s ≤ 1.
        floor: c, from −1 to 0: the cosine below which no more is taken out; None: no floor.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`. The direction is not made of this step's gradients
            alone, so switches that need weights are refused.

    Raises:
        TypeError: `forget` is no name.
        ValueError: An argument is out of range, or no loss of a call is called `forget`.

    Example:
        >>> rows = torch.tensor([[2.0, 1.0], [-3.0, 0.0]])
        >>> gradsurgery.GRU(torch.optim.SGD([torch.zeros(2)], lr=0.1)).combine(rows)
        tensor([-3.,  1.])
    """

    stateful = True
    observes = True
    has_weights = False

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        forget: str | None = None,
        smoothing: float = 0.8,
        floor: float | None = None,
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        super().__init__(optimizer, forget=forget, **switches)
        self.smoothing = self.check.number("smoothing", smoothing, above=0.0, most=1.0)
        self.floor = None if floor is None else self.check.number("floor", floor, least=-1.0, most=0.0)

    def observe(
        self, rows: list[rows_module.Row], losses: Sequence[Tensor], params: Sequence[Tensor]
    ) -> list[rows_module.Row]:
        i, s = self.forget_row(), self.smoothing
        retained = [row for j, row in enumerate(rows) if j != i]
        average = self.row_state("average", "retain", params)
        if retained:
            for j, (e, p) in enumerate(zip(average, params, strict=True)):
                shares = [s] * len(retained) + [1 - s]
                average[j] = rows_module.combine_wide([*(row[j] for row in retained), e], shares, p)
            self.keep_row("average", "retain", average, params)
        return [*rows, average]

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        i = self.forget_row()
        weights = np.append(np.ones(len(gram) - 1), 0.0)
        if i is not None and gram[i, -1] < 0:
            length, of_average = math.sqrt(gram[i, i]), math.sqrt(gram[-1, -1])
            cosine = gram[i, -1] / length / of_average
            weights[-1] = -max(cosine, -1.0 if self.floor is None else self.floor) * length / of_average
        return weights
