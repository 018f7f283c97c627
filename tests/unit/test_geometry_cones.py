"""Projections onto the dual cone, and the closest point with given products."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st

from gradsurgery import geometry
from tests.support import samplers
from tests.support.geometry import (
    EPS,
    assert_closest_point,
    assert_dual_cone_kkt,
    assert_homogeneous,
    assert_permutation_equivariant,
    closest,
    dualproj,
    given,
    project,
    size,
    unit_rows,
    upgrad,
)
from tests.support.samplers import Matrix

# ------------------------------------------------------------------------------------------------------------ dual cone


def project_gram(j: Matrix, u: Matrix) -> Matrix:
    return geometry.dual_cone(j @ j.T, u)


@pytest.mark.parametrize("solve", [project, project_gram])
@given(j=samplers.matrices(), seed=st.integers(0, 99))
def test_dual_cone_kkt(solve: Callable[[Matrix, Matrix], Matrix], j: Matrix, seed: int) -> None:
    assert_dual_cone_kkt(solve, j, np.random.default_rng(seed).uniform(-1, 2, len(j)))


@given(samplers.matrices())
def test_dual_cone_of_many_is_one_by_one(j: Matrix) -> None:
    u = np.eye(len(j)) + 0.25
    together = project(j, u)
    for row, weights in zip(u, together, strict=True):
        assert_dual_cone_kkt(lambda _, __, weights=weights: weights, j, row)
        d = j.T @ (project(j, row) - weights)
        assert np.linalg.norm(d) <= 1e-12 * size(j, weights)


@pytest.mark.parametrize("solve", [upgrad, dualproj])
@given(j=samplers.badly_scaled(samplers.integer_matrices(), 4), power=st.integers(-12, 12))
def test_dual_cone_equivariance(solve: Callable[[Matrix], Matrix], j: Matrix, power: int) -> None:
    assert_homogeneous(solve, j, scale=10.0**power)
    assert_permutation_equivariant(solve, j)


@given(samplers.integer_matrices())
def test_dual_cone_against_every_active_set(j: Matrix) -> None:
    """The literal definition: of all d with J d ≥ 0 that are projections on some face, the closest to the mean."""
    mean, best = j.mean(axis=0), np.zeros(j.shape[1])
    for count in range(min(j.shape) + 1):
        for face in itertools.combinations(range(len(j)), count):
            rows = j[list(face)]
            d = mean - np.linalg.pinv(rows) @ (rows @ mean) if count else mean
            if (j @ d >= -1e-9).all() and np.linalg.norm(d - mean) < np.linalg.norm(best - mean):
                best = d
    np.testing.assert_allclose(j.T @ dualproj(j), best, atol=1e-8)


# -------------------------------------------------------------------------------- the closest point with given products


demands = st.lists(st.sampled_from([-np.inf, -0.5, 0.0, 0.02, 0.4, 0.9]), min_size=8, max_size=8)


@given(samplers.badly_scaled(samplers.integer_matrices(), 4), demands)
def test_closest_point(j: Matrix, demand: list[float]) -> None:
    assume(j[0].any())
    assert_closest_point(closest, j, np.array(demand[: len(j)]))


@given(samplers.badly_scaled(samplers.of_rank(), 4), demands, st.integers(-12, 12))
def test_closest_point_knows_unit_rows_only(j: Matrix, demand: list[float], power: int) -> None:
    wanted = np.array(demand[: len(j)])
    y, length, along = closest(j, wanted, power)
    expected, its_length, its_along = closest(unit_rows(j), wanted)
    assert y.any() == expected.any()
    u, rounding = unit_rows(j), 1e-9 * np.abs(expected).sum()
    assert np.linalg.norm(u.T @ (y - expected)) <= rounding
    assert length == pytest.approx(its_length, abs=rounding)
    assert length <= 1e3 * rounding or along == pytest.approx(its_along, abs=1e-6)


@pytest.mark.parametrize(
    ("j", "demand", "expected", "length", "along"),
    [
        ([[1, 0], [1, 3]], [-np.inf, 0.1], [1, 0], 1.0, 1.0),  # no conflict: the row itself
        ([[5, 0], [-1, 0]], [-np.inf, 0.0], [1, 1], 0.0, 0.0),  # nothing is left
        ([[5, 0], [-1, 0]], [-np.inf, 0.5], [1, 1.5], 0.5, -1.0),  # the demand turns it round
        ([[5, 0], [-1, 0]], [0.0, 0.5], [0, 0], 0.0, 0.0),  # no point has both
        ([[2, 0], [-3, 4]], [0.0, 0.8], [1, 1.4], 1.28**0.5, 0.16 / 1.28**0.5),  # (0.16, 1.12)
        ([[2, 0], [-3, 4]], [0.5, 0.8], [1.53125, 1.71875], 2.140625**0.5, 0.5 / 2.140625**0.5),  # (0.5, 1.375)
        ([[1, 0], [0, 0]], [-np.inf, 0.5], [1, 0], 1.0, 1.0),  # a zero row demands nothing
    ],
)
def test_closest_point_known_weights(
    j: list[list[float]], demand: list[float], expected: list[float], length: float, along: float
) -> None:
    found = closest(np.array(j, dtype=float), np.array(demand))
    np.testing.assert_allclose(found[0], expected, atol=1e-14)
    assert found[1:] == (pytest.approx(length, abs=1e-14), pytest.approx(along, abs=1e-14))


@pytest.mark.parametrize("angle", [1e-3, 1e-5, 1e-7])
def test_closest_point_between_nearly_opposite_rows_needs_the_factor(angle: float) -> None:
    """Two rows an angle short of opposing each other leave one way out, square to both and 1/angle long."""
    j = np.array([[1.0, 0.0], [np.cos(angle), np.sin(angle)], [-np.cos(angle), np.sin(angle)]])
    demand = np.array([-np.inf, 1e-2, 1e-2])
    y, length, along = closest(j, demand)
    expected = np.array([0.0, 1e-2 / np.sin(angle)])
    assert np.linalg.norm(j.T @ y - expected) <= 4 * EPS * np.abs(y).sum()
    assert length == pytest.approx(expected[1], rel=1e-9)
    assert abs(along) * length <= 4 * EPS * np.abs(y).sum()
    alone = geometry.closest_point(j @ j.T, 0, demand)[0]
    assert angle > 1e-6 or np.linalg.norm(j.T @ alone - expected) > 1e-4 * expected[1]


def test_closest_point_asks_for_the_factor_only_when_it_must() -> None:
    asked = []

    def factor() -> Matrix:
        asked.append(1)
        return j

    for opposed in (False, True):
        j = np.array([[1.0, 0.2, 0.0], [-0.7, 1.0, 0.0], [0.1, -0.6, 1.2]])
        if opposed:
            j[1] = -j[0]
        geometry.closest_point(j @ j.T, 0, np.array([-np.inf, 0.0, 0.0]), factor)
        assert bool(asked) == opposed
