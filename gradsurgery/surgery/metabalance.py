"""MetaBalance: auxiliary gradients brought towards the length of the primary one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch.optim import Optimizer

from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class MetaBalance(Surgery):
    """Bring the gradient of every auxiliary task towards the length of the primary one, in each parameter by itself.

    d = g₁ + Σⱼ (r n₁/nⱼ + 1 − r) gⱼ, with moving averages n of the lengths and a relax factor r: 0 is the plain sum, 1
    gives all gradients the usual length of the primary one. No gradient is turned, and losses may rise to first order.
    m equal rows g give m·g. It is positively homogeneous. With r = 1 a constant factor on an auxiliary loss, over the
    whole run, changes nothing.

    Paper: He, Feng, Cheng, Ji, Guo & Caverlee, MetaBalance: Improving Multi-Task Recommendations via Adapting Gradient
    Magnitudes of Auxiliary Tasks, WWW 2022, arXiv 2203.06801, as its authors' code (facebookresearch/MetaBalance) does
    it: gradients that are too long are shortened, and too short ones made longer.

    Departures: averages are corrected for their start at zero, by the steps of each task, so that an absent task keeps
    its own; where all tasks are present in every step it makes no difference. A gradient that has always been zero is
    left out; the code divides by its length. Private parameters get the plain gradient of their loss.

    Args:
        optimizer: The optimizer that makes the step.
        relax: r in [0, 1].
        beta: Decay of the moving averages, in [0, 1).
        primary: Name of the primary loss; by default the first one in the first call. Where it is absent from a batch
            the plain sum of the others is taken, with the flag "primary-absent".
        **switches: See :class:`gradsurgery.surgery.base.Surgery`. `granularity` is "parameter" by default, as in the
            code; `every` needs "all".

    Raises:
        ValueError: An argument is out of range, or no loss of a call is called `primary`.

    Example:
        >>> rows = torch.tensor([[3.0, 4.0], [0.0, 10.0]])
        >>> gradsurgery.MetaBalance(torch.optim.SGD([torch.zeros(2)], lr=0.1), relax=1.0).combine(rows)
        tensor([3., 9.])
    """

    stateful = True

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        relax: float = 0.7,
        beta: float = 0.9,
        primary: str | None = None,
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        switches.setdefault("granularity", "parameter")
        super().__init__(optimizer, **switches)
        self.relax = self.check.number("relax", relax, least=0.0, most=1.0)
        self.beta = self.check.number("beta", beta, least=0.0, below=1.0)
        self.primary = self.check.primary(primary)

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        count, usual = self.recall("count", 0.0) + 1, self.recall("usual", 0.0)
        usual = usual + (self.lengths - usual) * ((1 - self.beta) / (1 - self.beta**count))
        self.keep("count", count)
        self.keep("usual", usual)
        first = self.primary_row(self.primary)
        if first is None:
            return np.ones(len(gram))
        towards = np.divide(usual[first], usual, out=np.zeros(len(gram)), where=usual > 0)
        return self.relax * towards + (1 - self.relax)
