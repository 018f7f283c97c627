"""PIVRG: FairGrad with more weight for tasks that perform worse."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch.optim import Optimizer

from gradsurgery.surgery.base import SurgerySwitches
from gradsurgery.surgery.fairgrad import FairGrad

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PIVRG(FairGrad):
    """FairGrad with α = 2, in which tasks that perform worse ask for more.

    p = m softmax(score / T) with T = (max − min of the scores) / log b, and at least T₀: the largest p is at most b
    times the smallest. The weights of the rows solve G w = √(p/w). So ⟨gᵢ, d⟩ > 0: no loss rises to first order. It is
    FairGrad with `preference` 1/p.

    Paper: Qin et al., Revisiting Fairness in Multitask Learning: A Performance-Driven Approach for Variance Reduction,
    CVPR 2025, with the authors' code (jianke0604/MTLlib), from which the formulas are.

    Departures: those of FairGrad: solved to rounding, where the code's general least-squares routine starts at 1/m and
    ends far from the solution on rows of very different length; Pareto-stationary rows give zero, with the flag
    "stationary"; a zero row is left out. The code multiplies the direction by m. Absent tasks are left out of the
    softmax.

    Args:
        optimizer: The optimizer that makes the step.
        scores: How badly each task performs, by name or in the order of the losses: *larger is worse*. The paper's is
            the percentage lost against a model for that task alone, from the metrics of an epoch. Equal by default.
            Set ``optimizer.scores`` after each epoch; what was set last is saved with the state.
        bound: b > 1.
        min_temperature: T₀ > 0, in units of the scores.
        scale: As in FairGrad.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`.

    Raises:
        ValueError: An argument is out of range, or a present loss has no score.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> optimizer = gradsurgery.PIVRG(torch.optim.SGD([torch.zeros(2)], lr=0.1), scores=[0.0, 80.0])
        >>> optimizer.combine(rows)
        tensor([0.8850, 1.1150])
    """

    stateful = True

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        scores: Mapping[str, float] | Sequence[float] | None = None,
        bound: float = 2.0,
        min_temperature: float = 10.0,
        scale: Literal["sum", "paper"] = "sum",
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        super().__init__(optimizer, alpha=2.0, scale=scale, **switches)
        self.bound = self.check.number("bound", bound, above=1.0)
        self.min_temperature = self.check.number("min_temperature", min_temperature, above=0.0)
        self._given = None if scores is None else self.check.numbers("scores", scores)

    @property
    def scores(self) -> Mapping[str, float] | None:
        """What was set last, by name, or as it was given if no call has named the losses yet."""
        found: Mapping[str, float] | None = self.transaction.whole.get("scores", self._given)
        return found

    @scores.setter
    def scores(self, scores: Mapping[str, float] | Sequence[float]) -> None:
        given = self.check.numbers("scores", scores)
        names = (self.transaction.proposed or self.transaction.learnt).get("tasks")
        if isinstance(scores, Mapping):
            self.transaction.revise(lambda memory: {"scores": given})
        elif names is None:
            self._given = given
        elif len(given) == len(names):
            self.transaction.revise(lambda memory: {"scores": dict(zip(names, given.values(), strict=True))})
        else:
            raise ValueError(f"{self._name}: `scores` must have one entry for each of {names}, got {len(given)}.")

    def strength(self) -> np.ndarray:
        if self.scores is None:
            return np.ones(len(self.names))
        self.transaction.whole["scores"] = dict(self.by_name("scores", self.scores))
        scores = np.array(self.each("scores", self.scores))
        temperature = max(float(np.ptp(scores)) / math.log(self.bound), self.min_temperature)
        powers = np.exp((scores - scores.max()) / temperature)
        return np.sqrt(powers * (len(powers) / powers.sum()))
