"""Directions that treat all rows alike: equal projections (ConFIG, IMTL-G) and orthogonal rows (Aligned-MTL)."""

from __future__ import annotations

from functools import cache
from math import sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import solve_triangular
from scipy.linalg.lapack import dgejsv, dgesdd, dgesv, dpotrf, dpotrs, dpstrf

from gradsurgery.geometry.nonnegative import NOT_CONVERGED, Flag, refuse
from gradsurgery.geometry.units import (
    AMPLIFICATION,
    DEPENDENT,
    EPS,
    Array,
    Factor,
    arranged,
    full_rank,
    half,
    select,
    unit,
    unit_rows,
)


def equal_projection(
    gram: ArrayLike,
    factor: Factor | None = None,
    *,
    by_length: bool = False,
    noise: float = EPS,
    flag: Flag = refuse,
) -> tuple[Array, int, bool]:
    """Coefficients of the vector with equal projections on all unit rows: y = C⁺ 1, v = Σ y_i u_i (ConFIG, IMTL-G).

    At full rank ⟨u_i, v⟩ = 1 for every row and ‖v‖² = 1ᵀy. At lower rank v is the shortest minimiser of
    Σ (⟨u_i, v⟩ − 1)², which need not be a common descent direction.

    Args:
        gram: (m, m) Gram matrix.
        factor: called for B (m, k) with B Bᵀ = J Jᵀ when the Gram is too coarse.
        by_length: minimise Σ n_i² (⟨u_i, v⟩ − 1)² instead, so that y_i / n_i = (G⁺ n)_i. It matters at lower rank only.
        noise: error of the Gram's entries, relative to n_i n_j.
        flag: called with "not-converged" if the conditions of the answer cannot be met; an error by default.

    Returns:
        ``(y, rank, degenerate)``: (m,) with zeros for zero rows, so that the weights of the rows are y_i / n_i; the
        rank of the unit rows; and whether v, and with it y, is zero (‖v‖² ≤ m·eps): no equal positive projections.
    """
    g = np.asarray(gram, dtype=np.float64)
    norms, cosines = unit(g)
    m = len(norms)
    if not norms.all():
        y = np.zeros(m)
        keep = np.flatnonzero(norms)
        if not len(keep):
            return y, 0, True
        part, part_factor = select(g, factor, keep)
        y[keep], rank, degenerate = equal_projection(part, part_factor, by_length=by_length, noise=noise, flag=flag)
        return y, rank, degenerate
    triangle, _, rank, _ = dpstrf(cosines, tol=16 * m * noise)
    back: NDArray[np.intp] | slice = slice(None)
    if rank < m or triangle[-1, -1] < DEPENDENT:
        order, norms, cosines, factor = arranged(norms, cosines, factor)
        back = np.argsort(order)
        triangle, _, rank, _ = dpstrf(cosines, tol=16 * m * noise)
    if rank == m:
        y, sound = _by_cholesky(cosines, float(triangle[-1, -1]), exact=factor is None)
        if sound:
            return y[back], m, False
    columns = half(cosines, 16 * m * noise)[0] if factor is None else full_rank(unit_rows(factor)[1], noise)
    if len(columns) == m:
        return _of_independent(columns, flag)[back], m, False
    y = _of_dependent(columns, norms / norms.max() if by_length else np.ones(m), flag)
    v = columns @ y
    if v @ v <= m * EPS:
        return np.zeros(m), len(columns), True
    return y[back], len(columns), False


def _by_cholesky(cosines: Array, pivot: float, exact: bool) -> tuple[Array, bool]:
    """The y with C y = 1, and whether it is as good as the cosines allow; `pivot` is the least of their factor.

    Cosines that are `exact` need not be far from singular.
    """
    y = dpotrs(dpotrf(cosines)[0], np.ones(len(cosines)))[0]
    total = sum(map(abs, y.tolist()))
    # An error E of the cosines turns v by |E| |y| / (σ_min |v|), and |v|² = 1ᵀy; y itself errs by |E| |y| / σ_min².
    steep = total >= AMPLIFICATION * pivot * sqrt(max(sum(y.tolist()), 0.0))
    sound = exact or not (steep or pivot * pivot * AMPLIFICATION < 1)
    return y, sound and _small(cosines.dot(y) - 1, total)


def _of_independent(columns: Array, flag: Flag) -> Array:
    """The y of ``equal_projection`` for independent unit columns."""
    y = _foot(columns)
    if not _small((columns @ y) @ columns - 1, np.abs(y).sum()):
        y = _by_qr(columns.T, np.ones(columns.shape[1]))
        if not _small((columns @ y) @ columns - 1, np.abs(y).sum()):
            flag(NOT_CONVERGED)
    return y


