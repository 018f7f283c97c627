"""Matrices of gradients with promised properties, as hypothesis strategies.

Every matrix J has shape (m, n), one row per task, and integer entries times powers of two. Such products are exact in
float64, so each promise holds for the numbers themselves and not only before rounding. Lengths are powers of two
between 2**-40 and 2**40, which is 1e-12 to 1e12.
"""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

MAX_ROWS = 8
LARGEST_POWER = 40


def scales(largest: int = LARGEST_POWER) -> st.SearchStrategy[float]:
    """Powers of two up to 2**±largest. Multiplying by one is exact, so it changes no sign, rank or cosine."""
    return st.integers(-largest, largest).map(lambda power: 2.0**power)


@st.composite
def integer_matrices(draw: st.DrawFn, rows: int | None = None, columns: int | None = None, largest: int = 4) -> Matrix:
    """Any matrix of integers in [-largest, largest], zero rows and chance duplicates included."""
    m = draw(st.integers(1, MAX_ROWS)) if rows is None else rows
    n = draw(st.integers(1, MAX_ROWS)) if columns is None else columns
    entries = draw(st.lists(st.integers(-largest, largest), min_size=m * n, max_size=m * n))
    return np.array(entries, dtype=np.float64).reshape(m, n)


@st.composite
def of_rank(draw: st.DrawFn, rank: int | None = None, rows: int | None = None, conflict: bool = False) -> Matrix:
    """J = A B of exactly the given rank.

    Why: A is (m, rank) with ones on its diagonal and zeros above it, so its leading square block has determinant 1 and
    its columns are independent. B is (rank, n) with ones on its diagonal and zeros below it, so its rows are
    independent. A product of a matrix with independent columns and one with independent rows has the rank of both. The
    entries are in {-1, 0, 1}, so the product is exact; reordering rows keeps the rank. With ``conflict`` (rank ≥ 2) the
    first two rows of A are e_1 and -k e_1 + e_2 with k = |⟨b_1, b_2⟩| + 1 for the rows b of B, so
    ⟨g_1, g_2⟩ = -k ‖b_1‖² + ⟨b_1, b_2⟩ < 0, because ‖b_1‖² ≥ 1.
    """
    m = draw(st.integers(1 if not conflict else 2, MAX_ROWS)) if rows is None else rows
    r = draw(st.integers(1 if not conflict else 2, m)) if rank is None else rank
    n = r + draw(st.integers(0, 3))
    a = np.tril(draw(integer_matrices(m, r, 1)), -1) + np.eye(m, r)
    b = np.triu(draw(integer_matrices(r, n, 1)), 1) + np.eye(r, n)
    if conflict:
        a[1, 0] = -(abs(b[0] @ b[1]) + 1)
    return a[draw(st.permutations(range(m)))] @ b


@st.composite
def descending(draw: st.DrawFn, rows: int | None = None) -> Matrix:
    """Rows with a common descent direction: not Pareto stationary, conflicts allowed.

    Why: every row has a first entry ≥ 1. A convex combination of the rows then has a first entry ≥ 1 as well, so it is
    never zero, and e_1 has a positive product with every row.
    """
    j = draw(integer_matrices(rows))
    j[:, 0] = np.abs(j[:, 0]) + 1
    return j


@st.composite
def stationary(draw: st.DrawFn) -> Matrix:
    """Pareto stationary rows: some w ≥ 0, Σ w = 1, gives Jᵀ w = 0.

    Why: the last row is -Σ c_i g_i with integers c_i ≥ 0 (c_1 ≥ 1), so the weights (c_1, …, c_{m-1}, 1) / (1 + Σ c_i)
    give zero. The sums are of small integers and therefore exact. Rows are reordered at the end, weights with them.
    """
    j = draw(integer_matrices(draw(st.integers(1, MAX_ROWS - 1))))
    c = np.array(draw(st.lists(st.integers(0, 3), min_size=len(j), max_size=len(j))), dtype=np.float64)
    c[0] += 1
    j = np.vstack((j, -c @ j))
    return j[draw(st.permutations(range(len(j))))]


@st.composite
def with_zero_row(draw: st.DrawFn) -> Matrix:
    """At least one row is zero and at least one is not.

    Why: the matrix has two rows or more; the first is written as zero, the first entry of the second as 1.
    """
    j = draw(integer_matrices(draw(st.integers(2, MAX_ROWS))))
    j[0] = 0.0
    j[1, 0] = 1.0
    return j[draw(st.permutations(range(len(j))))]


