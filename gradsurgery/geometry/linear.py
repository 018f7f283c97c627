"""Linear programs on slices of the simplex, whose answers are proved by duality: EPO and PMGDA."""

from __future__ import annotations

import numpy as np
from scipy.optimize import linprog

from gradsurgery.geometry.nonnegative import NOT_CONVERGED, Flag, guess, refuse, settle
from gradsurgery.geometry.units import Array

# HiGHS treats smaller coefficients as zero, and is asked to meet constraints to this.
_ROUNDED, _FEASIBLE = 1e-9, 1e-10


def best_corner(gain: Array, table: Array, floors: Array, share: Array, flag: Flag = refuse) -> Array | None:
    """Solve max gainᵀ x subject to x ≥ 0, shareᵀ x = 1 and table x ≥ floors.

    HiGHS finds x and the prices y ≥ 0 and z of the constraints. They prove each other if x meets the constraints,
    z share − tableᵀ y ≥ gain, and z − floorsᵀ y = gainᵀ x. HiGHS rounds coefficients below 1e-9 to zero: that part of
    the terms in a sum is what these conditions may be off by, where no coefficient is larger than 1. Where they are off
    by more, or where HiGHS finds nothing, they are solved as one non-negative least squares problem, and the residual
    of another proves that no x is allowed.

    Args:
        gain: (n,).
        table: (k, n).
        floors: (k,); −inf where there is no constraint.
        share: ≥ 0, (n,).
        flag: called with "not-converged" if nothing can be proved; an error by default.

    Returns:
        x, (n,); None where no x is allowed.
    """
    x = _corner(gain, table, floors, share, flag)
    if x is None or abs(share @ x - 1) <= 2 * _ROUNDED:
        return x
    # Shares so small that HiGHS has rounded them to zero become the unit of their variables.
    units = np.where(share > 0, share, 1.0)
    again = _corner(gain / units, table / units, floors, share / units, flag)
    return x if again is None else again / units


def _corner(gain: Array, table: Array, floors: Array, share: Array, flag: Flag) -> Array | None:
    """The answer of ``best_corner`` in the units that are given."""
    used = np.isfinite(floors)
    table, floors = table[used], floors[used]
    sizes = np.maximum(np.abs(table).max(axis=1, initial=0.0), np.abs(floors))
    sizes[sizes == 0] = 1.0
    table, floors = table / sizes[:, None], floors / sizes
    gain = gain / (float(np.abs(gain).max()) or 1.0)
    found = linprog(
        -gain,
        A_ub=-table,
        b_ub=-floors,
        A_eq=share[None],
        b_eq=[1.0],
        bounds=(0, None),
        method="highs",
        options={"primal_feasibility_tolerance": _FEASIBLE, "dual_feasibility_tolerance": _FEASIBLE},
    )
    x = None
    if found.status == 0:
        x = np.maximum(found.x, 0.0)
        y = np.maximum(-found.ineqlin.marginals, 0.0)
        if _proved(gain, table, floors, share, x, y, -float(found.eqlin.marginals[0])):
            return x
    elif _impossible(table, floors, share):
        return None
    other, y, z = _by_least_squares(gain, table, floors, share)
    if _proved(gain, table, floors, share, other, y, z):
        # These prices may prove what HiGHS has found, where its own did not.
        return x if x is not None and _proved(gain, table, floors, share, x, y, z) else other
    if x is not None and _impossible(table, floors, share):
        return None
    flag(NOT_CONVERGED)
    return x


def _proved(gain: Array, table: Array, floors: Array, share: Array, x: Array, y: Array, z: float) -> bool:
    """Whether x and the prices y ≥ 0 and z are allowed, and worth the same."""
    prices = 1 + abs(z) + float(y.sum())
    gap = z - y @ floors - gain @ x
    return bool(
        abs(share @ x - 1) <= _ROUNDED * (1 + x.sum())
        and (table @ x - floors).min(initial=0.0) >= -_ROUNDED * (1 + x.sum())
        and (z * share - y @ table - gain).min() >= -_ROUNDED * prices
        and abs(gap) <= _ROUNDED * (prices + x.sum())
    )


def _impossible(table: Array, floors: Array, share: Array) -> bool:
    """Whether no x ≥ 0 has shareᵀ x = 1 and table x ≥ floors: the least residual of these equations is not zero."""
    k = len(table)
    columns = np.block([[share[None], np.zeros((1, k))], [table, -np.eye(k)]])
    target = np.append(1.0, floors)
    unsure: list[str] = []
    residual = settle(columns, target, guess(columns, target), unsure.append)[1]
    return not unsure and bool(np.linalg.norm(residual) > _FEASIBLE * np.linalg.norm(target))


def _by_least_squares(gain: Array, table: Array, floors: Array, share: Array) -> tuple[Array, Array, float]:
    """The x, y and z that fulfil all conditions at once, with a slack for each inequality, if there are such."""
    k, n = table.shape
    columns = np.zeros((k + n + 2, 2 * (k + n + 1)))
    target = np.concatenate(([1.0], floors, gain, [0.0]))
    xs, ys, slacks, excess = slice(n), slice(n, n + k), slice(n + k, n + 2 * k), slice(n + 2 * k, 2 * (n + k))
    columns[0, xs], columns[1 : k + 1, xs], columns[-1, xs] = share, table, -gain
    columns[k + 1 : -1, ys], columns[-1, ys] = -table.T, -floors
    columns[1 : k + 1, slacks], columns[k + 1 : -1, excess] = -np.eye(k), -np.eye(n)
    columns[k + 1 : -1, -2], columns[-1, -2] = share, 1.0
    columns[:, -1] = -columns[:, -2]
    unsure: list[str] = []  # `_proved` decides
    found = settle(columns, target, guess(columns, target), unsure.append)[0]
    return found[xs], found[ys], float(found[-2] - found[-1])
