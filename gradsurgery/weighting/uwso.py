"""UW-SO: a softmax of the inverse losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch.optim import Optimizer

from gradsurgery.optimizer import Switches
from gradsurgery.weighting.base import Weighter
from gradsurgery.weighting.recording import ratio, softmax

if TYPE_CHECKING:
    from typing_extensions import Unpack


class UWSOWeighter(Weighter):
    """Soft optimal uncertainty weighting: w = m softmax(1/(T l)), with the losses held constant.

    The best uncertainty of a task is its loss, in closed form, so its weight would be 1/l (:class:`RealTimeWeighter`);
    the softmax bounds it. T has the unit of 1/l and must be tuned: as it grows the weights become equal, as it goes to
    0 the smallest loss takes them all.

    Paper: Kirchdorfer et al., Analytical Uncertainty-Based Loss Weighting in Multi-Task Learning, GCPR 2024, arXiv
    2408.07985. The formula was checked against descriptions of the paper and other implementations; the paper gives no
    default for T.

    Pitfall: T = 1 suits losses of about 1. Two losses .02 and .5 then get the weights 2 and 3e-21, and the larger one
    is not trained at all. A rule: T = 1/(3 l) for the smallest loss l that is to be expected; then no weight exceeds
    another by more than e³ = 20 times. A T that was right at the start is too small once a loss has become small.

    Args:
        optimizer: The torch optimizer that makes the step.
        temperature: T > 0.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: An argument is out of range, or a loss is not positive.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = gradsurgery.UWSOWeighter(torch.optim.SGD([w], lr=0.1))
        >>> {k: round(v, 3) for k, v in optimizer.backward({"class": w[0], "box": w[1]}).weights.items()}
        {'class': 1.245, 'box': 0.755}
    """

    if_collapsed = "Raise `temperature`, which has the unit of 1/loss: to 1/(3 l) for the smallest loss l, or more."

    def __init__(self, optimizer: Optimizer, *, temperature: float = 1.0, **switches: Unpack[Switches]) -> None:
        super().__init__(optimizer, **switches)
        self.temperature = self.check.number("temperature", temperature, above=0.0)

    def weights(self, losses: np.ndarray) -> np.ndarray:
        self.require_positive(losses, "it is divided by its value")
        return softmax(ratio(ratio(1.0, losses), np.array(self.temperature)))
