"""The small problems of CAGrad and ConicGrad."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st

from gradsurgery import geometry
from tests.support import samplers
from tests.support.geometry import (
    assert_cagrad_optimal,
    assert_homogeneous,
    assert_permutation_equivariant,
    cagrad,
    given,
    lengths,
    mgda,
    project,
    size,
)
from tests.support.samplers import Matrix

# --------------------------------------------------------------------------------------------------------------- CAGrad


@pytest.mark.parametrize("angle", [1e-3, 1e-6, 1e-8, 1e-10])
def test_cagrad_of_nearly_opposite_rows(angle: float) -> None:
    """The third row has more than it needs; the other two let d have no part along them, and the rest goes sideways."""
    j = np.array([[-3.0, angle, 0.0], [1.0, angle, 0.0], [0.0, 5.0, 5.0]])
    mean = j.mean(axis=0)
    w, degenerate = geometry.cagrad(j @ j.T, 0.99, lambda: j)
    sideways = np.sqrt(0.99**2 * (mean @ mean) - 4 / 9)
    assert not degenerate
    np.testing.assert_allclose(j.T @ w, [0.0, mean[1] + sideways, 5 / 3], atol=1e-13 + 1e-14 / angle)


@pytest.mark.parametrize("c", [0.1, 0.4, 0.9, 1.0, 1.5, 8.0, 100.0])
@given(j=samplers.scaled(samplers.badly_scaled(samplers.descending(), 3)))
def test_cagrad_optimal(c: float, j: Matrix) -> None:
    assert_cagrad_optimal(cagrad(c), j, c)
    assert_cagrad_optimal(lambda rows: geometry.cagrad(rows @ rows.T, c)[0], j, c)


@given(samplers.badly_scaled(samplers.descending(), 3), st.integers(-12, 12))
def test_cagrad_equivariance(j: Matrix, power: int) -> None:
    assert_homogeneous(cagrad(0.4), j, scale=10.0**power)
    assert_permutation_equivariant(cagrad(0.4), j)


@given(samplers.scaled(samplers.stationary()))
def test_cagrad_of_stationary_rows_is_still_optimal(j: Matrix) -> None:
    """Here the best worst case may be 0: then d is in the dual cone, no further from g_0 than any other that is."""
    w, degenerate = geometry.cagrad(j @ j.T, 0.4, lambda: j)
    mean, kept = j.mean(axis=0), lengths(j) > 0
    assert np.isfinite(w).all()
    if not degenerate:
        assert_cagrad_optimal(lambda _: w, j, 0.4)
    elif np.linalg.norm(mean) > 1e-12 * lengths(j).max():
        d = j.T @ w
        nearest = j.T @ project(j, np.full(len(j), 1 / len(j)))
        assert np.linalg.norm(d - nearest) <= 1e-9 * size(j, w)
        assert np.linalg.norm(d - mean) <= 0.4 * np.linalg.norm(mean) * (1 + 1e-9)
        assert (j[kept] @ d >= -1e-9 * lengths(j)[kept] * size(j, w)).all()


def test_cagrad_zero_rows_count_in_the_mean_only() -> None:
    j = np.array([[1.0, 2.0], [0.0, 0.0], [2.0, 1.0]])
    w, degenerate = geometry.cagrad(j @ j.T, 0.4)
    assert not degenerate
    np.testing.assert_allclose(j.T @ w, 1.4 * j.mean(axis=0), rtol=1e-14)
    assert w[1] == 1 / 3
    assert geometry.cagrad(0 * j @ j.T, 0.4)[1]


def test_cagrad_of_one_row_and_of_no_radius() -> None:
    assert geometry.cagrad([[4.0]], 0.4)[0].tolist() == [pytest.approx(1.4, rel=1e-15)]
    assert geometry.cagrad(np.eye(3), 0.0)[0].tolist() == [1 / 3] * 3


@pytest.mark.parametrize("c", [1.0, 1.5, 8.0])
@given(j=samplers.matrices())
def test_cagrad_from_a_radius_of_one_on_raises_no_loss(c: float, j: Matrix) -> None:
    w, _ = geometry.cagrad(j @ j.T, c, lambda: j)
    assert (j @ (j.T @ w) >= -1e-12 * lengths(j) * size(j, w)).all()


@given(samplers.scaled(samplers.descending()))
def test_cagrad_of_a_large_radius_points_where_mgda_does(j: Matrix) -> None:
    d, shortest = j.T @ cagrad(1e9)(j), j.T @ mgda(j)
    np.testing.assert_allclose(d / np.linalg.norm(d), shortest / np.linalg.norm(shortest), atol=1e-8)


def test_cagrad_of_many_tasks() -> None:
    j = np.random.default_rng(0).standard_normal((128, 100)) + 0.3
    assert_cagrad_optimal(cagrad(0.4), j, 0.4)


# ------------------------------------------------------------------------------------------------------------ ConicGrad


def conic(c: float) -> Callable[[Matrix], Matrix]:
    return lambda j: geometry.conic(j @ j.T, c, lambda: j)[0]


def assert_conic_optimal(solve: Callable[[Matrix], Matrix], j: Matrix, c: float) -> None:
    """‖d‖ = ‖g_0‖, cos(d, g_0) ≥ c, and no ⟨g_i, d⟩ is below the value of the dual at the multipliers.

    For every w on the simplex and μ ≥ 0 no unit d in the cone has a worst case above ‖g_w + μ g_0‖ − μ c ‖g_0‖.
    """
    weights, kept = solve(j), lengths(j) > 0
    mean = j.mean(axis=0)
    length, d = np.linalg.norm(mean), j.T @ weights
    terms = (size(j, weights) + lengths(j).mean()) / length
    assert np.linalg.norm(d) == pytest.approx(length, rel=1e-14 * terms + 1e-13)
    cosine = d @ mean / length**2
    assert cosine >= c - 1e-14 * terms
    # What all rows have is the share of the mean; where the cosine is above c the dual has none.
    share = weights[kept].min() if cosine <= c + 1e-14 * terms else 0.0
    w = np.where(kept, weights - share, 0.0)
    mu = share * len(j) / w.sum()
    w /= w.sum()
    assert (w >= 0).all()
    dual = np.linalg.norm(j.T @ w + mu * mean) - mu * c * length
    assert (j[kept] @ d / length >= dual - 1e-12 * (terms * lengths(j)[kept] + size(j, w) + mu * length)).all()


@pytest.mark.parametrize("c", [0.0, 0.05, 0.25, 0.5, 0.9, 0.999])
@given(j=samplers.scaled(samplers.badly_scaled(samplers.descending(), 3)))
def test_conic_optimal(c: float, j: Matrix) -> None:
    assert_conic_optimal(conic(c), j, c)
    assert_conic_optimal(lambda rows: geometry.conic(rows @ rows.T, c)[0], j, c)


@given(samplers.scaled(samplers.descending()))
def test_conic_at_its_ends(j: Matrix) -> None:
    mean, shortest = j.mean(axis=0), j.T @ mgda(j)
    np.testing.assert_allclose(conic(1.0)(j), 1 / len(j), rtol=1e-15)
    wanted = shortest * (np.linalg.norm(mean) / np.linalg.norm(shortest))
    np.testing.assert_allclose(j.T @ conic(0.0)(j), wanted, atol=1e-11 * np.linalg.norm(mean))


@given(samplers.badly_scaled(samplers.descending(), 3), st.integers(-12, 12))
def test_conic_equivariance(j: Matrix, power: int) -> None:
    assert_homogeneous(conic(0.6), j, scale=10.0**power)
    assert_permutation_equivariant(conic(0.6), j)


@given(samplers.scaled(samplers.descending()), st.sampled_from([0.3, 0.7]))
def test_conic_with_the_cosine_of_cagrad_is_cagrad(j: Matrix, c: float) -> None:
    """Both lie on one way from the mean to MGDA's direction."""
    d, mean = j.T @ cagrad(c)(j), j.mean(axis=0)
    cosine = d @ mean / np.linalg.norm(d) / np.linalg.norm(mean)
    assume(cosine < 1 - 1e-6)
    other = j.T @ conic(cosine)(j)
    np.testing.assert_allclose(other / np.linalg.norm(other), d / np.linalg.norm(d), atol=1e-7)


