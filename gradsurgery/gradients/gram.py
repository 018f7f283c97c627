"""Inner products of rows, and what else the mathematics of the methods needs of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from gradsurgery.communication import ALONE, Communicator
from gradsurgery.gradients.exact import exactly

#: The gradient of one loss: one entry per parameter, ``None`` where the loss does not reach it.
Row = list["Tensor | None"]

# A float32 product over n columns may be off by n roundoffs, and is off by n/20 of them where all terms are alike. So
# products run over chunks, which are then added up in float64. Those of rows are as short as costs little. Where both
# factors have many rows, as the inputs of a layer, short ones would cost memory.
_CHUNK, _WIDE_CHUNK = 128, 8192
# Entries that are copied side by side for one product: what fits a cache on the CPU, what fills a GPU elsewhere.
_BUCKET_CPU, _BUCKET_GPU = 2**19, 2**24

_EPS = float(np.finfo(np.float64).eps)
# How far products of rows that were rounded to single precision are off those of the rows before: a few roundoffs.
_SINGLE_ROWS = 2e-7

# Least eigenvalue of the cosines from which a Gram matrix in double precision tells all that single precision holds.
_WELL = 1e-6

# Entries of all rows together up to which double precision costs nothing that shows.
_FEW = 2**17

# Squares of float32 entries leave the range of normal numbers not far outside these bounds of the squared norm.
SAFE_SQUARES = (1e-24, 1e30)
# The same of float64 entries.
_SAFE_SQUARES_DOUBLE = (1e-280, 1e280)
# Entries are brought below 2 to this power, so that squares of rows 290 orders of magnitude apart are numbers still.
_TOP, _MOST_EXPONENT = 480, 1000
# Lengths within these bounds may be multiplied with each other four times over.
_SAFE_LENGTHS = (1e-60, 1e60)


class Table:
    """m rows over the same parameters, as the mathematics of the methods sees them.

    Args:
        rows: The rows, or a matrix (m, n). Spread over processes, the part of them that this one has.
        comm: The processes that they are spread over.
        noise: How far products may be off, if the rows at hand do not tell; see :func:`precision`.
        unit: The rows are the ones whose products :meth:`repaired` gave, times this: a power of two, 1 as long as all
            squares of entries are numbers.
    """

    def __init__(
        self,
        rows: Sequence[Row] | Tensor,
        comm: Communicator = ALONE,
        noise: float | None = None,
        unit: float = 1.0,
    ) -> None:
        self.rows = rows
        self.comm = comm
        self.unit = unit
        #: Some rows are so short beside others that their squares are lost at any unit.
        self.far_apart = False
        self._noise = noise
        self._double: bool | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def part(self, keep: Sequence[int]) -> Table:
        """Some of the rows.

        Args:
            keep: Their places.

        Returns:
            The same rows, not copied.
        """
        rows = as_rows(self.rows)
        part = Table([rows[i] for i in keep], self.comm, self.noise, self.unit)
        part.far_apart = self.far_apart
        return part

    def products(self) -> Tensor:
        """Inner products of what this process has.

        Returns:
            (m, m), float64. To be added up over the processes.
        """
        if isinstance(self.rows, Tensor) and self.is_double:
            if self.rows.device.type == "cpu":  # on few numbers numpy costs less per call
                return torch.from_numpy(gram_of_matrix(self.rows))
            wide = self.rows.double()
            return wide @ wide.T
        if isinstance(self.rows, Tensor) and self.rows.dtype == torch.float32:
            with exactly(self.rows.device):
                return product(self.rows, self.rows, _width(len(self.rows)))
        return gram_in(as_rows(self.rows), torch.float64 if self.is_double else torch.float32)

    def repaired(self, found: np.ndarray) -> np.ndarray:
        """Replace products that float32 or float64 could not hold.

        Args:
            found: The products, added up, (m, m).

        Returns:
            (m, m), of the rows divided by :attr:`unit`.
        """
        if in_range(found):  # as almost always
            return found
        return self._in_range(gram_outside_float32(self.rows, found) if self.comm.is_alone else found)

    def _in_range(self, found: np.ndarray) -> np.ndarray:
        """Products of the rows divided by a power of two, if float64 does not hold the squares of their entries."""
        low, high = _SAFE_SQUARES_DOUBLE
        squares = found.diagonal().tolist()
        if all(low <= square <= high for square in squares) or self.noise > 1e-12:
            return found
        rows = self._formed()
        # A bound is enough, and the sum is the same everywhere.
        peaks = self.comm.total(torch.stack([_largest(row) for row in rows])).cpu().numpy()
        lost = [peak > 0 and not low <= square <= high for peak, square in zip(peaks, squares, strict=True)]
        if not any(lost) or not np.isfinite(peaks).all():
            return found
        exponent = min(_TOP - math.frexp(peaks.max())[1], _MOST_EXPONENT)
        self.unit = 2.0**-exponent
        made = self.comm.total(gram_in(rows, torch.float64, 2.0**exponent)).cpu().numpy()
        self.far_apart = bool(((peaks > 0) & (made.diagonal() < low)).any())
        return made

    def _formed(self) -> Sequence[Row]:
        return as_rows(self.rows)

    def require_squares(self, owner: str) -> None:
        """Refuse rows so far apart that no power of two brings the squares of all into float64.

        Args:
            owner: The class that the error should name.

        Raises:
            RuntimeError: They are.
        """
        if self.far_apart:
            raise RuntimeError(
                f"{owner}: the longest gradient is more than 1e280 times as long as the shortest one, and float64 "
                "does not hold the squares of both. Multiply the losses by constants that bring them closer together. "
                "Nothing was written."
            )

    def triangle(self) -> np.ndarray:
        """A square root of the Gram matrix; see :func:`triangle`.

        Returns:
            (m, k), k ≤ m.
        """
        return self.comm.stacked(triangle(self.rows))

    @property
    def is_double(self) -> bool:
        """Whether products are made in double precision."""
        if self._double is None:
            self._double = not self.comm.is_alone or few(self.rows)
        return self._double

    @property
    def noise(self) -> float:
        """How far products may be off, relative to the lengths of the two rows."""
        if self._noise is None:
            self._noise = precision(self.rows, self.is_double)
        return self._noise


class Scaled:
    """Numbers that may leave the range of float64: fractions times powers of two.

    Args:
        values: The numbers; infinite ones stay so.
        exponent: What they are multiplied by: powers of two.

    Attributes:
        fraction: From 1/2 to 1, or 0.
        exponent: Whole numbers.
    """

    def __init__(self, values: np.ndarray | float, exponent: np.ndarray | int = 0) -> None:
        self.fraction, own = np.frexp(values)
        self.exponent = own + exponent

    def __mul__(self, other: Scaled) -> Scaled:
        return Scaled(self.fraction * other.fraction, self.exponent + other.exponent)

    def first(self, count: int) -> Scaled:
        """The first ones of a list.

        Args:
            count: How many.

        Returns:
            These numbers.
        """
        return Scaled(self.fraction[:count], self.exponent[:count])

    def at(self, places: Sequence[int]) -> Scaled:
        """Some of a list.

        Args:
            places: Which.

        Returns:
            These numbers.
        """
        return Scaled(self.fraction[places], self.exponent[places])

    def inverse(self) -> Scaled:
        """The reciprocals; 0 of 0.

        Returns:
            New numbers.
        """
        there = self.fraction != 0
        return Scaled(np.divide(1.0, self.fraction, out=np.zeros_like(self.fraction), where=there), -self.exponent)

    def values(self) -> np.ndarray:
        """The numbers as float64, in whose range they may be 0 or infinite.

        Returns:
            An array.
        """
        with np.errstate(over="ignore", under="ignore"):
            return np.asarray(np.ldexp(self.fraction, self.exponent))


@dataclass
class Gram:
    """Inner products of rows, as a method sees them.

    Attributes:
        table: The rows, as they are held.
        values: The inner products of the rows that the method works on, (k, k), float64, divided by the square of
            :attr:`unit`.
        scale: What the rows of the table still have to be divided by: the loss scale.
        by: What they are then multiplied by, (k,); None: 1.
    """

    table: Table
    values: np.ndarray
    scale: float = 1.0
    by: Scaled | None = None

    @classmethod
    def of(cls, table: Table, products: np.ndarray, scale: float = 1.0) -> Gram:
        """Take the loss scale out.

        Args:
            table: The rows.
            products: Their inner products, (k, k).
            scale: The loss scale.

        Returns:
            The inner products of the rows without it.
        """
        return cls(table, products if scale == 1.0 else products / scale**2, scale)

    def __len__(self) -> int:
        return len(self.values)

    @property
    def unit(self) -> float:
        """What the rows were divided by: a power of two, where float64 does not hold their squares.

        Rows that were multiplied have it inside, since that is what brings their products into range.
        """
        return self.table.unit if self.by is None else 1.0

    @property
    def noise(self) -> float:
        """How far products may be off, relative to the lengths of the two rows."""
        return self.table.noise

    def only(self, keep: Sequence[int]) -> Gram:
        """Some of the rows.

        Args:
            keep: Their places.

        Returns:
            Their inner products.
        """
        by = None if self.by is None else self.by.at(keep)
        return Gram(self.table.part(keep), self.values[np.ix_(keep, keep)], self.scale, by)

    def scaled(self, by: Scaled) -> Gram:
        """Rows that are multiplied by numbers, which bring them to where products are in range.

        Args:
            by: One per row, (k,).

        Returns:
            Their inner products.
        """
        inside = by * Scaled(self.unit)
        fractions = np.multiply.outer(inside.fraction, inside.fraction)
        values = np.ldexp(self.values * fractions, np.add.outer(inside.exponent, inside.exponent))
        return Gram(self.table, values, self.scale, by if self.by is None else self.by * by)

    def lengths(self) -> Scaled:
        """Lengths of the rows: as they are held, times what they are multiplied by.

        Returns:
            (k,).
        """
        return Scaled(self.unit) * Scaled(np.sqrt(self.values.diagonal()))

    def root(self) -> np.ndarray:
        """A square root B of the inner products, B Bᵀ = J Jᵀ, as accurate as the rows themselves.

        Inner products square the condition number. This reads all rows once more, in float64: for the rare input that
        needs it.

        Returns:
            (k, r), r ≤ k, float64.
        """
        triangle = self.table.triangle() / self.scale
        if self.by is None:
            return triangle
        return np.asarray(np.ldexp(self.by.fraction[:, None] * triangle, np.asarray(self.by.exponent)[:, None]))


def as_rows(rows: Sequence[Row] | Tensor) -> Sequence[Row]:
    """Rows that lie in one matrix, as a list of rows over one parameter.

    Args:
        rows: m rows, or a matrix (m, n).

    Returns:
        m rows.
    """
    return [[row] for row in rows] if isinstance(rows, Tensor) else rows


def few(rows: Sequence[Row] | Tensor, times: int = 1) -> bool:
    """Whether all rows together have so few entries, on the host, that double precision costs nothing that shows.

    Args:
        rows: The rows, or a matrix.
        times: How often each is there.

    Returns:
        False on an accelerator.
    """
    if isinstance(rows, Tensor):
        return rows.device.type == "cpu" and times * rows.numel() <= _FEW
    entries = sum(g.numel() if g.device.type == "cpu" else _FEW for row in rows for g in row if g is not None)
    return times * entries <= _FEW


def gram(rows: Sequence[Row]) -> Tensor:
    """Inner products of the rows.

    Products run in float32 over chunks of 128 columns and are summed in float64; float64 rows stay float64. Complex
    entries count as pairs of reals.

    Args:
        rows: m rows over the same parameters.

    Returns:
        J Jᵀ, (m, m), float64, on the device of the first parameter.
    """
    return gram_in(rows, torch.float32)


def gram_of_matrix(rows: Tensor) -> np.ndarray:
    """Inner products of rows that lie in one matrix, as :func:`gram` would find them.

    Args:
        rows: J, (m, n), without a graph.

    Returns:
        J Jᵀ, (m, m), float64.
    """
    # For small matrices on the host numpy costs less per call.
    if rows.device.type == "cpu" and (
        rows.dtype is torch.float64 or (rows.dtype is torch.float32 and rows.numel() <= _FEW)
    ):
        j = rows.numpy().astype(np.float64, copy=False)
        # Whoever asks looks for inf and nan; products that float64 does not hold are made again, of smaller rows.
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(j.dot(j.T))
    return gram_in(as_rows(rows), torch.float64 if few(rows) else torch.float32).cpu().numpy()


def in_range(gram: np.ndarray) -> bool:
    """Whether all rows are finite, and neither too short nor too long for float32 products.

    Args:
        gram: What :func:`gram` gave, (m, m).

    Returns:
        False for zero rows too.
    """
    low, high = SAFE_SQUARES
    for square in gram.diagonal().tolist():  # noqa: SIM110  # on a few numbers a generator costs as much as all else
        if not low <= square <= high:
            return False
    return True


def gram_outside_float32(rows: Sequence[Row] | Tensor, found: np.ndarray) -> np.ndarray:
    """Repair a Gram matrix whose rows are too short or too long for float32 products.

    Args:
        rows: m rows.
        found: What :func:`gram` gave, (m, m).

    Returns:
        ``found`` where it can be trusted, and a float64 product otherwise.
    """
    low, high = SAFE_SQUARES
    squares = found.diagonal()
    doubtful = ~((squares >= low) & (squares <= high))
    rows = as_rows(rows)
    # A row of exact zeros is common (an inactive hinge) and needs no second look.
    doubtful &= [
        bool(d) and any(g is not None and bool(g.any()) for g in row) for d, row in zip(doubtful, rows, strict=True)
    ]
    if not doubtful.any() or precision(rows) < 1e-12:
        return found
    return gram_in(rows, torch.float64).cpu().numpy()


def central(lengths: Scaled) -> int | None:
    """The power of two that brings the lengths of rows to where their products, and the products of these, are numbers.

    Args:
        lengths: The lengths, (m,).

    Returns:
        Its exponent; None if they are there already.
    """
    there = lengths.fraction != 0
    low, high = _SAFE_LENGTHS
    values, exponents = lengths.values()[there], lengths.exponent[there]
    if not len(values) or (values.min() >= low and values.max() <= high):
        return None
    return -int(exponents.min() + exponents.max()) // 2


def _largest(row: Row) -> Tensor:
    """The largest entry of a row, on the host."""
    entries = [_flat(g) for g in row if g is not None and g.numel()]
    peaks = [torch.linalg.vector_norm(g, float("inf")).to("cpu", torch.float64) for g in entries]
    return torch.stack(peaks).max() if peaks else torch.zeros((), dtype=torch.float64)


def gram_in(rows: Sequence[Row], least: torch.dtype, factor: float = 1.0) -> Tensor:
    """Inner products in a precision.

    Args:
        rows: m rows over the same parameters.
        least: Half and single precision are multiplied in this one.
        factor: What the rows are multiplied by before: a power of two.

    Returns:
        J Jᵀ, (m, m), float64, on the device of the first parameter.
    """
    m = len(rows)
    total: Tensor | None = None
    for bucket in buckets(rows, least):
        with exactly(bucket.device):
            bucket = bucket if factor == 1.0 else bucket * factor
            part = product(bucket, bucket, _width(m) if bucket.dtype == torch.float32 else _WIDE_CHUNK)
        total = part if total is None else total + part.to(total.device)
    return torch.zeros(m, m, dtype=torch.float64) if total is None else total


def _width(m: int) -> int:
    """Columns that m rows are multiplied over in single precision; the products hold no more entries than the rows."""
    return max(_CHUNK, m)


def product(a: Tensor, b: Tensor, chunk: int = _WIDE_CHUNK) -> Tensor:
    """A Bᵀ, in products over chunks of the columns.

    Args:
        a: (m, n), single or double precision.
        b: (k, n), of the same dtype.
        chunk: Columns of a chunk.

    Returns:
        (m, k), float64.
    """
    width = a.shape[1]
    if width <= chunk:
        return (a @ b.T).double()
    whole = width - width % chunk
    left, right = (x[:, :whole].unflatten(1, (-1, chunk)).transpose(0, 1) for x in (a, b))
    total = torch.bmm(left, right.transpose(1, 2)).sum(0, dtype=torch.float64)
    return total + (a[:, whole:] @ b[:, whole:].T) if whole < width else total


class Workspace:
    """Memory for intermediate results, which is used again and again: taking it anew costs as much as filling it."""

    def __init__(self) -> None:
        self._held: dict[tuple[int, torch.device, torch.dtype], Tensor] = {}

    def matrix(self, which: int, shape: tuple[int, int], device: torch.device, dtype: torch.dtype) -> Tensor:
        """Lend a matrix.

        Args:
            which: Matrices of different numbers lie apart. One of the same number takes the place of the last one.
            shape: Its shape.
            device: Its device.
            dtype: Its dtype.

        Returns:
            The matrix, filled with anything.
        """
        key, size = (which, device, dtype), shape[0] * shape[1]
        if key not in self._held or self._held[key].numel() < size:
            self._held[key] = torch.empty(size, device=device, dtype=dtype)
        return self._held[key][:size].view(shape)


def buckets(rows: Sequence[Row], least: torch.dtype) -> Iterator[Tensor]:
    """Cut the rows into matrices (m, k) of bounded width, small parameters together and large ones in slices.

    All of one kind lie in the same memory: each is gone when the next one is asked for.

    Args:
        rows: m rows.
        least: Half and single precision are multiplied in this one.

    Yields:
        The matrices, (m, k).
    """
    m = len(rows)
    pieces: list[list[Tensor]] = []  # of one bucket: for each piece the m flat parts
    held = 0
    kind: tuple[torch.device, torch.dtype] | None = None
    workspace = Workspace()

    def joined() -> Tensor:
        assert kind is not None
        parts = [flats[i] for i in range(m) for flats in pieces]
        if parts[0].dtype != kind[1]:
            return torch.cat(parts).view(m, held).to(kind[1])
        matrix = workspace.matrix(0, (m, held), *kind)
        torch.cat(parts, out=matrix.view(-1))
        return matrix

    for column in zip(*rows, strict=True):
        like = next((g for g in column if g is not None), None)
        if like is None:
            continue
        dtype = torch.promote_types(_real(like.dtype), least)
        flats = [torch.zeros(like.numel() << like.is_complex(), dtype=_real(like.dtype), device=like.device)
                 if g is None else _flat(g) for g in column]  # fmt: skip
        if pieces and kind != (like.device, dtype):
            yield joined()
            pieces, held = [], 0
        kind = (like.device, dtype)
        entries = _BUCKET_CPU if like.device.type == "cpu" else _BUCKET_GPU
        width = max(1, entries // m // _WIDE_CHUNK) * _WIDE_CHUNK
        n, start = flats[0].numel(), 0
        while start < n:
            stop = min(n, start + width - held)
            pieces.append(flats if stop - start == n else [f[start:stop] for f in flats])
            held += stop - start
            start = stop
            if held == width:
                yield joined()
                pieces, held = [], 0
    if pieces:
        yield joined()


def _real(dtype: torch.dtype) -> torch.dtype:
    return dtype.to_real() if dtype.is_complex else dtype


def _flat(g: Tensor) -> Tensor:
    if g.is_sparse:
        g = g.to_dense()
    if g.is_complex():
        g = torch.view_as_real(g.resolve_conj())
    return g.reshape(-1)


def triangle(rows: Sequence[Row] | Tensor) -> np.ndarray:
    """A square root of the Gram matrix that keeps the accuracy of the rows.

    The Gram matrix squares the condition number; a QR factorisation of the rows does not. For rows in single precision
    that are not nearly dependent a Gram matrix in double precision is as good, and cheaper. Either costs more than
    :func:`gram` and is meant for the rare inputs that need it.

    Args:
        rows: m rows.

    Returns:
        B, (m, k) with k ≤ m, float64, and B Bᵀ = J Jᵀ.
    """
    rows = as_rows(rows)
    if not _any_double(rows):
        products = gram_in(rows, torch.float64).cpu().numpy()
        lengths = np.sqrt(products.diagonal())
        outer = np.outer(lengths, lengths)
        cosines = np.divide(products, outer, out=np.eye(len(outer)), where=outer > 0)
        if np.isfinite(cosines).all() and np.linalg.eigvalsh(cosines)[0] > _WELL:
            return square_root(products)
    # Shortest first, so that rounding does not depend on the order in which the losses were given.
    cpu = torch.device("cpu")
    order = np.argsort([float(length(row, cpu)) for row in rows], kind="stable")
    rows, m = [rows[i] for i in order], len(rows)
    held = np.zeros((0, m))
    for bucket in buckets(rows, torch.float64):
        held = np.asarray(np.linalg.qr(np.concatenate([held, bucket.cpu().numpy().T]), mode="r"))
    return np.ascontiguousarray(held.T[np.argsort(order)])


def square_root(gram: np.ndarray) -> np.ndarray:
    """A square root of a Gram matrix, whatever the lengths of the rows.

    Args:
        gram: G, (m, m).

    Returns:
        B, (m, m), and B Bᵀ = G.
    """
    norms = np.sqrt(gram.diagonal())
    inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    values, vectors = np.linalg.eigh(inverse[:, None] * gram * inverse)
    return np.asarray(norms[:, None] * vectors * np.sqrt(np.maximum(values, 0.0)))


def rounding_of_products(m: int) -> float:
    """How far products of single precision rows may be off, relative to the lengths of the two rows.

    Whatever the number of their columns, the order in which a chunk is added up, and the signs: γₖ for k columns a
    chunk (Higham 2002, section 3.1), since Σ |aₖ| |bₖ| ≤ ‖a‖ ‖b‖.

    Args:
        m: Number of rows.

    Returns:
        7.7e-6 up to 128 rows.
    """
    k = _width(m) * 2.0**-24
    return k / (1 - k)


def precision(rows: Sequence[Row] | Tensor, double: bool = False) -> float:
    """How far inner products may be off, relative to the lengths of the two rows.

    Args:
        rows: m rows.
        double: All products are made in double precision.

    Returns:
        Rounding of float64 if all rows are in double precision; where they are not, that of the rows if their products
        are, and else that of float32 products.
    """
    if isinstance(rows, Tensor):
        single = rows.dtype != torch.float64
    else:
        single = any(g is not None and g.dtype not in (torch.float64, torch.complex128) for row in rows for g in row)
    if not single:
        return _EPS
    return _SINGLE_ROWS if double else rounding_of_products(len(rows))


def _any_double(rows: Sequence[Row]) -> bool:
    return any(g is not None and g.dtype in (torch.float64, torch.complex128) for row in rows for g in row)


def length(row: Row, device: torch.device) -> Tensor:
    """Euclidean norm of one row.

    Args:
        row: The row.
        device: Where to put the result.

    Returns:
        A scalar, float64.
    """
    norms = [_norm(_flat(g)).to(device) for g in row if g is not None]
    return _norm(torch.stack(norms)) if norms else torch.zeros((), dtype=torch.float64, device=device)


def _norm(x: Tensor) -> Tensor:
    """Euclidean norm in float64, whose squares of float64 entries are kept in range by a power of two."""
    if x.dtype != torch.float64 or not x.numel():
        return torch.linalg.vector_norm(x, dtype=torch.float64)
    exponent = torch.frexp(torch.linalg.vector_norm(x, float("inf")))[1].double()
    factor = torch.exp2(-exponent.clamp(-_MOST_EXPONENT, _MOST_EXPONENT))
    return torch.linalg.vector_norm(x * factor) / factor
