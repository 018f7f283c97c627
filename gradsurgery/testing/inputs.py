"""Gradients and losses to try a method on, the same for the same seed.

Rows have integer entries times powers of two, so that their products are exact in float64: what is promised of the
numbers can be held before any rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Random = np.random.Generator

MOST_ROWS = 6
STEPS = 5


@dataclass(frozen=True)
class Input:
    """What a method is tried on.

    Attributes:
        kind: One of :data:`KINDS`.
        number: Which of this kind, from 0.
        rows: J, one gradient per row, (m, n).
        history: Losses of some steps, positive, (t, m).
    """

    kind: str
    number: int
    rows: Array
    history: Array

    @property
    def losses(self) -> Array:
        """Losses of the first step, (m,)."""
        return self.history[0]


def _size(rng: Random, least: int = 1) -> int:
    return int(rng.integers(least, MOST_ROWS + 1))


def _powers(rng: Random, m: int, largest: int) -> Array:
    return np.asarray(2.0 ** rng.integers(-largest, largest + 1, (m, 1)), dtype=np.float64)


def _random(rng: Random) -> Array:
    """Any small integers: zero rows, duplicates and conflicts as chance has them."""
    return rng.integers(-4, 5, (_size(rng, 2), int(rng.integers(2, 9)))).astype(np.float64)


def _triangular(rng: Random, m: int, n: int) -> Array:
    """Ones on the diagonal, -1, 0 or 1 above it: the rows are independent for m ≤ n."""
    return np.asarray(np.triu(rng.integers(-1, 2, (m, n)), 1) + np.eye(m, n), dtype=np.float64)


def _independent(rng: Random, least: int = 1) -> Array:
    """A triangular matrix of determinant 1 times one with independent rows, so the rows are independent."""
    m = _size(rng, least)
    rows: Array = _triangular(rng, m, m).T @ _triangular(rng, m, m + int(rng.integers(0, 4)))
    return rows[rng.permutation(m)]


def _conflicting(rng: Random) -> Array:
    """Independent rows, of which the second goes against the first."""
    rows = _independent(rng, least=2)
    # ⟨g₁, g₂ − k g₁⟩ < 0 for k > ⟨g₁, g₂⟩ / ‖g₁‖²
    rows[1] -= (abs(rows[0] @ rows[1]) // (rows[0] @ rows[0]) + 1) * rows[0]
    return rows[rng.permutation(len(rows))]


def _badly_scaled(rng: Random) -> Array:
    rows = _conflicting(rng)
    return rows * _powers(rng, len(rows), 6)


def _nearly_dependent(rng: Random) -> Array:
    """Independent rows, of which one lies 2⁻³ to 2⁻²⁴ off another one or its opposite."""
    others = _independent(rng)
    m, n = others.shape
    rows = np.zeros((m + 1, n + 1))
    rows[:-1, :-1], rows[-1, :-1] = others, rng.choice((-2, -1, 1, 2)) * others[0]
    rows[-1, -1] = 2.0 ** -int(rng.integers(3, 25))
    return rows[rng.permutation(m + 1)]


def _dependent(rng: Random) -> Array:
    rows = _independent(rng)
    rows = np.vstack((rows, rng.integers(-2, 3, len(rows)) @ rows))
    return rows[rng.permutation(len(rows))]


def _duplicates(rng: Random) -> Array:
    """Two rows are equal, parallel or opposed."""
    rows = _independent(rng)
    rows = np.vstack((rows, float(rng.choice((-1, 1)) * 2.0 ** rng.choice((0, 0, 1, -3))) * rows[0]))
    return rows[rng.permutation(len(rows))]


def _zero_row(rng: Random) -> Array:
    rows = _independent(rng, least=2)
    rows[0] = 0.0
    return rows[rng.permutation(len(rows))]


def _stationary(rng: Random) -> Array:
    """The last row is minus a positive combination of the others, so that a convex combination of all is zero."""
    rows = _independent(rng)
    rows = np.vstack((rows, -rng.integers(1, 4, len(rows)) @ rows))
    return rows[rng.permutation(len(rows))]


def _aligned(rng: Random) -> Array:
    return np.abs(_random(rng)) * 2.0 ** int(rng.integers(-20, 21))


def _one(rng: Random) -> Array:
    return _independent(rng)[:1] * 2.0 ** int(rng.integers(-20, 21))


#: How the rows of each kind are drawn.
KINDS: dict[str, Callable[[Random], Array]] = {
    "random": _random,
    "one loss": _one,
    "aligned": _aligned,
    "independent": _independent,
    "conflicting": _conflicting,
    "badly scaled": _badly_scaled,
    "nearly dependent": _nearly_dependent,
    "dependent": _dependent,
    "duplicates": _duplicates,
    "zero row": _zero_row,
    "stationary": _stationary,
    "tiny": lambda rng: _conflicting(rng) * 2.0**-40,
    "huge": lambda rng: _conflicting(rng) * 2.0**40,
}


def possible(kind: str, m: int | None) -> bool:
    """Whether there are inputs of a kind with so many losses.

    Args:
        kind: One of :data:`KINDS`.
        m: The number of losses; None for any.

    Returns:
        Whether there are.
    """
    return m is None or (m == 1 if kind == "one loss" else 2 <= m <= MOST_ROWS)


def drawn(kind: str, seed: int, number: int, m: int | None = None) -> Input:
    """Draw an input.

    Args:
        kind: One of :data:`KINDS`.
        seed: Of all inputs.
        number: Which of this kind.
        m: How many losses; None for any number.

    Returns:
        The input; the same for the same arguments.
    """
    rng = np.random.default_rng([seed, list(KINDS).index(kind), number])
    rows = KINDS[kind](rng)
    while m is not None and len(rows) != m:
        rows = KINDS[kind](rng)
    spread = 3.0 if kind == "badly scaled" else 0.5
    start = np.exp(spread * rng.standard_normal(len(rows)))
    history = start * np.exp(0.2 * rng.standard_normal((STEPS, len(rows))).cumsum(axis=0))
    return Input(kind, number, rows, history)
