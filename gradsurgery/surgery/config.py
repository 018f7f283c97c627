"""ConFIG: equal cosines with all gradients, as long as their projections."""

from __future__ import annotations

import numpy as np

from gradsurgery import geometry
from gradsurgery.surgery.base import Surgery


class ConFIG(Surgery):
    """Follow the direction that has the same cosine with every gradient, as long as the sum of their projections on it.

    v = U⁺1 for the unit rows U, and d = (Σ ⟨gᵢ, v̂⟩) v̂ with v̂ = v/‖v‖ (eq. 2 and 3). Scaling single rows does not
    turn d, and repeated rows count once. Where the rows are independent no loss rises to first order: every cosine is
    1/‖v‖.

    Paper: Liu, Chu & Thuerey, ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks, ICLR 2025,
    arXiv 2408.11104.

    Departures: found from the Gram matrix, as y = C⁺1 and v = Σ yᵢuᵢ, with no shortcut for two rows. Linearly dependent
    rows are solved by least squares, for which common descent is *not* guaranteed (flag "rank-deficient"); where no
    equal positive cosines exist d is zero, with the flag "stationary". Zero rows are left out.

    Args:
        optimizer: The optimizer that makes the step.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
        >>> gradsurgery.ConFIG(torch.optim.SGD([torch.zeros(2)], lr=0.1)).combine(rows)
        tensor([2.5000, 2.5000])
    """

    preference_refused = "scaling a row does not turn the direction of equal cosines"

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        y, rank, degenerate = geometry.equal_projection(gram, self.factor, noise=self.noise, flag=self.flag)
        norms = np.sqrt(gram.diagonal())
        deficient = rank < np.count_nonzero(norms)
        if deficient:
            self.flag("rank-deficient")
        if degenerate:
            self.flag("stationary")
            return np.zeros_like(y)
        weights = np.divide(y, norms, out=np.zeros_like(y), where=norms > 0)
        if deficient:
            # Σ ⟨gᵢ, v⟩ from the rows: the y of nearly dependent ones magnify what the Gram matrix has lost.
            rows = self.factor()
            length = float((rows @ (weights @ rows)).sum())
        else:
            length = float(norms.sum())  # every ⟨uᵢ, v⟩ is 1
        return length / y.sum() * weights  # ‖v‖² = yᵀC y = 1ᵀy, since y = C⁺1
