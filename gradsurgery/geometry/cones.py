"""Nearest points of cones and convex hulls: each is one non-negative least squares problem in unit rows."""

from __future__ import annotations

from math import sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg import qr, solve_triangular
from scipy.linalg.lapack import dpstrf

from gradsurgery.geometry.exchange import MANY, exchange, suits
from gradsurgery.geometry.nonnegative import Flag, by_active_sets, guess, nonnegative, refuse
from gradsurgery.geometry.units import (
    AMPLIFICATION,
    DEPENDENT,
    EPS,
    Array,
    Factor,
    arranged,
    bound,
    doubtful,
    half,
    unit,
    unit_rows,
)


def least_distance(
    columns: Array, bounds: Array, flag: Flag = refuse, begin: Array | None = None
) -> tuple[Array, Array, float]:
    """Multipliers x ≥ 0 of the shortest e with ⟨u_i, e⟩ ≥ h_i, up to a factor: argmin ‖Σ x_i u_i‖² + (hᵀx − 1)².

    e = Σ x_i u_i / (1 − hᵀx), and no e exists when hᵀx = 1 (Lawson & Hanson 1974, chapter 23).

    Args:
        columns: u_1 … u_m, (k, m).
        bounds: h, (m,).
        flag: called with "not-converged" if x cannot be found; an error by default.
        begin: the x of similar bounds.

    Returns:
        x, (m,); Σ x_i u_i, (k,); and 1 − hᵀx.
    """
    k, m = columns.shape
    stacked = np.empty((k + 1, m))
    stacked[:k], stacked[k] = columns, bounds
    target = np.zeros(k + 1)
    target[k] = 1.0
    x, residual = nonnegative(stacked, target, flag, begin)
    return x, -residual[:k], float(residual[k])


def shortest(columns: Array, bounds: Array, flag: Flag = refuse) -> Array:
    """The shortest e with ⟨u_i, e⟩ ≥ h_i, if there is one, up to a factor.

    Args:
        columns: u_1 … u_m, (k, m).
        bounds: h, (m,).
        flag: called with "not-converged" if e cannot be found; an error by default.

    Returns:
        e, (k,).
    """
    x, point, _ = least_distance(columns, bounds, flag)
    support = np.flatnonzero(x)
    if 0 < len(support) <= len(columns):
        # Once more on the support, where the constraints are equations: Σ x_i u_i loses digits where it cancels.
        q, r = np.linalg.qr(columns[:, support])
        pivots = np.abs(r.diagonal())
        if pivots.min() > 4 * len(x) * EPS * pivots.max():
            return np.asarray(q @ solve_triangular(r, bounds[support], trans=1))
    return point


def min_norm(
    gram: ArrayLike, factor: Factor | None = None, *, noise: float = EPS, flag: Flag = refuse
) -> tuple[Array, bool]:
    """Weights of the shortest vector in the convex hull of the rows (MGDA): argmin ‖Jᵀ w‖, w ≥ 0, Σ w = 1.

    In unit rows, minimising ‖Σ v_i u_i‖² + (aᵀv − 1)² over v ≥ 0, with a_i = n_min / n_i, gives the point up to its
    length: one non-negative least squares problem.

    Args:
        gram: (m, m) Gram matrix.
        factor: called for B (m, k) with B Bᵀ = J Jᵀ when the Gram is too coarse.
        noise: error of the Gram's entries, relative to n_i n_j.
        flag: called with "not-converged" if the conditions of the answer cannot be met; an error by default.

    Returns:
        ``(weights, stationary)``: (m,) on the simplex, and whether the shortest vector is zero as far as the input can
        tell (the rows are Pareto stationary): ‖Jᵀ w‖ ≤ tol · Σ w_i n_i, with tol = 16 m·eps given the factor and
        √(m·noise) without. Zero rows share the weight among them.
    """
    norms, cosines = unit(gram)
    m = len(norms)
    if not norms.all():
        zero = norms == 0
        return zero / np.count_nonzero(zero), True
    columns, pivot = half(cosines)
    order = None
    if pivot < DEPENDENT:
        order, norms, cosines, factor = arranged(norms, cosines, factor)
        columns, pivot = half(cosines)
    a = norms[norms.argmin()] / norms
    unsure: list[str] = []
    v, point, gap = least_distance(columns, a, unsure.append)
    total, length = v.sum(), sqrt(point.dot(point))
    tolerance = sqrt(m * noise)
    if factor is not None and (unsure or pivot * length * AMPLIFICATION < total):
        slack = point @ columns - gap * a
        active = (v > 0) | (slack <= 100 * m * noise * total)
        if unsure or doubtful(np.vstack((columns, a)), active, length / float(total), noise):
            unsure.clear()
            norms, columns = unit_rows(factor)
            a = norms.min() / norms
            v, point, _ = least_distance(columns, a, unsure.append)
            total, length = v.sum(), sqrt(point @ point)
            tolerance = 16 * m * EPS
    for reason in unsure:
        flag(reason)
    weights = v * a
    weights /= weights.sum()
    return weights if order is None else weights[np.argsort(order)], bool(length <= tolerance * total)


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


