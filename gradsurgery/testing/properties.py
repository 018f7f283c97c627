"""Properties of gradient surgery, stated for any function from rows to a direction.

Each takes ``direction``, a function from a float64 array J of shape (m, n), one gradient per row, to the direction d of
shape (n,) that would be subtracted from the parameters. Each raises ``AssertionError`` where the property does not
hold. Tolerances are relative to the length of d, or to that of its terms where d may cancel; none is absolute.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Direction = Callable[[Array], Array]


def _lengths(rows: Array) -> Array:
    """Row lengths without overflow or underflow of the squares."""
    peaks = np.abs(rows).max(axis=1, initial=0.0)
    safe = np.where(peaks > 0, peaks, 1.0)
    return np.asarray(peaks * np.linalg.norm(rows / safe[:, None], axis=1))


def _close(found: Array, expected: Array, size: float, tolerance: float, what: str) -> None:
    assert np.isfinite(found).all(), f"{what}: the direction is not finite: {found}"
    error = float(np.abs(found - expected).max(initial=0.0))
    assert error <= tolerance * size, f"{what}: off by {error:.3g}, allowed {tolerance:.1g} × {size:.3g}"


def assert_common_descent(direction: Direction, rows: Array, tolerance: float = 1e-9) -> None:
    """No loss rises to first order: ⟨gᵢ, d⟩ ≥ 0 for every row.

    Args:
        direction: The method.
        rows: J, (m, n).
        tolerance: Largest negative cosine that passes as rounding.
    """
    d = direction(rows)
    assert np.isfinite(d).all(), f"the direction is not finite: {d}"
    products, lengths = rows @ d, _lengths(rows)
    # A direction that ought to vanish is rounding of its terms, and rounding may point anywhere.
    rounding = 8 * len(rows) * np.finfo(np.float64).eps * lengths.max()
    worst = products + lengths * (tolerance * np.linalg.norm(d) + rounding)
    assert (worst >= 0).all(), f"common descent fails: ⟨gᵢ, d⟩ = {products}"


def assert_homogeneous(
    direction: Direction, rows: Array, factor: float, degree: int = 1, tolerance: float = 1e-9
) -> None:
    """d(s J) = s^degree d(J) for s > 0.

    Args:
        direction: The method.
        rows: J, (m, n).
        factor: s.
        degree: 1 where the step grows with the gradients, 0 where its length is fixed.
        tolerance: Relative to the longest row, or to the direction.
    """
    d, other = direction(rows), direction(rows * factor)
    size = max(float(np.linalg.norm(d)), float(_lengths(rows).max()) if degree == 1 else 0.0)
    _close(other / factor**degree, d, size, tolerance, f"scaling all rows by {factor:g}")


def assert_row_scale_invariant(
    direction: Direction, rows: Array, factors: Sequence[float], tolerance: float = 1e-9
) -> None:
    """The direction, up to its length, does not change when single rows are multiplied by positive numbers.

    Args:
        direction: The method.
        rows: J, (m, n).
        factors: One a row, (m,).
        tolerance: On the unit vector.
    """
    d, other = direction(rows), direction(rows * np.asarray(factors)[:, None])
    length, other_length = np.linalg.norm(d), np.linalg.norm(other)
    assert (length > 0) == (other_length > 0), "scaling rows: the direction vanishes on one side only"
    if length > 0:
        _close(other / other_length, d / length, 1.0, tolerance, "scaling rows")


def assert_permutation_equivariant(
    direction: Direction, rows: Array, order: Sequence[int], tolerance: float = 1e-9
) -> None:
    """The order of the tasks does not matter.

    Args:
        direction: The method.
        rows: J, (m, n).
        order: A permutation of the rows.
        tolerance: Relative to the longest row, or to the direction.
    """
    d = direction(rows)
    size = max(float(np.linalg.norm(d)), float(_lengths(rows).max()))
    _close(direction(rows[list(order)]), d, size, tolerance, f"order {list(order)}")


def assert_rotation_equivariant(direction: Direction, rows: Array, tolerance: float = 1e-9) -> None:
    """Only inner products count: reversing and negating the coordinates does the same to the direction.

    Args:
        direction: The method.
        rows: J, (m, n).
        tolerance: Relative to the longest row, or to the direction.
    """
    d = direction(rows)
    signs = (-1.0) ** np.arange(rows.shape[1])
    size = max(float(np.linalg.norm(d)), float(_lengths(rows).max()))
    _close((direction((rows * signs)[:, ::-1].copy())[::-1]) * signs, d, size, tolerance, "turned coordinates")


def assert_ignores_copies(direction: Direction, rows: Array, tolerance: float = 1e-9) -> None:
    """Repeating a row does not turn the direction.

    Args:
        direction: The method.
        rows: J, (m, n).
        tolerance: On the unit vector.
    """
    d, other = direction(rows), direction(np.vstack((rows, rows[:1])))
    length, other_length = np.linalg.norm(d), np.linalg.norm(other)
    assert (length > 0) == (other_length > 0), "a copy of a row: the direction vanishes on one side only"
    if length > 0:
        _close(other / other_length, d / length, 1.0, tolerance, "a copy of a row")


def assert_plain_sum_without_conflict(direction: Direction, rows: Array, tolerance: float = 1e-12) -> None:
    """Rows without a negative inner product are left alone: d = Σ gᵢ.

    Args:
        direction: The method, in sum scale.
        rows: J, (m, n), without conflict.
        tolerance: Relative to the sum of the row lengths.
    """
    _close(direction(rows), rows.sum(axis=0), float(_lengths(rows).sum()), tolerance, "no conflict")


def assert_equal_rows(direction: Direction, row: Array, m: int, factor: float, tolerance: float = 1e-9) -> None:
    """m equal rows g give factor · g.

    Args:
        direction: The method.
        row: g, (n,).
        m: How many copies.
        factor: m for methods in sum scale, 1 in mean or priority scale.
        tolerance: Relative to factor · ‖g‖.
    """
    size = factor * float(_lengths(row[None])[0])
    _close(direction(np.tile(row, (m, 1))), factor * row, size, tolerance, f"{m} equal rows")


def assert_min_norm(direction: Direction, rows: Array, tolerance: float = 1e-9) -> None:
    """d is the shortest vector of the convex hull of the rows: ⟨gᵢ, d⟩ ≥ ‖d‖² for all i, and ‖d‖ ≤ min ‖gᵢ‖.

    By these alone d could be shorter than the shortest vector of the hull; that it lies in the hull is checked by its
    distance from it, found by a non-negative least squares problem. Any answer of that problem gives a distance that is
    too large at worst.

    Args:
        direction: The method, in mean scale (simplex weights).
        rows: J, (m, n).
        tolerance: Relative to the lengths that meet in each inequality.
    """
    from gradsurgery.geometry.nonnegative import nonnegative

    d = direction(rows)
    assert np.isfinite(d).all(), f"the direction is not finite: {d}"
    lengths, length = _lengths(rows), float(np.linalg.norm(d))
    slack = rows @ d - length**2 + tolerance * lengths * length
    assert (slack >= -(tolerance**2) * lengths**2).all(), f"min-norm point: ⟨gᵢ, d⟩ − ‖d‖² = {rows @ d - length**2}"
    assert length <= lengths.min() * (1 + tolerance), f"longer than the shortest row: {length} > {lengths.min()}"
    if length > 0:
        # In the hull of J iff in the hull of the rows that are not longer than needed; scaled so that all terms count.
        unit = max(length, float(lengths.min()))
        columns = np.vstack((rows.T / unit, np.ones(len(rows))))
        _, off = nonnegative(columns, np.append(d / unit, 1.0))
        distance = float(np.linalg.norm(off))
        assert distance <= 1e-6, f"min-norm point: {distance * unit:.3g} away from the convex hull"
