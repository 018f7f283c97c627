"""The mixing of PCGrad and of GradVac, pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st

from gradsurgery import geometry
from tests.support import samplers
from tests.support.geometry import (
    assert_gradvac,
    assert_homogeneous,
    assert_pcgrad,
    given,
    index_order,
    literal_gradvac,
    mix,
    pcgrad,
    size,
    upgrad,
)
from tests.support.samplers import Matrix


@pytest.mark.parametrize("small", [0, 99])
@given(j=samplers.matrices(), seed=st.integers(0, 99))
def test_pcgrad_mixing_is_the_algorithm_written_out(small: int, j: Matrix, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry.pairwise, "_SMALL", small)
        assert_pcgrad(mix, j, seed)


def test_pcgrad_without_conflict_is_the_identity() -> None:
    j = np.abs(np.random.default_rng(0).standard_normal((20, 5)))
    for m in (3, 20):
        assert (mix(j[:m], index_order(m)) == np.eye(m)).all()


@given(samplers.badly_scaled(samplers.integer_matrices(), 4), st.integers(-12, 12))
def test_pcgrad_is_homogeneous(j: Matrix, power: int) -> None:
    assert_homogeneous(pcgrad, j, scale=10.0**power)


def test_pcgrad_of_two_rows_is_twice_upgrad() -> None:
    j = np.array([[2.0, 1.0], [-10.0, 1.0]])
    np.testing.assert_allclose(pcgrad(j), 2 * upgrad(j), rtol=1e-13)


well_apart = st.integers(1, 5).flatmap(lambda m: samplers.of_rank(m, m))


@pytest.mark.parametrize("small", [0, 99])
@given(j=samplers.badly_scaled(well_apart, 6), seed=st.integers(0, 99))
def test_gradvac_mixing_is_the_algorithm_written_out(small: int, j: Matrix, seed: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry.pairwise, "_SMALL", small)
        assert_gradvac(geometry.gradvac_mixing, j, seed)


@pytest.mark.parametrize("small", [0, 99])
@given(j=samplers.matrices(), power=st.integers(-12, 12))
def test_gradvac_starts_as_pcgrad_and_forgets_scale(small: int, j: Matrix, power: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry.pairwise, "_SMALL", small)
        m = len(j)
        mixing, targets = geometry.gradvac_mixing(j @ j.T, index_order(m), np.zeros((m, m)), 0.5)
        expected = mix(j, index_order(m))
        assert np.linalg.norm(j.T @ (mixing - expected).sum(axis=0)) <= 1e-7 * size(j, expected.sum(axis=0))
        assert (np.abs(targets) <= 0.5 + 1e-12).all()
        assert (targets.diagonal() == 0).all()


@pytest.mark.parametrize("small", [0, 99])
@pytest.mark.parametrize("angle", [1e-3, 1e-6, 1e-8, 1e-10])
def test_gradvac_of_nearly_opposite_rows(small: int, angle: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of the first row, sin(angle) e_2, meets the third at a right angle and the fourth at 45 degrees."""
    monkeypatch.setattr(geometry.pairwise, "_SMALL", small)
    j = np.array([[1.0, 0, 0], [-np.cos(angle), np.sin(angle), 0], [0, 0, 1.0], [0, -1.0, 1.0]])
    targets = np.array([[0.0, 0.0, 0.5, 0.0]] + 3 * [[-1.0] * 4])
    mixing, moved = geometry.gradvac_mixing(j @ j.T, index_order(4), targets, 1.0, lambda: j)
    rows, expected = literal_gradvac(j, index_order(4), targets, 1.0)
    np.testing.assert_allclose(mixing[0] @ j, rows[0], atol=1e-15)
    np.testing.assert_allclose(moved[0], expected[0], atol=1e-14 / angle)


@pytest.mark.parametrize("small", [0, 99])
def test_gradvac_stays_bounded_after_identical_tasks(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry.pairwise, "_SMALL", small)
    same, apart = np.array([[1.0, 0.0], [1.0, 0.0]]), np.eye(2)
    targets = geometry.gradvac_mixing(same @ same.T, index_order(2), np.zeros((2, 2)), 1.0)[1]
    mixing, _ = geometry.gradvac_mixing(apart, index_order(2), targets, 1.0)
    assert np.abs(mixing).max() <= 1e3


@pytest.mark.parametrize("small", [0, 99])
def test_gradvac_moves_its_targets_on_every_visit(small: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry.pairwise, "_SMALL", small)
    j = np.array([[1.0, 0.0], [0.92, np.sqrt(1 - 0.92**2)]])
    targets = np.zeros((2, 2))
    for _ in range(40):
        _, targets = geometry.gradvac_mixing(j @ j.T, index_order(2), targets, 0.5)
    np.testing.assert_allclose(targets, [[0.0, 0.92], [0.92, 0.0]], atol=1e-9)
