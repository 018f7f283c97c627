"""Divide each loss by the largest value it has had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch.optim import Optimizer

from gradsurgery.optimizer import Switches
from gradsurgery.weighting.recording import RecordingWeighter, picked, ratio, require_nonnegative

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RunningMaxWeighter(RecordingWeighter):
    """Divide each loss by the largest value it has had so far: every term is then between 0 and 1.

    wᵢ = γᵢ / Mᵢ with Mᵢ ← max(decay · Mᵢ, lᵢ). The maximum is a constant for the gradient. A recipe from a PyTorch
    forum thread, without a paper. Multiplying a loss by a constant, over the whole run, changes nothing. A single
    outlier lowers a weight for ever unless `decay` is below 1. A loss that has been 0 so far has weight 0.

    Args:
        optimizer: The torch optimizer that makes the step.
        gamma: γ > 0, the importance of each term, by name or in the order of the losses. None: all 1.
        decay: What is left of an old maximum after a step, 0 < decay ≤ 1.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: An argument is out of range, or a loss is negative.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([2.0, 50.0]))
        >>> optimizer = gradsurgery.RunningMaxWeighter(torch.optim.SGD([w], lr=0.1))
        >>> optimizer.backward({"class": w[0], "box": w[1]}).weights
        {'class': 0.5, 'box': 0.02}
    """

    scale = "paper"

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        gamma: Mapping[str, float] | Sequence[float] | None = None,
        decay: float = 1.0,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.gamma = None if gamma is None else self.check.numbers("gamma", gamma, above=0.0)
        self.decay = self.check.number("decay", decay, above=0.0, most=1.0)

    def _largest(self, losses: np.ndarray) -> np.ndarray:
        return np.maximum(self.decay * self.recall("max", 0.0), losses)

    def weights(self, losses: np.ndarray) -> np.ndarray:
        gamma = np.ones(len(losses)) if self.gamma is None else np.array(picked(self, "gamma", self.gamma))
        largest = self._largest(losses)
        return np.where(largest > 0, ratio(gamma, np.where(largest > 0, largest, 1.0)), 0.0)

    def observe(self, losses: np.ndarray) -> None:
        require_nonnegative(self, losses, "it is compared with its largest value")
        self.keep("max", self._largest(losses))
