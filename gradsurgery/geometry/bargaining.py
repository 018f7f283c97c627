"""The strictly convex problem of Nash-MTL and FairGrad: G w = s w^(−1/α)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from math import sqrt
from typing import NamedTuple

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


class _Progress:
    """Whether a number that should fall to zero still falls by half within a few rounds."""

    def __init__(self) -> None:
        self._best, self._stale = np.inf, 0

    def has_ended(self, size: float) -> bool:
        self._stale = self._stale + 1 if size >= self._best / 2 else 0
        self._best = min(self._best, size)
        return self._stale == _STALE_ROUNDS


class _Powers(NamedTuple):
    """The problem of C v = b v^(−p): the least ½ vᵀCv − Σ b_i φ(v_i), φ' = v^(−p)."""

    cosines: Array
    b: Array
    p: float

    def terms(self, v: Array) -> tuple[Array, Array]:
        # C v, and b v^(1 − p).
        return self.cosines @ v, self.b if self.p == 1 else self.b * v ** (1 - self.p)

    def worth(self, v: Array, cv: Array) -> float:
        # What is minimised, but for a constant.
        b, p = self.b, self.p
        if p == 1:
            return float(v @ cv / 2 - b @ np.log(v))
        return float(v @ cv / 2 - b @ np.expm1((1 - p) * np.log(v)) / (1 - p))

    def stretched(self, v: Array) -> Array:
        # The best multiple of v, unless it is stationary to rounding.
        cv, q = self.terms(v)
        square = float(v @ cv)
        if square > len(v) * EPS * v.sum() ** 2:
            v *= (q.sum() / square) ** (1 / (1 + self.p))
        return v

    def newton(self, v: Array, q: Array, gradient: Array) -> Array | None:
        # The Newton step in y_i = dv_i / v_i; None if the Hessian is singular to rounding.
        hessian = self.cosines * v
        hessian *= v[:, None]
        hessian.ravel()[:: len(v) + 1] += self.p * q
        _, y, failed = dposv(hessian, -gradient)
        return None if failed else y

    def downhill(
        self, v: Array, cv: Array, q: Array, y: Array, gradient: Array, smallest: float
    ) -> tuple[Array, Array, Array] | None:
        # Go along y as far as it is worth it: the new v with its terms; None if it is not. A v with an entry below
        # `smallest` ends the search, and comes with the old terms.
        value, slope = self.worth(v, cv), float(y @ gradient)
        # Terms too small to show in the value must still be free to move.
        blur = 16 * EPS * (abs(value) + float(np.abs(v * cv).sum() + q.sum()))
        step = 1.0
        for _ in range(_HALVINGS):
            move = step * y
            # 1 + y, bent to 1 / (1 − y) below zero: weights stay positive and may fall by any factor in one round.
            trial = v * np.where(move < 0, 1 / (1 - np.minimum(move, 0.0)), 1 + move)
            if trial.min() < smallest:
                return trial, cv, q
            its_cv, its_q = self.terms(trial)
            if self.worth(trial, its_cv) <= value + 1e-4 * step * slope + blur:
                return trial, its_cv, its_q
            step /= 2
        return None


def _begun(cosines: Array, power: Array, lengths: Array, p: float, smallest: float) -> tuple[_Powers, Array] | None:
    """The problem, and the diagonal's solution stretched; None if an entry of that lies below `smallest`."""
    if lengths.min() < smallest:
        return None
    problem = _Powers(cosines, power * lengths ** (p - 1), p)
    v = problem.b ** (1 / (1 + p))
    return None if v.min() < smallest else (problem, problem.stretched(v))


