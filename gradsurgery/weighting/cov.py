"""CoV-Weighting: weigh the losses by how much they still vary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch.optim import Optimizer

from gradsurgery.optimizer import Switches
from gradsurgery.weighting.recording import RecordingWeighter, ratio, shared_out

if TYPE_CHECKING:
    from typing_extensions import Unpack


class CoVWeighter(RecordingWeighter):
    """Give each loss a weight in proportion to the coefficient of variation of its progress.

    With the loss ratio ρᵢ(t) = lᵢ(t) / mean of lᵢ over the steps before, wᵢ ∝ std(ρᵢ)/mean(ρᵢ) over the steps before,
    with sum m: a loss that has stopped moving is not worth optimising further. The first two steps have weights 1.
    Multiplying a loss by a constant, over the whole run, changes nothing. Losses that have all been constant get equal
    weights.

    Paper: Groenendijk, Karaoglu, Gevers and Mensink, Multi-Loss Weighting with Coefficient of Variations, WACV 2021,
    arXiv 2009.01717. Checked against the official code, whose moments are those of Welford's method.

    Departures: the official 1e-8 added to the variances is left out, so that a loss that has been constant gets weight
    0. With `decay` the deviations forget as the means do; in the official code they keep the whole past.

    Args:
        optimizer: The torch optimizer that makes the step.
        decay: Means and deviations forget by this factor per step, 0 < decay < 1. None: those of the whole past, as in
            the paper.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: An argument is out of range, or a loss is not positive.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = gradsurgery.CoVWeighter(torch.optim.SGD([w], lr=0.0))
        >>> for a, b in ((4.0, 1.0), (2.0, 0.9), (1.0, 0.8)):
        ...     report = optimizer.backward({"class": a * w[0], "box": b * w[1]})
        ...     optimizer.step()
        >>> {name: round(weight, 3) for name, weight in report.weights.items()}
        {'class': 1.727, 'box': 0.273}
    """

    def __init__(self, optimizer: Optimizer, *, decay: float | None = None, **switches: Unpack[Switches]) -> None:
        super().__init__(optimizer, **switches)
        self.decay = None if decay is None else self.check.number("decay", decay, above=0.0, below=1.0)

    def weights(self, losses: np.ndarray) -> np.ndarray:
        count = self.recall("count", 0.0)
        known = count >= 2
        weights = np.ones(len(losses))
        if known.any():
            spread = np.sqrt(np.maximum(self.recall("squares", 0.0)[known], 0.0) / count[known])
            weights[known] = shared_out(spread / self.recall("mean_ratio", 1.0)[known], float(known.sum()))
        return weights

    def observe(self, losses: np.ndarray) -> None:
        self.require_positive(losses, "it is divided by its mean")
        count = self.recall("count", 0.0)
        mean_loss, mean_ratio = self.recall("mean_loss", losses), self.recall("mean_ratio", 0.0)
        now = np.minimum(ratio(losses, mean_loss), 1e100)  # its square is to be a number, too
        keep = count / (count + 1) if self.decay is None else np.where(count > 0, self.decay, 0.0)
        moved = keep * mean_ratio + (1 - keep) * now
        # The sum of squares whose mean over all steps is the variance: that mean forgets as the other means do.
        left = np.where(count > 0, keep * (count + 1) / np.maximum(count, 1), 0.0)
        new = (1 - keep) * (count + 1) * (now - mean_ratio) * (now - moved)
        self.keep("squares", left * self.recall("squares", 0.0) + new)
        self.keep("mean_ratio", moved)
        self.keep("mean_loss", mean_loss + (1 - keep) * (losses - mean_loss))
        self.keep("count", count + 1)
