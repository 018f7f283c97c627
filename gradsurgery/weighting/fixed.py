"""Weights that the user chooses and that stay."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch.optim import Optimizer

from gradsurgery.optimizer import Switches
from gradsurgery.weighting.base import Weighter
from gradsurgery.weighting.recording import picked, shared_out

if TYPE_CHECKING:
    from typing_extensions import Unpack


class FixedWeighter(Weighter):
    """Constant weights; equal ones by default, which is the plain sum.

    The gradient is that of Σ wᵢ lᵢ. The weights are used as given and not normalised: weights of 1/m are the mean.
    Where tasks are absent from a batch, the weights of the others are rescaled so that the total per present task stays
    what it usually is.

    Args:
        optimizer: The torch optimizer that makes the step.
        weights: w ≥ 0, not all 0, by name or in the order of the losses. None: all 1.
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: A weight is negative or not finite, all are 0, or a loss has none.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = gradsurgery.FixedWeighter(torch.optim.SGD([w], lr=0.1), weights={"class": 1.0, "box": 5.0})
        >>> optimizer.backward({"class": w[0], "box": w[1]}).weights
        {'class': 1.0, 'box': 5.0}
    """

    can_defer = True

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        weights: Mapping[str, float] | Sequence[float] | None = None,
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.fixed: dict[str, float] | None = None
        if weights is not None:
            self.fixed = self.check.numbers("weights", weights, least=0.0)
            if not any(self.fixed.values()):
                raise ValueError(f"{self._name}: `weights` must not all be 0, got {weights!r}.")

    def weights(self, losses: np.ndarray) -> np.ndarray:
        if self.fixed is None:
            return np.ones(len(losses))
        weights = np.array(picked(self, "weights", self.fixed))
        known = self.by_name("weights", self.fixed)
        usual = [known[name] for name in self.all_names if name in known]
        return weights if len(usual) == len(weights) else shared_out(weights, len(weights) * float(np.mean(usual)))