def _power_newton(cosines: Array, power: Array, lengths: Array, p: float) -> tuple[Array, float, float]:
    """Solution of C v = b v^(−p), b = power · lengths^(p − 1); ‖Σ v_i u_i‖; and the largest relative residual.

    The residual is infinite where numbers have run out of range on the way.
    """
    m = len(lengths)
    # What is shorter than this part of its terms is rounding: the rows are stationary.
    floor = m * EPS
    smallest = np.exp(-_LOG_RANGE / max(1.0, abs(1 - p)))
    begun = _begun(cosines, power, lengths, p, smallest)
    if begun is None:
        return np.ones(m), 0.0, np.inf
    problem, v = begun
    cv, q = problem.terms(v)
    kept, least, length = v, np.inf, 0.0
    progress = _Progress()
    for _ in range(_NEWTON_ROUNDS):
        gradient = v * cv - q
        residual = float(np.abs(gradient / q).max())
        square = float(v @ cv)
        if residual < least:
            kept, least, length = v, residual, sqrt(max(square, 0.0))
        if residual <= 2 * EPS or square <= floor * float(v.sum()) ** 2:
            break
        y = problem.newton(v, q, gradient)
        if y is None:
            break
        longest = float(np.abs(y).max())
        if longest < 1e-3 and progress.has_ended(residual):
            break
        if longest * (1 + p) < 0.2:
            # The curvature changes by less than a quarter on the way: the whole step is a good one.
            v = v * (1 + y)
            cv, q = problem.terms(v)
            continue
        found = problem.downhill(v, cv, q, y, gradient, smallest)
        if found is None:
            break
        v, cv, q = found
        if v.min() < smallest:
            return kept, length, np.inf
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


def _power(log: Array) -> Array:
    return np.exp(np.minimum(log, _LOG_RANGE))


class _Search(ABC):
    """One of the two problems of ``_power_point``. `x` are its p or its v, `vector` is d.

    Args:
        columns: The unit columns.
        log_b: Logarithms of b.
        alpha: α.

    Attributes:
        gamma: The power of x that the problem has, α or 1/α.
        log_factors: Logarithms of the factors of these powers.
    """

    def __init__(self, columns: Array, log_b: Array, alpha: float) -> None:
        self.columns, self.log_b, self.alpha = columns, log_b, alpha
        self.gamma, self.log_factors = self.powers()

    @abstractmethod
    def powers(self) -> tuple[float, Array]: ...

    @abstractmethod
    def start(self, flag: Flag) -> tuple[Array, Array]:
        # The first vector and x. Without a solution if x is not positive.
        ...

    def stretched(self, vector: Array, x: Array) -> tuple[Array, Array]:
        # Of all multiples the best.
        square = float(vector @ vector)
        logs = self.log_factors + (1 - self.gamma) * np.log(x)
        total = float(logs.max() + np.log(_power(logs - logs.max()).sum()))
        stretch = np.exp((total - np.log(square)) / (1 + self.gamma))
        return vector * stretch, x * stretch

    @abstractmethod
    def squares(self, x: Array, heavy: Array) -> Array:
        # The matrix of the least squares problem, columns of x-entries below or above the weights `heavy`.
        ...

    @abstractmethod
    def effect(self, x: Array, step: Array) -> tuple[Array, Array]:
        # By how much a step changes x, relative to itself, and the vector.
        ...

    @abstractmethod
    def moved(self, vector: Array, x: Array, step: Array) -> tuple[Array, Array]:
        # The vector and x after a step.
        ...

    @abstractmethod
    def weights(self, vector: Array, x: Array) -> Array:
        # The v that belongs to the solution.
        ...

    def step(self, vector: Array, x: Array, q: Array) -> Array:
        # The Newton step.
        heavy = np.sqrt(self.gamma * q)
        stacked = self.squares(x, heavy)
        sides = np.concatenate((-vector, heavy / self.gamma))
        order = np.argsort(-np.abs(stacked).max(axis=1))
        return np.asarray(lstsq(stacked[order], sides[order], cond=0.0, lapack_driver="gelsy")[0])

    def part(self, vector: Array, q: Array, change: Array, move: Array) -> float:
        # How much of a long step to make.
        part = 0.95 / max(float(-change.min()), 0.95)
        slope = float(vector @ move - q @ change)
        for _ in range(_HALVINGS):
            # Along a line the slope of a convex function only grows: stop before it has climbed too far.
            with np.errstate(over="ignore", invalid="ignore"):  # high powers of a small number: too far
                climb = (vector + part * move) @ move - q * (1 + part * change) ** -self.gamma @ change
            if climb <= -slope / 2:
                break
            part /= 2
        return part