@st.composite
def with_copy(draw: st.DrawFn, sign: int | None = None) -> Matrix:
    """The last row is the first times ±2**k: a duplicate (k = 0), a parallel or an antiparallel row.

    Why: multiplying by a power of two is exact, so the two rows have a cosine of exactly ±1. The first entry of the
    first row is made non-zero, so neither row is zero.
    """
    j = draw(integer_matrices(draw(st.integers(1, MAX_ROWS - 1))))
    j[0, 0] = abs(j[0, 0]) + 1
    factor = (draw(st.sampled_from((-1, 1))) if sign is None else sign) * draw(scales(4))
    return np.vstack((j, j[0] * factor))


@st.composite
def nearly_dependent(draw: st.DrawFn) -> Matrix:
    """Independent rows of which one lies 2**-3 to 2**-36 off a row, its opposite, or the plane of two others.

    Why independent: the others are, and the part that this one has along its own coordinate is not zero.
    """
    m = draw(st.integers(2, 6))
    others = draw(of_rank(m - 1, m - 1))
    weights = np.zeros(m - 1)
    weights[0] = draw(st.sampled_from((-2, -1, 1, 2)))
    weights[-1] += draw(st.sampled_from((0, 0, -1, 1))) if m > 2 else 0
    j = np.zeros((m, others.shape[1] + 1))
    j[:-1, :-1], j[-1, :-1], j[-1, -1] = others, weights @ others, 2.0 ** -draw(st.integers(3, 36))
    j *= 2.0 ** np.array(draw(st.lists(st.integers(-6, 6), min_size=m, max_size=m)))[:, None]
    return j[draw(st.permutations(range(m)))]


def signs(shape: tuple[int, int], count: int = 3) -> list[Matrix]:
    """Matrices of ±1, always the same: which way rounding may push the entries."""
    rng = np.random.default_rng(0)
    return [rng.choice((-1.0, 1.0), shape) for _ in range(count)]


@st.composite
def bargains(draw: st.DrawFn, alpha: float) -> tuple[Matrix, Matrix, float]:
    """Rows J made for weights w with J Jᵀ w = w^(−1/α); the direction Jᵀ w, and the length of its terms Σ w_i n_i.

    Why: Σ w_i h_i = 0 for the rows h_i of all columns but the first, so that Jᵀ w = D e_1; the first column is
    w_i^(−1/α) / D, which makes ⟨g_i, D e_1⟩ = w_i^(−1/α), and D² = Σ w_i^(1 − 1/α) makes D = Σ w_i g_i1. The weights
    are powers of two, so that only the first column is rounded, each entry by its own part. Where weights are large,
    first entries are small beside the h_i, and the rows nearly stationary.
    """
    m, n = draw(st.integers(2, 6)), draw(st.integers(1, 4))
    largest = int(min(30, 30 * alpha))
    spread = min(6, largest // 2)
    own = draw(st.lists(st.integers(-spread, spread), min_size=m, max_size=m))
    powers = draw(st.integers(-largest // 3, largest - spread)) + np.array(own)
    w = 2.0**powers
    h = draw(integer_matrices(m, n)) * draw(scales(10))
    h[-1] = -(w[:-1] / w[-1]) @ h[:-1]
    gains = w ** (-1 / alpha)
    length = float(np.sqrt(w @ gains))
    j = np.column_stack((gains / length, h))
    order = draw(st.permutations(range(m)))
    return j[order], length * np.eye(n + 1)[0], float(w @ np.linalg.norm(j, axis=1))


@st.composite
def badly_scaled(draw: st.DrawFn, base: st.SearchStrategy[Matrix], largest: int = 20) -> Matrix:
    """The rows of ``base`` with lengths changed by powers of two up to 2**±largest each.

    Why rank, conflict, zero rows and stationarity stay: scaling rows by positive numbers multiplies J from the left by
    an invertible diagonal matrix (rank), multiplies ⟨g_i, g_j⟩ by a positive number (conflict), and turns weights with
    Jᵀ w = 0 into w_i / s_i (stationarity). Powers of two make all of it exact.
    """
    j = draw(base)
    powers = draw(st.lists(st.integers(-largest, largest), min_size=len(j), max_size=len(j)))
    return j * 2.0 ** np.array(powers)[:, None]


@st.composite
def scaled(draw: st.DrawFn, base: st.SearchStrategy[Matrix]) -> Matrix:
    """``base`` as a whole times a power of two up to 2**±40, which changes nothing but its length."""
    return draw(base) * draw(scales())


def matrices() -> st.SearchStrategy[Matrix]:
    """Any of the above: every rank, scale, conflict, zero, duplicate and antiparallel rows, m = 1 to 8.

    It promises only that the matrix is finite; each of its branches keeps its own promise.
    """
    kinds = st.one_of(
        integer_matrices(), of_rank(), of_rank(conflict=True), descending(), stationary(), with_zero_row(), with_copy()
    )
    return scaled(st.one_of(kinds, badly_scaled(kinds)))
