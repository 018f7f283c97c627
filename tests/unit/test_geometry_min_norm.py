"""Unit rows, the min-norm point, Frank-Wolfe and the projection onto the simplex."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import strategies as st
from scipy.optimize import minimize

from gradsurgery import geometry
from tests.support import samplers
from tests.support.geometry import (
    EPS,
    INPUTS,
    assert_duplicates_ignored,
    assert_frank_wolfe,
    assert_homogeneous,
    assert_min_norm_kkt,
    assert_not_longer_than_the_shortest_row,
    assert_permutation_equivariant,
    assert_simplex_projection,
    given,
    lengths,
    mgda,
    mgda_gram,
    size,
    unit_rows,
)
from tests.support.samplers import Matrix

# ------------------------------------------------------------------------------------------------------------ unit rows


@given(samplers.matrices())
def test_unit(j: Matrix) -> None:
    norms, cosines = geometry.unit(j @ j.T)
    u = unit_rows(j)
    np.testing.assert_allclose(norms, lengths(j), rtol=1e-14)
    np.testing.assert_allclose(cosines, u @ u.T, atol=1e-14)
    assert (np.abs(cosines) <= 1).all()
    assert (cosines.diagonal() == (lengths(j) > 0)).all()


@pytest.mark.parametrize("length", [1e-24, 1e-12, 1.0, 1e12, 1e24])
def test_unit_keeps_digits_at_every_length(length: float) -> None:
    gram = length * np.array([[4.0, 3.0], [3.0, 9.0]])
    norms, cosines = geometry.unit(gram)
    np.testing.assert_allclose(norms, np.sqrt(length) * np.array([2.0, 3.0]), rtol=1e-15)
    assert cosines[0, 1] == pytest.approx(0.5, rel=1e-15)


def test_unit_does_not_write_to_its_input() -> None:
    gram = np.array([[4.0, 0.0], [0.0, 0.0]])
    norms, cosines = geometry.unit(gram)
    assert norms.tolist() == [2.0, 0.0]
    assert cosines.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert gram.tolist() == [[4.0, 0.0], [0.0, 0.0]]


# ------------------------------------------------------------------------------------------------------- min-norm point


@pytest.mark.parametrize(("solve", "squared"), [(mgda, False), (mgda_gram, True)])
@given(j=samplers.matrices())
def test_min_norm_kkt(solve: Callable[[Matrix], Matrix], squared: bool, j: Matrix) -> None:
    assert_min_norm_kkt(solve, j, squared)
    assert_not_longer_than_the_shortest_row(solve, j)


@given(samplers.badly_scaled(samplers.descending()), st.integers(-12, 12))
def test_min_norm_equivariance(j: Matrix, power: int) -> None:
    assert_homogeneous(mgda, j, scale=10.0**power)
    assert_permutation_equivariant(mgda, j)
    assert_duplicates_ignored(mgda, j)


@given(samplers.scaled(samplers.badly_scaled(samplers.descending())))
def test_min_norm_sees_a_common_descent_direction(j: Matrix) -> None:
    assert not geometry.min_norm(j @ j.T, lambda: j)[1]


@given(samplers.scaled(st.one_of(samplers.stationary(), samplers.badly_scaled(samplers.stationary(), 6))))
def test_min_norm_sees_stationary_rows(j: Matrix) -> None:
    w, stationary = geometry.min_norm(j @ j.T, lambda: j)
    assert stationary
    assert geometry.min_norm(j @ j.T)[1]
    assert np.linalg.norm(j.T @ w) <= 16 * len(j) * EPS * size(j, w)


@given(samplers.scaled(samplers.with_zero_row()))
def test_min_norm_of_a_zero_row(j: Matrix) -> None:
    w, stationary = geometry.min_norm(j @ j.T, lambda: j)
    assert stationary
    assert (j.T @ w == 0).all()


@given(samplers.descending())
def test_min_norm_against_slsqp(j: Matrix) -> None:
    m, top = len(j), lengths(j).max()
    gram = j @ j.T / top**2
    oracle = minimize(
        lambda w: w @ gram @ w / 2,
        np.full(m, 1 / m),
        jac=lambda w: gram @ w,
        bounds=[(0, 1)] * m,
        constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": np.ones_like},
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    d, reached = j.T @ mgda(j), np.linalg.norm(j.T @ oracle.x)
    assert np.linalg.norm(d) <= reached * (1 + 1e-12)
    # An oracle whose square is within δ of the optimum is within √δ of the point.
    assert np.linalg.norm(d - j.T @ oracle.x) <= 1e-4 * top


@pytest.mark.parametrize("angle", [1e-3, 1e-5, 1e-7, 1e-9, 1e-11])
def test_min_norm_of_nearly_opposite_rows_needs_the_factor(angle: float) -> None:
    """For g_1 = (1, 0) and g_2 = (−cos, sin), of one length, the point is half their sum, in a Gram down to 1e-8."""
    j = np.array([[1.0, 0.0], [-np.cos(angle), np.sin(angle)]])
    w, stationary = geometry.min_norm(j @ j.T, lambda: j)
    assert not stationary
    np.testing.assert_allclose(w, 0.5, atol=1e-15 / angle)
    assert np.linalg.norm(j.T @ w) == pytest.approx(angle / 2, rel=max(1e-6, 1e-15 / angle))
    assert geometry.min_norm(j @ j.T)[1] == (angle < 1e-8)


def test_min_norm_asks_for_the_factor_only_when_it_must() -> None:
    def refuse() -> Matrix:
        raise AssertionError

    j = np.array([[1.0, 0.2, -0.5], [-0.7, 1.0, 0.3], [0.1, -0.6, 1.2]])
    geometry.min_norm(j @ j.T, refuse)
    geometry.dual_cone(j @ j.T, np.eye(3), refuse)
    geometry.equal_projection(j @ j.T, refuse)
    geometry.cagrad(j @ j.T, 0.4, refuse)
    geometry.power_fixed_point(j @ j.T, 1.0, refuse)
    geometry.align(j @ j.T, "min", refuse)


def test_a_coarse_gram_is_not_trusted_with_small_angles() -> None:
    """A Gram summed in float32 is wrong by 1e-7: opposite rows look 3e-4 apart, and the caller can say so."""
    j = np.array([[1.0, 2.0, 3.0], [-2.0, -4.0, -6.0]])
    gram = j @ j.T * np.array([[1.0, 1 - 1e-7], [1 - 1e-7, 1.0]])
    assert not geometry.min_norm(gram)[1]
    assert geometry.min_norm(gram, noise=2e-7)[1]
    assert geometry.min_norm(gram, lambda: j, noise=2e-7)[1]


@pytest.mark.parametrize(
    ("j", "expected"),
    [
        ([[1.0, 2.0]], [1.0]),
        ([[2e4, 1e4], [-1e4, 1e4]], [1 / 3, 2 / 3]),
        ([[1.0, 0.0], [3.0, 0.1]], [1.0, 0.0]),
        ([[0.0, 0.0], [0.0, 0.0]], [0.5, 0.5]),
    ],
)
def test_min_norm_known_weights(j: list[list[float]], expected: list[float]) -> None:
    np.testing.assert_allclose(mgda(np.array(j)), expected, atol=1e-15)


# ---------------------------------------------------------------------------------------------------------- Frank-Wolfe


@given(samplers.scaled(samplers.integer_matrices()))
def test_frank_wolfe_comes_down_to_the_min_norm_point(j: Matrix) -> None:
    assert_frank_wolfe(geometry.frank_wolfe, j)


@pytest.mark.parametrize(
    ("j", "expected"),
    [
        ([[1.0, 2.0]], [1.0]),
        ([[2e4, 1e4], [-1e4, 1e4]], [1 / 3, 2 / 3]),
        ([[1.0, 0.0], [3.0, 0.1]], [1.0, 0.0]),
    ],
)
def test_frank_wolfe_known_weights(j: list[list[float]], expected: list[float]) -> None:
    rows = np.array(j)
    w, rounds = geometry.frank_wolfe(rows @ rows.T)
    np.testing.assert_allclose(w, expected, atol=1e-12)
    assert rounds <= 3


def test_frank_wolfe_stops_at_its_tolerance() -> None:
    j = INPUTS["m8_n10_rank4"]
    rounds = [geometry.frank_wolfe(j @ j.T, 100_000, tolerance)[1] for tolerance in (1e-1, 1e-2, 1e-3, 1e-4)]
    assert rounds == sorted(rounds)
    assert rounds[0] < rounds[-1] < 100_000
    assert geometry.frank_wolfe(j @ j.T, 250)[1] == 250


# -------------------------------------------------------------------------------------------------------------- simplex


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_project_simplex(v: list[float]) -> None:
    assert_simplex_projection(geometry.project_simplex, np.array(v))
