"""Gradients that are accumulated over micro-batches, each loss for itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from gradsurgery.gradients import rows as rows_module
from gradsurgery.gradients.gram import Row


class _Batch(Protocol):
    """What is asked of a micro-batch."""

    values: Tensor
    foreign: list[Tensor]
    accumulate: bool

    @property
    def loss_scale(self) -> Tensor: ...
    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def is_scaled(self) -> bool: ...
    @property
    def suspects(self) -> frozenset[Tensor]: ...
    def rows(self, params: Sequence[Tensor]) -> Iterator[tuple[int, Row]]: ...


class Accumulated(NamedTuple):
    """The gradients of each loss, over one micro-batch or several.

    Attributes:
        present: Names of the tasks, (m,).
        values: Sums of their losses, (m,), float64.
        rows: For each task the gradient of every parameter that it reaches, (m,).
        loss_scale: What the gradients are multiplied by, a scalar.
        scaled: A gradient scaler gave it.
        foreign: Parameters of other optimizers that any micro-batch may have reached.
        suspects: Parameters of which the graph of a micro-batch does not tell which losses reach them.
    """

    present: tuple[str, ...]
    values: Tensor
    rows: tuple[dict[Tensor, Tensor], ...]
    loss_scale: Tensor
    scaled: bool
    foreign: tuple[Tensor, ...]
    suspects: frozenset[Tensor] = frozenset()

    @classmethod
    def collect(cls, batch: _Batch, params: Sequence[Tensor]) -> Accumulated:
        """Differentiate the losses of one micro-batch.

        Args:
            batch: The micro-batch.
            params: With respect to what.

        Returns:
            The gradients.
        """
        rows = []
        for _, row in batch.rows(params):
            found = {p: g for p, g in zip(params, row, strict=True) if g is not None}
            row.clear()
            if batch.accumulate:  # autograd may hand out the same memory again in the next micro-batch
                found = {p: found.pop(p).clone() for p in list(found)}
            rows.append(found)
        return cls(
            batch.names,
            batch.values,
            tuple(rows),
            batch.loss_scale,
            batch.is_scaled,
            tuple(batch.foreign),
            batch.suspects,
        )

    def masks(self) -> dict[Tensor, int]:
        """Which losses reach each parameter.

        Returns:
            Bit masks by parameter.
        """
        found: dict[Tensor, int] = {}
        for i, row in enumerate(self.rows):
            for p in row:
                found[p] = found.get(p, 0) | 1 << i
        return found

    def plus(self, new: Accumulated) -> Accumulated:
        """Add the next micro-batch. What was kept so far is not changed.

        Args:
            new: Its gradients.

        Returns:
            The sums, with the tasks of both.
        """
        values = dict(zip(self.present, self.values.unbind(), strict=True))
        # The scale may have been updated in between, or the scaler passed to one call only.
        change = new.loss_scale.float() / self.loss_scale.float() if self.scaled or new.scaled else None
        rows = {name: dict(row) for name, row in zip(self.present, self.rows, strict=True)}
        fresh: set[tuple[str, Tensor]] = set()
        for name, value, row in zip(new.present, new.values.unbind(), new.rows, strict=True):
            values[name] = values[name] + value if name in values else value
            into = rows.setdefault(name, {})
            for p in list(row):
                g = row.pop(p)
                into[p] = rows_module.total(_times(into[p], change), g) if p in into else g
                fresh.add((name, p))
        if change is not None:
            for name, into in rows.items():
                into.update({p: _times(g, change) for p, g in into.items() if (name, p) not in fresh})
        return Accumulated(
            tuple(values),
            torch.stack(list(values.values())),
            tuple(rows.values()),
            new.loss_scale,
            self.scaled or new.scaled,
            tuple(dict.fromkeys([*self.foreign, *new.foreign])),
            self.suspects | new.suspects,
        )

    def in_order(self, names: Sequence[str]) -> Accumulated:
        """Put the tasks into the order of the user's list.

        Args:
            names: All names, absent tasks included.

        Returns:
            The same gradients.
        """
        order = sorted(range(len(self.present)), key=lambda i: names.index(self.present[i]))
        return Accumulated(
            tuple(self.present[i] for i in order),
            self.values[order],
            tuple(self.rows[i] for i in order),
            self.loss_scale,
            self.scaled,
            self.foreign,
            self.suspects,
        )


def _times(g: Tensor, factor: Tensor | None) -> Tensor:
    return g if factor is None else g * factor.to(g.device, g.dtype)
