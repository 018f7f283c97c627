"""MoCo: min-norm weights learnt step by step, from tracked gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery import geometry
from gradsurgery.gradients import rows as rows_module
from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MoCo(Surgery):
    """Track every gradient by a moving average, and move the weights by one projected gradient step towards MGDA's.

    yᵢ ← yᵢ − β_k (yᵢ − gᵢ), λ ← Π(λ − γ_k (Y Yᵀ + ρI) λ) with Π the projection on the simplex, and d = Yᵀλ. Step sizes
    fall: β_k = β / k^σ, and so for γ. With β = 1 and constant gradients λ converges to the weights of MGDA.

    Losses may rise to first order. γ and ρ are absolute, so the direction is not homogeneous: long gradients throw λ
    into a corner in one step. `relative` fixes that. Private parameters get their plain gradient.

    Paper: Fernando et al., Mitigating Gradient Bias in Multi-objective Learning: A Provably Convergent Approach, ICLR
    2023, arXiv 2210.12624, algorithm 1. Step sizes default to those of LibMTL.

    Departures: λ is projected, as in the paper and the authors' code; LibMTL takes a softmax of λ, which converges
    elsewhere. The authors' code has no ρ and moves twice as far. An average starts at the first gradient of its task;
    public code starts at zero, which shortens the first steps. With ``reduction="sum"`` the direction is multiplied by
    m, so that m equal rows g give m·g.

    Args:
        optimizer: The optimizer that makes the step.
        beta: β, step of the tracking, 0 < β ≤ 1.
        beta_sigma: σ of β, ≥ 0. k counts the steps in which the task was present.
        gamma: γ, step of the weights, ≥ 0. 0 keeps them equal.
        gamma_sigma: σ of γ, ≥ 0.
        rho: ρ ≥ 0, pulls the weights towards equality.
        relative: Divide Y Yᵀ by the mean of its diagonal in the step of the weights: the direction becomes positively
            homogeneous.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`. The direction is not made of this step's gradients,
            so switches that need weights are refused.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> rows = torch.tensor([[2.0, 0.0], [0.0, 1.0]])
        >>> gradsurgery.MoCo(torch.optim.SGD([torch.zeros(2)], lr=0.1), reduction="mean").combine(rows)
        tensor([0.8500, 0.5750])
    """

    stateful = True
    observes = True
    has_weights = False

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        beta: float = 0.5,
        beta_sigma: float = 0.5,
        gamma: float = 0.1,
        gamma_sigma: float = 0.5,
        rho: float = 0.0,
        relative: bool = False,
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.beta = self.check.number("beta", beta, above=0.0, most=1.0)
        self.beta_sigma = self.check.number("beta_sigma", beta_sigma, least=0.0)
        self.gamma = self.check.number("gamma", gamma, least=0.0)
        self.gamma_sigma = self.check.number("gamma_sigma", gamma_sigma, least=0.0)
        self.rho = self.check.number("rho", rho, least=0.0)
        self.relative = bool(relative)
        self.degree = 1.0 if self.relative else None

    def observe(
        self, rows: list[rows_module.Row], losses: Sequence[Tensor], params: Sequence[Tensor]
    ) -> list[rows_module.Row]:
        counts = self.recall("count", 0.0) + 1
        self.keep("count", counts)
        for name, row, k in zip(self.names, rows, counts.tolist(), strict=True):
            before = self.row_state("tracked", name, params)
            for j, y in enumerate(before):
                row[j] = _moved(y, row[j], self.beta / k**self.beta_sigma)
            self.keep_row("tracked", name, row, params)
        return rows

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        m, shares = len(gram), self.recall_shares("shares")
        k = self.memory.get("updates", 0) + 1
        self.memory["updates"] = k
        if self.relative:
            gram = gram / (gram.trace() / m or 1.0)
        step = self.gamma / k**self.gamma_sigma
        shares = geometry.project_simplex(shares - step * (gram @ shares + self.rho * shares))
        self.keep_shares("shares", shares)
        return m * shares


def _moved(y: Tensor | None, g: Tensor | None, beta: float) -> Tensor | None:
    """y − β (y − g), where a loss that does not reach the parameter has the gradient zero. Always a new tensor."""
    if y is None:
        return None if g is None else g.clone()
    return y * (1 - beta) if g is None else y.to(g.dtype).lerp(g, beta)
