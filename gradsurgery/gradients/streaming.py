"""Gradients of a method that has no rows: each is added to the sum of those before as soon as it is there."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gradsurgery import geometry
from gradsurgery.communication import host
from gradsurgery.gradients import descent
from gradsurgery.gradients import rows as rows_module
from gradsurgery.gradients.base import Add, Gradients, Request, Stream
from gradsurgery.gradients.gram import Row, Table


class Streaming(Gradients):
    """PCGrad between the sum so far and the next gradient, loss after loss.

    The sum and one gradient are all that is held. Each loss costs one small transfer to the host, which decides what
    happens to its gradient.

    Args:
        request: What is wanted.
        stream: What the method has to say.
    """

    engine = "streaming"

    def __init__(self, request: Request, stream: Stream) -> None:
        super().__init__(request)
        m = request.m
        self.reason = "streaming=True was asked for"
        self.solved, self.norms = np.ones(m), np.zeros(m)
        self.reached = [False] * m
        self._stream = stream
        self._learns, self._priorities = stream.learns, stream.priorities
        self._sum: Row = [None] * len(self.shared)
        self._size = 0.0  # of all that was added up
        self._seen = np.zeros(m, dtype=bool)

    @classmethod
    def gather(cls, request: Request) -> Streaming:
        """Differentiate the losses and add them up.

        Args:
            request: What is wanted.

        Returns:
            The sum.

        Raises:
            RuntimeError: Which parameters are shared cannot be known before the first pass.
        """
        assert request.stream is not None
        batch = request.batch
        if batch.masks is None and not request.named:
            raise RuntimeError(
                f"{batch.owner}.backward: streaming=True has to know before the first pass which parameters are "
                "shared, and the graph does not tell: it hides them behind reentrant activation checkpointing, or is "
                "too deep to be walked. Name them in `shared_params`."
            )
        found = cls(request, request.stream)
        # A graph may be needed again by a loss that comes earlier in the list.
        if list(request.stream.order) != sorted(request.stream.order):
            batch.retain = [batch.retain_graph or overlaps for overlaps in batch.graph.overlaps]
        for i, row in batch.rows([*request.shared, *request.plain], request.stream.order):
            found._add(i, row)
        found._leave_alone()
        return found

    def _add(self, i: int, row: Row) -> None:
        """Project the sum and the gradient of one loss off each other, add them up, and free the gradient."""
        assert self.solved is not None
        assert self.norms is not None
        assert self.reached is not None
        self.reached[i] = any(g is not None for g in row)
        fresh = row[: len(self.shared)]
        self.private.add(i, row[len(self.shared) :])
        row.clear()
        table = Table([self._sum, fresh] if self._seen.any() else [fresh])
        (peak,), flat = host([self.private.peak(i), table.products()])
        products = table.repaired(flat.reshape(len(table), -1))
        table.require_squares(self.request.batch.owner)
        own_square = products[-1, -1]
        if not np.isfinite([peak, own_square]).all():
            self._learns = False
        self.norms[i] = table.unit * np.sqrt(own_square)
        if all(g is None for g in fresh):
            return
        before, own = 1.0, float(self._priorities[i])
        if self._seen.any() and self._learns:
            least = (4 * table.noise * self._size / table.unit) ** 2
            first, product = products[0, 0].item(), products[0, 1].item()
            before, own = geometry.pcgrad_of_two(first, product, own_square.item(), least, own)
        self._size = before * self._size + own * float(self.norms[i])
        with np.errstate(over="ignore"):  # an infinite weight is told of later
            self.solved[self._seen] *= before
        self.solved[i], self._seen[i] = own, True
        held = None
        if self.request.m == 2 and self._seen.all() and self._learns and self._stream.promises:  # those of PCGrad
            held = descent.held(
                Table([self._sum, fresh], unit=table.unit), products, np.array([before, own]), self.shared
            )
        del table
        if held is None:
            _add(self._sum, fresh, before, own, self.shared)
            return
        self._sum = held.split(self.shared)
        if not held.descends:
            self.flags.append("loss-may-rise")

    def _leave_alone(self) -> None:
        """Where one loss alone reaches the parameters there is nothing to balance: its priority does not act."""
        assert self.solved is not None
        if self._seen.sum() == 1:
            only = float(self.solved[self._seen][0])
            self._sum = [s if s is None or only == 1.0 else s.div_(only) for s in self._sum]
            self.solved[self._seen] = 1.0

    def combine(
        self,
        weights: Sequence[np.ndarray],
        factors: np.ndarray,
        held: Sequence[descent.Direction | None],
        add: Add,
    ) -> dict[Tensor, Tensor | None]:
        share = self.request.share
        sums = [s if s is None or share == 1.0 else s.mul_(share) for s in self._sum]
        found = {p: None if s is None else s.to(p.dtype) for s, p in zip(sums, self.shared, strict=True)}
        return {**found, **self.private.combine(factors, self.comm)}


@torch.no_grad()
def _add(total: Row, row: Row, before: float, own: float, params: list[Tensor]) -> None:
    """Make before · total + own · row of the total, and free the row."""
    for j, p in enumerate(params):
        g, row[j] = row[j], None
        s = total[j]
        if s is None:
            total[j] = rows_module.combine_wide([g], [own], p)
            continue
        if before != 1.0:
            s.mul_(before)
        if g is not None:
            s.add_(g.to_dense() if g.is_sparse else g, alpha=own)
