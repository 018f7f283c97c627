"""Bloop: auxiliary gradients at a right angle to the averaged main one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.gradients import rows as rows_module
from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Bloop(Surgery):
    """Follow the main gradient, and that part of the auxiliary ones that is orthogonal to an average of the main one.

    e ← (1 − β) e + β g₁, and d = g₁ + λ Σⱼ (gⱼ − ⟨gⱼ, e⟩ / ‖e‖² · e) over the auxiliary tasks j. In the first step,
    where e = g₁, the main loss falls as fast as without the auxiliary ones; later it does so on average. The auxiliary
    losses may rise to first order. It is positively homogeneous.

    Paper: Hsieh, Thornton, Ndiaye, Klein, Cuturi & Ablin, Careful with that Scalpel: Improving Gradient Surgery with an
    EMA, ICML 2024, arXiv 2402.02998. β and λ default to those of the authors' code (ml-bloop), where the average starts
    at the first gradient, too; its examples tune them.

    Departures: the paper has one auxiliary loss; here each is projected. Where the main task is absent the average
    stays, and the auxiliary gradients are still projected.

    Args:
        optimizer: The optimizer that makes the step.
        primary: Name of the main loss; by default the first.
        strength: λ ≥ 0, weight of the auxiliary gradients.
        beta: β, step of the average, 0 < β ≤ 1. With 1 the projection uses this step's gradient.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`. The direction is not made of this step's gradients
            alone, so switches that need weights are refused.

    Raises:
        ValueError: An argument is out of range, or no loss has the name `primary`.

    Example:
        >>> rows = torch.tensor([[2.0, 0.0], [-3.0, 1.0]])
        >>> gradsurgery.Bloop(torch.optim.SGD([torch.zeros(2)], lr=0.1), strength=0.5).combine(rows)
        tensor([2.0000, 0.5000])
    """

    stateful = True
    observes = True
    has_weights = False
    scale = "priority"

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        primary: str | None = None,
        strength: float = 0.1,
        beta: float = 0.1,
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.primary = self.check.primary(primary)
        self.strength = self.check.number("strength", strength, least=0.0)
        self.beta = self.check.number("beta", beta, above=0.0, most=1.0)

    def observe(
        self, rows: list[rows_module.Row], losses: Sequence[Tensor], params: Sequence[Tensor]
    ) -> list[rows_module.Row]:
        primary = self.primary_name(self.primary)
        average = self.row_state("average", "main", params)
        if primary in self.names:
            for j, (e, g) in enumerate(zip(average, rows[self.names.index(primary)], strict=True)):
                if e is None:
                    average[j] = None if g is None else g.clone()
                else:
                    average[j] = e * (1 - self.beta) if g is None else e.to(g.dtype).lerp(g, self.beta)
            self.keep_row("average", "main", average, params)
        return [*rows, average]

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        primary = self.primary_name(self.primary)
        weights = np.array([1.0 if name == primary else self.strength for name in self.names] + [0.0])
        auxiliary = np.array([name != primary for name in self.names] + [False])
        if gram[-1, -1] > 0:
            weights[-1] = -(weights * auxiliary) @ gram[-1] / gram[-1, -1]
        return weights
