"""Directions that treat all rows alike: equal projections (ConFIG, IMTL-G) and orthogonal rows (Aligned-MTL)."""

from __future__ import annotations

from math import sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import solve_triangular
from scipy.linalg.lapack import dgejsv, dgesdd, dgesv, dpotrf, dpotrs, dpstrf

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
    gram: ArrayLike, factor: Factor | None = None, *, by_length: bool = False, noise: float = EPS
) -> tuple[Array, int, bool]:
    """Coefficients of the vector with equal projections on all unit rows: y = C⁺ 1, v = Σ y_i u_i (ConFIG, IMTL-G).

    At full rank ⟨u_i, v⟩ = 1 for every row and ‖v‖² = 1ᵀy. At lower rank v is the shortest minimiser of
    Σ (⟨u_i, v⟩ − 1)², which need not be a common descent direction.

    Args:
        gram: (m, m) Gram matrix.
        factor: called for B (m, k) with B Bᵀ = J Jᵀ when the Gram is too coarse.
        by_length: minimise Σ n_i² (⟨u_i, v⟩ − 1)² instead, so that y_i / n_i = (G⁺ n)_i. It matters at lower rank only.
        noise: error of the Gram's entries, relative to n_i n_j.

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
        y[keep], rank, degenerate = equal_projection(part, part_factor, by_length=by_length, noise=noise)
        return y, rank, degenerate
    triangle, _, rank, _ = dpstrf(cosines, tol=16 * m * noise)
    back: NDArray[np.intp] | slice = slice(None)
    if rank < m or triangle[-1, -1] < DEPENDENT:
        order, norms, cosines, factor = arranged(norms, cosines, factor)
        back = np.argsort(order)
        triangle, _, rank, _ = dpstrf(cosines, tol=16 * m * noise)
    if rank == m:
        y = dpotrs(dpotrf(cosines)[0], np.ones(m))[0]
        pivot = float(triangle[-1, -1])
        # An error E of the cosines turns v by |E| |y| / (σ_min |v|), and |v|² = 1ᵀy; y itself errs by |E| |y| / σ_min².
        steep = float(np.abs(y).sum()) >= AMPLIFICATION * pivot * sqrt(max(float(y.sum()), 0.0))
        if factor is None or not (steep or pivot * pivot * AMPLIFICATION < 1):
            return y[back], m, False
    columns = half(cosines, 16 * m * noise)[0] if factor is None else full_rank(unit_rows(factor)[1], noise)
    if len(columns) == m:
        return _foot(columns)[back], m, False
    scale = norms / norms.max() if by_length else np.ones(m)
    left, sigma, _ = np.linalg.svd((columns * scale).T, full_matrices=False)
    y = scale * (left @ (scale @ left / sigma**2))
    v = columns @ y
    if v @ v <= m * EPS:
        return np.zeros(m), len(columns), True
    return y[back], len(columns), False


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
    gram: ArrayLike, scale_mode: str = "min", factor: Factor | None = None, *, noise: float = EPS
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

    Returns:
        ``(balance, rank)``: the (m, m) matrix B, zero in the rows and columns of zero rows (unique up to directions
        that Jᵀ maps to zero), and the rank of the unit rows.
    """
    g = np.asarray(gram, dtype=np.float64)
    norms, cosines = unit(g)
    m = len(norms)
    keep = np.flatnonzero(norms)
    if len(keep) < m:
        balance = np.zeros((m, m))
        if not len(keep):
            return balance, 0
        part, part_factor = select(g, factor, keep)
        balance[np.ix_(keep, keep)], rank = align(part, scale_mode, part_factor, noise=noise)
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
    top = norms.max()
    lengths = norms / top
    if rank == m and pivot * pivot * AMPLIFICATION >= 1 and lengths.min() >= 0.03:
        # Nothing here needs the Jacobi method, whose routine wakes the threads of the BLAS even for tiny matrices.
        left, sigma, transposed, _ = dgesdd((columns * lengths).T)
        right = transposed.T
    else:
        # joba = 2: accurate for rows and columns of any length.
        sigma, left, right, work, _, _ = dgejsv((columns * lengths).T, joba=2)
        sigma = np.sort(sigma * (work[0] / work[1]))[::-1]
    sigma = sigma * top
    scale = np.sqrt(np.mean(sigma**2)) if scale_mode == "rmse" else sigma[-1 if scale_mode == "min" else rank // 2]
    polar = right @ left[:, :rank].T
    balance = dgesv(columns, polar)[2] if rank == m else np.linalg.lstsq(columns, polar)[0]
    balance = balance * scale / norms[:, None]
    return balance if back is None else balance[np.ix_(back, back)], rank
