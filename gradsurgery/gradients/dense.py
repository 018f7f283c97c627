"""Rows as autograd made them, one tensor per parameter and loss."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradsurgery.communication import shards
from gradsurgery.gradients import descent
from gradsurgery.gradients import rows as rows_module
from gradsurgery.gradients.base import Add, Gradients, Request, collect
from gradsurgery.gradients.gram import Gram, Row, Table, precision


class Dense(Gradients):
    """m rows over the shared parameters.

    Args:
        request: What is wanted.

    Attributes:
        rows: The rows, (m,); a method may have replaced them, and may have added others.
    """

    def __init__(self, request: Request) -> None:
        super().__init__(request)
        self.rows: list[Row] = []

    @classmethod
    def gather(cls, request: Request) -> Dense | str:
        """Differentiate the losses.

        Args:
            request: What is wanted.

        Returns:
            The rows; an empty reason where they are held in another way.
        """
        found = cls(request)
        found.marks = collect(request, found.private, found._arrive)
        return found

    @classmethod
    def of(cls, other: Dense) -> Dense:
        """Hold rows that were found for another way of holding them.

        Args:
            other: The other way.

        Returns:
            The same rows.
        """
        found = cls(other.request)
        found.rows, found.private, found.marks, found.flags = other.rows, other.private, other.marks, other.flags
        return found

    def _arrive(self, i: int, row: Row) -> None:
        self.rows.append(row if self.request.gram_only else list(map(real, row)))

    def settle(
        self,
        there: Sequence[Sequence[int]],
        unreached: Sequence[tuple[int, int]],
        private: Sequence[int],
        idle: Sequence[int],
    ) -> None:
        for i, j in unreached:
            self.rows[i][j] = None
        for j in sorted(private, reverse=True):
            p = self.shared[j]
            terms = [(i, g) for i, row in enumerate(self.rows) if (g := self._entry(row.pop(j), p)) is not None]
            self.private.take(self.shared.pop(j), terms)
        if idle:
            gone = {j - sum(k < j for k in private) for j in idle}
            left = [j for j in range(len(self.shared)) if j not in gone]
            self.shared = [self.shared[j] for j in left]
            self.rows = [[row[j] for j in left] for row in self.rows]
        like = [self.request.stand_in(p) for p in self.shared]
        self.rows = [self.comm.totals(row, like) for row in self.rows]

    def _entry(self, g: Tensor | None, p: Tensor) -> Tensor | None:
        return whole(g, p)

    def replace(self, rows: list[Row]) -> None:
        """Go on with what a method has made of the rows.

        Args:
            rows: The rows.
        """
        self.rows = rows

    def partition(self, parts: list[list[int]]) -> None:
        self.parts = parts
        self.tables = [self._table(part) for part in parts]

    def _table(self, part: Sequence[int]) -> Table:
        return Table([[row[j] for j in part] for row in self.rows])

    def products(self) -> list[Tensor]:
        # All processes have the rows whole, and one of them counts.
        if all(map(self.comm.counts, self.shared[:1])):
            return super().products()
        return [torch.zeros(len(table), len(table), dtype=torch.float64) for table in self.tables]

    def reaching(self, k: int) -> list[bool] | None:
        return [any(row[j] is not None for j in self.parts[k]) for row in self.rows[: self.request.m]]

    @property
    def balances(self) -> bool:
        return sum(any(g is not None for g in row) for row in self.rows) > 1

    def hold(self, k: int, gram: Gram, weights: np.ndarray) -> descent.Direction | None:
        params = [self.request.stand_in(self.shared[j]) for j in self.parts[k]]
        return descent.held(self.tables[k], gram.values, weights, params)

    def combine(
        self,
        weights: Sequence[np.ndarray],
        factors: np.ndarray,
        held: Sequence[descent.Direction | None],
        add: Add,
    ) -> dict[Tensor, Tensor | None]:
        found: dict[Tensor, Tensor | None] = {}
        self.tables = []  # nothing else may hold the rows
        for part, w, direction in zip(self.parts, weights, held, strict=True):
            if direction is None:
                self._add_up(part, w.tolist(), add, found)
                continue
            pieces = direction.split([shards.empty(self.shared[j]) for j in part])
            found.update(zip([self.shared[j] for j in part], pieces, strict=True))
        self.rows = []
        return {**found, **self.private.combine(factors, self.comm)}

    def _add_up(self, part: Sequence[int], weights: list[float], add: Add, found: dict[Tensor, Tensor | None]) -> None:
        """Add up the rows of a group: small parameters together, if that is all there is to do."""
        left = self._add_small(part, weights, found) if self.request.gram_only else part
        for j in left:
            column = self._column(j)
            found[self.shared[j]] = add(column[: len(weights)], weights, self.shared[j])

    def _column(self, j: int) -> list[Tensor | None]:
        """The entries of one parameter, which leave the rows: there are never more than m rows and one parameter."""
        column = [row[j] for row in self.rows]
        for row in self.rows:
            row[j] = None
        return column

    def _add_small(
        self, part: Sequence[int], weights: list[float], found: dict[Tensor, Tensor | None]
    ) -> Sequence[int]:
        rows, done = self.rows[: len(weights)], set()
        for group in rows_module.together([[row[j] for j in part] for row in rows], [self.shared[j] for j in part]):
            places = [part[k] for k in group]
            sums = rows_module.combine_together([[row[j] for j in places] for row in rows], weights)  # type: ignore[misc]
            found.update(zip([self.shared[j] for j in places], sums, strict=True))
            for j in places:
                self._column(j)
            done.update(places)
        return [j for j in part if j not in done]


class Offloaded(Dense):
    """Rows that wait for the others in another precision or on another device."""

    def _arrive(self, i: int, row: Row) -> None:
        if rows_module.store(row, self.request.row_dtype, self.request.row_device):
            self.flags = ["rounded-rows"]
        super()._arrive(i, row)

    def _entry(self, g: Tensor | None, p: Tensor) -> Tensor | None:
        return rows_module.restored(whole(g, p), p)

    def _add_small(
        self, part: Sequence[int], weights: list[float], found: dict[Tensor, Tensor | None]
    ) -> Sequence[int]:
        return part


class Sharded(Dense):
    """Local pieces of rows whose parameters are spread over processes."""

    def _table(self, part: Sequence[int]) -> Table:
        params = [self.shared[j] for j in part]
        counted = list(map(self.comm.counts, params))
        rows = [[row[j] if mark else None for j, mark in zip(part, counted, strict=True)] for row in self.rows]
        return Table(rows, self.comm, precision([[shards.empty(p) for p in params]], double=True))

    def products(self) -> list[Tensor]:
        return [table.products() for table in self.tables]

    def hold(self, k: int, gram: Gram, weights: np.ndarray) -> descent.Direction | None:
        params = [self.shared[j] for j in self.parts[k]]
        local = [[row[j] for j in self.parts[k]] for row in self.rows]
        counted = list(map(self.comm.counts, params))
        like = [self.request.stand_in(p) for p in params]
        return descent.held(self.tables[k], gram.values, weights, like, rows=local, counted=counted)

    def _add_small(
        self, part: Sequence[int], weights: list[float], found: dict[Tensor, Tensor | None]
    ) -> Sequence[int]:
        return part


def real(g: Tensor | None) -> Tensor | None:
    """Complex entries as pairs of reals, for the methods that look at entries.

    Args:
        g: An entry of a row.

    Returns:
        The same, or a view of it.
    """
    if g is None or not g.is_complex():
        return g
    return torch.view_as_real(g.to_dense().resolve_conj())


def whole(g: Tensor | None, p: Tensor) -> Tensor | None:
    """The way back: complex entries of a complex parameter.

    Args:
        g: An entry of a row.
        p: Its parameter.

    Returns:
        The same, or a view of it.
    """
    return torch.view_as_complex(g) if g is not None and p.is_complex() and not g.is_complex() else g
