"""The best direction for the loss that is worst off, within a ball around the mean gradient: CAGrad."""

from __future__ import annotations

from math import sqrt

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg.lapack import dtrtrs

from gradsurgery.geometry.cones import least_distance
from gradsurgery.geometry.nonnegative import NOT_CONVERGED, Flag, refuse
from gradsurgery.geometry.units import (
    AMPLIFICATION,
    DEPENDENT,
    EPS,
    Array,
    Factor,
    arranged,
    doubtful,
    half,
    select,
    unit,
    unit_rows,
)

_ROUNDS = 100
# What may be left of the conditions where the multipliers come from the last step of the search.
_SEARCHED = 1e-12


def cagrad(
    gram: ArrayLike, c: float, factor: Factor | None = None, *, noise: float = EPS, flag: Flag = refuse
) -> tuple[Array, bool]:
    """Weights of CAGrad: the d within c ‖g_0‖ of the mean g_0 with the largest min_i ⟨g_i, d⟩ (Liu et al. 2021).

    In unit rows: the largest τ for which the shortest e = d − g_0 with ⟨u_i, e⟩ ≥ τ a_i − ⟨u_i, g_0⟩, a_i = 1/n_i, is
    no longer than c ‖g_0‖. That e is one non-negative least squares problem, and on its support ‖e‖² is a quadratic in
    τ: a few rounds find the right support, and the root of its quadratic is the answer.

    Args:
        gram: (m, m) Gram matrix.
        c: radius relative to ‖g_0‖, ≥ 0.
        factor: called for B (m, k) with B Bᵀ = J Jᵀ when the Gram is too coarse.
        noise: error of the Gram's entries, relative to n_i n_j.
        flag: called with "not-converged" if the conditions of the answer cannot be met; an error by default.

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
        part_gram, part_factor = select(g, factor, keep)
        part, degenerate = cagrad(part_gram, c, part_factor, noise=noise, flag=flag)
        weights[keep] = part * len(keep) / m
        return weights, degenerate
    if c == 0:
        return weights, False
    columns, pivot = half(cosines)
    order = None
    if pivot < DEPENDENT:
        order, norms, cosines, factor = arranged(norms, cosines, factor)
        columns, pivot = half(cosines)
    x, slack, mean, degenerate = _cagrad_multipliers(columns, norms, c, np.sqrt(m * noise), flag)
    if factor is not None:
        total = max(float(x.sum()), EPS)
        cancellation = min(mean, c / total)
        if degenerate or pivot * cancellation * AMPLIFICATION < 1:
            active = (x > 0) | (slack <= 100 * m * noise)
            if degenerate or doubtful(columns, active, cancellation, noise):
                norms, columns = unit_rows(factor)
                x, _, mean, degenerate = _cagrad_multipliers(columns, norms, c, 16 * m * EPS, flag)
    x *= mean * norms.sum() / m
    x /= norms
    return weights + (x if order is None else x[np.argsort(order)]), degenerate


def _cagrad_multipliers(
    columns: Array, norms: Array, c: float, tolerance: float, flag: Flag
) -> tuple[Array, Array, float, bool]:
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
    for _ in range(_ROUNDS):
        bounds = tau * a - slopes
        x, e, gap = least_distance(columns, bounds, flag)
        reached = float(np.sqrt(e @ e)) / gap if gap > 0 else np.inf
        if tau == 0 and reached <= c and _is_stationary(columns, a, tolerance, flag):
            return x / gap, e @ columns / gap - bounds, length, True
        if reached <= c:
            low, inside = max(low, tau), x / gap
        else:
            high = min(high, tau)
        guess = (low + high) / 2
        support = np.flatnonzero(x > 0)
        found = _at_radius(columns, support, a, slopes, mean, c)
        if found is not None:
            tau, exact, slack = found
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
    e = columns @ inside
    slack = e @ columns - (low * a - slopes)
    allowed = _SEARCHED * max(1.0, abs(low))
    if max(-slack.min(), np.abs(slack[inside > 0]).max(initial=0.0), abs(sqrt(e @ e) - c)) > allowed:
        flag(NOT_CONVERGED)
    return inside, slack, length, False


def _is_stationary(columns: Array, a: Array, tolerance: float, flag: Flag) -> bool:
    """Whether no d has ⟨u_i, d⟩ ≥ a_i for every row: the point closest to zero among the weighted means is zero."""
    v, point, _ = least_distance(columns, a, flag)
    return bool(np.sqrt(point @ point) <= tolerance * v.sum())


def _at_radius(
    columns: Array, support: NDArray[np.intp], a: Array, slopes: Array, mean: Array, c: float
) -> tuple[float, Array, Array] | None:
    """The τ at which the e of a support has length c, the multipliers on the support, and the slack of all constraints.

    None if there is no such τ. A support larger than the rank means that no e exists.
    """
    if not 0 < len(support) <= len(columns):
        return None
    # On the support ⟨u_i, e⟩ = τ a_i − ⟨u_i, g_0⟩, so e = Q (τ α − π), and ‖e‖ = c is a quadratic in τ.
    q, r = np.linalg.qr(columns[:, support])
    alpha = dtrtrs(r, a[support], trans=1)[0]
    pi = q.T @ mean
    square, cross, rest = float(alpha @ alpha), float(alpha @ pi), c * c - float(pi @ pi)
    root = cross * cross + square * rest
    if not root >= 0:
        return None
    root = np.sqrt(root)
    tau = (cross + root) / square if cross >= 0 else rest / (root - cross)
    steps = tau * alpha - pi
    e = q @ steps
    return tau, dtrtrs(r, steps)[0], e @ columns - (tau * a - slopes)
