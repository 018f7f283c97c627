"""Uncertainty weighting: learn how noisy each task is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from torch.optim import Optimizer

from gradsurgery.optimizer import Switches
from gradsurgery.weighting.base import Weighter
from gradsurgery.weighting.deferred import library, where
from gradsurgery.weighting.recording import LOG_LIMIT, picked, require_nonnegative, step_size

if TYPE_CHECKING:
    from typing_extensions import Unpack

KINDS = ("regression", "classification")
SHARES = {"regression": 0.5, "classification": 1.0}


class UncertaintyWeighter(Weighter):
    """Weigh the losses by a noise level σᵢ² that is learnt along with the model.

    With sᵢ = log σᵢ², form "log_variance" minimises Σ exp(−sᵢ) lᵢ/2 + sᵢ/2 over model and sᵢ; a loss of kind
    "classification" enters as exp(−sᵢ) lᵢ + sᵢ/2. Either way the weight settles at 1/(2 lᵢ): half of
    :class:`RealTimeWeighter`, smoothed over time. Form "log1p" minimises Σ lᵢ/(2σᵢ²) + log(1 + σᵢ²), whose regulariser
    is never negative; it settles at σ² = (l + √(l² + 8l))/4. The weights used in a step are those before its update.

    Pitfall: the sᵢ move by at most `lr` per step. A loss of 100 needs ln 100 / lr steps: 4600 with 1e-3, the learning
    rate of most models, and 460 with lr=1e-2, which is a better one to start from.

    Papers: Kendall, Gal and Cipolla, Multi-Task Learning Using Uncertainty to Weigh Losses for Scene Geometry and
    Semantics, CVPR 2018, arXiv 1705.07115 (eq. 7 and 10); Liebel and Körner, Auxiliary Tasks in Multi-task Learning,
    2018, arXiv 1805.06334, for "log1p".

    Departures: the sᵢ are no parameters of the model's optimizer, so that they are never decayed; their gradient has a
    closed form. "log1p" learns log σ² where the paper learns σ, which cannot reach 0. A loss of exactly 0 says nothing
    of its noise and leaves sᵢ alone; the weight would otherwise grow without bound. A negative loss is refused, since
    the objective then has no lower bound.
    Under "adam" a gradient above 10 and above ten times its root mean square so far (1000 and a thousand times in the
    first 100 steps of a loss) counts as one of that root mean square: Adam would let a single wild loss freeze the
    weight for thousands of steps. A loss whose first value is wild still does so; give `initial` or a constant factor.

    Args:
        optimizer: The torch optimizer that makes the step.
        form: "log_variance" or "log1p".
        kind: "regression" or "classification" for all, or by name or in the order of the losses. Only "log_variance"
            tells them apart.
        initial: sᵢ at the start.
        lr: Step size of the sᵢ. None: the learning rate of the first parameter group, as it is in each step.
        weight_optimizer: "adam" or "sgd".
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: An argument is out of range, or a loss is negative.

    Example:
        >>> w = torch.nn.Parameter(torch.ones(2))
        >>> kind = {"class": "classification", "box": "regression"}
        >>> optimizer = gradsurgery.UncertaintyWeighter(torch.optim.AdamW([w], lr=1e-3), kind=kind)
        >>> optimizer.backward({"class": w[0], "box": w[1]}).weights
        {'class': 1.0, 'box': 0.5}
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
        form: Literal["log_variance", "log1p"] = "log_variance",
        kind: str | Mapping[str, str] | Sequence[str] = "regression",
        initial: float = 0.0,
        lr: float | None = None,
        weight_optimizer: Literal["adam", "sgd"] = "adam",
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.form = self.check.choice("form", form, ("log_variance", "log1p"))
        named: dict[str, Any] = (
            {"all": kind} if isinstance(kind, str) else self.check.entries("kind", kind, "names of kinds")
        )
        for name, value in named.items():
            self.check.choice("kind" if isinstance(kind, str) else f"kind[{name!r}]", value, KINDS)
        if self.form == "log1p" and "classification" in named.values():
            raise ValueError(f'{self._name}: `kind` "classification" has no meaning with form="log1p".')
        self.kind = kind if isinstance(kind, str) else named
        self.initial = self.check.number("initial", initial, least=-LOG_LIMIT, most=LOG_LIMIT)
        self.lr = None if lr is None else self.check.number("lr", lr, above=0.0)
        self.weight_optimizer = self.check.choice("weight_optimizer", weight_optimizer, ("adam", "sgd"))

    def weights(self, losses: np.ndarray) -> np.ndarray:
        require_nonnegative(self, losses, self.if_negative)
        xp, s = library(losses), self.recall("log_variance", self.initial, like=losses)
        known = losses > 0
        # lᵢ exp(−sᵢ), kept where its square is an ordinary number.
        weighted = xp.exp((xp.log(where(known, losses, 1.0)) - s).clip(max=300.0))
        share: float | np.ndarray = 0.5
        if self.form == "log1p":
            gradient = 1 / (1 + xp.exp(-s)) - share * weighted
        else:
            share = self._shares(losses)
            gradient = 0.5 - share * weighted
        gradient = self.without_spikes("log_variance", where(known, gradient, 0.0), self.weight_optimizer)
        moved = self.descend("log_variance", s, gradient, step_size(self, self.lr), self.weight_optimizer)
        self.keep("log_variance", where(known, moved.clip(-LOG_LIMIT, LOG_LIMIT), s))
        weights: np.ndarray = share * xp.exp(-s)
        return weights

    def _shares(self, losses: np.ndarray) -> float | np.ndarray:
        """What multiplies the losses by their kinds, beside exp(−sᵢ)."""
        if isinstance(self.kind, str):
            return SHARES[self.kind]
        return self.constants([SHARES[kind] for kind in picked(self, "kind", self.kind)], losses)
