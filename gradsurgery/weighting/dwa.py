"""DWA: weigh the losses by how much they fell over the last epoch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.optim import Optimizer

from gradsurgery.optimizer import Switches
from gradsurgery.weighting.recording import RecordingWeighter, means, ratio, softmax

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DWAWeighter(RecordingWeighter):
    """Dynamic weight average: give more weight to the losses that fell least over the last epoch.

    With rᵢ = Lᵢ(t−1) / Lᵢ(t−2), the ratio of mean losses of the last two epochs, w = m softmax(r/T). The first two
    epochs have weights 1. Call :meth:`epoch_end` after each epoch. Multiplying a loss by a constant, over the whole
    run, changes nothing.

    Pitfall: without :meth:`epoch_end` the weights stay 1. A warning says so after 1000 steps.

    Paper: Liu, Johns and Davison, End-to-End Multi-Task Learning with Attention, CVPR 2019, arXiv 1803.10704 (eq. 7).

    Args:
        optimizer: The torch optimizer that makes the step.
        temperature: T > 0; large values even the weights out.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = gradsurgery.DWAWeighter(torch.optim.SGD([w], lr=0.0))
        >>> for falling in (4.0, 1.0, 0.5):
        ...     report = optimizer.backward({"class": falling * w[0], "box": w[1]})
        ...     optimizer.step()
        ...     optimizer.epoch_end()
        >>> {name: round(weight, 3) for name, weight in report.weights.items()}
        {'class': 0.815, 'box': 1.185}
    """

    can_defer = True

    def __init__(self, optimizer: Optimizer, *, temperature: float = 2.0, **switches: Unpack[Switches]) -> None:
        super().__init__(optimizer, **switches)
        self.temperature = self.check.number("temperature", temperature, above=0.0)

    def epoch_end(self) -> None:
        """End an epoch: the mean of each loss over it enters the ratios.

        A task without a loss in this epoch keeps its ratio. Committed memory changes at once; a ``backward`` whose
        ``step`` is still to come counts as part of the epoch if that step is made.

        Raises:
            ValueError: The mean of a loss is not positive. Nothing changes then.
        """
        self._end_epoch()

    def weights(self, losses: np.ndarray) -> np.ndarray:
        before = self.recall("before", np.nan)
        known = ~np.isnan(before)
        if not known.any():
            return np.ones(len(losses))
        rates = np.ones(len(losses))
        rates[known] = ratio(self.recall("previous", np.nan)[known], before[known])
        return softmax(rates / self.temperature)

    def observe(self, losses: np.ndarray) -> None:
        self.add_up(losses)
        self.expect_epoch_end("previous")

    def roll(self, memory: Mapping[str, Any]) -> dict[str, Any]:
        now = means(memory)
        bad = {name: mean for name, mean in now.items() if not mean > 0}
        if bad:
            raise ValueError(
                f"{self._name}.epoch_end: the mean of every loss must be > 0, since it is compared with the "
                f"next one; got {bad}. Nothing was changed. Pass None for a loss that is 0, or add a small constant "
                "to it, in every batch."
            )
        previous = memory.get("previous", {})
        moved = {name: previous[name] for name in now if name in previous}
        return {
            "before": {**memory.get("before", {}), **moved},
            "previous": {**previous, **now},
            "epoch.sum": {},
            "epoch.count": {},
        }
