"""ConFIG: equal cosines with all gradients, as long as their projections."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch.optim import Optimizer

from gradsurgery import geometry
from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack

# What all row lengths are taken to be.
_LENGTHS = {
    "min": lambda n: n.min(),
    "max": lambda n: n.max(),
    "mean": lambda n: n.mean(),
    "harmonic": lambda n: n.min() / (n.min() / n).mean(),
    "geometric": lambda n: np.exp(np.log(n).mean()),
}


class ConFIG(Surgery):
    """Follow the direction that has the same cosine with every gradient, as long as the sum of their projections on it.

    v = U⁺1 for the unit rows U, and d = (Σ ⟨gᵢ, v̂⟩) v̂ with v̂ = v/‖v‖ (eq. 2 and 3). Scaling single rows does not
    turn d, and repeated rows count once. Where the rows are independent no loss rises to first order: every cosine is
    1/‖v‖. With another `length` d = L (Σ cos(gᵢ, v̂)) v̂: every row counts as if it had the length L.

    Paper: Liu, Chu & Thuerey, ConFIG: Towards Conflict-free Training of Physics Informed Neural Networks, ICLR 2025,
    arXiv 2408.11104.

    Departures: found from the Gram matrix, as y = C⁺1 and v = Σ yᵢuᵢ, with no shortcut for two rows. Linearly dependent
    rows are solved by least squares, for which common descent is *not* guaranteed (flag "rank-deficient"); where no
    equal positive cosines exist d is zero, with the flag "stationary". Zero rows are left out, of the mean lengths
    too; the authors' code (conflictfree) gives nan there.

    Args:
        optimizer: The optimizer that makes the step.
        length: "projection", as above, or which L to take: the "min", "max", "mean", "harmonic" mean or "geometric"
            mean of the row lengths, or the length of the row of one loss, by its name. With "min" d is no longer than m
            times the shortest row. Where the loss named is absent "projection" is taken, with the flag "length-absent".
        **switches: See :class:`gradsurgery.surgery.base.Surgery`.

    Raises:
        TypeError: `length` is no word.
        ValueError: No loss of a call has the name `length`.

    Example:
        >>> rows = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
        >>> gradsurgery.ConFIG(torch.optim.SGD([torch.zeros(2)], lr=0.1)).combine(rows)
        tensor([2.5000, 2.5000])
    """

    preference_refused = "scaling a row does not turn the direction of equal cosines"

    def __init__(
        self, optimizer: Optimizer, *, length: str = "projection", **switches: Unpack[SurgerySwitches]
    ) -> None:
        super().__init__(optimizer, **switches)
        if not isinstance(length, str):
            raise TypeError(
                f"{self._name}: `length` must be one of {['projection', *_LENGTHS]} or the name of a loss, got "
                f"{length!r}."
            )
        self.length = length

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        y, rank, degenerate = geometry.equal_projection(gram, self.factor, noise=self.noise, flag=self.flag)
        norms = np.sqrt(gram.diagonal())
        counted = self._lengths(norms)
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
            projections = rows @ (weights @ rows)
            length = float(np.divide(projections * counted, norms, out=np.zeros_like(y), where=norms > 0).sum())
        else:
            length = float(counted.sum())  # every ⟨uᵢ, v⟩ is 1
        return length / y.sum() * weights  # ‖v‖² = yᵀC y = 1ᵀy, since y = C⁺1

    def _lengths(self, norms: np.ndarray) -> np.ndarray:
        """How long each row counts, (m,); a zero row does not."""
        named, moving = self.length not in ("projection", *_LENGTHS), norms > 0
        if named and self.length not in self.all_names:
            raise ValueError(
                f"{self._name}: `length` must be one of {['projection', *_LENGTHS]} or the name of a loss, one of "
                f"{list(self.all_names)}, got {self.length!r}."
            )
        if named and self.length not in self.names:
            self.flag("length-absent")
            return norms
        if self.length == "projection" or not moving.any():
            return norms
        if self.length in _LENGTHS:
            return moving * _LENGTHS[self.length](norms[moving])
        return moving * norms[self.names.index(self.length)]
