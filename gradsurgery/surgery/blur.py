"""BLUR: forget first, and retain at a right angle to it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch.optim import Optimizer

from gradsurgery.surgery.base import SurgerySwitches
from gradsurgery.surgery.unlearning import Unlearning

if TYPE_CHECKING:
    from typing_extensions import Unpack


class BLUR(Unlearning):
    """Follow the forget gradient, and that part of the retain gradient which is orthogonal to it.

    With the forget gradient f and the retain gradient r, d = γ f + α (r − ⟨r, f⟩ / ‖f‖² · f), whether they conflict or
    not. So ⟨d, f⟩ = γ ‖f‖²: the forget loss falls as it would alone, to first order and up to the rounding of α r. The
    retained losses may rise. Where f is 0, d = α r. It is positively homogeneous.

    Paper: Reisizadeh et al., BLUR: A Bi-Level Optimization Approach for LLM Unlearning, EACL 2026, arXiv 2506.08164. γ
    and α as in the authors' code (OptimAI-Lab/BLURLLMUnlearning).

    Departures: the paper has one retained loss; of several, r is the sum. No epsilon is added to ‖f‖²; the 1e-10 of the
    code turns the direction by several per cent where gradients are of length 1e-5. Where the forget loss or all
    retained ones are absent the plain sum of the others is taken, γ and α aside; a report on several losses then has
    the flag "forget-absent".

    Args:
        optimizer: The optimizer that makes the step.
        forget: Name of the forget loss; by default the first one in the first call. It is minimised, as all losses are.
        gamma: γ > 0, multiplies the forget gradient.
        alpha: α > 0, multiplies the retain gradient.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`.

    Raises:
        TypeError: `forget` is no name.
        ValueError: An argument is out of range, or no loss of a call is called `forget`.

    Example:
        >>> rows = torch.tensor([[2.0, 0.0], [3.0, 1.0]])
        >>> gradsurgery.BLUR(torch.optim.SGD([torch.zeros(2)], lr=0.1)).combine(rows)
        tensor([2., 1.])
    """

    scale = "priority"

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        forget: str | None = None,
        gamma: float = 1.0,
        alpha: float = 1.0,
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        super().__init__(optimizer, forget=forget, **switches)
        self.gamma = self.check.number("gamma", gamma, above=0.0)
        self.alpha = self.check.number("alpha", alpha, above=0.0)

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        i = self.forget_row()
        weights = np.full(len(gram), self.alpha)
        if i is None or len(gram) == 1:
            return np.ones(len(gram))
        own, along = gram[i, i], np.delete(gram[i], i).sum()
        weights[i] = self.gamma - (self.alpha * along / own if own > 0 else 0.0)
        return weights
