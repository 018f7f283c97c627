"""IGB: more weight to the losses with the most left to gain."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.optim import Optimizer

from gradsurgery.optimizer import Switches
from gradsurgery.weighting.recording import RecordingWeighter, means, ratio, softmax

if TYPE_CHECKING:
    from typing_extensions import Unpack


class IGBWeighter(RecordingWeighter):
    """Improvable gap balancing (IGBv1): relative losses, weighted by how little each has fallen since an early epoch.

    The objective is Σ wᵢ log lᵢ with w = m softmax(rᵢ) for rᵢ = lᵢ / Lᵢ, where Lᵢ is the mean of loss i over epoch
    `base_epoch`; until that epoch has ended all wᵢ are 1. So the coefficient of loss i is wᵢ/lᵢ. Multiplying a loss by
    a constant, over the whole run, does not turn the direction. Call :meth:`epoch_end` after each epoch.

    Pitfall: without :meth:`epoch_end` it stays :class:`RealTimeWeighter`. A warning says so after 1000 steps. As
    there, coefficients grow without bound as a loss goes to 0.

    Paper: Dai, Fei and Lu, Improvable Gap Balancing for Multi-Task Learning, UAI 2023, arXiv 2307.15429; formulas and
    the epoch as in the authors' code (IGB4MTL), which counts epochs from 0. Its second variant, which learns the
    weights by reinforcement, is not here.

    Departure: a task without a loss in epoch `base_epoch` is compared with the first later epoch that has one, and
    counts with rᵢ = 1 until then.

    Args:
        optimizer: The torch optimizer that makes the step.
        base_epoch: The epoch whose means are the Lᵢ, counted from 0.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: An argument is out of range, or a loss is not positive.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = gradsurgery.IGBWeighter(torch.optim.SGD([w], lr=0.0), base_epoch=0)
        >>> for falling in (4.0, 1.0):
        ...     report = optimizer.backward({"class": falling * w[0], "box": w[1]})
        ...     optimizer.step()
        ...     optimizer.epoch_end()
        >>> {name: round(weight, 3) for name, weight in report.weights.items()}
        {'class': 0.642, 'box': 1.358}
    """

    scale = "paper"

    def __init__(self, optimizer: Optimizer, *, base_epoch: int = 1, **switches: Unpack[Switches]) -> None:
        super().__init__(optimizer, **switches)
        self.base_epoch = self.check.count("base_epoch", base_epoch, least=0)

    def epoch_end(self) -> None:
        """End an epoch: the mean of each loss over it may become what later losses are compared with.

        Committed memory changes at once; a ``backward`` whose ``step`` is still to come counts as part of the epoch if
        that step is made.
        """
        self._end_epoch()

    def weights(self, losses: np.ndarray) -> np.ndarray:
        self.require_positive(losses, "its logarithm is taken")
        base = self.recall("base", np.nan)
        rates = np.ones(len(losses))
        known = ~np.isnan(base)
        rates[known] = ratio(losses[known], base[known])
        return ratio(softmax(rates), losses)

    def observe(self, losses: np.ndarray) -> None:
        self.add_up(losses)
        self.expect_epoch_end("epochs", "the weight of each loss is 1 divided by its value, as in RealTimeWeighter")

    def roll(self, memory: Mapping[str, Any]) -> dict[str, Any]:
        ended = memory.get("epochs", 0)
        base = memory.get("base", {})
        if ended >= self.base_epoch:
            base = {**means(memory), **base}
        return {"epochs": ended + 1, "base": base, "epoch.sum": {}, "epoch.count": {}}
