"""Equal projections, as ConFIG and IMTL-G want them, and the balanced rows of Aligned-MTL."""

from __future__ import annotations

import decimal
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import strategies as st

from gradsurgery import geometry
from tests.support import samplers
from tests.support.geometry import (
    EPS,
    assert_duplicates_ignored,
    assert_equal_projections,
    assert_homogeneous,
    assert_orthogonal_rows,
    assert_permutation_equivariant,
    assert_row_scaling_changes_nothing,
    balance,
    config,
    equal,
    given,
    lengths,
    unit_rows,
)
from tests.support.samplers import Matrix

# ---------------------------------------------------------------------------------------------------- equal projections


full_rank = st.integers(1, 6).flatmap(lambda m: samplers.of_rank(m, m))


@given(samplers.scaled(samplers.badly_scaled(full_rank)))
def test_equal_projection_of_full_rank(j: Matrix) -> None:
    assert_equal_projections(equal, j)


@given(samplers.scaled(st.integers(1, 3).flatmap(lambda rank: samplers.of_rank(rank))), st.booleans())
def test_equal_projection_is_least_squares(j: Matrix, by_length: bool) -> None:
    y, rank, degenerate = geometry.equal_projection(j @ j.T, lambda: j, by_length=by_length)
    kept = lengths(j) > 0
    u = unit_rows(j)
    scale = lengths(j)[kept, None] / lengths(j).max() if by_length else 1.0
    assert rank == np.linalg.matrix_rank(u)
    v = np.linalg.lstsq(scale * u[kept], np.ravel(scale * np.ones((kept.sum(), 1))), rcond=1e-10)[0]
    assert degenerate == (np.linalg.norm(v) < 1e-7)
    assert (y[~kept] == 0).all()
    np.testing.assert_allclose(u.T @ y, 0 * v if degenerate else v, atol=1e-9 * (1 + np.abs(y).sum()))


@given(samplers.badly_scaled(full_rank, 6), st.integers(-12, 12))
def test_config_equivariance(j: Matrix, power: int) -> None:
    assert_homogeneous(config, j, scale=10.0**power)
    assert_permutation_equivariant(config, j)

    def toward(rows: Matrix) -> Matrix:
        return equal(rows)[0] / lengths(rows)

    assert_row_scaling_changes_nothing(toward, j)


@given(full_rank)
def test_config_ignores_duplicates(j: Matrix) -> None:
    def toward(rows: Matrix) -> Matrix:
        return equal(rows)[0] / lengths(rows)

    assert_duplicates_ignored(toward, j)


@pytest.mark.parametrize("seed", range(50))
def test_equal_projection_of_opposite_rows_is_zero(seed: int) -> None:
    g = np.random.default_rng(seed).standard_normal(10)
    j = np.stack((g, -2 * g))
    for factor in (None, lambda: j):
        y, rank, degenerate = geometry.equal_projection(j @ j.T, factor)
        assert (y == 0).all()
        assert rank == 1
        assert degenerate


def exact_equal_projection(j: Matrix) -> Matrix:
    """C y = 1 by Gaussian elimination in 60 digits."""
    with decimal.localcontext() as context:
        context.prec = 60
        rows = [[Decimal(x) for x in row] for row in j.tolist()]
        products = [[sum((a * b for a, b in zip(u, v, strict=True)), Decimal(0)) for v in rows] for u in rows]
        norms = [products[i][i].sqrt() for i in range(len(j))]
        table = [
            [x / (n * k) for x, k in zip(row, norms, strict=True)] + [Decimal(1)]
            for row, n in zip(products, norms, strict=True)
        ]
        m = len(table)
        for k in range(m):
            table[k] = [x / table[k][k] for x in table[k]]
            for i in range(m):
                if i != k:
                    table[i] = [x - table[i][k] * t for x, t in zip(table[i], table[k], strict=True)]
        return np.array([float(row[m]) for row in table])