def _of_dependent(columns: Array, scale: Array, flag: Flag) -> Array:
    """The y of ``equal_projection`` for more unit columns than their rank, each counted by its scale."""
    rows = (columns * scale).T
    left, sigma, _ = np.linalg.svd(rows, full_matrices=False)
    shares = left @ (scale @ left / sigma**2)
    if not _fits(rows, scale, shares):
        shares = _by_qr(rows, scale)
        if not _fits(rows, scale, shares):
            flag(NOT_CONVERGED)
    return scale * shares


def _small(off: Array, terms: float) -> bool:
    """Whether this is rounding of sums of m products, each with terms of this size: no longer than 16 m·eps."""
    flat = off.ravel()
    return bool(flat.dot(flat) <= (16 * len(off) * EPS * terms) ** 2)


def _fits(rows: Array, aim: Array, x: Array) -> bool:
    """Whether x = (A Aᵀ)⁺ h for the rows A: A Aᵀ x is as close to h as can be, and x is in the range of A."""
    q, r = np.linalg.qr(rows)
    terms = float(np.abs(x).sum()) + 1
    off = rows.T @ (rows @ (x @ rows) - aim)
    # Rounding of A turns its range by as much over its least singular value.
    return _small(off, len(x) * terms) and _small(x - q @ (x @ q), terms / float(np.abs(r.diagonal()).min()))


def _by_qr(rows: Array, aim: Array) -> Array:
    """(A Aᵀ)⁺ h for rows A of full column rank, by another way than those whose answers are verified."""
    q, r = np.linalg.qr(rows)
    return np.asarray(q @ solve_triangular(r, solve_triangular(r, aim @ q), trans=1))


def _foot(columns: Array) -> Array:
    """The y of ``equal_projection`` for independent unit columns, however close they lie to each other.

    v / ‖v‖² is the point closest to zero in the plane through the ends of the columns. That plane is spanned by the
    differences along the shortest tree through the ends, and of each difference u_j − u_i the part along another unit
    vector r is ⟨u_j − u_i, r − (u_i + u_j) / 2⟩, since all columns have one length: no digit is lost to near-parallel
    columns, which solving C y = 1 loses.
    """
    m = columns.shape[1]
    near, distance = np.zeros(m, dtype=int), np.linalg.norm(columns - columns[:, :1], axis=0)
    distance[0] = np.inf
    edges = np.empty((columns.shape[0], m - 1))
    ends, sizes, along = np.empty((2, m - 1), dtype=int), np.empty(m - 1), np.empty(m - 1)
    for k in range(m - 1):
        j = int(distance.argmin())
        i = near[j]
        ends[:, k], sizes[k], edges[:, k] = (i, j), distance[j], (columns[:, j] - columns[:, i]) / distance[j]
        along[k] = edges[:, k] @ (columns[:, 0] - (columns[:, i] + columns[:, j]) / 2)
        closer = np.linalg.norm(columns - columns[:, j : j + 1], axis=0)
        distance[j] = np.inf
        better = (closer < distance) & (distance < np.inf)
        near[better], distance[better] = j, closer[better]
    q, r = np.linalg.qr(edges)
    down = solve_triangular(r, -along, trans=1)
    steps = solve_triangular(r, down) / sizes
    y = np.zeros(m)
    y[0] = 1.0
    np.add.at(y, ends[1], steps)
    np.add.at(y, ends[0], -steps)
    point = columns[:, 0] + q @ down
    return y / float(point @ point)


