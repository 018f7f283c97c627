"""DB-MTL: logarithms of the losses, and averaged gradients of equal length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from torch.optim import Optimizer

from gradsurgery.gradients import rows as rows_module
from gradsurgery.surgery.base import Surgery, SurgerySwitches

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DBMTL(Surgery):
    """Average the gradients of the logarithms of the losses, and add them up at the length of the longest.

    With rows gᵢ/lᵢ, averages yᵢ ← (1 − β_k) gᵢ/lᵢ + β_k yᵢ with β_k = β / k^σ, and d = maxⱼ ‖yⱼ‖ Σ yᵢ/‖yᵢ‖.

    Multiplying a loss by a constant changes nothing, over a whole run. Losses may rise to first order, except that with
    two tasks and β = 0 none does. Every loss must be positive. A zero row is left out.

    Paper: Lin et al., Dual-Balancing for Multi-Task Learning, 2023, arXiv 2308.12029; β and σ as in LibMTL, by its
    authors.

    Departures: averages are corrected for their start at zero, as in Adam; the authors' are not, which shortens the
    first steps tenfold. Nothing is added to the losses or lengths before dividing. Private parameters get the plain
    gradient of their loss; ``log_losses=True`` divides theirs by the loss too, as the authors' code does.

    Args:
        optimizer: The optimizer that makes the step.
        beta: β, weight of the past, 0 ≤ β < 1. 0 keeps no average.
        sigma: σ ≥ 0, how fast β falls. k counts the steps in which the task was present.
        **switches: See :class:`gradsurgery.surgery.base.Surgery`. `preference` multiplies the terms of the sum. The
            direction is not made of this step's gradients, so switches that need weights are refused.

    Raises:
        ValueError: An argument is out of range, or a loss is not positive.

    Example:
        >>> rows = torch.tensor([[2.0, 0.0], [0.0, 8.0]])
        >>> gradsurgery.DBMTL(torch.optim.SGD([torch.zeros(2)], lr=0.1)).combine(rows, losses=[1.0, 2.0])
        tensor([4., 4.])
    """

    stateful = True
    observes = True
    needs_losses = True
    has_weights = False
    scale = "paper"
    preference_scales_rows = False

    def __init__(
        self, optimizer: Optimizer, *, beta: float = 0.9, sigma: float = 0.0, **switches: Unpack[SurgerySwitches]
    ) -> None:
        super().__init__(optimizer, **switches)
        self.beta = self.check.number("beta", beta, least=0.0, below=1.0)
        self.sigma = self.check.number("sigma", sigma, least=0.0)

    def _require_together(self) -> None:
        super()._require_together()
        if self.normalize != "none":
            raise ValueError(f"{self._name}: `normalize` has no effect here, since the method does it itself.")

    def observe(
        self, rows: list[rows_module.Row], losses: Sequence[Tensor], params: Sequence[Tensor]
    ) -> list[rows_module.Row]:
        counts = self.recall("count", 0.0) + 1
        betas = self.beta / counts**self.sigma
        corrections = 1 - betas + betas * self.recall("correction", 0.0)
        self.keep("count", counts)
        self.keep("correction", corrections)
        averages = []
        for name, row, loss, beta, c in zip(self.names, rows, losses, betas, corrections, strict=True):
            before = self.row_state("average", name, params)
            for j, y in enumerate(before):
                g = row[j]
                if g is not None:
                    g = g * (1 - beta)
                    if not self.log_losses:  # a loss that is not positive is refused in `weights`
                        g /= loss.where(loss > 0, 1).to(g.device)
                row[j] = g if y is None else y * beta if g is None else g.add_(y, alpha=beta)
            self.keep_row("average", name, row, params)
            averages.append([None if y is None else y / c for y in row])
        return averages

    def weights(self, gram: np.ndarray, losses: np.ndarray) -> np.ndarray:
        if not self.log_losses:
            self.require_positive(losses, "the method takes its logarithm")
        lengths = np.sqrt(gram.diagonal())
        return lengths.max() * np.divide(self.preferences(), lengths, out=np.zeros_like(lengths), where=lengths > 0)
