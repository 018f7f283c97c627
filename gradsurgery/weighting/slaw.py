"""SLAW: estimate gradient norms from how much the losses vary."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch.optim import Optimizer

from gradsurgery.optimizer import Switches
from gradsurgery.weighting.recording import RecordingWeighter, ratio, shared_out

if TYPE_CHECKING:
    from typing_extensions import Unpack

# A loss that varies less than this, relative to its mean, is treated as if it varied that much.
_LEAST_VARIATION = 1e-5


class SLAWWeighter(RecordingWeighter):
    """Scaled loss approximate weighting: divide each loss by the standard deviation of its values.

    wᵢ ∝ 1/sᵢ with sum m, where sᵢ² is the mean of lᵢ² minus the square of the mean of lᵢ, by averages over the past
    with this step included: plain ones for the first 1/(1 − β) steps, exponential ones from then on. The deviation
    stands in for the gradient norm, at no cost. The first step has weights 1. Multiplying a loss by a constant, over
    the whole run, divides its weight by it.

    Paper: Crawshaw and Košecká, SLAW: Scaled Loss Approximate Weighting for Efficient Multi-Task Learning, 2021, arXiv
    2109.08218. Checked against the official code.

    Departures: a deviation below 1e-5 of the mean counts as that; the official code has an absolute 1e-5. The variance
    is updated as such and not as a difference of two large averages.

    Args:
        optimizer: The torch optimizer that makes the step.
        beta: β, the decay of the averages, 0 ≤ β < 1.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = gradsurgery.SLAWWeighter(torch.optim.SGD([w], lr=0.0))
        >>> for a, b in ((4.0, 2.0), (1.0, 1.0)):
        ...     report = optimizer.backward({"class": a * w[0], "box": b * w[1]})
        ...     optimizer.step()
        >>> {name: round(weight, 3) for name, weight in report.weights.items()}
        {'class': 0.5, 'box': 1.5}
    """

    def __init__(self, optimizer: Optimizer, *, beta: float = 0.99, **switches: Unpack[Switches]) -> None:
        super().__init__(optimizer, **switches)
        self.beta = self.check.number("beta", beta, least=0.0, below=1.0)

    def _moments(self, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Count, mean and standard deviation with this step included."""
        count = self.recall("count", 0.0) + 1
        new = np.where(count <= round(1 / (1 - self.beta)), 1 / count, 1 - self.beta)
        mean, deviation = self.recall("mean", losses), self.recall("deviation", 0.0)
        # Scaled by its largest term, so that squares of huge and tiny losses stay numbers.
        return (
            count,
            mean + new * (losses - mean),
            np.sqrt(1 - new) * np.hypot(deviation, np.sqrt(new) * (losses - mean)),
        )

    def weights(self, losses: np.ndarray) -> np.ndarray:
        count, mean, deviation = self._moments(losses)
        size = np.maximum(deviation, _LEAST_VARIATION * np.abs(mean))
        known = (count >= 2) & (size > 0)
        weights = np.ones(len(losses))
        if known.any():
            inverse = ratio(size[known].min(), size[known])
            weights[known] = shared_out(inverse, float(known.sum()))
        return weights

    def observe(self, losses: np.ndarray) -> None:
        for key, value in zip(("count", "mean", "deviation"), self._moments(losses), strict=True):
            self.keep(key, value)
