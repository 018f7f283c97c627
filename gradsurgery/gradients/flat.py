"""All rows of a small model in one matrix: few calls, whatever the number of layers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradsurgery.gradients import descent
from gradsurgery.gradients import rows as rows_module
from gradsurgery.gradients.base import Add, Request, collect
from gradsurgery.gradients.dense import Dense
from gradsurgery.gradients.gram import Gram, Table

# Entries of all rows together that are copied into one matrix. For more, one tensor per parameter costs no more calls
# than the copy, and twice the memory would show.
_MOST = 2**19


class Flat(Dense):
    """m rows over shared parameters that every loss reaches, one behind the other."""

    @classmethod
    def gather(cls, request: Request) -> Dense | str:
        """Differentiate the losses, if their rows may fit a small matrix.

        Args:
            request: What is wanted.

        Returns:
            The rows; an empty reason where they are too large or of several kinds.
        """
        if not _fits(request):
            return ""
        found = cls(request)
        found.marks = collect(request, found.private, found._arrive)
        whole = all(g is not None and not g.is_sparse for row in found.rows for g in row)
        return found if whole else Dense.of(found)

    def partition(self, parts: list[list[int]]) -> None:
        self.parts = parts
        entries = rows_module.joined([g for row in self.rows for g in row if g is not None])
        self._matrix = torch.from_numpy(entries.reshape(self.request.m, -1))
        self.rows, self.tables = [], [Table(self._matrix)]

    def reaching(self, k: int) -> list[bool] | None:
        return None

    @property
    def balances(self) -> bool:
        return True

    def hold(self, k: int, gram: Gram, weights: np.ndarray) -> descent.Direction | None:
        return descent.held(self.tables[k], gram.values, weights, [self._matrix])

    def combine(
        self,
        weights: Sequence[np.ndarray],
        factors: np.ndarray,
        held: Sequence[descent.Direction | None],
        add: Add,
    ) -> dict[Tensor, Tensor | None]:
        (w,), (direction,) = weights, held
        flat = rows_module.mixed(self._matrix, w) if direction is None else direction.flat.to(self._matrix)
        found: dict[Tensor, Tensor | None] = dict(
            zip(self.shared, rows_module.apart(flat.numpy(), self.shared), strict=True)
        )
        found.update(self.private.combine(factors, self.comm))
        return found


def _fits(request: Request) -> bool:
    """Whether all rows are of one kind and so short that a copy costs nothing that shows."""
    params = request.shared
    if request.doubtful or request.m < 2 or not params or not request.batch.comm.is_alone:
        return False
    kinds = {(p.dtype, p.device.type) for p in params}
    if len(kinds) > 1 or request.m * sum([p.numel() for p in params]) > _MOST:
        return False
    ((dtype, device),) = kinds
    return device == "cpu" and dtype in (torch.float32, torch.float64) and all(p.is_contiguous() for p in params)