@given(samplers.nearly_dependent(), st.booleans())
def test_equal_projection_of_nearly_dependent_rows(j: Matrix, by_length: bool) -> None:
    """Weights that sum to one, and their direction, are off by no more than rounding of the rows makes of them."""
    y, rank, degenerate = geometry.equal_projection(j @ j.T, lambda: j, by_length=by_length)
    exact = exact_equal_projection(j)
    moved = [exact_equal_projection(j + EPS * lengths(j)[:, None] * signs) for signs in samplers.signs(j.shape)]
    assert (rank, degenerate) == (len(j), False)
    u = unit_rows(j)

    def apart(z: Matrix) -> tuple[float, float]:
        direction = u.T @ (z / z.sum() - exact / exact.sum())
        return float(np.linalg.norm(direction)), float(np.abs(z / z.sum() - exact / exact.sum()).max())

    sensitivity = np.max([apart(z) for z in moved], axis=0)
    terms = np.abs(exact).sum() / exact.sum()
    assert (np.array(apart(y)) <= 1e-11 * terms + 30 * len(j) * sensitivity).all()


@pytest.mark.parametrize("angle", [1e-2, 1e-5, 1e-8, 1e-11])
@pytest.mark.parametrize("length", [1e-3, 1.0, 1e5])
def test_equal_projection_of_nearly_parallel_rows(angle: float, length: float) -> None:
    """Both rows get 1 / (1 + cos): a half. Solving C y = 1 loses that, and IMTL-G divides by Σ y_i / n_i."""
    j = np.array([[1.0, 0.0], [length * np.cos(angle), length * np.sin(angle)]])
    y = geometry.equal_projection(j @ j.T, lambda: j, by_length=True)[0]
    np.testing.assert_allclose(y, 1 / (1 + np.cos(angle)), rtol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_rank_of_rows_in_single_precision(seed: int) -> None:
    """20 rows of rank 5 have full rank once each entry is rounded to float32; weights must not be made of that."""
    rng = np.random.default_rng(seed)
    exact = rng.standard_normal((20, 5)) @ rng.standard_normal((5, 30))
    j = exact.astype(np.float32).astype(np.float64)
    gram, noise = (j.astype(np.float32) @ j.astype(np.float32).T).astype(np.float64), 2e-7
    y, rank, _ = geometry.equal_projection(gram, lambda: j, noise=noise)
    assert rank == 5
    expected = geometry.equal_projection(exact @ exact.T, lambda: exact)[0]
    np.testing.assert_allclose(y, expected, atol=1e-4 * np.abs(expected).max())
    balance, rank = geometry.align(gram, "min", lambda: j, noise=noise)
    assert rank == 5
    expected = exact.T @ geometry.align(exact @ exact.T, "min", lambda: exact)[0].sum(axis=1)
    np.testing.assert_allclose(j.T @ balance.sum(axis=1), expected, atol=1e-3 * np.linalg.norm(expected))


# ---------------------------------------------------------------------------------------------------------- Aligned-MTL


@given(samplers.scaled(samplers.badly_scaled(full_rank, 2)))
def test_align_gives_orthogonal_rows(j: Matrix) -> None:
    assert_orthogonal_rows(balance, j)


@pytest.mark.parametrize("mode", ["min", "median", "rmse"])
@given(j=samplers.badly_scaled(samplers.of_rank(), 3), power=st.integers(-12, 12))
def test_align_equivariance(mode: str, j: Matrix, power: int) -> None:
    """The rows of B J, not their sum, which may cancel: they scale and reorder with the rows of J."""

    def aligned_rows(rows: Matrix) -> Matrix:
        return geometry.align(rows @ rows.T, mode, lambda: rows)[0] @ rows

    plain = aligned_rows(j)
    rounding = 1e-9 * np.linalg.norm(plain)
    assert np.linalg.norm(aligned_rows(10.0**power * j) / 10.0**power - plain) <= rounding
    assert np.linalg.norm(aligned_rows(np.roll(j, 1, axis=0)) - np.roll(plain, 1, axis=0)) <= rounding


@pytest.mark.parametrize("tilt", [1e-3, 1e-6, 0.0])
def test_align_jumps_at_a_change_of_rank(tilt: float) -> None:
    """Two rows nearly alike: σ is the small singular value, and d vanishes with it; at rank one it is the large one."""
    j = np.array([[1.0, 0.0], [1.0, tilt]])
    matrix, rank = geometry.align(j @ j.T, "min", lambda: j)
    length = np.linalg.norm(j.T @ matrix.sum(axis=1))
    assert rank == (2 if tilt else 1)
    assert length == pytest.approx(2.0, abs=1e-12) if not tilt else length < 2 * tilt
