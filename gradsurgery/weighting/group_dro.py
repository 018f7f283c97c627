"""Group DRO: move weight to the worst loss."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch.optim import Optimizer

from gradsurgery.optimizer import Switches
from gradsurgery.weighting.base import Weighter
from gradsurgery.weighting.recording import bounded, softmax

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GroupDROWeighter(Weighter):
    """Group distributionally robust optimisation: exponentiated gradient ascent on the weights.

    wᵢ ← wᵢ exp(η lᵢ), rescaled to a sum of m (1 in the paper: use `reduction="mean"`); the new weights are used. It
    seeks the model whose largest loss is smallest, for losses that are comparable: one task over several groups or
    domains. A weight never recovers from a loss that was once much the largest, other than by the others becoming
    larger.

    Paper: Sagawa, Koh, Hashimoto and Liang, Distributionally Robust Neural Networks for Group Shifts, ICLR 2020, arXiv
    1911.08731 (algorithm 1). Checked against the official code, its step size included.

    Departure: an absent group keeps its weight, and the present ones share theirs; in the official code its loss is 0.

    Pitfall: the raw values are compared. Of losses a thousandfold apart the large one takes all the weight within some
    1/(η l) steps, and the others are not trained: bring them to one size by constant factors first.

    Args:
        optimizer: The torch optimizer that makes the step.
        eta: Step size η > 0, in units of 1/l.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = gradsurgery.GroupDROWeighter(torch.optim.SGD([w], lr=0.1), eta=1.0)
        >>> {k: round(v, 3) for k, v in optimizer.backward({"left": w[0], "right": w[1]}).weights.items()}
        {'left': 0.538, 'right': 1.462}
    """

    stateful = True
    if_collapsed = (
        "It seeks the smallest largest loss, and weighs by raw values: losses of different units need constant factors "
        "that bring them to one size first. Otherwise lower `eta`."
    )

    def __init__(self, optimizer: Optimizer, *, eta: float = 0.01, **switches: Unpack[Switches]) -> None:
        super().__init__(optimizer, **switches)
        self.eta = self.check.number("eta", eta, above=0.0)

    def weights(self, losses: np.ndarray) -> np.ndarray:
        logs = self.recall("log_weights", 0.0)
        with np.errstate(over="ignore"):
            moved = bounded(logs + self.eta * losses)
        # The present tasks keep their common total, so that what absent tasks have stays theirs.
        self.keep("log_weights", moved - _log_sum(moved) + _log_sum(logs))
        return softmax(moved)


def _log_sum(logs: np.ndarray) -> float:
    return float(logs.max() + np.log(np.exp(logs - logs.max()).sum()))
