"""Rows that are spread over the processes: each has the sum of one slice of the columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gradsurgery.communication.processes import Processes, all_gather, flattened, reduce_scatter
from gradsurgery.gradients import descent
from gradsurgery.gradients.base import Add, Gradients, Request, collect
from gradsurgery.gradients.exact import exactly
from gradsurgery.gradients.gram import Gram, Row, Table


class Sliced(Gradients):
    """Rows of one dtype, cut into slices.

    A row is sent as soon as it is found, while the next loss is differentiated. m rows and one direction travel,
    (m + 1) n numbers in all, where summing the rows everywhere would take twice m n.

    Args:
        request: What is wanted.
        comm: The processes.
    """

    engine = "slices"

    def __init__(self, request: Request, comm: Processes) -> None:
        super().__init__(request)
        self._processes = comm
        self._n = sum(p.numel() for p in self.shared)
        self._width = -(-self._n // comm.size)
        like = self.shared[0]
        self._rows = torch.empty(request.m, self._width, dtype=like.dtype, device=like.device)
        self._late: Tensor | None = None  # columns that turned out to be private
        self._there: list[list[int]] | None = None  # which losses reach which parameter, where that is known
        self._sent: list[tuple[Any, Tensor]] = []

    @classmethod
    def gather(cls, request: Request) -> Sliced | str:
        """Differentiate the losses, if the method needs no more than inner products.

        Args:
            request: What is wanted.

        Returns:
            The slices; an empty reason if rows are not sliced.
        """
        comm, shared = request.batch.comm, request.shared
        assert isinstance(comm, Processes)
        if not request.gram_only or not shared:
            return ""
        if len({(p.dtype, p.device) for p in shared}) > 1 or shared[0].is_complex():
            return ""
        found = cls(request, comm)
        found.marks = collect(request, found.private, found._arrive)
        return found

    def _arrive(self, i: int, row: Row) -> None:
        flat = self._rows.new_zeros(self._width * self._processes.size)
        flattened(row, self.shared, out=flat[: self._n])
        work = reduce_scatter(self._rows[i], flat, group=self._processes.group, async_op=True)
        self._sent.append((work, flat))
        while len(self._sent) > 2:
            self._sent.pop(0)[0].wait()

    def settle(
        self,
        there: Sequence[Sequence[int]],
        unreached: Sequence[tuple[int, int]],
        private: Sequence[int],
        idle: Sequence[int],
    ) -> None:
        while self._sent:
            self._sent.pop(0)[0].wait()
        gone = set(private)
        self._there = [[0 if j in gone else mark for j, mark in enumerate(row)] for row in there]
        if private:
            self._late = self._taken_out(set(private))

    def _taken_out(self, places: set[int]) -> Tensor:
        """Take the columns of some parameters out of the rows; returns them, and zero elsewhere."""
        inside = torch.zeros(self._width * self._processes.size, dtype=torch.bool)
        start = 0
        for j, p in enumerate(self.shared):
            if j in places:
                inside[start : start + p.numel()] = True
            start += p.numel()
        here = inside[self._processes.rank * self._width : (self._processes.rank + 1) * self._width]
        here = here.to(self._rows.device)
        out = torch.where(here, self._rows, 0)
        self._rows.masked_fill_(here, 0)
        return out

    def partition(self, parts: list[list[int]]) -> None:
        self.parts = parts
        self.tables = [Table(self._rows, self._processes)]

    def reaching(self, k: int) -> list[bool] | None:
        return None if self._there is None else list(map(any, self._there))

    @property
    def balances(self) -> bool:
        return self._there is None or sum(map(any, self._there)) > 1

    def hold(self, k: int, gram: Gram, weights: np.ndarray) -> descent.Direction | None:
        return descent.held(self.tables[k], gram.values, weights, [self._rows[0]])

    def combine(
        self,
        weights: Sequence[np.ndarray],
        factors: np.ndarray,
        held: Sequence[descent.Direction | None],
        add: Add,
    ) -> dict[Tensor, Tensor | None]:
        wide = torch.promote_types(self._rows.dtype, torch.float32)
        direction = held[0]
        with exactly(self._rows.device):
            if direction is None:
                part = torch.from_numpy(weights[0]).to(self._rows.device, wide) @ self._rows.to(wide)
            else:
                part = direction.flat
            if self._late is not None:
                part += torch.from_numpy(factors).to(self._rows.device, wide) @ self._late.to(wide)
        flat = self._rows.new_empty(self._width * self._processes.size)
        all_gather(flat, part.to(self._rows.dtype), group=self._processes.group)
        pieces = flat[: self._n].split([p.numel() for p in self.shared])
        found: dict[Tensor, Tensor | None] = {
            p: None if p in self.silent else piece.view(p.shape) for p, piece in zip(self.shared, pieces, strict=True)
        }
        return {**found, **self.private.combine(factors, self.comm)}
