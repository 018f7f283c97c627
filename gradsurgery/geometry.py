"""Exact mathematics on the small matrices of multi-task gradients.

Every function takes the Gram matrix G = J Jᵀ of the m gradients (rows) of J, shape (m, m), and returns weights of the
rows: the direction is d = Jᵀ w. All of them compute in float64, keep no state, and know no absolute length: the answer
for s·J follows from the answer for J for every s > 0 (as long as the entries of G stay within 1e-300 and 1e300).

Two habits run through the file:

* **Unit rows.** Problems are solved for the cosines C_ij = G_ij / (n_i n_j), n_i = √G_ii, with unknowns v_i = w_i n_i.
  Rows of length 1e-6 and 1e6 then weigh the same, and every tolerance can be stated relative to the rows.
* **A factor on request.** A Gram matrix squares the condition number: angles below 1e-8 are lost in it. Functions with
  a ``factor`` argument measure how far the Gram can be trusted and, where it cannot, call ``factor()`` for a matrix B
  of shape (m, k) with B Bᵀ = J Jᵀ to row accuracy (the triangle of a QR decomposition of Jᵀ, or J itself).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import sqrt
from operator import mul

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import lstsq, qr, solve_triangular
from scipy.linalg.lapack import dgejsv, dgesdd, dgesv, dposv, dpotrf, dpotrs, dpstrf, dtrtrs
from scipy.optimize import nnls

Array = NDArray[np.float64]
Factor = Callable[[], ArrayLike]

EPS = float(np.finfo(np.float64).eps)
_EPS_SINGLE = float(np.finfo(np.float32).eps)

# Rounding of the Gram may reach the answer multiplied by this, 2e-16 as 2e-12, before the factor is asked for.
_AMPLIFICATION = 1e4
# Up to this many rows plain Python floats beat numpy's cost per call.
_SMALL = 8
# Cosine targets of GradVac stay this far from parallel at most, where a correction would have no bound.
_TARGET = 1 - 1e-6
_NEWTON_ROUNDS, _POINT_ROUNDS, _STALE_ROUNDS, _HALVINGS, _CAGRAD_ROUNDS = 100, 500, 5, 40, 100
# Numbers and their powers keep within e^±600; beyond, their logarithms are used.
_LOG_RANGE = 600.0


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


def _half(cosines: Array, tolerance: float = -1.0) -> tuple[Array, float]:
    """Columns with the given cosines: R of shape (rank, m) with Rᵀ R = C, and the smallest pivot of R.

    Pivoted Cholesky leaves out what is below the tolerance (m·eps by default), so R has full rank even when C is
    singular; the pivot is then 0.
    """
    m = len(cosines)
    triangle, pivots, rank, _ = dpstrf(cosines, tol=tolerance)
    half = np.empty((rank, m))
    half[:, pivots - 1] = (triangle * _upper(m))[:rank]
    return half, float(triangle[rank - 1, rank - 1]) if rank == m else 0.0


def _full_rank(columns: Array, noise: float) -> Array:
    """Columns with the same dot products and as many entries as their rank: (k, m) becomes (rank, m).

    Rows in single precision, told by a Gram with more ``noise`` than float64's, are rounded that coarsely themselves.
    """
    triangle, order = qr(columns, mode="r", pivoting=True)
    diagonal = np.abs(triangle.diagonal())
    rounding = 4 * EPS if noise <= EPS else _EPS_SINGLE
    rank = int(np.count_nonzero(diagonal > max(columns.shape) * rounding * diagonal[0]))
    reduced = np.empty((rank, columns.shape[1]))
    reduced[:, order] = triangle[:rank]
    return reduced


def _rows(factor: Factor) -> tuple[Array, Array]:
    """Row lengths (m,) and unit rows as columns (k, m) of the matrix that ``factor`` returns."""
    rows = np.asarray(factor(), dtype=np.float64)
    norms = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return norms, (rows / np.where(norms > 0, norms, 1.0)[:, None]).T


def _select(gram: Array, factor: Factor | None, keep: NDArray[np.intp]) -> tuple[Array, Factor | None]:
    """The same problem for some of the rows."""
    part = None if factor is None else lambda: np.asarray(factor(), dtype=np.float64)[keep]
    return gram[np.ix_(keep, keep)], part


def _doubtful(columns: Array, active: NDArray[np.bool_], cancellation: float, noise: float) -> bool:
    """Whether rounding in the Gram could reach the direction multiplied by more than the allowed amplification.

    The direction is a sum of the ``active`` unit columns and ``cancellation`` is its length over that of its terms. An
    error E in the cosines moves it by about |E| / (σ_min(active columns) · cancellation), relative to its length.
    """
    count = int(np.count_nonzero(active))
    if cancellation <= 10 * np.sqrt(len(active) * noise) or count > len(columns):
        return True
    return count > 0 and np.linalg.svd(columns[:, active], compute_uv=False)[-1] * cancellation < 1 / _AMPLIFICATION


def _least_distance(columns: Array, bounds: Array) -> Array:
    """Multipliers x ≥ 0 of the shortest e with ⟨u_i, e⟩ ≥ h_i, up to a factor: argmin ‖Σ x_i u_i‖² + (hᵀx − 1)².

    e = Σ x_i u_i / (1 − hᵀx), and no e exists when hᵀx = 1 (Lawson & Hanson 1974, chapter 23).
    """
    target = np.zeros(len(columns) + 1)
    target[-1] = 1.0
    return nnls(np.vstack((columns, bounds)), target)[0]


def _shortest(columns: Array, bounds: Array) -> Array:
    """The shortest e with ⟨u_i, e⟩ ≥ h_i, if there is one, up to a factor."""
    x = _least_distance(columns, bounds)
    support = np.flatnonzero(x)
    if 0 < len(support) <= len(columns):
        # Once more on the support, where the constraints are equations: Σ x_i u_i loses digits where it cancels.
        q, r = np.linalg.qr(columns[:, support])
        pivots = np.abs(r.diagonal())
        if pivots.min() > 4 * len(x) * EPS * pivots.max():
            return np.asarray(q @ solve_triangular(r, bounds[support], trans=1))
    return np.asarray(columns @ x)


def min_norm(gram: ArrayLike, factor: Factor | None = None, *, noise: float = EPS) -> tuple[Array, bool]:
    """Weights of the shortest vector in the convex hull of the rows (MGDA): argmin ‖Jᵀ w‖, w ≥ 0, Σ w = 1.

    In unit rows, minimising ‖Σ v_i u_i‖² + (aᵀv − 1)² over v ≥ 0, with a_i = n_min / n_i, gives the point up to its
    length: one non-negative least squares problem.

    Args:
        gram: (m, m) Gram matrix.
        factor: called for B (m, k) with B Bᵀ = J Jᵀ when the Gram is too coarse.
        noise: error of the Gram's entries, relative to n_i n_j.

    Returns:
        ``(weights, stationary)``: (m,) on the simplex, and whether the shortest vector is zero as far as the input can
        tell (the rows are Pareto stationary): ‖Jᵀ w‖ ≤ tol · Σ w_i n_i, with tol = 16 m·eps given the factor and
        √(m·noise) without. Zero rows share the weight among them.
    """
    norms, cosines = unit(gram)
    m = len(norms)
    zero = norms == 0
    if zero.any():
        return zero / np.count_nonzero(zero), True
    columns, pivot = _half(cosines)
    a = norms.min() / norms
    v = _least_distance(columns, a)
    total = v.sum()
    point = columns @ v
    length = np.sqrt(point @ point)
    tolerance = np.sqrt(m * noise)
    if factor is not None and pivot * length * _AMPLIFICATION < total:
        slack = point @ columns - length * length / (a @ v) * a
        active = (v > 0) | (slack <= 100 * m * noise * total)
        if _doubtful(np.vstack((columns, a)), active, float(length / total), noise):
            norms, columns = _rows(factor)
            a = norms.min() / norms
            v = _least_distance(columns, a)
            total = v.sum()
            point = columns @ v
            length = np.sqrt(point @ point)
            tolerance = 16 * m * EPS
    weights = v * a
    return weights / weights.sum(), bool(length <= tolerance * total)


def frank_wolfe(gram: ArrayLike, max_iterations: int = 250, tolerance: float = 1e-5) -> tuple[Array, int]:
    """Min-norm weights by Frank-Wolfe with exact line search (Sener & Koltun 2018, algorithm 2), for comparison.

    Starts at w = 1/m; each round moves towards the row t = argmin (G w)_t by γ = argmin ‖(1 − γ) Jᵀw + γ g_t‖.

    Args:
        gram: (m, m) Gram matrix.
        max_iterations: rounds at most.
        tolerance: stop when a round moves the weights by less than this (sum of absolute changes).

    Returns:
        ``(weights, rounds)``: (m,) on the simplex, and how many rounds were used.
    """
    g = np.asarray(gram, dtype=np.float64)
    m = len(g)
    w = np.full(m, 1 / m)
    gw = g @ w
    square = float(w @ gw)
    for rounds in range(1, max_iterations + 1):
        t = int(gw.argmin())
        towards, corner = float(gw[t]), float(g[t, t])
        if towards >= square or m == 1:
            return w, rounds
        # The line between Jᵀw and g_t: its shortest point lies beyond g_t when <Jᵀw, g_t> ≥ |g_t|².
        gamma = 1.0 if towards >= corner else (square - towards) / (square - 2 * towards + corner)
        change = 2 * gamma * (1 - float(w[t]))
        w *= 1 - gamma
        w[t] += gamma
        gw = g @ w
        square = float(w @ gw)
        if change < tolerance:
            return w, rounds
    return w, max_iterations


def project_simplex(v: ArrayLike) -> Array:
    """Euclidean projection on the simplex {w ≥ 0, Σ w = 1} (Held, Wolfe & Crowder 1974).

    Args:
        v: (m,).

    Returns:
        w, (m,).
    """
    x = np.asarray(v, dtype=np.float64)
    x = x - x.max()
    down = np.sort(x)[::-1]
    excess = (np.cumsum(down) - 1) / np.arange(1, len(x) + 1)
    w = np.maximum(x - excess[np.count_nonzero(down > excess) - 1], 0.0)
    return w / w.sum()


def pcgrad_mixing(gram: ArrayLike, orders: ArrayLike) -> Array:
    """Mixing matrix of PCGrad: row i holds the weights of task i's projected gradient (Yu et al. 2020, algorithm 1).

    p_i starts as g_i and meets the other rows in its order: p_i ← p_i − ⟨p_i, g_j⟩ / ‖g_j‖² g_j where ⟨p_i, g_j⟩ < 0.

    Args:
        gram: (m, m) Gram matrix.
        orders: (m, m − 1) integers; row i lists the j ≠ i in the order of task i's visits.

    Returns:
        (m, m) matrix M; the direction of PCGrad is Jᵀ (Mᵀ 1).
    """
    g = np.asarray(gram, dtype=np.float64)
    m = len(g)
    if m <= _SMALL:
        table, visits = g.tolist(), np.asarray(orders).tolist()
        mixing = [[float(i == j) for j in range(m)] for i in range(m)]
        for weights, order in zip(mixing, visits, strict=True):
            for j in order:
                row = table[j]
                dot = sum(map(mul, weights, row))
                if dot < 0 < row[j]:
                    weights[j] -= dot / row[j]
        return np.array(mixing)
    squares = g.diagonal()
    out = np.eye(m)
    tasks = np.arange(m)
    for j in np.asarray(orders).T:
        dots = np.einsum("ij,ij->i", out, g[j])
        hit = (dots < 0) & (squares[j] > 0)
        i, j = tasks[hit], j[hit]
        out[i, j] -= dots[hit] / squares[j]
    return out


def pcgrad_of_two(first: float, product: float, second: float, least: float = 0.0) -> tuple[float, float]:
    """Weights that PCGrad gives two rows u and v.

    Args:
        first: ‖u‖².
        product: ⟨u, v⟩.
        second: ‖v‖².
        least: Below this ‖u‖² is what rounding has left of a sum that cancels: u has no direction then.

    Returns:
        a and b of the direction a u + b v. 1 and 1 without conflict.
    """
    if not (product < 0 < second and first > least):
        return 1.0, 1.0
    return 1.0 - product / first, 1.0 - product / second


def streaming_pcgrad(gram: ArrayLike, order: ArrayLike, *, noise: float = EPS) -> Array:
    """Weights of PCGrad between the sum of the rows so far and the next row, row after row.

    Args:
        gram: (m, m) Gram matrix.
        order: (m,) integers; in which order the rows come.
        noise: error of the Gram's entries, relative to n_i n_j.

    Returns:
        (m,) weights.
    """
    g = np.asarray(gram, dtype=np.float64)
    w = np.zeros(len(g))
    lengths = np.sqrt(g.diagonal())
    for i in np.asarray(order).tolist():
        products = g @ w
        least = 4 * noise * float(w @ lengths) ** 2
        a, b = pcgrad_of_two(float(w @ products), float(products[i]), float(g[i, i]), least)
        w *= a
        w[i] = b
    return w


def dual_cone(gram: ArrayLike, u: ArrayLike, factor: Factor | None = None, *, noise: float = EPS) -> Array:
    """Weights of the projection of Jᵀ u on the dual cone {d: J d ≥ 0}: w = u + λ, λ ≥ 0 minimising ‖Jᵀ (u + λ)‖.

    One non-negative least squares problem in unit rows for each u; the cone does not depend on the row lengths.
    DualProj projects one u, UPGrad the rows of a diagonal matrix.

    Args:
        gram: (m, m) Gram matrix.
        u: (m,) weights of the vector to project, or (k, m), one vector a row.
        factor: called for B (m, k) with B Bᵀ = J Jᵀ when the Gram is too coarse.
        noise: error of the Gram's entries, relative to n_i n_j.

    Returns:
        w of the shape of u. A zero row keeps its weight.
    """
    norms, cosines = unit(gram)
    u = np.asarray(u, dtype=np.float64)
    m = len(norms)
    wanted = (u * norms).reshape(-1, m)
    columns, pivot = _half(cosines)
    lowest = (wanted @ cosines).min(axis=1).tolist()
    # A vector that no row opposes is its own projection.
    opposed = [i for i, low in enumerate(lowest) if low < 0]
    if not opposed:
        return u.copy()
    targets = wanted @ -columns.T
    pushed = np.zeros_like(wanted)
    for i in opposed:
        pushed[i] = nnls(columns, targets[i])[0]
    # For u ≥ 0, ‖Jᵀ(u + λ)‖ ≥ σ_min |u + λ|₁ / √m, and after pivoting σ_min ≥ 3 pivot / √(4^m + 6m − 1) (Higham 2002,
    # chapter 8). Where that is good enough, as for most small m, no closer look is needed.
    sound = m < 32 and 3 * _AMPLIFICATION * pivot * pivot >= sqrt(m * (4.0**m + 6 * m - 1)) and u.min() >= 0
    if factor is not None and not sound:
        exact: Array | None = None
        for i in opposed:
            y, s = wanted[i], pushed[i]
            point = columns @ (y + s)
            total = float(np.abs(y).sum() + s.sum())
            length = float(np.sqrt(point @ point))
            if pivot * length * _AMPLIFICATION < total:
                active = (norms > 0) & ((s > 0) | (point @ columns <= 100 * m * noise * total))
                if _doubtful(columns, active, length / total, noise):
                    if exact is None:
                        exact = _rows(factor)[1]
                    pushed[i] = nnls(exact, -(exact @ y))[0]
    pushed /= norms if norms.all() else np.where(norms > 0, norms, 1.0)
    return u + pushed.reshape(u.shape)


def closest_point(
    gram: ArrayLike, start: int, demand: ArrayLike, factor: Factor | None = None, *, noise: float = EPS
) -> tuple[Array, float, float]:
    """Weights of the point closest to one unit row that has given products with others: argmin ‖p − u_start‖ (PCD).

    Subject to ⟨u_j, p⟩ ≥ demand_j. The shift e = p − u_start is the shortest with ⟨u_j, e⟩ ≥ demand_j − C_j,start: one
    non-negative least squares problem, made exact on its support.

    Args:
        gram: (m, m) Gram matrix.
        start: which row to stay close to; it must not be zero.
        demand: (m,) products demanded with the unit rows; −inf where there is no constraint. A zero row has none.
        factor: called for B (m, k) with B Bᵀ = J Jᵀ when the Gram is too coarse.
        noise: error of the Gram's entries, relative to n_i n_j.

    Returns:
        ``(y, length, along)``: (m,) weights of the *unit* rows, p = Σ y_j u_j, all zero if no p meets the constraints
        as far as the input can tell; ‖p‖; and the cosine between p and u_start. Where ‖p‖ relative to Σ y_j, or the
        cosine, is no more than rounding, it is 0.
    """
    norms, cosines = unit(gram)
    m = len(norms)
    demand = np.where(norms > 0, np.asarray(demand, dtype=np.float64), -np.inf)
    columns, pivot = _half(cosines)
    tolerance = (m * noise) ** 0.5
    y, point = _closest(columns, start, demand, tolerance)
    length, total = float(np.sqrt(point @ point)), float(y.sum())
    if factor is not None and (length <= tolerance * total or pivot * length * _AMPLIFICATION < total):
        active = (y > 0) | (point @ columns - demand <= 100 * m * noise * total)
        if _doubtful(columns, active, length / max(total, 1.0), noise):
            columns = _rows(factor)[1]
            # Rows of lower precision are rounded themselves.
            tolerance = 16 * m * EPS if noise <= EPS else (m * EPS) ** 0.5
            y, point = _closest(columns, start, demand, tolerance)
            length, total = float(np.sqrt(point @ point)), float(y.sum())
    if length <= tolerance * total:
        return y, 0.0, 0.0
    along = float(columns[:, start] @ point) / length
    return y, length, along if abs(along) > tolerance else 0.0


def _closest(columns: Array, start: int, demand: Array, tolerance: float) -> tuple[Array, Array]:
    """The weights y of ``closest_point`` for unit columns, and the point; zeros if there is none."""
    y = np.zeros(columns.shape[1])
    y[start] = 1.0
    j = np.flatnonzero(demand > -np.inf)
    h = demand[j] - columns[:, start] @ columns[:, j]
    top = float(h.max(initial=0.0))
    if top > 0:
        h /= top
        x = _least_distance(columns[:, j], h)
        gap = 1 - float(h @ x)  # 1 / (1 + ‖e‖²) for the shortest e with ⟨u_j, e⟩ ≥ h_j
        if gap <= max(tolerance * tolerance, 16 * len(y) * EPS):
            return np.zeros(len(y)), np.zeros(len(columns))
        x /= gap
        support = np.flatnonzero(x)
        if len(support) <= len(columns):
            # Once more on the support, where the constraints are equations: the division by a small gap costs digits.
            triangle = qr(columns[:, j[support]], mode="r")[0][: len(support)]
            pivots = np.abs(triangle.diagonal())
            if pivots.min() > 4 * len(y) * EPS * pivots.max():
                exact = solve_triangular(triangle, solve_triangular(triangle, h[support], trans=1))
                if exact.min() >= 0:
                    x[support] = exact
        y[j] += top * x
    return y, columns @ y


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
        part, part_factor = _select(g, factor, keep)
        y[keep], rank, degenerate = equal_projection(part, part_factor, by_length=by_length, noise=noise)
        return y, rank, degenerate
    triangle, _, rank, _ = dpstrf(cosines, tol=16 * m * noise)
    if rank == m:
        y = dpotrs(dpotrf(cosines)[0], np.ones(m))[0]
        pivot = float(triangle[-1, -1])
        # An error E of the cosines turns v by |E| |y| / (σ_min |v|), and |v|² = 1ᵀy; y itself errs by |E| |y| / σ_min².
        steep = float(np.abs(y).sum()) >= _AMPLIFICATION * pivot * sqrt(max(float(y.sum()), 0.0))
        if factor is None or not (steep or pivot * pivot * _AMPLIFICATION < 1):
            return y, m, False
    columns = _half(cosines, 16 * m * noise)[0] if factor is None else _full_rank(_rows(factor)[1], noise)
    if len(columns) == m:
        return _foot(columns), m, False
    scale = norms / norms.max() if by_length else np.ones(m)
    left, sigma, _ = np.linalg.svd((columns * scale).T, full_matrices=False)
    y = scale * (left @ (scale @ left / sigma**2))
    v = columns @ y
    if v @ v <= m * EPS:
        return np.zeros(m), len(columns), True
    return y, len(columns), False


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


def power_fixed_point(
    gram: ArrayLike,
    alpha: float = 1.0,
    factor: Factor | None = None,
    *,
    strength: ArrayLike = 1.0,
    noise: float = EPS,
) -> tuple[Array, bool]:
    """Weights w > 0 with G w = s w^(−1/α): Nash-MTL for α = 1, FairGrad for any α > 0, bargaining powers s.

    They minimise the strictly convex ½ wᵀGw − Σ s_i φ(w_i), φ' = w^(−1/α). In unit rows and with p = 1/α the equation
    reads C v = b v^(−p), b_i = s_i n_i^(p − 1); damped Newton steps in y_i = dv_i / v_i solve it in 4 to 15 rounds.

    Args:
        gram: (m, m) Gram matrix.
        alpha: α > 0.
        factor: called for B (m, k) with B Bᵀ = J Jᵀ when the Gram is too coarse.
        strength: s > 0, (m,) or one number.
        noise: error of the Gram's entries, relative to n_i n_j.

    Returns:
        ``(weights, solved)``. A zero row has no finite solution: it is left out and gets weight 0. ``solved`` is false,
        and the weights are zero, when the other rows are Pareto stationary (or none is left): then no solution exists.
        The relative residual of row i is rounding, about m·eps·``(Σ_j |C_ij| v_j) / (C v)_i``. No float64 weights do
        better: rounding them changes it by as much. For two opposite unit rows with an angle θ to spare it is eps / θ².
    """
    g = np.asarray(gram, dtype=np.float64)
    norms, cosines = unit(g)
    m = len(norms)
    keep = np.flatnonzero(norms)
    if len(keep) < m:
        weights = np.zeros(m)
        if not len(keep):
            return weights, False
        part, part_factor = _select(g, factor, keep)
        power = np.broadcast_to(np.asarray(strength, dtype=np.float64), m)[keep]
        weights[keep], solved = power_fixed_point(part, alpha, part_factor, strength=power, noise=noise)
        return weights, solved
    top = norms.max()
    lengths = norms / top
    power = np.broadcast_to(np.asarray(strength, dtype=np.float64), m)
    p = 1 / alpha
    v, length, residual = _power_newton(cosines, power, lengths, p)
    # An error E of the cosines moves ⟨u_i, d⟩ by |E| Σ v_j, and v_i, relative to itself, α times as much. With α < 1
    # some ⟨u_i, d⟩ may be next to nothing: then d is the measure, off by |E| Σ v_j over ‖d‖ / Σ v_j.
    if alpha >= 1:
        least = min(length, float((power * lengths ** (p - 1) * v**-p).min()) / alpha)
    else:
        least = length * length / float(v.sum())
    if not (v.sum() < _AMPLIFICATION * least and residual < 1e-10):
        if min_norm(g, factor, noise=noise)[1]:
            return np.zeros(m), False
        if factor is None:
            columns = _half(cosines)[0]
        else:
            norms, columns = _rows(factor)
            lengths = norms / top
        v, solved = _power_point(columns, np.log(power) + (p - 1) * np.log(lengths), alpha)
        if not solved:
            return np.zeros(m), False
    return v / lengths * top ** (-2 * alpha / (1 + alpha)), True


def _power_newton(cosines: Array, power: Array, lengths: Array, p: float) -> tuple[Array, float, float]:
    """Solution of C v = b v^(−p), b = power · lengths^(p − 1); ‖Σ v_i u_i‖; and the largest relative residual.

    The residual is infinite where numbers have run out of range on the way.
    """
    m = len(lengths)
    # What is shorter than this part of its terms is rounding: the rows are stationary.
    floor = m * EPS
    smallest = np.exp(-_LOG_RANGE / max(1.0, abs(1 - p)))
    if lengths.min() < smallest:
        return np.ones(m), 0.0, np.inf
    b = power * lengths ** (p - 1)

    def terms(v: Array) -> tuple[Array, Array]:
        return cosines @ v, b if p == 1 else b * v ** (1 - p)

    def worth(v: Array, cv: Array) -> float:
        if p == 1:
            return float(v @ cv / 2 - b @ np.log(v))
        return float(v @ cv / 2 - b @ np.expm1((1 - p) * np.log(v)) / (1 - p))

    # The diagonal's solution, stretched to the best multiple unless it is stationary to rounding.
    v = b ** (1 / (1 + p))
    if v.min() < smallest:
        return v, 0.0, np.inf
    cv, q = terms(v)
    square = float(v @ cv)
    if square > m * EPS * v.sum() ** 2:
        v *= (q.sum() / square) ** (1 / (1 + p))
    cv, q = terms(v)
    kept, least, length = v, np.inf, 0.0
    stale, best = 0, np.inf
    for _ in range(_NEWTON_ROUNDS):
        vcv = v * cv
        gradient = vcv - q
        residual = float(np.abs(gradient / q).max())
        square = float(v @ cv)
        if residual < least:
            kept, least, length = v, residual, sqrt(max(square, 0.0))
        if residual <= 2 * EPS or square <= floor * float(v.sum()) ** 2:
            break
        hessian = cosines * v
        hessian *= v[:, None]
        hessian.ravel()[:: m + 1] += p * q
        _, y, failed = dposv(hessian, -gradient)
        if failed:
            break
        longest = float(np.abs(y).max())
        if longest < 1e-3:
            stale = stale + 1 if residual >= best / 2 else 0
            if stale == _STALE_ROUNDS:
                break
            best = min(best, residual)
        if longest * (1 + p) < 0.2:
            # The curvature changes by less than a quarter on the way: the whole step is a good one.
            v = v * (1 + y)
            cv, q = terms(v)
            continue
        value, slope = worth(v, cv), float(y @ gradient)
        # Terms too small to show in the value must still be free to move.
        blur = 16 * EPS * (abs(value) + float(np.abs(vcv).sum() + q.sum()))
        step = 1.0
        for _ in range(_HALVINGS):
            move = step * y
            # 1 + y, bent to 1 / (1 − y) below zero: weights stay positive and may fall by any factor in one round.
            trial = v * np.where(move < 0, 1 / (1 - np.minimum(move, 0.0)), 1 + move)
            if trial.min() < smallest:
                return kept, length, np.inf
            cv, q = terms(trial)
            if worth(trial, cv) <= value + 1e-4 * step * slope + blur:
                break
            step /= 2
        else:
            break
        v = trial
    return kept, length, least


def _power_point(columns: Array, log_b: Array, alpha: float) -> tuple[Array, bool]:
    """The same v for unit columns that are nearly stationary, or that differ by any factor; and whether there is one.

    Two convex problems have this solution, with p_i = ⟨u_i, d⟩ and v_i = (b_i / p_i)^α: the least
    ½ ‖d‖² − Σ b_i^α F(p_i) over d, and the least ½ ‖Σ v_i u_i‖² − Σ b_i φ(v_i) over v. Of p and v the one that is
    raised to the power γ ≥ 1 varies less, and rounding hurts it less: that one is solved for. Newton steps are least
    squares problems on the columns, with rows sorted by size, so that no condition number is squared and all sizes keep
    their digits.
    """
    k, m = columns.shape
    by_products = alpha >= 1
    gamma = max(alpha, 1 / alpha)

    def power(log: Array) -> Array:
        return np.exp(np.minimum(log, _LOG_RANGE))

    # x are the p or the v, vector is d.
    if by_products:
        vector = _shortest(columns, power(log_b - log_b.max()))
        if (vector @ columns).min() <= 0:
            vector = _shortest(columns, np.ones(m))
        x, log_b = vector @ columns, alpha * log_b
        if x.min() <= 0:
            return np.zeros(m), False
    else:
        x = power(np.maximum(alpha * (log_b - log_b.max()), -_LOG_RANGE / gamma))
        vector = columns @ x
    # Of all multiples the best, unless this start is stationary to rounding.
    square = float(vector @ vector)
    if by_products or square > m * EPS * float(x.sum()) ** 2:
        logs = log_b + (1 - gamma) * np.log(x)
        total = float(logs.max() + np.log(power(logs - logs.max()).sum()))
        stretch = np.exp((total - np.log(square)) / (1 + gamma))
        vector, x = vector * stretch, x * stretch
    stale, best = 0, np.inf
    for _ in range(_POINT_ROUNDS):
        q = power(log_b + (1 - gamma) * np.log(x))
        heavy = np.sqrt(gamma * q)
        if by_products:
            stacked = np.vstack((np.eye(k), (columns / x * heavy).T))
        else:
            stacked = np.vstack((columns * x, np.diag(heavy)))
        sides = np.concatenate((-vector, heavy / gamma))
        order = np.argsort(-np.abs(stacked).max(axis=1))
        step = lstsq(stacked[order], sides[order], cond=0.0, lapack_driver="gelsy")[0]
        change = step @ columns / x if by_products else step
        move = step if by_products else columns @ (x * step)
        longest = float(np.abs(change).max()) * (1 + gamma)
        if longest <= 4 * EPS:
            break
        if longest < 1e-2:
            stale = stale + 1 if longest >= best / 2 else 0
            if stale == _STALE_ROUNDS:
                break
            best = min(best, longest)
        part = 1.0
        if longest >= 0.2:
            part = 0.95 / max(float(-change.min()), 0.95)
            slope = float(vector @ move - q @ change)
            for _ in range(_HALVINGS):
                # Along a line the slope of a convex function only grows: stop before it has climbed too far.
                if (vector + part * move) @ move - q * (1 + part * change) ** -gamma @ change <= -slope / 2:
                    break
                part /= 2
        if by_products:
            vector = vector + part * step
            x = vector @ columns
            if x.min() <= 0:
                return np.zeros(m), False
        else:
            x = x * (1 + part * step)
            vector = columns @ x
    if not by_products:
        return x, True
    v = power(log_b - alpha * np.log(x))
    # The weights whose sum is d, as close to these as can be: their rounding, about α eps ‖d‖ / p_i, may exceed d.
    coarse = float(x.min() / (alpha * np.sqrt(vector @ vector)))
    shares = lstsq(columns * v, vector - columns @ v, cond=coarse, lapack_driver="gelsy")[0]
    if np.abs(shares).max() < 0.5:
        v = v * (1 + shares)
    return v, True


def cagrad(gram: ArrayLike, c: float, factor: Factor | None = None, *, noise: float = EPS) -> tuple[Array, bool]:
    """Weights of CAGrad: the d within c ‖g_0‖ of the mean g_0 with the largest min_i ⟨g_i, d⟩ (Liu et al. 2021).

    In unit rows: the largest τ for which the shortest e = d − g_0 with ⟨u_i, e⟩ ≥ τ a_i − ⟨u_i, g_0⟩, a_i = 1/n_i, is
    no longer than c ‖g_0‖. That e is one non-negative least squares problem, and on its support ‖e‖² is a quadratic in
    τ: a few rounds find the right support, and the root of its quadratic is the answer.

    Args:
        gram: (m, m) Gram matrix.
        c: radius relative to ‖g_0‖, ≥ 0.
        factor: called for B (m, k) with B Bᵀ = J Jᵀ when the Gram is too coarse.
        noise: error of the Gram's entries, relative to n_i n_j.

    Returns:
        ``(weights, degenerate)``: (m,) weights with d = Jᵀ w, the mean included and not rescaled. Zero rows count in
        the mean and are left out of the minimum. ``degenerate``: the paper's dual has g_w = 0 (the rows are Pareto
        stationary and the best worst case is 0), so that many d are optimal; the one closest to g_0 is returned, which
        is g_0 itself when no row opposes it. It is also set when g_0 is zero.
    """
    g = np.asarray(gram, dtype=np.float64)
    norms, cosines = unit(g)
    m = len(norms)
    weights = np.full(m, 1 / m)
    keep = np.flatnonzero(norms)
    if not len(keep):
        return weights, True
    if len(keep) < m:
        part_gram, part_factor = _select(g, factor, keep)
        part, degenerate = cagrad(part_gram, c, part_factor, noise=noise)
        weights[keep] = part * len(keep) / m
        return weights, degenerate
    if c == 0:
        return weights, False
    columns, pivot = _half(cosines)
    x, slack, mean, degenerate = _cagrad_multipliers(columns, norms, c, np.sqrt(m * noise))
    if factor is not None:
        total = max(float(x.sum()), EPS)
        cancellation = min(mean, c / total)
        if degenerate or pivot * cancellation * _AMPLIFICATION < 1:
            active = (x > 0) | (slack <= 100 * m * noise)
            if degenerate or _doubtful(columns, active, cancellation, noise):
                norms, columns = _rows(factor)
                x, _, mean, degenerate = _cagrad_multipliers(columns, norms, c, 16 * m * EPS)
    weights += x * (mean * norms.sum() / m) / norms
    return weights, degenerate


def _cagrad_multipliers(columns: Array, norms: Array, c: float, tolerance: float) -> tuple[Array, Array, float, bool]:
    """Multipliers x ≥ 0, d = g_0 + ‖g_0‖ Σ x_i u_i; the slack of the constraints; ‖g_0‖ m / Σ n_i; degenerate."""
    a = norms.min() / norms
    mean = columns @ (norms / norms.sum())
    length = float(np.sqrt(mean @ mean))
    if length <= tolerance:
        return np.zeros(len(a)), a, length, True
    mean /= length
    slopes = mean @ columns
    low, high = float((slopes / a).min()), float(((slopes + c) / a).min())
    # τ = 0 is special: when the rows are Pareto stationary no d reaches a positive τ, and ‖e‖ jumps to infinity there.
    tau = 0.0 if low <= 0 < high else high
    inside = np.zeros(len(a))
    for _ in range(_CAGRAD_ROUNDS):
        bounds = tau * a - slopes
        x = _least_distance(columns, bounds)
        e = columns @ x
        gap = 1 - float(bounds @ x)
        reached = float(np.sqrt(e @ e)) / gap if gap > 0 else np.inf
        if tau == 0 and reached <= c:
            v = _least_distance(columns, a)
            point = columns @ v
            if np.sqrt(point @ point) <= tolerance * v.sum():
                return x / gap, e @ columns / gap - bounds, length, True
        if reached <= c:
            low, inside = max(low, tau), x / gap
        else:
            high = min(high, tau)
        guess = (low + high) / 2
        support = np.flatnonzero(x > 0)
        # A support larger than the rank means that no e exists for this τ.
        if 0 < len(support) <= len(columns):
            # On the support ⟨u_i, e⟩ = τ a_i − ⟨u_i, g_0⟩, so e = Q (τ α − π), and ‖e‖ = c is a quadratic in τ.
            q, r = np.linalg.qr(columns[:, support])
            alpha = dtrtrs(r, a[support], trans=1)[0]
            pi = q.T @ mean
            square, cross, rest = float(alpha @ alpha), float(alpha @ pi), c * c - float(pi @ pi)
            root = cross * cross + square * rest
            if root >= 0:
                root = np.sqrt(root)
                tau = (cross + root) / square if cross >= 0 else rest / (root - cross)
                steps = tau * alpha - pi
                e = q @ steps
                exact = dtrtrs(r, steps)[0]
                slack = e @ columns - (tau * a - slopes)
                rounding = 16 * len(a) * EPS
                if exact.min() >= 0 and slack.min() >= -rounding * max(1.0, abs(tau)):
                    x = np.zeros(len(a))
                    x[support] = exact
                    return x, slack, length, False
                if low < tau < high:
                    guess = tau
        if high - low <= 2 * EPS * max(abs(low), abs(high)):
            break
        tau = guess
    return inside, (columns @ inside) @ columns - (low * a - slopes), length, False


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
        part, part_factor = _select(g, factor, keep)
        balance[np.ix_(keep, keep)], rank = align(part, scale_mode, part_factor, noise=noise)
        return balance, rank
    columns, pivot = _half(cosines, 16 * m * noise)
    if factor is not None and pivot * pivot * _AMPLIFICATION < 1:
        norms, columns = _rows(factor)
        columns = _full_rank(columns, noise)
    rank = len(columns)
    top = norms.max()
    lengths = norms / top
    if rank == m and pivot * pivot * _AMPLIFICATION >= 1 and lengths.min() >= 0.03:
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
    return balance * scale / norms[:, None], rank


def gradvac_mixing(
    gram: ArrayLike, orders: ArrayLike, targets: ArrayLike, beta: float = 0.01, factor: Factor | None = None
) -> tuple[Array, Array]:
    """Mixing matrix of GradVac and the new cosine targets (Wang et al. 2021, algorithm 1).

    Where φ = cos(p_i, g_j) is below its target t_ij, p_i gains
    ‖p_i‖ (t √(1 − φ²) − φ √(1 − t²)) / (‖g_j‖ √(1 − t²)) · g_j, which makes the cosine t; with t = 0 that is PCGrad.
    Every visit moves the target: t_ij ← (1 − β) t_ij + β φ.

    Args:
        gram: (m, m) Gram matrix.
        orders: (m, m − 1) integers; row i lists the j ≠ i in the order of task i's visits.
        targets: (m, m) cosine targets; used within ±(1 − 1e-6), beyond which the step would have no bound.
        beta: step of the moving average.
        factor: called for B (m, k) with B Bᵀ = J Jᵀ when some p_i becomes too short for the Gram to tell its length.

    Returns:
        ``(mixing, targets)``, both (m, m): row i of ``mixing`` holds the weights of task i's gradient. Visits that
        involve a zero row, or a p_i that has become zero, change neither.
    """
    g = np.asarray(gram, dtype=np.float64)
    visits = np.asarray(orders)
    t = np.array(targets, dtype=np.float64)
    norms = np.sqrt(np.maximum(g.diagonal(), 0.0))
    # Of a p_i that has lost this much of its terms (squared) the Gram no longer tells the length.
    short = -1.0 if factor is None else EPS * _AMPLIFICATION**2
    if len(g) <= _SMALL:
        found = _gradvac_small(g.tolist(), visits.tolist(), t.tolist(), norms.tolist(), beta, short)
    else:
        found = _gradvac_sweep(g, None, visits, t.copy(), norms, beta, short)
    if found is None:
        assert factor is not None
        rows = np.asarray(factor(), dtype=np.float64)
        found = _gradvac_sweep(g, rows, visits, t, np.sqrt(np.einsum("ij,ij->i", rows, rows)), beta, -1.0)
    assert found is not None
    return found


def _gradvac_sweep(
    g: Array, rows: Array | None, orders: NDArray[np.intp], t: Array, norms: Array, beta: float, short: float
) -> tuple[Array, Array] | None:
    """``gradvac_mixing`` for all tasks at a time, by the Gram or by the rows; None where some p_i becomes too short."""
    m = len(g)
    mixing, left = np.eye(m), None if rows is None else rows.copy()
    squares = norms * norms
    terms = squares.copy()  # the largest square among the terms of p_i
    nothing = m * EPS if rows is None else (4 * m * EPS) ** 2
    for j in orders.T:
        dots = np.einsum("ij,ij->i", mixing, g[j]) if left is None or rows is None else (left * rows[j]).sum(axis=1)
        own = norms[j]
        i = np.flatnonzero((own > 0) & (squares > nothing * terms))
        j, dots, own = j[i], dots[i], own[i]
        length = np.sqrt(squares[i])
        phi = np.clip(dots / (length * own), -1.0, 1.0)
        target = np.clip(t[i, j], -_TARGET, _TARGET)
        sine = np.sqrt(1 - target * target)
        gain = length * (target * np.sqrt(1 - phi * phi) - phi * sine) / (own * sine)
        gain[phi >= target] = 0.0
        mixing[i, j] += gain
        if left is None or rows is None:
            squares[i] += gain * (2 * dots + gain * own * own)
        else:
            left[i] += gain[:, None] * rows[j]
            squares[i] = np.einsum("ij,ij->i", left[i], left[i])
        terms[i] = np.maximum(terms[i], (gain * own) ** 2)
        t[i, j] += beta * (phi - t[i, j])
        if (squares < short * terms).any():
            return None
    return mixing, t


def _gradvac_small(
    g: list[list[float]], orders: list[list[int]], t: list[list[float]], norms: list[float], beta: float, short: float
) -> tuple[Array, Array] | None:
    """``_gradvac_sweep`` by the Gram in plain floats."""
    m = len(g)
    mixing = []
    for i, order in enumerate(orders):
        weights = [float(i == j) for j in range(m)]
        square = norms[i] * norms[i]
        terms = square
        for j in order:
            own = norms[j]
            if own == 0 or square <= m * EPS * terms:
                continue
            dot = sum(map(mul, weights, g[j]))
            length = sqrt(square)
            phi = min(max(dot / (length * own), -1.0), 1.0)
            target = min(max(t[i][j], -_TARGET), _TARGET)
            if phi < target:
                sine = sqrt(1 - target * target)
                gain = length * (target * sqrt(1 - phi * phi) - phi * sine) / (own * sine)
                weights[j] += gain
                square += gain * (2 * dot + gain * own * own)
                terms = max(terms, (gain * own) ** 2)
                if square < short * terms:
                    return None
            t[i][j] += beta * (phi - t[i][j])
        mixing.append(weights)
    return np.array(mixing), np.array(t)
