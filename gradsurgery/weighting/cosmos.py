"""COSMOS: a linear scalarisation with a pull towards the preference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch.optim import Optimizer

from gradsurgery.optimizer import Switches
from gradsurgery.weighting.preference import PreferenceWeighter

if TYPE_CHECKING:
    from typing_extensions import Unpack


class COSMOSWeighter(PreferenceWeighter):
    """COSMOS: a linear scalarisation that also pulls the losses towards the direction of the preference.

    The objective is r·(l − z) − λ cos(r, l − z). The cosine does not change with the length of l: its gradient is
    orthogonal to l − z, and weights may become negative. λ = 0 is linear.

    The preference vector r is the switch `preference`: positive numbers by name or in the order of the losses, 1/m each
    if it is not given. It is used as given, and does not multiply the weights once more.

    Paper: Ruchte and Grabocka, Scalable Pareto Front Approximation for Deep Multi-Objective Learning, ICDM 2021, arXiv
    2103.13392. There a new r is drawn in every step, from a Dirichlet distribution, and fed to the network: set
    the attribute `preference`, a dict by name, before ``backward``.

    Args:
        optimizer: The torch optimizer that makes the step.
        penalty: λ ≥ 0, the pull towards the preference, in units of r·l. The paper uses 0.01 to 8, by data set.
        reference: The ideal losses z, one number or by name or in the order of the losses.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 3.0]))
        >>> optimizer = gradsurgery.COSMOSWeighter(torch.optim.SGD([w], lr=0.1), penalty=1.0)
        >>> {k: round(v, 3) for k, v in optimizer.backward({"class": w[0], "box": w[1]}).weights.items()}
        {'class': 0.366, 'box': 0.545}
    """

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        penalty: float = 1.0,
        reference: float | Mapping[str, float] | Sequence[float] = 0.0,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(optimizer, reference=reference, **switches)
        self.penalty = self.check.number("penalty", penalty, least=0.0)

    def weights(self, losses: np.ndarray) -> np.ndarray:
        vector, above = self.vector(), self.above(losses)
        if not above.any():
            return vector
        size = np.abs(above).max()
        length = np.linalg.norm(above / size)
        r, u = vector / np.linalg.norm(vector), above / size / length
        with np.errstate(over="ignore"):
            pull = np.clip((r - (r @ u) * u) / length / size, -1e300, 1e300)  # ∇ cos(r, l)
        return vector - self.penalty * pull
