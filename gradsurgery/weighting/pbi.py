"""PBI: go along a ray of the preference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch.optim import Optimizer

from gradsurgery.optimizer import Switches
from gradsurgery.weighting.preference import PreferenceWeighter

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PBIWeighter(PreferenceWeighter):
    """Penalty-based boundary intersection: go along a ray of the preference, and stay close to it.

    With ŵ = w/‖w‖, d₁ = ⟨l − z, ŵ⟩ and d₂ = ‖l − z − d₁ ŵ‖ the objective is d₁ + θ d₂. The weights are
    ŵ + θ (l − z − d₁ ŵ)/d₂; on the ray itself, where d₂ has no gradient, they are ŵ. They may be negative: a loss that
    is too small for the ray is made to rise.

    The preference vector w is the switch `preference`: positive numbers by name or in the order of the losses, 1/m each
    if it is not given. It is used as given, and does not multiply the weights once more.

    Paper: Zhang and Li, MOEA/D: A Multiobjective Evolutionary Algorithm Based on Decomposition, IEEE TEVC 2007.

    Args:
        optimizer: The torch optimizer that makes the step.
        theta: θ ≥ 0, the penalty on the distance from the ray.
        reference: The ideal losses z, one number or by name or in the order of the losses.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 3.0]))
        >>> optimizer = gradsurgery.PBIWeighter(torch.optim.SGD([w], lr=0.1), theta=1.0)
        >>> {k: round(v, 3) for k, v in optimizer.backward({"class": w[0], "box": w[1]}).weights.items()}
        {'class': 0.0, 'box': 1.414}
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        theta: float = 5.0,
        reference: float | Mapping[str, float] | Sequence[float] = 0.0,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(optimizer, reference=reference, **switches)
        self.theta = self.check.number("theta", theta, least=0.0)

    def weights(self, losses: np.ndarray) -> np.ndarray:
        vector, above = self.vector(), self.above(losses)
        ray = vector / np.linalg.norm(vector)
        size = np.abs(above).max()
        scaled = above / size if size > 0 else above
        aside = scaled - (scaled @ ray) * ray
        distance = np.linalg.norm(aside)
        if distance <= 8 * np.finfo(np.float64).eps * len(ray):
            return ray
        return ray + self.theta * aside / distance
