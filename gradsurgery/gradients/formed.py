"""What the engines have in common that find inner products without keeping rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from torch import Tensor

from gradsurgery.gradients import descent
from gradsurgery.gradients.base import Add, Gradients, Marks, Request
from gradsurgery.gradients.dense import Dense
from gradsurgery.gradients.gram import Gram, Row, Table

#: Entries of all rows together below which these are always formed: it would take longer to look than that can spare.
FEW = 2**19
_TOO_FEW = f"fewer than {FEW} entries in all rows"


def are_few(shared: Sequence[Tensor], m: int) -> bool:
    """Whether rows are so short that nobody looks for anything cheaper.

    Args:
        shared: The shared parameters.
        m: Number of losses.

    Returns:
        True if so.
    """
    return m * sum([p.numel() for p in shared]) < FEW


class Unformed(Protocol):
    """A table whose rows are formed only when asked for."""

    shared: tuple[Tensor, ...]
    others: list[Row]

    def reached(self) -> list[int]: ...
    def row(self, i: int, place: int) -> Tensor | None: ...
    def whole(self) -> list[Row]: ...
    def drop(self, places: Sequence[int]) -> None: ...
    def combine(self, weights: Sequence[float]) -> list[Tensor | None]: ...


def refusal(request: Request) -> str:
    """Why rows are needed, whatever the model.

    Args:
        request: What is wanted.

    Returns:
        The reason, in words; empty if there is none.
    """
    batch = request.batch
    refused = (
        (request.puts_away, "`row_dtype` and `row_device` put rows away"),
        (request.engine == "rows", 'engine="rows" was asked for'),
        (not request.gram_only, "the method looks at the rows themselves"),
        (batch.accumulated is not None, "micro-batches are added up row by row"),
        (not batch.comm.is_alone, "several processes share the work"),
        (batch.masks is None or request.doubtful, "the graph cannot be read"),
        (request.engine == "auto" and are_few(request.shared, request.m), _TOO_FEW),
    )
    for so, why in refused:
        if so:
            return why
    return ""


class Formed(Gradients):
    """Gradients of which the inner products are known, and which are formed as a sum.

    Args:
        request: What is wanted.
        table: What has been found.
        engine: What the report calls it.
        reason: Why it was chosen.
    """

    def __init__(self, request: Request, table: Table, engine: str, reason: str) -> None:
        super().__init__(request)
        self.engine, self.reason = engine, reason
        self._found: Unformed = table  # type: ignore[assignment]
        self._table = table
        for i, row in enumerate(self._found.others):
            self.private.add(i, row)
        self._found.others = []
        masks = self._found.reached()
        there = [[mask >> i & 1 == 1 for mask in masks] for i in range(request.m)]
        self.marks = Marks(there, None, [True] * request.m)

    def settle(
        self,
        there: Sequence[Sequence[int]],
        unreached: Sequence[tuple[int, int]],
        private: Sequence[int],
        idle: Sequence[int],
    ) -> None:
        for place in private:
            terms = [(i, g) for i in range(self.request.m) if (g := self._found.row(i, place)) is not None]
            self.private.take(self.shared[place], terms)
        self._found.drop(private)
        gone = set(private)
        self.shared = [p for place, p in enumerate(self.shared) if place not in gone]

    def partition(self, parts: list[list[int]]) -> None:
        self.parts = parts
        self.tables = [self._table] if parts else []

    def reaching(self, k: int) -> list[bool] | None:
        rows: Sequence[Row] = self._table.rows  # type: ignore[assignment]
        return [any(g is not None for g in row) for row in rows]

    @property
    def balances(self) -> bool:
        return sum(self.reaching(0) or ()) > 1

    def inside(self, gram: Gram, weights: np.ndarray) -> tuple[Gradients, np.ndarray]:
        if not np.isfinite(weights).all() or descent.is_certain(self._table, gram.values, weights):
            return self, weights
        if (moved := descent.moved_inside(self._table, gram.values, weights)) is not None:
            return self, moved
        dense = Dense(self.request)
        dense.reason, dense.flags = "rounding could make a loss rise", self.flags
        dense.shared, dense.private = self.shared, self.private
        places = {p: place for place, p in enumerate(self._found.shared)}
        dense.rows = [[row[places[p]] for p in self.shared] for row in self._found.whole()]
        dense.partition(self.parts)
        for table in dense.tables:
            table.unit = gram.table.unit
        return dense, weights

    def combine(
        self,
        weights: Sequence[np.ndarray],
        factors: np.ndarray,
        held: Sequence[descent.Direction | None],
        add: Add,
    ) -> dict[Tensor, Tensor | None]:
        found: dict[Tensor, Tensor | None] = {}
        if weights:
            every = dict(zip(self._found.shared, self._found.combine(weights[0].tolist()), strict=True))
            found = {p: every[p] for p in self.shared}
        return {**found, **self.private.combine(factors, self.comm)}
