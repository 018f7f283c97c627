"""The best direction for the loss that is worst off, near the mean gradient: CAGrad's ball, and ConicGrad's cone."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import inf, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.linalg.lapack import dtrtrs

from gradsurgery.geometry.cones import least_distance
from gradsurgery.geometry.nonnegative import NOT_CONVERGED, Flag, nonnegative, refuse
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
# How many pieces are walked through one by one, before the interval is halved: of many rows there are hundreds.
_WALKED = 8
# What may be left of the conditions where the multipliers come from the last step of the search.
_SEARCHED = 1e-12
# How close to zero, relative to where the search begins, the direction still shows where the way of a cone ends.
_LAST = 1e-8


def cagrad(
    gram: ArrayLike, c: float, factor: Factor | None = None, *, noise: float = EPS, flag: Flag = refuse
) -> tuple[Array, bool]:
    """Weights of CAGrad: the d within c ‖g_0‖ of the mean g_0 with the largest min_i ⟨g_i, d⟩ (Liu et al. 2021).

    In unit rows: the largest τ for which the shortest e = d − g_0 with ⟨u_i, e⟩ ≥ τ a_i − ⟨u_i, g_0⟩, a_i = 1/n_i, is
    no longer than c ‖g_0‖. That e is one non-negative least squares problem, and on its support ‖e‖² is a quadratic in
    τ: a few rounds find the right support, and the root of its quadratic is the answer.

    Args:
        gram: (m, m) Gram matrix.
        c: radius relative to ‖g_0‖, ≥ 0. From 1 on the ball holds 0, so that the best worst case is not negative.
        factor: called for B (m, k) with B Bᵀ = J Jᵀ when the Gram is too coarse.
        noise: error of the Gram's entries, relative to n_i n_j.
        flag: called with "not-converged" if the conditions of the answer cannot be met; an error by default.

    Returns:
        ``(weights, degenerate)``: (m,) weights with d = Jᵀ w, the mean included and not rescaled. Zero rows count in
        the mean and are left out of the minimum. ``degenerate``: the paper's dual has g_w = 0 (the rows are Pareto
        stationary and the best worst case is 0), so that many d are optimal; the one closest to g_0 is returned, which
        is g_0 itself when no row opposes it. It is also set when g_0 is zero.
    """
    return _best(gram, _Ball(c), factor, noise, flag)


def conic(
    gram: ArrayLike, c: float, factor: Factor | None = None, *, noise: float = EPS, flag: Flag = refuse
) -> tuple[Array, bool]:
    """Weights of ConicGrad: the d as long as the mean g_0, with cos(d, g_0) ≥ c and the largest min_i ⟨g_i, d⟩.

    For all μ ≥ 0 and w on the simplex ⟨g_w, d⟩ ≤ ‖g_w + μ g_0‖ − μ c ‖g_0‖ for unit vectors d of the cone. This is
    tight where d points to the shortest vector of the convex hull of the g_i + μ g_0: μ = 0, and so MGDA's direction,
    if that lies in the cone; otherwise the μ for which the cosine is c. With μ = 1/t these are CAGrad's directions,
    g_0 + t g_w, and the search for τ is the same.

    Args:
        gram: (m, m) Gram matrix.
        c: the least cosine, 0 ≤ c ≤ 1.
        factor: called for B (m, k) with B Bᵀ = J Jᵀ when the Gram is too coarse.
        noise: error of the Gram's entries, relative to n_i n_j.
        flag: called with "not-converged" if the conditions of the answer cannot be met; an error by default.

    Returns:
        ``(weights, degenerate)``: (m,) weights with d = Jᵀ w. Zero rows count in the mean and are left out of the
        minimum. ``degenerate``: the rows are Pareto stationary and the cosine stays above c. If some d of the cone
        opposes no row, the best worst case is 0, and of all these d the one closest to g_0 is returned. If the shortest
        point vanishes before that, the weights are those of g_0. It is also set when g_0 is zero.
    """
    return _best(gram, _Cone(c), factor, noise, flag)


class _Found(NamedTuple):
    """A direction ‖g_0‖ (share ĝ_0 + Σ x_i u_i).

    Attributes:
        x: (m,).
        share: how much of the mean it has.
        slack: of the constraints, (m,).
        length: ‖g_0‖ m / Σ n_i.
        cancellation: the length of the sum over that of its terms.
        whole: all rows count in that sum, through the mean.
        degenerate: see :func:`cagrad` and :func:`conic`.
    """

    x: Array
    share: float
    slack: Array
    length: float
    cancellation: float
    whole: bool
    degenerate: bool


def _best(gram: ArrayLike, region: _Region, factor: Factor | None, noise: float, flag: Flag) -> tuple[Array, bool]:
    """Weights of the best direction of a region, and whether it is degenerate."""
    g = np.asarray(gram, dtype=np.float64)
    norms, cosines = unit(g)
    m = len(norms)
    weights = np.full(m, 1 / m)
    keep = np.flatnonzero(norms)
    if not len(keep):
        return weights, True
    if len(keep) < m:
        part_gram, part_factor = select(g, factor, keep)
        part, degenerate = _best(part_gram, region, part_factor, noise, flag)
        weights[keep] = part * len(keep) / m
        return weights, degenerate
    if region.is_mean:
        return weights, False
    columns, pivot = half(cosines)
    order = None
    if pivot < DEPENDENT:
        order, norms, cosines, factor = arranged(norms, cosines, factor)
        columns, pivot = half(cosines)
    reasons: list[str] = []
    found = region.solve(columns, norms, np.sqrt(m * noise), reasons.append)
    if factor is not None:
        cancellation = min(found.length, found.cancellation)
        # ‖g_0‖² is a sum of entries of the Gram, and as far off as they are.
        unsure = bool(reasons) or found.degenerate or found.length**2 * AMPLIFICATION < 1
        if unsure or pivot * cancellation * AMPLIFICATION < 1:
            active = (found.x > 0) | (found.slack <= 100 * m * noise) | found.whole
            if unsure or doubtful(columns, active, cancellation, noise):
                reasons.clear()
                norms, columns = unit_rows(factor)
                found = region.solve(columns, norms, 16 * m * EPS, reasons.append)
    for reason in reasons:
        flag(reason)
    x = found.x
    x *= found.length * norms.sum() / m
    x /= norms
    return weights * found.share + (x if order is None else x[np.argsort(order)]), found.degenerate


class _Line:
    """For each τ the shortest e with ⟨u_i, e⟩ ≥ τ a_i − ⟨u_i, ĝ_0⟩; the direction is ĝ_0 + e, in units of ‖g_0‖.

    Args:
        columns: the unit rows u_i, (k, m).
        a: n_min / n_i, (m,).
        mean: ĝ_0, (k,).
        flag: called with "not-converged" if the conditions of an answer cannot be met.
    """

    def __init__(self, columns: Array, a: Array, mean: Array, flag: Flag) -> None:
        self.columns, self.a, self.mean, self.flag = columns, a, mean, flag
        self.last: Array | None = None
        self.slopes = mean @ columns

    def bounds(self, tau: float) -> Array:
        return tau * self.a - self.slopes

    def at(self, tau: float) -> tuple[Array, Array, float]:
        # The multipliers, e, and what both are to be divided by.
        found = least_distance(self.columns, self.bounds(tau), self.flag, self.last)
        self.last = found[0]
        return found

    def projection(self) -> tuple[Array, Array]:
        # At τ = 0 the multipliers and the direction, ĝ_0 projected on the dual cone. The bounds of `at` are a
        # combination of the columns there, which rounding can make infeasible.
        x, residual = nonnegative(self.columns, -self.mean, self.flag)
        return x, -residual

    def piece(self, support: NDArray[np.intp]) -> _Piece | None:
        # The τ with this support; None if it is empty, or larger than the rank, so that no e exists.
        if not 0 < len(support) <= len(self.columns):
            return None
        q, r = np.linalg.qr(self.columns[:, support])
        return _Piece(self, support, q, r, dtrtrs(r, self.a[support], trans=1)[0], q.T @ self.mean)

    def border(self, region: _Region, low: float, high: float, tau: float) -> tuple[Array, Array]:
        # Multipliers and slack at the largest τ whose direction lies in the region, from `tau` on: `low` is in there,
        # and `high` is not, unless it is infinite.
        m = len(self.a)
        inside = np.zeros(m)
        for k in range(_ROUNDS):
            x, e, gap = self.at(tau)
            has = region.has(self.mean, e, gap)
            if has:
                low, inside = max(low, tau), x / gap
            else:
                high = min(high, tau)
            piece = self.piece(np.flatnonzero(x > 0))
            guess = None if piece is None else region.border(piece)
            if piece is not None and guess is not None:
                exact, slack = piece.at(guess)
                if exact.min() >= 0 and slack.min() >= -16 * m * EPS * max(1.0, abs(guess)):
                    x = np.zeros(m)
                    x[piece.support] = exact
                    return x, slack
            if high < inf and high - low <= 2 * EPS * max(abs(low), abs(high)):
                break
            if guess is None and piece is not None and k < _WALKED:
                guess = piece.end(tau, up=has)
            middle = (low + high) / 2 if high < inf else 4 * max(1.0, low)
            tau = guess if guess is not None and low < guess < high else middle
        e = self.columns @ inside
        slack = e @ self.columns - self.bounds(low)
        allowed = _SEARCHED * max(1.0, abs(low))
        left = max(-slack.min(), np.abs(slack[inside > 0]).max(initial=0.0), region.miss(self.mean, e))
        if left > allowed:
            self.flag(NOT_CONVERGED)
        return inside, slack

    def is_stationary(self, tolerance: float) -> bool:
        # Whether no d has ⟨u_i, d⟩ ≥ a_i for every row: the point closest to 0 among the weighted means is zero.
        v, point, _ = least_distance(self.columns, self.a, self.flag)
        return bool(np.sqrt(point @ point) <= tolerance * v.sum())


class _Piece(NamedTuple):
    """The τ that have one support, on which ⟨u_i, e⟩ = τ a_i − ⟨u_i, ĝ_0⟩: e = Q (τ α − π) with π = Qᵀ ĝ_0."""

    line: _Line
    support: NDArray[np.intp]
    q: Array
    r: Array
    alpha: Array
    pi: Array

    def at(self, tau: float) -> tuple[Array, Array]:
        # The multipliers on the support, and all slack.
        steps = tau * self.alpha - self.pi
        return dtrtrs(self.r, steps)[0], (self.q @ steps) @ self.line.columns - self.line.bounds(tau)

    def end(self, tau: float, up: bool) -> float | None:
        # Just beyond the τ at which the first multiplier or slack becomes negative; None if none ever does.
        rates = np.append(dtrtrs(self.r, self.alpha)[0], (self.q @ self.alpha) @ self.line.columns - self.line.a)
        values = np.append(*self.at(tau))
        rates[len(self.support) + self.support] = 0.0  # these have no slack
        falls = rates < 0 if up else rates > 0
        if not falls.any():
            return None
        step = float((np.maximum(values[falls], 0.0) / np.abs(rates[falls])).min()) * (1 + _LAST)
        step += 64 * EPS * max(1.0, abs(tau))
        return tau + step if up else tau - step


class _Region(ABC):
    """Where the direction may lie, around the mean gradient.

    Args:
        c: how far from it.
    """

    def __init__(self, c: float) -> None:
        self.c = c

    @property
    @abstractmethod
    def is_mean(self) -> bool:
        # The mean is the only direction.
        ...

    @abstractmethod
    def has(self, mean: Array, e: Array, gap: float) -> bool:
        # Whether the direction ĝ_0 + e / gap is one.
        ...

    @abstractmethod
    def border(self, piece: _Piece) -> float | None:
        # The τ at which the direction of a piece, however long, leaves the region; None if it does not.
        ...

    @abstractmethod
    def miss(self, mean: Array, e: Array) -> float:
        # How far ĝ_0 + e is from the border.
        ...

    def solve(self, columns: Array, norms: Array, tolerance: float, flag: Flag) -> _Found:
        # The best direction for rows of these lengths along these unit columns.
        a = norms.min() / norms
        mean = columns @ (norms / norms.sum())
        length = float(np.sqrt(mean @ mean))
        if length <= tolerance:
            return _Found(np.zeros(len(a)), 1.0, a, length, 1.0, True, True)
        return self.along(_Line(columns, a, mean / length, flag), length, tolerance)

    @abstractmethod
    def along(self, line: _Line, length: float, tolerance: float) -> _Found: ...


class _Ball(_Region):
    """‖d − g_0‖ ≤ c ‖g_0‖."""

    @property
    def is_mean(self) -> bool:
        return self.c == 0

    def has(self, mean: Array, e: Array, gap: float) -> bool:
        return gap > 0 and float(np.sqrt(e @ e)) / gap <= self.c

    def border(self, piece: _Piece) -> float | None:
        alpha, pi = piece.alpha, piece.pi
        square, cross, rest = float(alpha @ alpha), float(alpha @ pi), self.c * self.c - float(pi @ pi)
        root = cross * cross + square * rest
        if not root >= 0:
            return None
        root = np.sqrt(root)
        return float((cross + root) / square if cross >= 0 else rest / (root - cross))

    def miss(self, mean: Array, e: Array) -> float:
        return abs(sqrt(e @ e) - self.c)

    def along(self, line: _Line, length: float, tolerance: float) -> _Found:
        low, high = float((line.slopes / line.a).min()), float(((line.slopes + self.c) / line.a).min())
        tau = high
        # τ = 0 is special: when the rows are Pareto stationary no d reaches a positive τ, and ‖e‖ jumps to infinity.
        if low <= 0 < high:
            tau = 0.0
            x, d = line.projection()
            if self.has(line.mean, d - line.mean, 1.0) and line.is_stationary(tolerance):
                return self._from(line, (x, d @ line.columns), length, True)
        return self._from(line, line.border(self, low, high, tau), length, False)

    def _from(self, line: _Line, answer: tuple[Array, Array], length: float, degenerate: bool) -> _Found:
        x, slack = answer
        total = float(x.sum())
        if self.c < 1:  # d is no shorter than (1 − c) ‖g_0‖
            return _Found(x, 1.0, slack, length, self.c / max(total, EPS), False, degenerate)
        d = line.mean + line.columns @ x
        return _Found(x, 1.0, slack, length, sqrt(d @ d) / (1 + total), True, degenerate)


class _Cone(_Region):
    """cos(d, g_0) ≥ c, ‖d‖ = ‖g_0‖."""

    @property
    def is_mean(self) -> bool:
        return self.c == 1

    def has(self, mean: Array, e: Array, gap: float) -> bool:
        d = gap * mean + e
        return gap > 0 and float(mean @ d) >= self.c * sqrt(d @ d)

    def border(self, piece: _Piece) -> float | None:
        alpha, pi, q, mean = piece.alpha, piece.pi, piece.q, piece.line.mean
        # With τ = (α·π)/‖α‖² + s and the part of ĝ_0 off the span, p: cos = (M + s B) / √(M + 2 s B + s² A). From s = 0
        # on it falls, and reaches c where (c² A − B²) s² − 2 B k s − M k = 0.
        off = mean - q @ pi
        off -= q @ (q.T @ off)
        p, square, cross = float(off @ off), float(alpha @ alpha), float(alpha @ pi)
        whole = p + cross * cross / square
        above = whole - self.c * self.c
        if above < 0 or p <= (16 * len(mean) * EPS) ** 2:  # the second: it turns no more
            return None
        root = self.c * sqrt(above * square * p)
        if cross < 0:
            s = whole * above / (root - cross * above)
        else:
            bend = self.c * self.c * square - cross * cross
            if bend <= 0:
                return None
            s = (cross * above + root) / bend
        return cross / square + s

    def miss(self, mean: Array, e: Array) -> float:
        d = mean + e
        return abs(float(mean @ d) - self.c * sqrt(d @ d))

    def along(self, line: _Line, length: float, tolerance: float) -> _Found:
        v, point, gap = least_distance(line.columns, line.a, line.flag)
        size = sqrt(point @ point)
        low = float((line.slopes / line.a).min())
        if size <= tolerance * v.sum():
            return self._of_stationary(line, low, length, tolerance)
        # With c = 0 every common descent direction is one, rounding or not.
        if self.c == 0 or float(line.mean @ point) >= self.c * size:
            slack = (point @ line.columns - gap * line.a) / size
            return _Found(v / size, 0.0, slack, length, size / float(v.sum()), False, False)
        # A guess to begin with: no e shorter than the sine of the angle reaches the border.
        tau = float(((line.slopes + sqrt(1 - self.c * self.c)) / line.a).min())
        return self._from(line, line.border(self, low, inf, tau), length, False)

    def _of_stationary(self, line: _Line, low: float, length: float, tolerance: float) -> _Found:
        # No d helps all rows, so that τ ends at 0, at the projection of ĝ_0 on the dual cone.
        x, d = line.projection()
        if sqrt(d @ d) > tolerance * (1 + x.sum()):
            if self.has(line.mean, d - line.mean, 1.0):
                return self._from(line, (x, d @ line.columns), length, True)
            return self._from(line, line.border(self, low, 0.0, low / 2), length, False)
        last = _LAST * low
        x, e, gap = line.at(last)
        d = gap * line.mean + e
        if self.has(line.mean, e, gap) or sqrt(d @ d) <= tolerance * (gap + x.sum()):
            return _Found(np.zeros(len(x)), 1.0, line.slopes, length, 1.0, True, True)
        return self._from(line, line.border(self, low, last, low / 2), length, False)

    def _from(self, line: _Line, answer: tuple[Array, Array], length: float, degenerate: bool) -> _Found:
        x, slack = answer
        d = line.mean + line.columns @ x
        size = sqrt(d @ d)
        return _Found(x / size, 1 / size, slack, length, size / (1 + float(x.sum())), True, degenerate)
