"""The strictly convex problem of Nash-MTL and FairGrad: G w = s w^(−1/α)."""

from __future__ import annotations

from math import sqrt

import numpy as np
from numpy.typing import ArrayLike
from scipy.linalg import lstsq
from scipy.linalg.lapack import dposv

from gradsurgery.geometry.cones import min_norm, shortest
from gradsurgery.geometry.nonnegative import NOT_CONVERGED, Flag, refuse
from gradsurgery.geometry.units import AMPLIFICATION, EPS, Array, Factor, arranged, half, select, unit, unit_rows

_NEWTON_ROUNDS, _POINT_ROUNDS, _STALE_ROUNDS, _HALVINGS = 100, 500, 5, 40
# Numbers and their powers keep within e^±600; beyond, their logarithms are used.
_LOG_RANGE = 600.0


def power_fixed_point(
    gram: ArrayLike,
    alpha: float = 1.0,
    factor: Factor | None = None,
    *,
    strength: ArrayLike = 1.0,
    noise: float = EPS,
    flag: Flag = refuse,
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
        flag: called with "not-converged" if the conditions of the answer cannot be met; an error by default.

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
        part, part_factor = select(g, factor, keep)
        power = np.broadcast_to(np.asarray(strength, dtype=np.float64), m)[keep]
        weights[keep], solved = power_fixed_point(part, alpha, part_factor, strength=power, noise=noise, flag=flag)
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
    if not (v.sum() < AMPLIFICATION * least and residual < 1e-10):
        if min_norm(g, factor, noise=noise, flag=flag)[1]:
            return np.zeros(m), False
        order, norms, cosines, factor = arranged(norms, cosines, factor)
        back = np.argsort(order)
        if factor is None:
            columns = half(cosines)[0]
        else:
            norms, columns = unit_rows(factor)
        lengths, power = norms / top, power[order]
        v, solved = _power_point(columns, np.log(power) + (p - 1) * np.log(lengths), alpha, flag)
        if not solved:
            return np.zeros(m), False
        v, lengths = v[back], lengths[back]
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


def _power_point(columns: Array, log_b: Array, alpha: float, flag: Flag) -> tuple[Array, bool]:
    """The same v for unit columns that are nearly stationary, or that differ by any factor; and whether there is one.

    Two convex problems have this solution, with p_i = ⟨u_i, d⟩ and v_i = (b_i / p_i)^α: the least
    ½ ‖d‖² − Σ b_i^α F(p_i) over d, and the least ½ ‖Σ v_i u_i‖² − Σ b_i φ(v_i) over v. Of p and v the one that is
    raised to the power γ ≥ 1 varies less, and rounding hurts it less: that one is solved for, and the other one where
    the equation does not hold. What ends without a point in both has none.
    """
    first, solved = _power_search(columns, log_b, alpha, alpha >= 1, flag)
    if solved and _balanced(columns, log_b, alpha, first):
        return first, True
    v, other = _power_search(columns, log_b, alpha, alpha < 1, flag)
    if other and _balanced(columns, log_b, alpha, v):
        return v, True
    if solved or other:
        flag(NOT_CONVERGED)
    return first, solved


def _balanced(columns: Array, log_b: Array, alpha: float, v: Array) -> bool:
    """Whether C v = b v^(−1/α) up to rounding: 16 m·eps times the terms of C v, and the logarithms of b v^(−1/α)."""
    if not v.min() >= 0:
        return False
    tiny = np.finfo(np.float64).tiny
    logs = np.log(np.maximum(v, tiny))
    right = np.exp(np.minimum(log_b - logs / alpha, _LOG_RANGE))
    terms = v.sum() + (1 + 1 / alpha) * (1 + np.abs(log_b) + np.abs(logs) / alpha) * right
    off = (columns @ v) @ columns - right
    # A weight below the range of float64 is right if the smallest one would be too large.
    return bool((np.where(v > tiny, np.abs(off), -off) <= 16 * len(v) * EPS * terms).all())


def _power_search(columns: Array, log_b: Array, alpha: float, by_products: bool, flag: Flag) -> tuple[Array, bool]:
    """The v of ``_power_point`` by one of its two problems, and whether one was found.

    Newton steps are least squares problems on the columns, with rows sorted by size, so that no condition number is
    squared and all sizes keep their digits.
    """
    k, m = columns.shape
    gamma = alpha if by_products else 1 / alpha

    def power(log: Array) -> Array:
        return np.exp(np.minimum(log, _LOG_RANGE))

    # x are the p or the v, vector is d.
    if by_products:
        vector = shortest(columns, power(log_b - log_b.max()), flag)
        if (vector @ columns).min() <= 0:
            vector = shortest(columns, np.ones(m), flag)
        x, log_b = vector @ columns, alpha * log_b
        if x.min() <= 0:
            return np.zeros(m), False
    else:
        x = power(np.maximum(alpha * (log_b - log_b.max()), -_LOG_RANGE / gamma))
        vector = columns @ x
        if x.min() <= 0:
            return np.zeros(m), False
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
        else:
            x = x * (1 + part * step)
            vector = columns @ x
        if not x.min() > 0:
            return np.zeros(m), False
    if not by_products:
        return x, True
    v = power(log_b - alpha * np.log(x))
    # The weights whose sum is d, as close to these as can be: their rounding, about α eps ‖d‖ / p_i, may exceed d.
    coarse = float(x.min() / (alpha * np.sqrt(vector @ vector)))
    shares = lstsq(columns * v, vector - columns @ v, cond=coarse, lapack_driver="gelsy")[0]
    if np.abs(shares).max() < 0.5:
        v = v * (1 + shares)
    return v, True