def dual_cone(
    gram: ArrayLike, u: ArrayLike, factor: Factor | None = None, *, noise: float = EPS, flag: Flag = refuse
) -> Array:
    """Weights of the projection of Jᵀ u on the dual cone {d: J d ≥ 0}: w = u + λ, λ ≥ 0 minimising ‖Jᵀ (u + λ)‖.

    One non-negative least squares problem in unit rows for each u; the cone does not depend on the row lengths.
    DualProj projects one u, UPGrad the rows of a diagonal matrix.

    Args:
        gram: (m, m) Gram matrix.
        u: (m,) weights of the vector to project, or (k, m), one vector per row.
        factor: called for B (m, k) with B Bᵀ = J Jᵀ when the Gram is too coarse.
        noise: error of the Gram's entries, relative to n_i n_j.
        flag: called with "not-converged" if the conditions of the answer cannot be met; an error by default.

    Returns:
        w of the shape of u. A zero row keeps its weight.
    """
    norms, cosines = unit(gram)
    u = np.asarray(u, dtype=np.float64)
    m = len(norms)
    with np.errstate(over="ignore", under="ignore"):
        wanted = (u * norms).reshape(-1, m)
    sizes, exponents = np.abs(wanted).max(axis=1).tolist(), None
    if not all(size == 0 or 1e-100 < size < 1e100 for size in sizes):
        # The answer for a multiple is a multiple of the answer: one whose squares are numbers.
        (u_fraction, u_exponent), (n_fraction, n_exponent) = np.frexp(u.reshape(-1, m)), np.frexp(norms)
        powers = u_exponent + n_exponent
        exponents = np.where(u_fraction * n_fraction != 0, powers, -5000).max(axis=1)[:, None]
        wanted = np.ldexp(u_fraction * n_fraction, powers - exponents)
    products = wanted.dot(cosines)
    # A vector that no row opposes is its own projection.
    if products.item(products.argmin()) >= 0:
        return u.copy()
    columns, pivot = half(cosines)
    order = None
    if pivot < DEPENDENT:
        order, norms, cosines, factor = arranged(norms, cosines, factor)
        wanted, products = wanted[:, order], products[:, order]
        columns, pivot = half(cosines)
    unsure: list[str] = []
    s = _push(columns, wanted, products, unsure.append)
    # For u ≥ 0, ‖Jᵀ(u + λ)‖ ≥ σ_min |u + λ|₁ / √m, and after pivoting σ_min ≥ 3 pivot / √(4^m + 6m − 1) (Higham 2002,
    # chapter 8). Where that is good enough, as for most small m, no closer look is needed.
    sound = m < 32 and 3 * AMPLIFICATION * pivot * pivot >= sqrt(m * (4.0**m + 6 * m - 1)) and u.min() >= 0
    if factor is not None and (unsure or not sound):
        doubt = _too_coarse(columns, pivot, norms, wanted, s, noise) | bool(unsure)
        coarse = np.flatnonzero(doubt & (products.min(axis=1) < 0))
        unsure.clear()
        if len(coarse):
            s[coarse] = _push(unit_rows(factor)[1], wanted[coarse], products[coarse], unsure.append)
    for reason in unsure:
        flag(reason)
    s /= norms if norms[norms.argmin()] > 0 else np.where(norms > 0, norms, 1.0)
    if order is not None:
        s = s[:, np.argsort(order)]
    if exponents is not None:
        with np.errstate(over="ignore", under="ignore"):
            s = np.ldexp(s, exponents)
    return u + s.reshape(u.shape)


def is_crowded(gram: ArrayLike, noise: float = EPS) -> bool:
    """Whether many rows lie in so few dimensions that projections on their dual cone are slow to find.

    For half of all sets of m random rows of rank m / 2 no direction helps all rows, and for more at lower ranks (Wendel
    1962).

    Args:
        gram: (m, m) Gram matrix.
        noise: error of the Gram's entries, relative to n_i n_j.

    Returns:
        Whether there are 48 non-zero rows or more, at least twice as many as their rank.
    """
    norms, cosines = unit(gram)
    m = int(np.count_nonzero(norms))
    if m < MANY:
        return False
    rank = dpstrf(cosines, tol=16 * len(norms) * noise)[2]
    return m >= 2 * int(rank)


