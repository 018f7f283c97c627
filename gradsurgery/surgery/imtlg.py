"""IMTL-G: equal projections on all gradients."""

from __future__ import annotations

import numpy as np

from gradsurgery import geometry
from gradsurgery.surgery.base import Surgery


class IMTLG(Surgery):
    """Follow the direction whose projections on all unit gradients are equal.

    ⟨d, uᵢ⟩ is the same for every task, and the weights sum to m (to 1 in the paper, and under ``reduction="mean"``).
    With C the cosine matrix and y = C⁺1, wᵢ ∝ yᵢ/‖gᵢ‖: the paper's closed form (eq. 5) in a shape that holds for every
    rank. The direction is that of ConFIG; only the length differs. Scaling single rows changes the length alone, and
    repeated rows count once.

    It is *not* a common-descent method in the paper's form: where the weights sum to a negative number, dividing by the
    sum turns the direction round, so that every loss rises. Here the sign stays positive. The length still grows
    without bound as the sum approaches zero.

    Paper: Liu et al., Towards Impartial Multi-task Learning, ICLR 2021, section 3.1.

    Departures: positive sign, as said. Zero rows get weight 0. Rows that are linearly dependent are solved by least
    squares and flagged "rank-deficient"; where no equal positive projections exist the direction is zero, with the flag
    "stationary", and where the weights sum to nothing but rounding it is zero too, with the flag "degenerate". The
    paper's loss balance (IMTL-L) is ``IMTLLWeighter``, which can be put inside.

    Args:
        optimizer: The optimizer that makes the step.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
        >>> gradsurgery.IMTLG(torch.optim.SGD([torch.zeros(2)], lr=0.1)).combine(rows)
        tensor([1.6000, 1.6000])
    """

    preference_refused = "scaling a row does not change where its projection equals the others"

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        y, rank, degenerate = geometry.equal_projection(
            gram, self.factor, by_length=True, noise=self.noise, flag=self.flag
        )
        norms = np.sqrt(gram.diagonal())
        if rank == len(gram):
            weights = y / norms
        else:
            if rank < np.count_nonzero(norms):
                self.flag("rank-deficient")
            weights = np.divide(y, norms, out=np.zeros_like(y), where=norms > 0)
        if degenerate:
            self.flag("stationary")
            return np.zeros_like(y)
        total = abs(float(weights.sum()))
        if total <= len(gram) * geometry.EPS * float(np.abs(weights).sum()):
            self.flag("degenerate")
            return np.zeros_like(y)
        return weights * (len(gram) / total)
