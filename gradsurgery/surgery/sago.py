"""SAGO: forget only in coordinates where that does not undo what is retained."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.gradients import rows as rows_module
from gradsurgery.surgery.base import SurgerySwitches
from gradsurgery.surgery.unlearning import Unlearning

if TYPE_CHECKING:
    from typing_extensions import Unpack


class SAGO(Unlearning):
    """In every coordinate follow the forget gradient, or the retain gradient where their signs differ.

    With the forget gradient f and the retain gradient r, in each coordinate: α r where f r < 0, and γ f elsewhere; with
    `prefer_retain` γ f + α r elsewhere. So ⟨d, r⟩ ≥ 0: the retained losses do not rise in sum, to first order. The
    forget loss may. It is positively homogeneous.

    Pitfall: a coordinate in which f is 0 counts as one of agreement, so that what only the retained losses move gets
    no update. `prefer_retain` moves it.

    Paper: Modeling LLM Unlearning as an Asymmetric Two-Task Learning Problem, ACL 2026, arXiv 2604.14808. The rule, and
    γ = α = 1, are those of the authors' code (sustech-nlp/SAGO).

    Departures: the paper has one retained loss; of several, r is the sum. A forget gradient that is zero altogether is
    left out, which gives α r. Where the forget loss or all retained ones are absent, or do not reach a parameter, it
    gets the plain sum of the others, γ and α aside; a report on several losses then has the flag "forget-absent".

    Args:
        optimizer: The optimizer that makes the step.
        forget: Name of the forget loss; by default the first one in the first call. It is minimised, as all losses are.
        gamma: γ > 0, multiplies the forget gradient.
        alpha: α > 0, multiplies the retain gradient.
        prefer_retain: Keep the retain gradient in coordinates of agreement, too. m equal gradients then give their sum.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`. It has no weights, so those that need them are
            refused.

    Raises:
        TypeError: `forget` is no name.
        ValueError: An argument is out of range, or no loss of a call is called `forget`.

    Example:
        >>> rows = torch.tensor([[1.0, -2.0, 0.0], [3.0, 4.0, 5.0]])
        >>> gradsurgery.SAGO(torch.optim.SGD([torch.zeros(3)], lr=0.1)).combine(rows)
        tensor([1., 4., 0.])
    """

    has_weights = False
    scale: Literal["sum", "priority"] = "priority"

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        forget: str | None = None,
        gamma: float = 1.0,
        alpha: float = 1.0,
        prefer_retain: bool = False,
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        super().__init__(optimizer, forget=forget, **switches)
        self.gamma = self.check.number("gamma", gamma, above=0.0)
        self.alpha = self.check.number("alpha", alpha, above=0.0)
        self.prefer_retain = self.check.choice("prefer_retain", prefer_retain, (False, True))
        if self.prefer_retain:
            self.scale = "sum"

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        self.forget_row()
        return np.where(gram.diagonal() > 0, 1.0, 0.0)

    def direct(
        self, column: Sequence[Tensor | None], applied: Sequence[float], like: Tensor, share: float
    ) -> Tensor | None:
        i = self.forget_row()
        f = None if i is None else column[i]
        others = [None if j == i else g for j, g in enumerate(column)]
        # Signs are those of rows before what multiplies all of them, and products of signs: entries may underflow.
        most = max((abs(w) for j, w in enumerate(applied) if j != i), default=0.0) or 1.0
        signs = rows_module.combine_wide(others, [w / most for w in applied], like)
        if i is None or f is None or signs is None:
            return rows_module.combine(column, applied, like)
        r = signs * most
        if applied[i] == 0:
            return rows_module.combine([r], [self.alpha], like)
        f = rows_module.wide(f)
        opposed = f.sign() * signs.sign() * math.copysign(1.0, applied[i]) < 0
        f = f * applied[i]
        followed = self.gamma * f + self.alpha * r if self.prefer_retain else self.gamma * f
        d = torch.where(opposed, self.alpha * r, followed)
        # What has overflowed has no sign, and is told of later.
        return rows_module.combine([torch.where(r.isfinite(), d, r)], [1.0], like)
