"""Common descent of the direction that is written, in the dtype in which it is written.

Weights that are right make a direction that is wrong where its terms cancel: products and sums are rounded. So the
inner products ⟨gᵢ, d⟩ of the direction as it will be written are formed in double precision, unless a bound says that
no rounding matters, and the direction is corrected until ⟨gᵢ, d⟩ ≥ −4u Σₖ |gᵢₖ| |dₖ| with the unit roundoff u of its
dtype: one rounding of the exact direction needs −u.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from gradsurgery import geometry
from gradsurgery.gradients import gram as gram_module
from gradsurgery.gradients.gram import Row, Table

# What products and sums in double precision may be off at most, relative to the lengths of what is multiplied, and what
# sums in single precision may be off for each row.
_DOUBLE, _SUM = 2e-12, 2.0**-24
# What products without rows, and sums of them, are off: in single precision, and in double.
_UNFORMED = (4e-6, _DOUBLE)
# The least and the largest weight with which rows in single precision may be added up.
_SAFE_WEIGHTS = (1e-18, 1e18)
# In units of u Σ |gᵢₖ| |dₖ|: what is let pass, and what a correction aims at, if that exists or else.
_ALLOWED, _AIMS = 2.9, (1.0, -1.0)
_ROUNDS = 8


def held(
    table: Table,
    gram: np.ndarray,
    weights: np.ndarray,
    params: Sequence[Tensor],
    rows: Sequence[Row] | None = None,
    counted: Sequence[bool] | None = None,
) -> Direction | None:
    """Add up rows so that no loss rises, where rounding could make one rise.

    Args:
        table: The rows.
        gram: Their inner products, (m, m).
        weights: (m,).
        params: What the columns are written to, for their dtypes.
        rows: What this process has of the rows; None: what the table has.
        counted: Which columns of these the table counts; None: all.

    Returns:
        The direction; None if no rounding matters, or it is out of range, and the rows may be added up as usual.
    """
    if is_certain(table, gram, weights):
        return None
    direction = Direction(table, [p.dtype for p in params], rows, counted)
    direction.find(weights)
    return direction if direction.is_finite else None


def is_certain(table: Table, gram: np.ndarray, weights: np.ndarray) -> bool:
    """Whether no loss rises along the sum of the rows, however it is rounded on the way.

    Args:
        table: The rows.
        gram: Their inner products, (m, m).
        weights: w, (m,).

    Returns:
        False if it has to be looked at.
    """
    if table.noise < 1e-12:
        return geometry.is_descent(gram, weights, _DOUBLE)
    low, high = _SAFE_WEIGHTS
    sizes = [abs(w) for w in weights.tolist() if w] or [1.0]
    safe = low <= min(sizes) and max(sizes) <= high
    products = 0.0 if table.is_double else 1.2 * gram_module.rounding_of_products(len(table))
    return safe and geometry.is_descent(gram, weights, products + (len(weights) + 8) * _SUM)


def moved_inside(table: Table, gram: np.ndarray, weights: np.ndarray) -> np.ndarray | None:
    """Weights along which no loss rises by what rounding does where no row is formed, in single or double precision.

    Where a loss would neither rise nor fall, the direction moves by as much as its rounding is: to look at the rounding
    itself the rows would have to be formed.

    Args:
        table: The rows.
        gram: Their inner products, (m, m).
        weights: w, (m,).

    Returns:
        (m,); None if that changes the direction by more than a little.
    """
    return geometry.moved_inside(gram, weights, _UNFORMED[table.noise < 1e-12])


class Direction:
    """A sum of rows that is rounded once, and corrected where that is not enough.

    Args:
        table: m rows. Spread over processes, the part of them that this one has.
        dtypes: What each column is written in.
        rows: What this process has of the rows; None: what the table has.
        counted: Which columns of these the table counts; None: all.

    Attributes:
        weights: The weights of the rows in the direction, (m,).
        flat: The direction as it is written, over all columns, float64.
        descends: Whether no loss rises.
        is_finite: Whether the direction is in range, on all processes.
    """

    weights: np.ndarray
    flat: Tensor
    descends: bool
    is_finite: bool

    def __init__(
        self,
        table: Table,
        dtypes: Sequence[torch.dtype],
        rows: Sequence[Row] | None = None,
        counted: Sequence[bool] | None = None,
    ) -> None:
        self.table = table
        self.rows = gram_module.as_rows(table.rows) if rows is None else rows
        columns = [next((g for g in column if g is not None), None) for column in zip(*self.rows, strict=True)]
        self.sizes = [0 if g is None else g.numel() << g.is_complex() for g in columns]
        self.dtypes = [t.to_real() if t.is_complex else t for t in dtypes]
        self.roundoff = self._spread([torch.finfo(t).eps / 2 for t in self.dtypes])
        self.counts = None if counted is None else self._spread(list(map(float, counted)))
        self.double = any(g is not None and g.dtype in (torch.float64, torch.complex128) for g in columns)
        self._held = [b.clone() for b in self._made()] if gram_module.few(self.rows) else None

    def _spread(self, numbers: Sequence[float]) -> Tensor | float:
        """One number a column, for each entry of a flat direction."""
        if len(set(numbers)) == 1:
            return numbers[0]
        return torch.tensor(numbers, dtype=torch.float64).repeat_interleave(torch.tensor(self.sizes))

    def _made(self) -> Iterator[Tensor]:
        return gram_module.buckets(self.rows, torch.float64)

    def _buckets(self) -> Iterator[Tensor]:
        yield from self._made() if self._held is None else self._held

    def sum(self, weights: np.ndarray, sizes: bool = False) -> Tensor:
        """Σ wᵢ gᵢ, or Σ |wᵢ| |gᵢ|, over all columns.

        Args:
            weights: (m,).
            sizes: Of the absolute values.

        Returns:
            Flat, float64.
        """
        w = torch.from_numpy(np.abs(weights) if sizes else weights)
        parts = [w.to(b.device) @ (b.abs() if sizes else b) for b in self._buckets()]
        return torch.cat([part.to(parts[0].device) for part in parts]) if parts else torch.zeros(0, dtype=torch.float64)

    def rounded(self, flat: Tensor) -> Tensor:
        """What is left of a flat direction when it is written.

        Args:
            flat: Over all columns, float64.

        Returns:
            The same in the dtypes of the columns, float64 again.
        """
        kinds = set(self.dtypes)
        if kinds <= {torch.float64}:
            return flat
        if len(kinds) == 1:
            return flat.to(self.dtypes[0]).double()
        return torch.cat([x.to(t).double() for x, t in zip(flat.split(self.sizes), self.dtypes, strict=True)])

    def products(self, flat: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Inner products of the rows with a direction, and what they may be below zero.

        Args:
            flat: The direction as it is written, float64.

        Returns:
            ⟨gᵢ, d⟩ and Σₖ u |gᵢₖ| |dₖ|, (m,) each, of rows and direction divided by the unit of the table.
        """
        flat = flat / self.table.unit
        limits = _times(flat.abs(), self.roundoff)
        if self.counts is not None:
            limits, flat = _times(limits, self.counts), _times(flat, self.counts)
        found, start = np.zeros((2, len(self.rows))), 0
        for b in self._buckets():
            b = b if self.table.unit == 1.0 else b / self.table.unit
            stop = start + b.shape[1]
            part, limit = flat[start:stop].to(b.device), limits[start:stop].to(b.device)
            dots = _dots(b, part) if self.double else b @ part
            found += torch.stack((dots, b.abs() @ limit)).cpu().numpy()
            start = stop
        found = self.table.comm.added(found)
        return found[0], found[1]

    def find(self, weights: np.ndarray) -> None:
        """Find the direction closest to the sum of the rows along which no loss rises.

        Args:
            weights: w, (m,).
        """
        self.weights, self.flat = weights, self.rounded(self.sum(weights))
        columns: np.ndarray | None = None
        for k in range(_ROUNDS + 1):
            products, limit = self.products(self.flat)
            self.descends = bool((products >= -_ALLOWED * limit).all())
            self.is_finite = bool(np.isfinite(products).all())
            if self.descends or k == _ROUNDS or not self.is_finite:
                return
            if columns is None:
                lengths, columns = geometry.unit_rows(lambda: self.table.triangle() / self.table.unit)
                safe = np.where(lengths > 0, lengths, 1.0)
            shifts = (geometry.shift(columns, (aim * limit - products) / safe) for aim in _AIMS)
            extra = next((shift / safe for shift in shifts if shift is not None), np.zeros(len(weights)))
            flat = self.flat + self.sum(extra)
            self.weights = self.weights + extra
            if k or not extra.any():
                # An entry that is no more than what rounding has left of its terms is zero.
                rest = 2 * (len(weights) + 2) * geometry.EPS
                flat = torch.where(flat.abs() <= rest * self.sum(self.weights, sizes=True), 0.0, flat)
            self.flat = self.rounded(flat)

    def split(self, params: Sequence[Tensor]) -> list[Tensor | None]:
        """Cut the direction into the gradients of the parameters.

        Args:
            params: The parameters, one a column.

        Returns:
            New tensors; None where no loss reaches a parameter.
        """
        gradients: list[Tensor | None] = []
        for part, p in zip(self.flat.split(self.sizes), params, strict=True):
            g = None
            if part.numel() or not p.numel():
                g = torch.empty_like(p, requires_grad=False)
                target = torch.view_as_real(g) if g.is_complex() else g
                target.copy_(part.view(target.shape))
            gradients.append(g)
        return gradients


def _times(x: Tensor, factors: Tensor | float) -> Tensor:
    return x * (factors.to(x.device) if isinstance(factors, Tensor) else factors)


def _dots(rows: Tensor, direction: Tensor) -> Tensor:
    """Inner products in twice the working precision (Ogita, Rump & Oishi 2005): error-free products, added in pairs."""
    high = rows * direction
    a, b = _halves(rows)
    c, d = _halves(direction)
    low = b * d - (((high - a * c) - b * c) - a * d)
    while high.shape[1] > 1:
        if high.shape[1] % 2:
            high, low = (torch.nn.functional.pad(x, (0, 1)) for x in (high, low))
        (x, y), (p, q) = high.chunk(2, 1), low.chunk(2, 1)
        high = x + y
        z = high - x
        low = p + q + ((x - (high - z)) + (y - z))
    return (high + low).sum(1)


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two numbers of 26 bits whose sum is x (Veltkamp)."""
    far = x * 134217729.0
    high = far - (far - x)
    return high, x - high
