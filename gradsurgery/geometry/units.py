"""What all of these problems share: unit rows, square roots of their cosines, and when a Gram matrix is too coarse."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import qr
from scipy.linalg.lapack import dpstrf

Array = NDArray[np.float64]
Factor = Callable[[], ArrayLike]

EPS = float(np.finfo(np.float64).eps)
_EPS_SINGLE = float(np.finfo(np.float32).eps)

#: Rounding of the Gram may reach the answer multiplied by this, 2e-16 as 2e-12, before the factor is asked for.
AMPLIFICATION = 1e4

#: With a pivot below this the order of the rows could show in the answer; see ``arranged``.
DEPENDENT = 0.1


def bound(m: int) -> float:
    """What is rounding of the product of a column and a residual, relative to the lengths of column and target.

    Args:
        m: number of columns.

    Returns:
        4 √m·eps.
    """
    return 4 * sqrt(m) * EPS


def unit(gram: ArrayLike) -> tuple[Array, Array]:
    """Row lengths and cosines: n_i = √G_ii and C_ij = G_ij / (n_i n_j).

    Args:
        gram: (m, m) Gram matrix J Jᵀ.

    Returns:
        ``(norms, cosines)`` of shapes (m,) and (m, m). Cosines lie in [-1, 1] and are 1 on the diagonal. A zero row has
        norm 0 and cosine 0 with every row, itself included.
    """
    g = np.asarray(gram, dtype=np.float64)
    norms = np.sqrt(np.maximum(g.diagonal(), 0.0))
    if norms.all():
        cosines = g / norms
        cosines /= norms[:, None]
        diagonal: Array | float = 1.0
    else:
        diagonal = (norms > 0).astype(np.float64)
        inverse = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
        cosines = g * inverse
        cosines *= inverse[:, None]
    np.minimum(cosines, 1.0, out=cosines)
    np.maximum(cosines, -1.0, out=cosines)
    cosines.ravel()[:: len(norms) + 1] = diagonal
    return norms, cosines


@cache
def _upper(m: int) -> Array:
    """Ones on and above the diagonal, (m, m)."""
    return np.triu(np.ones((m, m)))


def half(cosines: Array, tolerance: float = -1.0) -> tuple[Array, float]:
    """Columns with the given cosines: R of shape (rank, m) with Rᵀ R = C, and the smallest pivot of R.

    Pivoted Cholesky leaves out what is below the tolerance, so R has full rank even when C is singular; the pivot is
    then 0.

    Args:
        cosines: (m, m).
        tolerance: squared pivots up to this are left out; m·eps if it is below 0.

    Returns:
        ``(columns, pivot)``.
    """
    m = len(cosines)
    triangle, pivots, rank, _ = dpstrf(cosines, tol=tolerance)
    columns = np.empty((rank, m))
    columns[:, pivots - 1] = (triangle * _upper(m))[:rank]
    return columns, float(triangle[rank - 1, rank - 1]) if rank == m else 0.0


def full_rank(columns: Array, noise: float) -> Array:
    """Columns with the same dot products and as many entries as their rank: (k, m) becomes (rank, m).

    Rows in single precision, told by a Gram with more ``noise`` than float64's, are rounded that coarsely themselves.

    Args:
        columns: (k, m).
        noise: error of the Gram's entries, relative to n_i n_j.

    Returns:
        (rank, m).
    """
    triangle, order = qr(columns, mode="r", pivoting=True)
    diagonal = np.abs(triangle.diagonal())
    rounding = 4 * EPS if noise <= EPS else _EPS_SINGLE
    rank = int(np.count_nonzero(diagonal > max(columns.shape) * rounding * diagonal[0]))
    reduced = np.empty((rank, columns.shape[1]))
    reduced[:, order] = triangle[:rank]
    return reduced


def unit_rows(factor: Factor) -> tuple[Array, Array]:
    """Row lengths, and unit rows as columns, of the matrix that ``factor`` returns.

    Args:
        factor: called for B (m, k).

    Returns:
        ``(norms, columns)`` of shapes (m,) and (k, m); a zero row is a zero column.
    """
    rows = np.asarray(factor(), dtype=np.float64)
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return norms, (rows / np.where(norms > 0, norms, 1.0)[:, None]).T


def select(gram: Array, factor: Factor | None, keep: NDArray[np.intp]) -> tuple[Array, Factor | None]:
    """The same problem for some of the rows.

    Args:
        gram: (m, m) Gram matrix.
        factor: of all rows.
        keep: which rows, (k,).

    Returns:
        The Gram matrix (k, k) and the factor of these rows.
    """
    part = None if factor is None else lambda: np.asarray(factor(), dtype=np.float64)[keep]
    return gram[np.ix_(keep, keep)], part


def arranged(
    norms: Array, cosines: Array, factor: Factor | None
) -> tuple[NDArray[np.intp], Array, Array, Factor | None]:
    """The same rows in an order that does not depend on the one they came in.

    Rounding depends on the order in which rows are treated, and where they are nearly dependent it is no longer small.
    They are sorted by length, then by their cosines, both to ten digits, which another order of sums leaves alone;
    what ties there is sorted by all digits.

    Args:
        norms: row lengths, (m,).
        cosines: (m, m).
        factor: of all rows.

    Returns:
        The order, (m,), and the three arguments in it.
    """
    top = float(norms.max(initial=0.0)) or 1.0
    lengths = np.round(np.log(np.maximum(norms / top, np.finfo(np.float64).tiny)), 10)
    cubes = (np.sort(cosines, axis=1) ** 3).sum(axis=1)
    order = np.lexsort((cubes, norms, np.round(cubes, 10), lengths))
    part, part_factor = select(cosines, factor, order)
    return order, norms[order], part, part_factor


def doubtful(columns: Array, active: NDArray[np.bool_], cancellation: float, noise: float) -> bool:
    """Whether rounding in the Gram could reach the direction multiplied by more than the allowed amplification.

    The direction is a sum of the ``active`` unit columns and ``cancellation`` is its length over that of its terms. An
    error E in the cosines moves it by about |E| / (σ_min(active columns) · cancellation), relative to its length.

    Args:
        columns: (k, m).
        active: which columns the direction is made of, (m,).
        cancellation: between 0 and 1.
        noise: error of the Gram's entries, relative to n_i n_j.

    Returns:
        Whether to ask for the factor.
    """
    count = int(np.count_nonzero(active))
    if cancellation <= 10 * np.sqrt(len(active) * noise) or count > len(columns):
        return True
    return count > 0 and np.linalg.svd(columns[:, active], compute_uv=False)[-1] * cancellation < 1 / AMPLIFICATION
