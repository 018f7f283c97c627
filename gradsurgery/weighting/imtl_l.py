"""IMTL-L: learn scales that make all losses equally large."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from torch.optim import Optimizer

from gradsurgery.optimizer import Switches
from gradsurgery.weighting.base import Weighter
from gradsurgery.weighting.deferred import library, where
from gradsurgery.weighting.recording import LOG_LIMIT, require_nonnegative, step_size

if TYPE_CHECKING:
    from typing_extensions import Unpack


class IMTLLWeighter(Weighter):
    """Learn a scale exp(sᵢ) for each loss that brings all scaled losses to 1.

    Minimises Σ exp(sᵢ) lᵢ − sᵢ over model and sᵢ, convex in sᵢ, with sᵢ = 0 at the start. The weight settles at 1/lᵢ:
    :class:`RealTimeWeighter`, smoothed over time. Its gradient is twice that of the uncertainty weighting of Kendall et
    al. with s → −s. The weights used in a step are those before its update.

    Pitfall: the sᵢ move by at most `lr` per step. A loss of 100 needs ln 100 / lr steps: 4600 with 1e-3, the learning
    rate of most models, and 460 with lr=1e-2, which is a better one to start from.

    Paper: Liu et al., Towards Impartial Multi-task Learning, ICLR 2021 (the loss balance, IMTL-L, with base e).

    Departures: the sᵢ are no parameters of the model's optimizer, so that they are never decayed; their gradient has a
    closed form. A loss of exactly 0 leaves its sᵢ alone, a negative one is refused: the objective has no lower bound.
    Under "adam" a gradient above 10 and above ten times its root mean square so far (1000 and a thousand times in the
    first 100 steps of a loss) counts as one of that root mean square: Adam would let a single wild loss freeze the
    weight for thousands of steps. A loss whose first value is wild still does so; divide it by its size.

    Args:
        optimizer: The torch optimizer that makes the step.
        lr: Step size of the sᵢ. None: the learning rate of the first parameter group, as it is in each step.
        weight_optimizer: "adam" or "sgd".
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: An argument is out of range, or a loss is negative.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> optimizer = gradsurgery.IMTLLWeighter(torch.optim.AdamW([w], lr=1e-3))
        >>> optimizer.backward({"class": w[0], "box": 9 * w[1]}).weights
        {'class': 1.0, 'box': 1.0}
    """

    stateful = True
    can_defer = True
    if_negative = "the objective has no lower bound otherwise"
    scale = "paper"
    if_still = "They move by at most `lr` per step, on a logarithmic scale: pass lr=1e-2."

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        lr: float | None = None,
        weight_optimizer: Literal["adam", "sgd"] = "adam",
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.lr = None if lr is None else self.check.number("lr", lr, above=0.0)
        self.weight_optimizer = self.check.choice("weight_optimizer", weight_optimizer, ("adam", "sgd"))

    def weights(self, losses: np.ndarray) -> np.ndarray:
        require_nonnegative(self, losses, self.if_negative)
        xp, s = library(losses), self.recall("log_scale", 0.0, like=losses)
        known = losses > 0
        # lᵢ exp(sᵢ), kept where its square is an ordinary number.
        weighted = xp.exp((xp.log(where(known, losses, 1.0)) + s).clip(max=300.0))
        gradient = self.without_spikes("log_scale", where(known, weighted - 1, 0.0), self.weight_optimizer)
        moved = self.descend("log_scale", s, gradient, step_size(self, self.lr), self.weight_optimizer)
        self.keep("log_scale", where(known, moved.clip(-LOG_LIMIT, LOG_LIMIT), s))
        weights: np.ndarray = xp.exp(s)
        return weights
