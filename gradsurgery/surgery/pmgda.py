"""PMGDA: bring the losses to a preferred ray, then descend."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from torch.optim import Optimizer

from gradsurgery import geometry
from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PMGDA(Surgery):
    """Preference-based multiple gradient descent: correct the ratio of the losses first, and use MGDA once it is right.

    The losses should lie on the ray l ∝ λ, where λᵢ = 1/pᵢ for the user's priorities p. Their distance from it is
    h(l) = ‖l − ⟨l, λ̂⟩ λ̂‖, with gradient g_h = Σ qᵢ gᵢ, q = ∂h/∂l. Up to h ≤ h_eps ‖l‖ the direction is MGDA's. Beyond,
    it is d = Σ μᵢ ĝᵢ + μ_h ĝ_h, a combination of unit vectors on the simplex with the largest min_i ⟨gᵢ, d⟩ that still
    has ⟨ĝ_h, d⟩ ≥ σ (eq. 20, a linear program); the losses' weights are μᵢ/‖gᵢ‖ + μ_h qᵢ/‖g_h‖ (eq. 18).

    In MGDA mode no loss rises to first order. In correction mode (flag "correction") h falls, and losses may be *meant*
    to rise: weights can be negative. It is discontinuous between the modes. Where several corners of the program are
    equally good the choice is the solver's.

    Paper: Zhang, Lin & Zhang, PMGDA: A Preference-based Multiple Gradient Descent Algorithm, 2024, arXiv 2402.09492,
    with libmoon, the library of one of its authors.

    Departures: the tolerance is relative to ‖l‖, since losses come at any scale; the paper's is absolute. The paper's
    vector is λ itself; here a higher priority means a lower loss in every method. The paper's correction is at most 1
    long whatever the gradients are; by default it is multiplied by Σ ‖gᵢ‖, and MGDA's weights by m, so that a step
    grows with the gradients: m equal rows g give m·g, and −σ m·g where the way to the ray is up. Zero rows are left out
    of the minimum; where g_h is zero, and nothing can be corrected, MGDA follows (flag "no-correction").

    Args:
        optimizer: The optimizer that makes the step.
        h_eps: Distance from the ray, relative to ‖l‖, up to which the ratio counts as right; 0 < h_eps ≤ 1.
        sigma: σ in [0, 1], how closely a correction follows ĝ_h.
        scale: "sum": as described. "paper": MGDA's simplex weights, and corrections of length at most 1.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`. `preference` is p.

    Raises:
        ValueError: An argument is out of range.

    Example:
        >>> optimizer = gradsurgery.PMGDA(torch.optim.SGD([torch.zeros(2)], lr=0.1), sigma=1.0, scale="paper")
        >>> optimizer.combine(torch.tensor([[2.0, 0.0], [0.0, 2.0]]), losses=[4.0, 1.0])
        tensor([ 0.7071, -0.7071])
    """

    needs_losses = True
    preference_scales_rows = False

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        h_eps: float = 0.01,
        sigma: float = 0.95,
        scale: Literal["sum", "paper"] = "sum",
        **switches: Unpack[SurgerySwitches],
    ) -> None:
        super().__init__(optimizer, **switches)
        self.h_eps = self.check.number("h_eps", h_eps, above=0.0, most=1.0)
        self.sigma = self.check.number("sigma", sigma, least=0.0, most=1.0)
        self.scale = self.check.choice("scale", scale, ("sum", "paper"))
        self.degree = 1.0 if self.scale == "sum" else None

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        m = len(gram)
        preferences = self.preferences()
        ray = preferences.min() / preferences
        ray /= np.linalg.norm(ray)
        losses = losses / (np.abs(losses).max() or 1.0)  # whose squares are numbers
        off = losses - (losses @ ray) * ray
        distance = float(np.linalg.norm(off))
        if distance > self.h_eps * np.linalg.norm(losses):
            weights = self._correct(gram, off / distance)
            if weights is not None:
                return weights
        alpha, stationary = geometry.min_norm(gram, self.factor, noise=self.noise, flag=self.flag)
        if stationary:
            self.flag("stationary")
            return np.zeros(m)
        return alpha if self.scale == "paper" else m * alpha

    def _correct(self, gram: np.ndarray, q: np.ndarray) -> np.ndarray | None:
        """Weights of a step towards the ray; None if there is none."""
        m = len(gram)
        lengths = np.sqrt(gram.diagonal())
        if q @ gram @ q <= m * self.noise * float(np.abs(q) @ lengths) ** 2:
            rows = self.factor()
            tolerance = 16 * m * geometry.EPS if self.noise <= geometry.EPS else (m * geometry.EPS) ** 0.5
            if np.linalg.norm(q @ rows) <= tolerance * float(np.abs(q) @ lengths):
                self.flag("no-correction")
                return None
            gram = rows @ rows.T
        all_rows = np.vstack((np.eye(m), q))
        norms, cosines = geometry.unit(all_rows @ gram @ all_rows.T)
        used = np.flatnonzero(norms)  # the last one is g_h
        if norms[m] == 0:
            self.flag("no-correction")
            return None
        c, n = cosines[np.ix_(used, used)], norms[used[:-1]]
        # Variables μ and ω = ω⁺ − ω⁻: max ω with ⟨u_i, d⟩ ≥ ω n_min / n_i, ⟨ĝ_h, d⟩ ≥ σ.
        k = len(used)
        gain = np.append(np.zeros(k), (1.0, -1.0))
        worst = np.append(n.min() / n, 0.0)
        floors = np.append(np.zeros(k - 1), self.sigma)
        found = geometry.best_corner(gain, np.column_stack((c, -worst, worst)), floors, 1 - np.abs(gain), self.flag)
        # μ_h = 1 alone is always allowed, so that a failure is one of rounding.
        mu = np.eye(k)[-1] if found is None else found[:k]
        self.flag("correction")
        weights = np.zeros(m)
        weights[used[:-1]] = mu[:-1] / n
        weights += mu[-1] / norms[m] * q
        return weights if self.scale == "paper" else weights * lengths.sum()
