"""The fixed points of Nash-MTL and FairGrad, and the ratio of FERERO."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import strategies as st
from scipy.optimize import linprog

from gradsurgery import geometry
from tests.support import samplers
from tests.support.geometry import (
    EPS,
    assert_fixed_point,
    assert_homogeneous,
    assert_permutation_equivariant,
    assert_row_scaling_changes_nothing,
    fairgrad,
    given,
    lengths,
    size,
    toward,
)
from tests.support.samplers import Matrix

# ------------------------------------------------------------------------------------------------ Nash-MTL and FairGrad


ALPHAS = (0.5, 1.0, 2.0, 5.0)


@pytest.mark.parametrize("alpha", ALPHAS)
@given(j=samplers.badly_scaled(samplers.descending(), 10))
def test_power_fixed_point_residual(alpha: float, j: Matrix) -> None:
    assert_fixed_point(fairgrad(alpha), j, alpha)
    assert_fixed_point(lambda rows: geometry.power_fixed_point(rows @ rows.T, alpha)[0], j, alpha)


@pytest.mark.parametrize("alpha", ALPHAS)
@given(j=samplers.badly_scaled(samplers.descending(), 4), power=st.integers(-12, 12))
def test_power_fixed_point_equivariance(alpha: float, j: Matrix, power: int) -> None:
    assert_homogeneous(fairgrad(alpha), j, (1 - alpha) / (1 + alpha), 10.0**power)
    assert_permutation_equivariant(fairgrad(alpha), j)
    if alpha == 1:
        assert_row_scaling_changes_nothing(fairgrad(1.0), j)
        d = j.T @ fairgrad(1.0)(j)
        assert d @ d == pytest.approx(len(j), rel=1e-9)


@pytest.mark.parametrize("alpha", ALPHAS)
@given(j=samplers.scaled(samplers.stationary()))
def test_power_fixed_point_says_when_there_is_none(alpha: float, j: Matrix) -> None:
    kept = j[lengths(j) > 0]
    expected = len(kept) > 0 and not geometry.min_norm(kept @ kept.T, lambda: kept)[1]
    for factor in (None, lambda: j):
        w, solved = geometry.power_fixed_point(j @ j.T, alpha, factor)
        assert solved == expected
        assert solved or (w == 0).all()


def test_power_fixed_point_drops_zero_rows() -> None:
    j = np.array([[1.0, 2.0], [0.0, 0.0], [2.0, 1.0]])
    w, solved = geometry.power_fixed_point(j @ j.T, 1.0)
    assert solved
    np.testing.assert_allclose(w, [1 / 3, 0.0, 1 / 3], rtol=1e-14)


@pytest.mark.parametrize("angle", [1e-2, 1e-4, 1e-6, 1e-9])
def test_power_fixed_point_of_nearly_opposite_rows(angle: float) -> None:
    """By symmetry w_1 = w_2 = w; G w = 1/w reads w² (1 + ⟨g_1, g_2⟩) = 1, and ⟨g_1, g_2⟩ = 2 sin² − 1."""
    j = np.array([[np.cos(angle), np.sin(angle)], [-np.cos(angle), np.sin(angle)]])
    w, solved = geometry.power_fixed_point(j @ j.T, 1.0, lambda: j)
    assert solved
    np.testing.assert_allclose(w, 1 / (np.sqrt(2) * np.sin(angle)), rtol=1e-12 + 1e-15 / angle)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 2.0, 10.0, 100.0])
@given(data=st.data())
def test_power_fixed_point_of_rows_made_for_their_solution(alpha: float, data: st.DataObject) -> None:
    """Nearly opposite rows, nearly dependent ones, and weights of any size, with the direction known."""
    j, expected, terms = data.draw(samplers.bargains(alpha))
    w, solved = geometry.power_fixed_point(j @ j.T, alpha, lambda: j)
    assert solved
    assert np.linalg.norm(j.T @ w - expected) <= 1e-11 * np.linalg.norm(expected) + 64 * len(j) * EPS * terms


@pytest.mark.parametrize("size", [4.0, 16.0, 64.0, 256.0])
def test_power_fixed_point_of_nearly_opposite_rows_below_alpha_one(size: float) -> None:
    """With α = 1/2 the weights (2s, s) ask for the products 1/(2s)² and 1/s², and for ‖d‖² = 1/(2s) + 1/s."""
    length = np.sqrt(1.5 / size)
    j = np.array([[1 / (4 * size**2) / length, size], [1 / size**2 / length, -2 * size]])
    w, solved = geometry.power_fixed_point(j @ j.T, 0.5, lambda: j)
    assert solved
    np.testing.assert_allclose(j.T @ w, [length, 0.0], rtol=0, atol=64 * EPS * (w @ lengths(j)))


@pytest.mark.parametrize("alpha", [0.1, 1.0, 10.0, 100.0])
def test_power_fixed_point_of_rows_that_need_no_help(alpha: float) -> None:
    """Row 0 alone would help row 1 more than row 1 asks for, so that its weight leaves the range of float64 with α."""
    j = np.array([[1e-3, 0.0], [1e3, 1e-3], [0.0, 1e-3]])
    w, solved = geometry.power_fixed_point(j @ j.T, alpha, lambda: j)
    d = j.T @ w
    assert solved
    assert np.isfinite(w).all()
    np.testing.assert_allclose(w, np.exp(-alpha * np.log(j @ d)), rtol=1e-9)


# --------------------------------------------------------------------------------------------------------------- FERERO


def assert_toward_ratio(
    solve: Callable[..., tuple[Matrix, bool]], j: Matrix, losses: Matrix, ratio: Matrix, rate: float
) -> None:
    """The conditions of the convex problem, which suffice: B J d = κ B l, and λ_f at the least of what it costs."""
    w, deficient = solve(j, losses, ratio, rate)
    assert not deficient
    p = ratio / np.linalg.norm(ratio)
    d, levels = j.T @ w, losses / p
    products, spread = j @ d / p - rate * levels, lengths(j) * size(j, w) / p + rate * np.abs(levels).max()
    assert (np.abs(products - products[0]) <= 1e-10 * (spread + spread[0])).all()
    # s = pᵀ λ_f = pᵀ w, and of all λ_f of this s none costs less.
    share = float(p @ w)
    assert p.min() - 1e-9 <= share <= p.max() + 1e-9
    across = np.linalg.qr(p[:, None], mode="complete")[0][:, 1:]
    span = j.T @ across
    q = np.linalg.qr(span)[0]
    r = j.T @ p
    r = r - q @ (q.T @ r)
    cost = share * (r @ r) * p + j @ (d - share * r)  # its gradient
    best = linprog(cost, A_eq=np.stack((np.ones(len(p)), p)), b_eq=[1.0, share], bounds=(0, None))
    assert best.fun <= cost.min() + 1e-7 * np.abs(cost).max()


@given(samplers.of_rank(3, 3), st.integers(0, 99), st.sampled_from([0.0, 0.3, 1.0]))
def test_toward_ratio(j: Matrix, seed: int, rate: float) -> None:
    rng = np.random.default_rng(seed)
    assert_toward_ratio(toward, j, rng.normal(size=3), rng.uniform(0.2, 2, 3), rate)


@pytest.mark.parametrize("m", [1, 2, 5, 12])
def test_toward_ratio_of_any_number_of_losses(m: int) -> None:
    rng = np.random.default_rng(m)
    j = rng.standard_normal((m, m + 2)) * 10.0 ** rng.uniform(-2, 2, (m, 1))
    assert_toward_ratio(toward, j, rng.uniform(0, 3, m), rng.uniform(0.2, 2, m), 0.7)
    w, _ = toward(j, rng.normal(size=m), np.ones(m), 0.0)
    products = j @ (j.T @ w)  # without a rate all losses fall alike
    np.testing.assert_allclose(products, products[0], rtol=1e-9)


@given(samplers.of_rank(2, 4), st.integers(0, 99))
def test_toward_ratio_of_dependent_rows(j: Matrix, seed: int) -> None:
    """The shortest d that corrects the ratio as far as can be, and the best λ_f by a general routine."""
    rng = np.random.default_rng(seed)
    losses, ratio = rng.normal(size=4), rng.uniform(0.2, 2, 4)
    w, deficient = toward(j, losses, ratio)
    assert deficient
    p = ratio / np.linalg.norm(ratio)
    across = np.linalg.qr(p[:, None], mode="complete")[0][:, 1:]
    span = j.T @ across
    e = np.linalg.pinv(span.T, rcond=1e-10) @ (losses @ across)
    r = j.T @ p
    r = r - span @ (np.linalg.pinv(span, rcond=1e-10) @ r)
    d, cost = j.T @ w, j @ e
    s = float((d - e) @ r / (r @ r)) if r @ r > 1e-12 * (j * j).sum() else 0.0
    np.testing.assert_allclose(d, e + s * r, atol=1e-8 * (1 + np.linalg.norm(d)))
    if s:
        reached = [s**2 / 2 * (r @ r) + linear(cost, p, s)]
        others = [t**2 / 2 * (r @ r) + linear(cost, p, t) for t in np.linspace(p.min(), p.max(), 101)]
        assert reached[0] <= min(others) + 1e-9 * (1 + abs(reached[0]))


def linear(cost: Matrix, p: Matrix, s: float) -> float:
    found = linprog(cost, A_eq=np.stack((np.ones(len(p)), p)), b_eq=[1.0, s], bounds=(0, None))
    return float(found.fun)


def test_toward_ratio_of_nothing() -> None:
    assert toward(np.zeros((3, 4)), np.ones(3), np.ones(3))[0].tolist() == [0.0] * 3
    same = np.ones((2, 3))
    w, deficient = toward(same, np.array([1.0, 1.0]), np.ones(2))
    assert deficient
    np.testing.assert_allclose(same.T @ w, [1.0, 1.0, 1.0], rtol=1e-12)
