"""Weights that are known before the parameters are reached: one or two passes for all losses together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from gradsurgery.gradients.base import Add, Gradients, Request
from gradsurgery.gradients.descent import Direction
from gradsurgery.gradients.gram import Table


class OnePass(Gradients):
    """Nothing but a weighted sum; what is measured, if anything, are the rows at the features."""

    engine = "one pass"
    is_unseen = True

    @classmethod
    def gather(cls, request: Request) -> OnePass:
        """Differentiate down to the features, if there are any.

        Args:
            request: What is wanted.

        Returns:
            What is known before the pass.

        Raises:
            RuntimeError: A loss does not reach the features.
        """
        found = cls(request)
        if request.solves and request.shared:
            batch = request.batch
            rows = list(batch.rows_at(batch.features, whole=False))
            for name, row in zip(batch.names, rows, strict=True):
                if all(g is None for g in row) and batch.comm.is_alone:
                    raise RuntimeError(f"{batch.owner}.backward: loss {name!r} does not reach `features`.")
            found.tables = [Table(rows, batch.comm)]
        return found

    def peaks(self) -> list[Tensor]:
        return []

    def largest_weights(self) -> np.ndarray | float:
        return self.request.batch.largest_weights()

    def combine(
        self, weights: Sequence[np.ndarray], factors: np.ndarray, held: Sequence[Direction | None], add: Add
    ) -> dict[Tensor, Tensor | None]:
        batch, plain = self.request.batch, self.private.params
        applied = weights[0] if weights else factors
        if all(np.array_equal(w, factors) for w in weights):
            targets = [*self.shared, *plain]
            return dict(zip(targets, batch.one_pass(factors, targets, last=True), strict=True))
        found = batch.one_pass(applied, self.shared, last=not plain)
        found += batch.one_pass(factors, plain, last=True)
        return dict(zip([*self.shared, *plain], found, strict=True))
