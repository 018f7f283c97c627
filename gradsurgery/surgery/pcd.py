"""PCD: stay close to the primary gradient while every other task makes some progress."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from torch.optim import Optimizer

from gradsurgery import geometry
from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PCD(Surgery):
    """Priority-constrained descent: the direction closest to the primary gradient that helps every other task a little.

    Rows are divided by their usual length, g̃ⱼ = gⱼ / √(v̂ⱼ + ε), where v̂ⱼ is the bias-corrected moving average of ‖gⱼ‖²
    (def. 4.5). Then d̃ = argmin ½ ‖d − g̃₁‖² subject to ⟨g̃ⱼ, d⟩ ≥ τ ‖g̃ⱼ‖² for every secondary task j (def. 4.1), and d
    is d̃ made as long as g₁ (algorithm 1). No secondary loss rises to first order while the constraints can be met.

    The *primary* loss may rise to first order: where a secondary gradient almost opposes g₁, the demanded progress
    costs more than is left. The flag "primary-rises" says so, and `protect_primary` rules it out. If the constraints
    cannot be met together (flag "infeasible"), d = g₁ and nothing is promised to the others. If g₁ is zero (flag
    "primary-zero"), or d̃ is (flag "stationary"), d is zero. With ε = 0 it is positively homogeneous, and a constant
    factor on a secondary loss changes nothing. m equal rows g give g: the learning rate is that of the primary loss.

    Paper: Not All Objectives Are Born Equal: Priority-Constrained Descent for Hierarchical Multi-Objective
    Optimization, TMLR 2026, arXiv 2606.29521, with its reference implementation.

    Departures: ε is 0 by default. The paper's 10⁻⁸ matters for gradients shorter than 10⁻³ only, and there it makes τ
    depend on the scale of the losses. Solved to rounding. Averages count the steps of each task by itself.

    Args:
        optimizer: The optimizer that makes the step.
        tau: τ in [0, 1], the part of the progress along its own normalised gradient that each secondary task gets. A
            mapping gives every secondary loss its own, by name.
        beta: Decay of the moving averages, in [0, 1).
        eps: ε ≥ 0, in units of a squared gradient. The paper's is 1e-8.
        protect_primary: Demand ⟨g₁, d⟩ ≥ 0 as well. Not in the paper.
        primary: Name of the primary loss; by default the first one in the first call. Where it is absent from a batch
            the plain sum of the others is taken, with the flag "primary-absent".
        **switches: See :class:`gradsurgery.surgery.base.Surgery`.

    Raises:
        ValueError: An argument is out of range, no loss of a call is called `primary`, one has no `tau`, or `tau` has a
            name that no loss has.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [-1.0, 1.0]])
        >>> gradsurgery.PCD(torch.optim.SGD([torch.zeros(2)], lr=0.1), tau=0.0).combine(rows)
        tensor([0.7071, 0.7071])
    """

    stateful = True
    degree = None
    scale = "priority"
    preference_refused = "the primary task comes first, and `tau` says what the others get"

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        tau: float | Mapping[str, float] = 0.02,
        beta: float = 0.999,
        eps: float = 0.0,
        protect_primary: bool = False,
        primary: str | None = None,
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.tau: float | dict[str, float] = (
            self.check.numbers("tau", tau, least=0.0, most=1.0)
            if isinstance(tau, Mapping)
            else self.check.number("tau", tau, least=0.0, most=1.0)
        )
        self.beta = self.check.number("beta", beta, least=0.0, below=1.0)
        self.eps = self.check.number("eps", eps, least=0.0)
        self.protect_primary = bool(protect_primary)
        self.primary = self.check.primary(primary)

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        m, norms = len(gram), np.sqrt(gram.diagonal())
        count = self.recall("counts", 0.0) + 1
        squares = self.beta * self.recall("squares", 0.0) + (1 - self.beta) * norms * norms
        self.keep("counts", count)
        self.keep("squares", squares)
        first = self.primary_row(self.primary)
        if first is None:
            return np.ones(m)
        weights = np.zeros(m)
        if norms[first] == 0:
            self.flag("primary-zero")
            return weights
        usual = np.sqrt(squares / (1 - self.beta**count) + self.eps)  # definition 4.5
        lengths = np.divide(norms, usual, out=np.zeros(m), where=usual > 0)
        demand = self._taus(first) * lengths / lengths[first]  # definition 4.1, with ‖g̃₁‖ = 1
        demand[norms == 0] = -np.inf
        demand[first] = 0.0 if self.protect_primary else -np.inf
        y, length, along = geometry.closest_point(gram, first, demand, self.factor, noise=self.noise, flag=self.flag)
        if not y.any():
            self.flag("infeasible")
            weights[first] = 1.0
            return weights
        if length == 0:
            self.flag("stationary")
            return weights
        if along < 0:
            self.flag("primary-rises")
        return np.divide(norms[first] / length * y, norms, out=weights, where=norms > 0)  # algorithm 1

    def _taus(self, first: int) -> np.ndarray:
        if isinstance(self.tau, float):
            return np.full(len(self.names), self.tau)
        missing = [name for i, name in enumerate(self.names) if i != first and name not in self.tau]
        if missing:
            raise ValueError(f"{self._name}: `tau` must name every secondary loss, {missing} is missing.")
        self.require_known("tau", self.tau)
        return np.array([self.tau.get(name, 0.0) for name in self.names])
