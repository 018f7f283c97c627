"""EPO: move to the Pareto point at which the weighted losses are equal."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch.optim import Optimizer

from gradsurgery import geometry
from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class EPO(Surgery):
    """Exact Pareto optimal search: balance the losses to rᵢ lᵢ = const, then descend along that ray.

    r are the user's priorities: at the end lᵢ is proportional to 1/rᵢ. With l̂ = r l / Σ r l the imbalance is μ =
    Σ l̂ᵢ log(m l̂ᵢ), and a = r (log(m l̂) − μ) is the change that lowers it. Weights α on the simplex solve one of two
    linear programs:

    * balance (μ > ε): max aᵀG α, subject to (G α)ⱼ ≥ 0 for the j with the largest rⱼ lⱼ, and to (G α)ⱼ ≥ (G a)ⱼ for the
      other j with (G a)ⱼ ≤ 0. If no (G a)ⱼ is positive: G α ≥ 0.
    * descent (otherwise): max 1ᵀG α, subject to G α ≥ 0 and aᵀG α ≥ min(maxⱼ (G a)ⱼ, 0).

    In descent mode no loss rises to first order. In balance mode losses below their share are *meant* to rise; the one
    that lies highest does not. The flag "balance" or "descent" tells the mode. Solutions are vertices of the feasible
    part of the simplex, so often few tasks move; where several vertices are equally good the choice is the solver's.
    The weights do not change when all gradients, or all losses, are multiplied by one number.

    Paper: Mahapatra & Rajan, Multi-Task Learning with User Preferences: Gradient Descent with Controlled Ascent in
    Pareto Optimization, ICML 2020, with the official code (`epo_lp.py`).

    Departures: α is multiplied by m ("mean" gives the paper's). The programs are written for unit rows, so that rows of
    very different lengths do not fall below the solver's tolerances. Where the second condition of descent cannot be
    met it is dropped (flag "relaxed", the official `relax=True`). Where α gives a zero direction, as on
    Pareto-stationary rows, the flag is "stationary". A zero row gets weight 0.

    Args:
        optimizer: The optimizer that makes the step.
        imbalance: ε, the largest μ that counts as balanced.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`. `preference` is r; the length of r counts too.

    Raises:
        ValueError: An argument is out of range, or a loss is not positive.

    Example:
        >>> optimizer = gradsurgery.EPO(torch.optim.SGD([torch.zeros(2)], lr=0.1), reduction="mean")
        >>> optimizer.combine(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), losses=[4.0, 1.0])
        tensor([1., 0.])
    """

    needs_losses = True
    preference_scales_rows = False

    def __init__(self, optimizer: Optimizer, *, imbalance: float = 1e-4, **switches: Unpack[SurgerySwitches]) -> None:
        super().__init__(optimizer, **switches)
        self.imbalance = self.check.number("imbalance", imbalance, least=0.0)

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        self.require_positive(losses, "their shares are compared by logarithms")
        m = len(gram)
        # The common factor of the priorities counts in the lower bounds alone, and products are to be numbers.
        top = float(self.preferences().max())
        preferences = self.preferences() / top
        weighted = preferences * (losses / losses.max())
        logs = np.log(m * weighted / weighted.sum())
        imbalance = float(weighted @ logs / weighted.sum())
        a = preferences * (logs - imbalance)
        norms, cosines = geometry.unit(gram)
        keep = np.flatnonzero(norms)
        if not len(keep):
            self.flag("stationary")
            return np.zeros(m)
        # In unit rows: α_i = v_i n_min / n_i, and products are divided by n_j n_min.
        n, c = norms[keep], cosines[np.ix_(keep, keep)]
        share = n.min() / n
        wanted = c @ (a[keep] * n)  # (G a)_j / n_j
        if imbalance > self.imbalance:
            self.flag("balance")
            with np.errstate(over="ignore"):  # −inf is no bound
                floors = top * (self._floors(wanted, weighted[keep]) / n.min())
            v = geometry.best_corner(wanted, c, floors, share, self.flag)
        else:
            self.flag("descent")
            floor = min(float((n * wanted).max()), 0.0) / n.min()
            v = geometry.best_corner(
                c.T @ n, np.vstack((c, wanted)), np.append(np.zeros(len(n)), floor), share, self.flag
            )
            if v is None:
                self.flag("relaxed")
                v = geometry.best_corner(c.T @ n, c, np.zeros(len(n)), share, self.flag)
        if v is None:
            self.flag("fallback")
            alpha = geometry.min_norm(gram[np.ix_(keep, keep)], noise=self.noise, flag=self.flag)[0]
            v = alpha / share
        point = float(v @ c @ v)
        if point <= m * self.noise * v.sum() ** 2:
            rows = self.factor()[keep] / n[:, None]
            tolerance = 16 * m * geometry.EPS if self.noise <= geometry.EPS else (m * geometry.EPS) ** 0.5
            if np.linalg.norm(v @ rows) <= tolerance * v.sum():
                self.flag("stationary")
                return np.zeros(m)
        weights = np.zeros(m)
        weights[keep] = m * v * share / (v @ share)
        return weights

    def _floors(self, wanted: np.ndarray, weighted: np.ndarray) -> np.ndarray:
        """Lower bounds of the products in balance mode, in unit rows."""
        if not (wanted > 0).any():
            return np.zeros(len(wanted))
        floors = np.where(wanted > 0, -np.inf, wanted)
        floors[weighted == weighted.max()] = 0.0
        return floors
