"""DCGD: a direction in the dual cone of two gradients."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Literal

import numpy as np
from torch.optim import Optimizer

from gradsurgery.geometry import EPS
from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DCGD(Surgery):
    """Dual cone gradient descent for two groups of losses, such as the equation and the boundary of a physics problem.

    The losses of each group are added up. With the gradients a and b of the two sums and s = a + b, "center" follows
    the bisector of a and b, with the length of the projection of s on it: c = â + b̂, d = ⟨c, s⟩ / ‖c‖² · c, which is
    (‖a‖ + ‖b‖)/2 · (â + b̂). "projection" is s if ⟨s, a⟩ ≥ 0 and ⟨s, b⟩ ≥ 0; otherwise s without its part along the one
    that it opposes. "average" is s in the same case; otherwise the mean of s without its part along a, and s without
    its part along b.

    The sum of neither group rises to first order. A single loss of a group of several may. It is positively
    homogeneous. With two losses "center" is ConFIG and "projection" is DualProj.

    Paper: Hwang & Lim, Dual Cone Gradient Descent for Training Physics-Informed Neural Networks, NeurIPS 2024, arXiv
    2409.18426, with its official code.

    Departures: no ε in the norms. Where the groups oppose each other exactly d is zero, with the flag "stationary";
    where the gradient of one group is zero, or the group is absent, the plain sum is taken, with the flag "one-group".

    Args:
        optimizer: The optimizer that makes the step.
        variant: "center", "projection" or "average".
        first_group: Names of the losses of one group (the official `num_pde` first ones); the others make up the
            second. By default the first loss of the call against all others.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`.

    Raises:
        ValueError: An argument is out of range, or a name in `first_group` is that of no loss.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        >>> gradsurgery.DCGD(torch.optim.SGD([torch.zeros(2)], lr=0.1)).combine(rows)
        tensor([2., 2.])
    """

    descends = 2

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        variant: Literal["center", "projection", "average"] = "center",
        first_group: str | Collection[str] | None = None,
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.variant = self.check.choice("variant", variant, ("center", "projection", "average"))
        self.first_group = (first_group,) if isinstance(first_group, str) else first_group
        self.check.by_order = self.check.by_order or first_group is None

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        m = len(gram)
        in_first = self._in_first()
        groups = np.array([in_first, ~in_first], dtype=np.float64)
        pair = groups @ gram @ groups.T
        lengths, terms = np.sqrt(np.maximum(pair.diagonal(), 0.0)), groups @ np.sqrt(gram.diagonal())
        tolerance = 100 * (m * self.noise) ** 0.5
        # A group that cancels, or two that oppose each other, may be all rounding: then the rows decide.
        if (lengths <= tolerance * terms).any() or pair[0, 1] <= (tolerance**2 - 1) * lengths.prod():
            rows = groups @ self.factor()
            pair, lengths = rows @ rows.T, np.sqrt(np.einsum("ij,ij->i", rows, rows))
            tolerance = 16 * m * EPS if self.noise <= EPS else (m * EPS) ** 0.5
            if (lengths <= tolerance * terms).any():
                self.flag("one-group")
                return np.ones(m)
            if np.linalg.norm((rows / lengths[:, None]).sum(axis=0)) <= 4 * tolerance:
                self.flag("stationary")
                return np.zeros(m)
        squares, dot = lengths * lengths, float(pair[0, 1])
        if self.variant == "center":
            both = lengths.sum() / (2 * lengths)
        else:
            both = np.ones(2)
            against = dot + squares < 0  # ⟨s, a⟩, ⟨s, b⟩
            if against.any():
                # s without its part along a is b − ⟨a, b⟩ / ‖a‖² a, and the other way round.
                both = (1 - dot / squares) / 2
                if self.variant == "projection":
                    both = np.where(against, -dot / squares, 1.0)
        return np.asarray(both @ groups)

    def _in_first(self) -> np.ndarray:
        names = self.all_names
        group = self.order[:1] if self.first_group is None else self.first_group
        unknown = [name for name in group if name not in names]
        if unknown:
            raise ValueError(
                f"{self._name}: `first_group` must name losses, some of {list(names)}, got {unknown}. "
                "Pass the losses as a dict with these names."
            )
        return np.array([name in group for name in self.names])
