"""ExcessMTL: more weight for the tasks whose excess risk is large."""

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


class ExcessMTL(Surgery):
    """Raise the weights of tasks far from their optimum, by an estimate of the excess risk that needs gradients only.

    With the running sums Sᵢ ← Sᵢ + gᵢ² in every coordinate, the excess risk is estimated as eᵢ = Σ gᵢ²/√Sᵢ and divided
    by that of the task's first step; then wᵢ ← wᵢ exp(η eᵢ / eᵢ(0)), and the weights are brought to sum 1.

    The first step only stores the eᵢ(0): it is the plain sum. Multiplying a loss by a constant does not change the
    weights, over a whole run. The direction is a positive combination of the gradients, in which losses may rise to
    first order. A loss whose labels are noisy keeps a high loss but not a high excess risk: that is what the method is
    for.

    Paper: He, Zhou, Zhang, Yao & Zhao, Robust Multi-Task Learning with Excess Risks, ICML 2024, arXiv 2402.02009, and
    the order of the authors' code.

    Departures: a task whose first gradient is zero, for which that code gives nan, takes its eᵢ(0) from its first
    gradient that is not; it counts with 0 before and with 1 then. Weights are kept as logarithms, and nothing is added
    under the root.

    Args:
        optimizer: The optimizer that makes the step.
        eta: η ≥ 0, step of the weights.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`. With ``every=k`` the sums grow in the steps that find
            new weights.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> optimizer = gradsurgery.ExcessMTL(torch.optim.SGD([torch.zeros(2)], lr=0.1), eta=1.0, reduction="mean")
        >>> optimizer.combine(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), update=True)
        tensor([0.5000, 0.5000])
        >>> optimizer.combine(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        tensor([0.6698, 0.0000])
    """

    stateful = True
    observes = True

    def __init__(self, optimizer: Optimizer, *, eta: float = 0.01, **switches: Unpack[SurgerySwitches]) -> None:
        super().__init__(optimizer, **switches)
        self.eta = self.check.number("eta", eta, least=0.0)

    def observe(
        self, rows: list[rows_module.Row], losses: Sequence[Tensor], params: Sequence[Tensor]
    ) -> list[rows_module.Row]:
        device = losses[0].device
        zero = torch.zeros((), dtype=torch.float64, device=device)
        excess = []
        for name, row in zip(self.names, rows, strict=True):
            roots = self.row_state("roots", name, params)
            terms = [zero] * len(params)
            for j, g in enumerate(row):
                if g is None:
                    continue
                # √S is kept in place of S: squares of small gradients leave the range of single precision.
                past = roots[j]
                roots[j] = root = g.abs() if past is None else torch.hypot(past.to(g.dtype), g)
                terms[j] = torch.where(root > 0, g * (g / root), 0.0).sum(dtype=torch.float64).to(device)
            self.keep_row("roots", name, roots, params)
            excess.append(torch.stack(terms) if terms else zero.expand(0))
        self.measure(torch.stack(excess))
        return rows

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        m, excess = len(gram), self.measured
        begun = bool(self.memory.get("first_excess"))
        first = self.recall("first_excess", 0.0)
        first = np.where(first > 0, first, excess)
        known = {name: e for name, e in zip(self.names, first.tolist(), strict=True) if e > 0}
        self.memory["first_excess"] = {**self.memory.get("first_excess", {}), **known}
        logs = self.recall("log_weights", 0.0)
        if begun:
            # The total of the present tasks stays, and with it their place among the absent ones.
            total = np.logaddexp.reduce(logs)
            logs = logs + self.eta * np.divide(excess, first, out=np.zeros(m), where=first > 0)
            logs += total - np.logaddexp.reduce(logs)
            self.keep("log_weights", logs)
        weights = np.exp(logs - logs.max())
        return m * weights / weights.sum()
