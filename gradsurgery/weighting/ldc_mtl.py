"""LDC-MTL: learn weights that keep neighbouring weighted losses together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from torch.optim import Optimizer

from gradsurgery.optimizer import Switches
from gradsurgery.weighting.base import Weighter
from gradsurgery.weighting.recording import LOG_LIMIT, step_size

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LDCMTLWeighter(Weighter):
    """Learn weights that keep the discrepancies of the weighted losses small, in one step with the model.

    With Sᵢ = σ(θᵢ) and tᵢ = Sᵢ lᵢ, model and θ minimise Σ tᵢ / ΣS + λ Σ_{i<m} ``|tᵢ − tᵢ₊₁|``, where ΣS counts as
    constant. With sᵢ = sign(tᵢ − tᵢ₊₁) − sign(tᵢ₋₁ − tᵢ) the coefficient of loss i is Sᵢ (1/ΣS + λ sᵢ), and the
    gradient of θᵢ is Sᵢ (1 − Sᵢ) lᵢ (1/ΣS + λ sᵢ). The coefficients used in a step are those before its update. All θᵢ
    start at `initial`.

    Pitfalls: the **order of the losses** matters, since each is compared with the next one: that of the first call
    counts throughout. And where 2 λ ΣS > 1 a coefficient may be negative, so that its loss is made to rise; a warning
    says so. Losses should be of one size: divide them by their initial values if they are not.

    Paper: Xiao et al., Scalable Bilevel Loss Balancing for Multi-Task Learning (now LDC-MTL), 2025, arXiv 2502.08585.
    The objective, the start at 1 and λ (0.01 for CelebA, 0.05 for NYUv2, 0.1 for Cityscapes) as in the authors' code
    (OptMN-Lab/LDC-MTL).

    Departures: the authors' scripts differ from each other. Some have a softmax, clamped to 0.2 and 0.8, in place of σ,
    take the weights as constants in the second term, or divide the losses by their first values; none of this is here.
    The θᵢ are no parameters of the model's optimizer, so that they are never decayed. Among absent tasks neighbours are
    those that are present.

    Args:
        optimizer: The torch optimizer that makes the step.
        penalty: λ ≥ 0.
        initial: θᵢ at the start.
        lr: Step size of the θᵢ. None: the learning rate of the first parameter group, as it is in each step.
        weight_optimizer: "adam" or "sgd".
        **switches: See :class:`gradsurgery.optimizer.MultiLossOptimizer`.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> w = torch.nn.Parameter(torch.tensor([2.0, 1.0]))
        >>> optimizer = gradsurgery.LDCMTLWeighter(torch.optim.SGD([w], lr=0.1), penalty=0.1)
        >>> {k: round(v, 3) for k, v in optimizer.backward({"class": w[0], "box": w[1]}).weights.items()}
        {'class': 0.573, 'box': 0.427}
    """

    stateful = True
    scale = "paper"

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        penalty: float = 0.05,
        initial: float = 1.0,
        lr: float | None = None,
        weight_optimizer: Literal["adam", "sgd"] = "adam",
        **switches: Unpack[Switches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.penalty = self.check.number("penalty", penalty, least=0.0)
        self.initial = self.check.number("initial", initial, least=-LOG_LIMIT, most=LOG_LIMIT)
        self.lr = None if lr is None else self.check.number("lr", lr, above=0.0)
        self.weight_optimizer = self.check.choice("weight_optimizer", weight_optimizer, ("adam", "sgd"))

    def weights(self, losses: np.ndarray) -> np.ndarray:
        theta = self.recall("theta", self.initial)
        shares = 1 / (1 + np.exp(-theta))
        factors = 1 / shares.sum() + self.penalty * self._signs(shares * losses)
        # Squares of the gradient are averaged.
        gradient = np.clip(shares * (1 - shares) * losses * factors, -1e150, 1e150)
        moved = self.descend("theta", theta, gradient, step_size(self, self.lr), self.weight_optimizer)
        self.keep("theta", np.clip(moved, -LOG_LIMIT, LOG_LIMIT))
        found = shares * factors
        if (found < 0).any():
            shown = dict(zip(self.names, found.tolist(), strict=True))
            self.warn_once(
                "negative",
                f"{self._name}: coefficients are negative, so that their losses are made to rise: {shown}. With "
                f"`penalty` below {1 / (2 * shares.sum()):.3g} none can be.",
            )
        return np.asarray(found)

    def _signs(self, terms: np.ndarray) -> np.ndarray:
        """Derivatives of Σ |tᵢ − tᵢ₊₁| in the order of the losses in the first call."""
        known = self.memory["tasks"]
        order = sorted(range(len(terms)), key=lambda i: known.index(self.names[i]))
        between = np.sign(terms[order][:-1] - terms[order][1:])
        signs = np.empty(len(terms))
        signs[order] = np.append(between, 0.0) - np.append(0.0, between)
        return signs