class _ByProducts(_Search):
    """The least ½ ‖d‖² − Σ b_i^α F(p_i) over d."""

    def powers(self) -> tuple[float, Array]:
        return self.alpha, self.alpha * self.log_b

    def start(self, flag: Flag) -> tuple[Array, Array]:
        columns = self.columns
        vector = shortest(columns, _power(self.log_b - self.log_b.max()), flag)
        if (vector @ columns).min() <= 0:
            vector = shortest(columns, np.ones(columns.shape[1]), flag)
        return vector, vector @ columns

    def squares(self, x: Array, heavy: Array) -> Array:
        return np.vstack((np.eye(len(self.columns)), (self.columns / x * heavy).T))

    def effect(self, x: Array, step: Array) -> tuple[Array, Array]:
        return step @ self.columns / x, step

    def moved(self, vector: Array, x: Array, step: Array) -> tuple[Array, Array]:
        vector = vector + step
        return vector, vector @ self.columns

    def weights(self, vector: Array, x: Array) -> Array:
        columns, alpha = self.columns, self.alpha
        v = _power(self.log_factors - alpha * np.log(x))
        # The weights whose sum is d, as close to these as can be: their rounding, about α eps ‖d‖ / p_i, may exceed d.
        coarse = float(x.min() / (alpha * np.sqrt(vector @ vector)))
        shares = lstsq(columns * v, vector - columns @ v, cond=coarse, lapack_driver="gelsy")[0]
        return v * (1 + shares) if np.abs(shares).max() < 0.5 else v


class _ByWeights(_Search):
    """The least ½ ‖Σ v_i u_i‖² − Σ b_i φ(v_i) over v."""

    def powers(self) -> tuple[float, Array]:
        return 1 / self.alpha, self.log_b

    def start(self, flag: Flag) -> tuple[Array, Array]:
        x = _power(np.maximum(self.alpha * (self.log_b - self.log_b.max()), -_LOG_RANGE / self.gamma))
        return self.columns @ x, x

    def stretched(self, vector: Array, x: Array) -> tuple[Array, Array]:
        if float(vector @ vector) > len(x) * EPS * float(x.sum()) ** 2:
            return super().stretched(vector, x)
        return vector, x  # stationary to rounding

    def squares(self, x: Array, heavy: Array) -> Array:
        return np.vstack((self.columns * x, np.diag(heavy)))

    def effect(self, x: Array, step: Array) -> tuple[Array, Array]:
        return step, self.columns @ (x * step)

    def moved(self, vector: Array, x: Array, step: Array) -> tuple[Array, Array]:
        x = x * (1 + step)
        return self.columns @ x, x

    def weights(self, vector: Array, x: Array) -> Array:
        return x


def _power_search(columns: Array, log_b: Array, alpha: float, by_products: bool, flag: Flag) -> tuple[Array, bool]:
    """The v of ``_power_point`` by one of its two problems, and whether one was found.

    Newton steps are least squares problems on the columns, with rows sorted by size, so that no condition number is
    squared and all sizes keep their digits.
    """
    nothing = np.zeros(columns.shape[1])
    problem = (_ByProducts if by_products else _ByWeights)(columns, log_b, alpha)
    vector, x = problem.start(flag)
    if x.min() <= 0:
        return nothing, False
    vector, x = problem.stretched(vector, x)
    progress = _Progress()
    for _ in range(_POINT_ROUNDS):
        q = _power(problem.log_factors + (1 - problem.gamma) * np.log(x))
        step = problem.step(vector, x, q)
        change, move = problem.effect(x, step)
        longest = float(np.abs(change).max()) * (1 + problem.gamma)
        if longest <= 4 * EPS or (longest < 1e-2 and progress.has_ended(longest)):
            break
        part = problem.part(vector, q, change, move) if longest >= 0.2 else 1.0
        vector, x = problem.moved(vector, x, part * step)
        if not x.min() > 0:
            return nothing, False
    return problem.weights(vector, x), True
