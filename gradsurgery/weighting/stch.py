"""STCH: descend on a smooth maximum of the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch.optim import Optimizer

from gradsurgery.optimizer import Switches
from gradsurgery.weighting.preference import PreferenceWeighter
from gradsurgery.weighting.recording import bounded

if TYPE_CHECKING:
    from typing_extensions import Unpack


class STCHWeighter(PreferenceWeighter):
    """Smooth Tchebycheff scalarisation: descend on a smooth maximum of the weighted losses.

    The objective is μ log Σ exp(λᵢ (lᵢ − zᵢ)/μ), between the largest λᵢ (lᵢ − zᵢ) and μ log m more. Its weights are
    λᵢ softmax(λ (l − z)/μ)ᵢ. Every Pareto-optimal point is the minimum for some λ, also on non-convex fronts. As μ → 0
    only the worst loss counts; as μ grows it becomes the linear Σ λᵢ lᵢ / m.

    The preference vector λ is the switch `preference`: positive numbers by name or in the order of the losses, 1/m each
    if it is not given. It is used as given, and does not multiply the weights once more.

    Pitfall: losses a thousandfold apart leave the small ones without any weight. Give the reciprocals of their sizes as
    `preference`, or raise μ to the size of the largest λ l.

    Paper: Lin et al., Smooth Tchebycheff Scalarization for Multi-Objective Optimization, ICML 2024, arXiv 2402.19078.

    Args:
        optimizer: The torch optimizer that makes the step.
        mu: μ > 0, in units of λ l. The paper uses 0.01 to 1.
        reference: The ideal losses z, one number or by name or in the order of the losses.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 3.0]))
        >>> optimizer = gradsurgery.STCHWeighter(torch.optim.SGD([w], lr=0.1), mu=0.5)
        >>> {k: round(v, 3) for k, v in optimizer.backward({"class": w[0], "box": w[1]}).weights.items()}
        {'class': 0.06, 'box': 0.44}
    """

    if_collapsed = (
        "The largest weighted loss takes it all: bring the losses to one size by `preference`, which multiplies them, "
        "or raise `mu`, which has the unit of a weighted loss."
    )

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        mu: float = 1.0,
        reference: float | Mapping[str, float] | Sequence[float] = 0.0,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(optimizer, reference=reference, **switches)
        self.mu = self.check.number("mu", mu, above=0.0)

    def weights(self, losses: np.ndarray) -> np.ndarray:
        vector = self.vector()
        with np.errstate(over="ignore"):
            scores = bounded(vector * self.above(losses) / self.mu)
        powers = np.exp(scores - scores.max())
        return vector * powers / powers.sum()