def _push(columns: Array, wanted: Array, products: Array, flag: Flag) -> Array:
    """The s ≥ 0 with the least ‖columns (y + s)‖, for each y of ``wanted``: (k, m), one problem per row.

    ``products`` are those of the columns with each vector, as far as they are known.
    """
    targets = wanted @ -columns.T
    # Where one row opposes, this often is the answer; where none does, it is.
    opposed = products < 0
    s = np.where(opposed, -products, 0.0)
    several = np.flatnonzero(opposed.sum(axis=1) > 1)
    if suits(columns):
        s[several] = exchange(columns, targets[several])
    else:
        for i in several:
            s[i] = guess(columns, targets[i])
    # The conditions of `nonnegative`, for all answers at once.
    excess = (targets - s.dot(columns.T)).dot(columns)
    np.abs(excess, out=excess, where=s > 0)
    excess -= bound(len(columns.T)) * np.sqrt(np.einsum("ij,ij->i", targets, targets))[:, None]
    if not (excess.item(excess.argmax()) <= 0 and s.item(s.argmin()) >= 0):
        for i in np.flatnonzero(~((excess <= 0) & (s >= 0)).all(axis=1)):
            s[i] = by_active_sets(columns, targets[i], flag)[0]
    return s


def _too_coarse(columns: Array, pivot: float, norms: Array, wanted: Array, s: Array, noise: float) -> NDArray[np.bool_]:
    """For which vectors the Gram, whose square root ``columns`` are, cannot tell the projection."""
    points = (wanted + s).dot(columns.T)
    totals = np.abs(wanted).sum(axis=1) + s.sum(axis=1)
    lengths = np.sqrt(np.einsum("ij,ij->i", points, points))
    coarse = pivot * lengths * AMPLIFICATION < totals
    for i in np.flatnonzero(coarse):
        active = (norms > 0) & ((s[i] > 0) | (points[i] @ columns <= 100 * len(norms) * noise * totals[i]))
        coarse[i] = doubtful(columns, active, float(lengths[i] / totals[i]), noise)
    return coarse


def closest_point(
    gram: ArrayLike,
    start: int,
    demand: ArrayLike,
    factor: Factor | None = None,
    *,
    noise: float = EPS,
    flag: Flag = refuse,
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
        flag: called with "not-converged" if the conditions of the answer cannot be met; an error by default.

    Returns:
        ``(y, length, along)``: (m,) weights of the *unit* rows, p = Σ y_j u_j, all zero if no p meets the constraints
        as far as the input can tell; ‖p‖; and the cosine between p and u_start. Where ‖p‖ relative to Σ y_j, or the
        cosine, is no more than rounding, it is 0.
    """
    norms, cosines = unit(gram)
    m = len(norms)
    demand = np.where(norms > 0, np.asarray(demand, dtype=np.float64), -np.inf)
    columns, pivot = half(cosines)
    back = np.arange(m)
    if pivot < DEPENDENT:
        order, norms, cosines, factor = arranged(norms, cosines, factor)
        back = np.argsort(order)
        demand, start = demand[order], int(back[start])
        columns, pivot = half(cosines)
    tolerance = (m * noise) ** 0.5
    unsure: list[str] = []
    y, point = _closest(columns, start, demand, tolerance, unsure.append)
    length, total = float(np.sqrt(point @ point)), float(y.sum())
    if factor is not None and (unsure or length <= tolerance * total or pivot * length * AMPLIFICATION < total):
        active = (y > 0) | (point @ columns - demand <= 100 * m * noise * total)
        if unsure or doubtful(columns, active, length / max(total, 1.0), noise):
            unsure.clear()
            columns = unit_rows(factor)[1]
            # Rows of lower precision are rounded themselves.
            tolerance = 16 * m * EPS if noise <= EPS else (m * EPS) ** 0.5
            y, point = _closest(columns, start, demand, tolerance, unsure.append)
            length, total = float(np.sqrt(point @ point)), float(y.sum())
    for reason in unsure:
        flag(reason)
    if length <= tolerance * total:
        return y[back], 0.0, 0.0
    along = float(columns[:, start] @ point) / length
    return y[back], length, along if abs(along) > tolerance else 0.0


def _closest(columns: Array, start: int, demand: Array, tolerance: float, flag: Flag) -> tuple[Array, Array]:
    """The weights y of ``closest_point`` for unit columns, and the point; zeros if there is none."""
    y = np.zeros(columns.shape[1])
    y[start] = 1.0
    j = np.flatnonzero(demand > -np.inf)
    h = demand[j] - columns[:, start] @ columns[:, j]
    top = float(h.max(initial=0.0))
    if top > 0:
        h /= top
        x, _, gap = least_distance(columns[:, j], h, flag)  # gap: 1 / (1 + ‖e‖²) for the shortest e, ⟨u_j, e⟩ ≥ h_j
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
