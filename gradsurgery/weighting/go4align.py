"""GO4Align: one weight per group of tasks, with groups found from the losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from torch.optim import Optimizer

from gradsurgery.optimizer import Switches
from gradsurgery.weighting.recording import RecordingWeighter, ratio, softmax

if TYPE_CHECKING:
    from typing_extensions import Unpack


class GO4AlignWeighter(RecordingWeighter):
    """Divide each loss by its value, raise what has fallen most, and give tasks with like results one weight.

    pᵢ ∝ exp(−η Σₜ lᵢ(t)), over all steps with this one, and the indicator of task i is vᵢ = pᵢ Σⱼ lⱼ / lᵢ. The tasks
    are parted into groups of like indicators, and every task gets the mean indicator of its group. η is in units of
    1/loss: with η = 0, or as many groups as tasks and few steps, the terms wᵢ lᵢ are equal. As η Σ l grows the weight
    goes to the task of the smallest summed loss: keep η times the number of steps small.

    Pitfall: losses a thousandfold apart differ by that much in their sums, and the small one has all the weight after
    some 1/(η l) steps. Bring them to one size by constant factors first.

    Paper: Shen, Wang, Xiao, van Noord & Worring, GO4Align: Group Optimization for Multi-Task Alignment, NeurIPS 2024,
    arXiv 2404.06486, as its authors' code (class ``GO4ALIGN``) does it.

    Departures: the groups are the best ones, with the least sum of squared distances from the means of the groups; the
    code searches them by k-means from a random start. Among several best partitions one is taken.

    Args:
        optimizer: The torch optimizer that makes the step.
        groups: Number of groups, ≥ 1, at most the number of tasks counts. With 1 all weights are equal.
        eta: η ≥ 0.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: An argument is out of range, or a loss is not positive.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0, 16.0]))
        >>> optimizer = gradsurgery.GO4AlignWeighter(torch.optim.SGD([w], lr=0.1), eta=0.0)
        >>> {k: round(v, 3) for k, v in optimizer.backward({"a": w[0], "b": w[1], "c": w[2]}).weights.items()}
        {'a': 6.333, 'b': 1.781, 'c': 1.781}
    """

    scale: Literal["sum", "paper", "priority"] = "paper"
    if_collapsed = (
        "The sums of losses over the run are compared as they are: bring the losses to one size by constant factors, "
        "or lower `eta`, to below 1 / (number of steps × largest loss); eta=0 compares present values only."
    )

    def __init__(
        self, optimizer: Optimizer, *, groups: int = 2, eta: float = 1e-4, **switches: Unpack[Switches]
    ) -> None:
        super().__init__(optimizer, **switches)
        self.groups = self.check.count("groups", groups, least=1)
        self.eta = self.check.number("eta", eta, least=0.0)

    def _risks(self, losses: np.ndarray) -> np.ndarray:
        return np.minimum(self.recall("risks", 0.0) + losses, 1e300)

    def weights(self, losses: np.ndarray) -> np.ndarray:
        self.require_positive(losses, "it is divided by its value")
        probabilities = softmax(-self.eta * self._risks(losses)) / len(losses)
        # Indicators over their upper bound Σ l / min l: losses of all sizes stay within the range of numbers.
        shares = probabilities * (losses.min() / losses)
        top = shares.max() or 1.0
        bound = np.minimum(ratio(losses, losses.min()), 1e300).sum()
        return grouped(shares / top, self.groups) * top * bound

    def observe(self, losses: np.ndarray) -> None:
        self.keep("risks", self._risks(losses))


def grouped(values: np.ndarray, groups: int) -> np.ndarray:
    """Replace each value by the mean of its group; the groups have the least sum of squares within them.

    In one dimension the best groups are intervals, and a table of the best sums up to each value finds them.

    Args:
        values: (m,).
        groups: Their number, at most.

    Returns:
        (m,).
    """
    m, order = len(values), np.argsort(values, kind="stable")
    x = values[order]
    spread = np.zeros((m, m))  # of the interval from i to j
    means = np.zeros((m, m))
    for i in range(m):
        count = np.arange(1, m - i + 1)
        means[i, i:] = x[i] + np.cumsum(x[i:] - x[i]) / count
        steps = np.diff(means[i, i:], prepend=x[i])
        # A new value adds (x − old mean)(x − new mean), and the mean moves by a count-th of the first factor.
        spread[i, i:] = np.cumsum(steps * count * (x[i:] - means[i, i:]))
    best = spread[0].copy()
    starts = [np.zeros(m, dtype=int)]
    for _ in range(min(groups, m) - 1):
        total = np.full((m, m), np.inf)  # the last interval is from i to j
        total[0] = spread[0]
        for i in range(1, m):
            total[i, i:] = best[i - 1] + spread[i, i:]
        starts.append(total.argmin(axis=0))
        best = total.min(axis=0)
    result, end = np.empty(m), m - 1
    for first in reversed(starts):
        if end < 0:
            break
        begin = int(first[end])
        result[order[begin : end + 1]] = means[begin, end]
        end = begin - 1
    return result