def align(
    gram: ArrayLike,
    scale_mode: str = "min",
    factor: Factor | None = None,
    *,
    noise: float = EPS,
    flag: Flag = refuse,
) -> tuple[Array, int]:
    """Balance matrix of Aligned-MTL: B = σ G^(−1/2) on the range of G; the rows of B J are orthogonal, of length σ.

    Senushkin et al. 2023, algorithm 1; the direction for task weights p is Jᵀ (B p). With J = W Σ Qᵀ the rows of W Qᵀ
    are wanted; they come from a one-sided Jacobi decomposition, which is accurate for every row length, and are written
    back in unit rows. The direction jumps where the rank changes.

    Args:
        gram: (m, m) Gram matrix.
        scale_mode: which singular value of J (among the non-zero ones) σ is: "min", "median" (the lower one), or "rmse"
            (their root mean square).
        factor: called for B (m, k) with B Bᵀ = J Jᵀ when the Gram is too coarse.
        noise: error of the Gram's entries, relative to n_i n_j.
        flag: called with "not-converged" if the conditions of the answer cannot be met; an error by default.

    Returns:
        ``(balance, rank)``: the (m, m) matrix B, zero in the rows and columns of zero rows (unique up to directions
        that Jᵀ maps to zero), and the rank of the unit rows.
    """
    g = np.asarray(gram, dtype=np.float64)
    norms, cosines = unit(g)
    m = len(norms)
    if not norms.all():
        balance, keep = np.zeros((m, m)), np.flatnonzero(norms)
        if not len(keep):
            return balance, 0
        part, part_factor = select(g, factor, keep)
        balance[np.ix_(keep, keep)], rank = align(part, scale_mode, part_factor, noise=noise, flag=flag)
        return balance, rank
    columns, pivot = half(cosines, 16 * m * noise)
    back: NDArray[np.intp] | None = None
    if pivot < DEPENDENT:
        order, norms, cosines, factor = arranged(norms, cosines, factor)
        back = np.argsort(order)
        columns, pivot = half(cosines, 16 * m * noise)
    if factor is not None and pivot * pivot * AMPLIFICATION < 1:
        norms, columns = unit_rows(factor)
        columns = full_rank(columns, noise)
    rank = len(columns)
    top = norms[norms.argmax()]  # `argmax` costs a fifth of `max` on arrays this small
    lengths = norms / top
    rows = (columns * lengths).T
    # Where this holds nothing needs the Jacobi method, whose routine wakes the threads of the BLAS even for tiny
    # matrices.
    plain = rank == m and pivot * pivot * AMPLIFICATION >= 1 and lengths[lengths.argmin()] >= 0.03
    left, sigma, right = _divide_and_conquer(rows) if plain else _jacobi(rows)
    if not _decomposes(left, sigma, right, rows, lengths):
        left, sigma, right = _jacobi(rows) if plain else _divide_and_conquer(rows)
        if not _decomposes(left, sigma, right, rows, lengths):
            flag(NOT_CONVERGED)
    sigma = sigma * top
    scale = np.sqrt(np.mean(sigma**2)) if scale_mode == "rmse" else sigma[-1 if scale_mode == "min" else rank // 2]
    polar = right @ left.T
    found = dgesv(columns, polar)[2] if rank == m else np.linalg.lstsq(columns, polar)[0]
    balance = np.asarray(found, dtype=np.float64)
    if not _solves(columns, balance, polar):
        q, r = np.linalg.qr(columns.T)
        balance = np.asarray(q @ solve_triangular(r, polar, trans=1))
        if not _solves(columns, balance, polar):
            flag(NOT_CONVERGED)
    balance = balance * scale / norms[:, None]
    return balance if back is None else balance[np.ix_(back, back)], rank


def _divide_and_conquer(rows: Array) -> tuple[Array, Array, Array]:
    """Singular values, and the vectors on both sides of them as columns, of rows of full column rank."""
    left, sigma, transposed, _ = dgesdd(rows, full_matrices=0)
    return left, sigma, transposed.T


def _jacobi(rows: Array) -> tuple[Array, Array, Array]:
    """The same, accurate for rows and columns of any length (joba = 2)."""
    sigma, left, right, work, _, _ = dgejsv(rows, joba=2)
    return left[:, : len(sigma)], np.sort(sigma * (work[0] / work[1]))[::-1], right


def _solves(columns: Array, balance: Array, polar: Array) -> bool:
    """Whether Σ_i u_i B_ij is the j-th column of the aim for every j, up to rounding."""
    flat = balance.ravel()
    return _small(columns.dot(balance) - polar, 1 + sqrt(len(balance) * flat.dot(flat)))


def _decomposes(left: Array, sigma: Array, right: Array, rows: Array, lengths: Array) -> bool:
    """Whether rows = L diag(σ) Rᵀ with orthonormal columns in L and R, up to rounding relative to each row."""
    identity, columns = _identity(len(sigma)), len(left) / len(sigma)
    return (
        float(sigma[-1]) > 0
        and _small(((left * sigma).dot(right.T) - rows) / lengths[:, None], 1.0)
        and _small(left.T.dot(left) - identity, columns)
        and _small(right.T.dot(right) - identity, columns)
    )


@cache
def _identity(rank: int) -> Array:
    """Not to be changed."""
    return np.eye(rank)
