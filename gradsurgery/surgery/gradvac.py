"""GradVac: pull the cosine of each pair of gradients up to its usual value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from torch.optim import Optimizer

from gradsurgery import geometry
from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GradVac(Surgery):
    """Like PCGrad, but each pair of tasks has a target cosine of its own instead of 0, learnt as a moving average.

    Task i starts with p = gᵢ and meets the others, j ≠ i, in random order. Where φ = cos(p, gⱼ) is below its target t,
    a multiple of gⱼ is added that makes the cosine t (eq. 3). Every visit then moves the target: t ← (1 − β) t + β φ.
    All targets start at 0, so the first step is PCGrad's.

    With two tasks and targets of 0 or more no loss rises to first order; with three or more that is *not* guaranteed.
    It is positively homogeneous.

    Paper: Wang, Tsvetkov, Firat & Cao, Gradient Vaccine, ICLR 2021, arXiv 2010.05874, algorithm 1.

    Departures: targets are used within ±(1 − 10⁻⁶), since a target of 1 asks for an infinite step. One surgery acts on
    the whole shared vector; the paper's groups of parameters are not formed. The average also moves in steps where the
    target is met, as in the paper and unlike some public code.

    Args:
        optimizer: The optimizer that makes the step.
        beta: Step of the moving average, 0 ≤ β ≤ 1.
        shuffle: Draw the order anew for every task and step. ``False``: the order of the losses.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> rows = torch.tensor([[2.0, 1.0], [-10.0, 1.0]])
        >>> gradsurgery.GradVac(torch.optim.SGD([torch.zeros(2)], lr=0.1)).combine(rows)
        tensor([-2.2812,  5.9881])
    """

    stateful = True

    def __init__(
        self, optimizer: Optimizer, *, beta: float = 0.01, shuffle: bool = True, **switches: Unpack[SurgerySwitches]
    ) -> None:
        super().__init__(optimizer, **switches)
        self.beta = self.check.number("beta", beta, least=0.0, most=1.0)
        self.shuffle = bool(shuffle)

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        kept: dict[str, dict[str, Any]] = self.memory.get("targets", {})
        targets = np.array([[kept.get(a, {}).get(b, 0.0) for b in self.names] for a in self.names])
        self.descends = 2 if targets.min() >= 0 else 0
        orders = self.visiting_orders(self.shuffle)
        mixing, targets = geometry.gradvac_mixing(gram, orders, targets, self.beta, self.factor)
        moved = {
            a: dict(zip(self.names, row, strict=True)) for a, row in zip(self.names, targets.tolist(), strict=True)
        }
        self.memory["targets"] = {**kept, **{a: {**kept.get(a, {}), **row} for a, row in moved.items()}}
        self.count_projections(mixing)
        return mixing.sum(axis=0)