@pytest.mark.parametrize("c", [0.0, 0.5, 0.99])
@pytest.mark.parametrize(
    ("j", "expected"),
    [
        ([[1.0, 2.0], [-3.0, -6.0]], [-1.0, -2.0]),  # nothing but the mean is left
        ([[1.0, 0.0], [-2.0, 0.0], [0.0, 0.0]], [-1 / 3, 0.0]),
        ([[2.0, 0.0], [-0.5, 1.0], [-0.5, -1.0]], [1 / 3, 0.0]),  # by symmetry the way is straight, and ends
    ],
)
def test_conic_of_stationary_rows_that_leave_nothing_is_the_mean(
    c: float, j: list[list[float]], expected: list[float]
) -> None:
    rows = np.array(j)
    w, degenerate = geometry.conic(rows @ rows.T, c, lambda: rows)
    assert degenerate
    np.testing.assert_allclose(rows.T @ w, expected, atol=1e-14)


@pytest.mark.parametrize("turn", range(8))
@pytest.mark.parametrize("angle", [1e-2, 1e-4, 1e-6, 1e-8])
@pytest.mark.parametrize("solve", [geometry.cagrad, geometry.conic], ids=["cagrad", "conic"])
def test_nearly_opposite_rows_and_one_beyond_leave_no_direction(
    solve: Callable[..., tuple[Matrix, bool]], angle: float, turn: int
) -> None:
    """The multipliers are 1/angle here. What is left of the projection on the dual cone is their rounding."""
    angles = np.array([0.0, np.pi - angle, -1.4]) + 0.3 + turn * np.pi / 4
    j = np.array([1.0, 0.7, 1.0])[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    w, degenerate = solve(j @ j.T, 2.0 if solve is geometry.cagrad else 0.5, lambda: j)
    assert degenerate
    if solve is geometry.conic:
        np.testing.assert_allclose(w, 1 / 3, rtol=1e-15)
        return
    assert np.abs(w).max() < 10 / angle
    assert np.linalg.norm(w @ j) <= 1e-14 * np.abs(w).sum()


def test_conic_of_stationary_rows_with_a_free_direction_raises_no_loss() -> None:
    """The two opposed rows forbid all but the third one's direction, at 45° from the mean."""
    j = np.array([[1.0, 0.0], [-2.0, 0.0], [0.0, 1.0]])
    w, degenerate = geometry.conic(j @ j.T, 0.5, lambda: j)
    assert degenerate
    np.testing.assert_allclose(j.T @ w, [0.0, 2**0.5 / 3], atol=1e-14)
    w, degenerate = geometry.conic(j @ j.T, 0.8, lambda: j)  # not in this cone
    assert not degenerate
    assert_conic_optimal(lambda _: w, j, 0.8)


def test_conic_zero_rows_count_in_the_mean_only() -> None:
    j = np.array([[1.0, 0.0], [0.0, 0.0], [0.0, 1.0]])
    w, degenerate = geometry.conic(j @ j.T, 0.5)
    assert not degenerate
    np.testing.assert_allclose(j.T @ w, j.mean(axis=0), rtol=1e-14)
    assert geometry.conic(0 * j @ j.T, 0.5)[1]
    assert geometry.conic([[4.0]], 0.5)[0].tolist() == [1.0]


def test_conic_of_many_tasks() -> None:
    j = np.random.default_rng(0).standard_normal((128, 100)) + 0.3
    assert_conic_optimal(conic(0.4), j, 0.4)
