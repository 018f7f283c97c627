"""The shortest way towards losses in a given ratio that also lowers them: FERERO."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import solve_triangular

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
    unit,
    unit_rows,
)


def toward_ratio(
    gram: ArrayLike,
    losses: ArrayLike,
    ratio: ArrayLike,
    rate: float,
    factor: Factor | None = None,
    *,
    noise: float = EPS,
    flag: Flag = refuse,
) -> tuple[Array, bool]:
    """Weights of FERERO: d = Jᵀ(λ_f + Bᵀ λ_h) of least ½ ‖d‖² − κ λ_hᵀ B l, λ_f on the simplex (Chen et al. 2024).

    The rows of B are an orthonormal basis of what is orthogonal to the unit ratio p. Whatever λ_f is, B J d = κ B l.
    It makes d = s r + e, with s = pᵀ λ_f, the part r of Jᵀp at a right angle to the span of Jᵀ Bᵀ, and e in that span.
    It costs ½ s² ‖r‖² + λ_fᵀ J e, least on an edge of the simplex.

    Args:
        gram: (m, m) Gram matrix.
        losses: l, (m,), of any sign.
        ratio: p up to its length, (m,), > 0.
        rate: κ ≥ 0, in units of one over the step.
        factor: called for B (m, k) with B Bᵀ = J Jᵀ when the Gram is too coarse.
        noise: error of the Gram's entries, relative to n_i n_j.
        flag: called with "not-converged" if the conditions of the answer cannot be met; an error by default.

    Returns:
        ``(weights, deficient)``: (m,), and whether the rows are dependent or one is zero. Then pseudo-inverses stand
        for inverses, B J d = κ B l holds as far as it can, and of all weights of d the shortest are found.
    """
    norms, cosines = unit(gram)
    m, values = len(norms), np.asarray(losses, dtype=np.float64)
    p = np.asarray(ratio, dtype=np.float64) / np.linalg.norm(ratio)
    columns, pivot = half(cosines, 16 * m * noise)
    order = np.arange(m)
    if pivot < DEPENDENT:
        order, norms, cosines, factor = arranged(norms, cosines, factor)
        columns, pivot = half(cosines, 16 * m * noise)
    if factor is not None and pivot * pivot * AMPLIFICATION < 1:
        norms, columns = unit_rows(factor)
        columns = full_rank(columns, noise) if norms.any() else columns[:0]
    deficient = len(columns) < m or not norms.all()
    if deficient:
        weights = _of_dependent((columns * norms).T, values[order], p[order], rate, noise)
    else:
        weights, sound = _of_independent(columns, norms, values[order], p[order], rate)
        if not sound:
            flag(NOT_CONVERGED)
    return weights[np.argsort(order)], deficient


def _of_independent(columns: Array, norms: Array, losses: Array, p: Array, rate: float) -> tuple[Array, bool]:
    """The weights, and whether their sum is d, and d what it should be, to rounding."""
    m = len(norms)
    # The differences g_j / p_j − g_0 / p_0 to the shortest one span Jᵀ Bᵀ, and keep their digits whatever the lengths.
    first = int((norms / p).argmin())
    others = np.arange(m) != first
    scaled, levels = columns * (norms / p), losses / p
    ahead = rate * (levels - levels[first])
    differences = scaled[:, others] - scaled[:, [first]]
    sizes = np.linalg.norm(differences, axis=0)
    differences /= sizes
    q, r = np.linalg.qr(differences)
    wanted = ahead[others] / sizes
    e = q @ solve_triangular(r, wanted, trans=1)
    across = scaled[:, first]  # like Jᵀp, but for that span
    across = across - q @ (across @ q)
    across = across - q @ (across @ q)
    d = _share(p, p * (scaled[:, first] @ e + ahead), float(across @ across)) * across + e
    q, r = np.linalg.qr(columns)
    v = solve_triangular(r, d @ q)
    length = float(np.linalg.norm(d))
    met = np.abs(d @ differences - wanted).max(initial=0.0) <= 64 * m * EPS * (length + np.abs(wanted).max(initial=0.0))
    return v / norms, bool(met and np.linalg.norm(columns @ v - d) <= 64 * m * EPS * (length + np.abs(v).sum()))


def _of_dependent(rows: Array, losses: Array, p: Array, rate: float, noise: float) -> Array:
    """The weights by pseudo-inverses, for rows (m, k)."""
    m = len(rows)
    tolerance = 16 * m * EPS if noise <= EPS else (m * EPS) ** 0.5
    if not rows.any():
        return np.zeros(m)
    across = np.linalg.qr(p[:, None], mode="complete")[0][:, 1:]
    basis, sigma, turned = np.linalg.svd(rows.T @ across, full_matrices=False)
    kept = sigma > tolerance * np.linalg.norm(rows)
    basis = basis[:, kept]
    e = basis @ (turned[kept] @ (rate * (losses @ across)) / sigma[kept])
    r = p @ rows
    r = r - basis @ (r @ basis)
    if np.linalg.norm(r) <= tolerance * np.linalg.norm(rows):
        r = np.zeros_like(r)
    d = _share(p, rows @ e, float(r @ r)) * r + e
    return np.asarray(np.linalg.lstsq(rows.T, d, rcond=tolerance)[0])


def _share(p: Array, cost: Array, square: float) -> float:
    """s = pᵀ λ of the λ on the simplex with the least ½ s² `square` + costᵀ λ.

    It depends on λ by two numbers alone, so that the least lies on the border of a polygon in the plane, whose edges
    are edges of the simplex.
    """
    i, j = np.triu_indices(len(p))
    across, rise = p[j] - p[i], cost[j] - cost[i]
    bend = square * across * across
    slope = square * p[i] * across + rise
    part = np.where(
        bend > 0, np.clip(np.divide(-slope, bend, out=np.zeros_like(bend), where=bend > 0), 0, 1), slope < 0
    )
    s = p[i] + part * across
    return float(s[(square / 2 * s * s + cost[i] + part * rise).argmin()])
