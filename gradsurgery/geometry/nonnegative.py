"""Non-negative least squares that is optimal to rounding, whatever the routine that guesses the answer returns."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt

import numpy as np
from scipy.linalg import qr, solve_triangular
from scipy.optimize import nnls

from gradsurgery.geometry.exchange import exchange, suits
from gradsurgery.geometry.units import EPS, Array, bound

Flag = Callable[[str], None]

#: The flag of an answer whose optimality conditions do not hold to rounding.
NOT_CONVERGED = "not-converged"


def refuse(flag: str) -> None:
    """What an unverified answer comes to where nobody can be told by a flag.

    Args:
        flag: "not-converged".

    Raises:
        ArithmeticError: Always.
    """
    raise ArithmeticError(f"{flag}: no point was found whose optimality conditions hold to rounding")


def nonnegative(columns: Array, target: Array, flag: Flag = refuse, begin: Array | None = None) -> tuple[Array, Array]:
    """The x ≥ 0 with the least ‖target − columns x‖, and what is left: r = target − columns x.

    `scipy.optimize.nnls` makes a guess, and for many columns `exchange` before it. It is an answer if its conditions
    hold: x ≥ 0, ⟨a_i, r⟩ ≤ 0 for every column, and = 0 where x_i > 0, all up to rounding relative to ‖target‖.
    Otherwise `settle` goes on from it.

    Args:
        columns: a_1 … a_m, (k, m), none shorter than 1 except those that are zero.
        target: (k,).
        flag: called with "not-converged" if the conditions cannot be met; an error by default.
        begin: the answer to a similar problem, (m,).

    Returns:
        ``(x, r)`` of shapes (m,) and (k,).
    """
    if suits(columns):
        x = exchange(columns, target[None], None if begin is None else begin[None])[0]
        residual = target - columns.dot(x)
        if _is_optimal(target, x, residual.dot(columns)):
            return x, residual
    return by_active_sets(columns, target, flag)


def by_active_sets(columns: Array, target: Array, flag: Flag = refuse) -> tuple[Array, Array]:
    """The answer of `nonnegative`, one column at a time.

    Args:
        columns: a_1 … a_m, (k, m), none shorter than 1 except those that are zero.
        target: (k,).
        flag: called with "not-converged" if the conditions cannot be met; an error by default.

    Returns:
        ``(x, r)`` of shapes (m,) and (k,).
    """
    x = guess(columns, target)
    residual = target - columns.dot(x)
    if _is_optimal(target, x, residual.dot(columns)):
        return x, residual
    return settle(columns, target, x, flag)


def _is_optimal(target: Array, x: Array, gradient: Array) -> bool:
    """Whether the conditions of `nonnegative` hold."""
    kept = gradient * (x > 0)
    allowed = bound(len(x)) * sqrt(target.dot(target))
    # `argmax` costs a fifth of `max` on arrays this small.
    return bool(gradient[gradient.argmax()] <= allowed and kept[kept.argmin()] >= -allowed and x[x.argmin()] >= 0)


def guess(columns: Array, target: Array) -> Array:
    """Where to begin: scipy's answer, which may be wrong.

    Args:
        columns: a_1 … a_m, (k, m).
        target: (k,).

    Returns:
        x, (m,).
    """
    try:
        return np.asarray(nnls(columns, target)[0])
    except RuntimeError:  # too many iterations
        return np.zeros(columns.shape[1])


def settle(columns: Array, target: Array, x: Array, flag: Flag = refuse) -> tuple[Array, Array]:
    """The answer of `nonnegative` by active sets, from any x (Lawson & Hanson 1974, chapter 23).

    Of every support the least squares solution and its residual come from a QR decomposition: they are those of columns
    that are off by rounding, however large x is. No support is visited twice, so that it ends: where rounding leads
    back to one, the column that led there is left alone until the support changes otherwise.

    Args:
        columns: a_1 … a_m, (k, m), of any length.
        target: (k,).
        x: where to begin, (m,); what is not a positive number counts as 0.
        flag: called with "not-converged" if the conditions cannot be met; an error by default.

    Returns:
        ``(x, r)`` of shapes (m,) and (k,).
    """
    m = columns.shape[1]
    sizes, length = np.linalg.norm(columns, axis=0), float(np.linalg.norm(target))
    if length == 0 or not sizes.any():
        return np.zeros(m), target
    inverse = np.divide(1.0, sizes, out=np.zeros(m), where=sizes > 0)
    units, aim = columns * inverse, target / length
    y = np.where((x > 0) & (x < np.inf), x, 0.0) * sizes / length
    y, residual = _relax(units, aim, _independent(units, y))
    visited, banned = {(y > 0).tobytes()}, np.zeros(m, dtype=bool)
    for _ in range(10 * m + 10):
        gradient = residual @ units
        off = np.where(y > 0, np.abs(gradient), gradient) > bound(m)
        usable = off & ~banned & (y == 0)
        if not usable.any():
            break
        j = int(np.where(usable, gradient, -np.inf).argmax())
        try:
            trial, rest = _relax(units, aim, y, j)
        except np.linalg.LinAlgError:  # it depends on the others
            banned[j] = True
            continue
        support = (trial > 0).tobytes()
        if support in visited:
            banned[j] = True
        else:
            visited.add(support)
            banned[:] = False
            y, residual = trial, rest
    # Columns that are off by a roundoff each, as any are that were computed, move the residual by this much.
    moved = bound(m) * (1 + float(y.sum()) / (4 * sqrt(m)))  # bound(m) + Σ y_i·eps
    if off.any() and (np.where(y > 0, np.abs(gradient), gradient) > moved).any():
        flag(NOT_CONVERGED)
    return y * length * inverse, residual * length


def _independent(units: Array, y: Array) -> Array:
    """y without the columns of its support that depend on others."""
    support = np.flatnonzero(y)
    if len(support):
        triangle, order = qr(units[:, support], mode="r", pivoting=True)
        pivots = np.abs(triangle.diagonal())
        rank = int(np.count_nonzero(pivots > len(y) * EPS))
        y = y.copy()
        y[support[order[rank:]]] = 0.0
    return y


def _relax(units: Array, aim: Array, y: Array, entering: int | None = None) -> tuple[Array, Array]:
    """Least squares on the support of y and on ``entering``, where what would not be positive leaves; the residual."""
    support = y > 0
    if entering is not None:
        support[entering] = True
    while support.any():
        found, residual = _least_squares(units[:, support], aim)
        if found.min() > 0:
            y = np.zeros(len(y))
            y[support] = found
            return y, residual
        z = np.zeros(len(y))
        z[support] = found
        falling = np.flatnonzero(support & ~(z > 0))
        part = y[falling] / np.where(y[falling] > 0, y[falling] - z[falling], 1.0)
        step = float(part.min())
        y = np.where(support, np.maximum(y + step * (z - y), 0.0), 0.0)
        y[falling[part == step]] = 0.0
        support[falling[part == step]] = False
    return np.zeros(len(y)), aim


def _least_squares(units: Array, aim: Array) -> tuple[Array, Array]:
    """The solution and its residual, at right angles to the columns to rounding; an error if they are dependent."""
    if units.shape[1] > len(units):
        raise np.linalg.LinAlgError("more columns than entries")
    q, r = np.linalg.qr(units)
    along = q.T @ aim
    residual = aim - q @ along
    more = q.T @ residual
    return solve_triangular(r, along + more), residual - q @ more
