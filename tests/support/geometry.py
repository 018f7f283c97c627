"""What the tests of `gradsurgery.geometry` share: the functions as maps from J, and properties of their answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given as hypothesis_given
from hypothesis import settings
from scipy.optimize import linprog

from gradsurgery import geometry
from tests.support.samplers import Matrix

EPS = geometry.EPS
REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "reference.json").read_text())
INPUTS = {name: np.array(entry["J"]) for name, entry in REFERENCE["inputs"].items()}


def given(*args: object, **kwargs: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Hypothesis with 20 examples a test: there are many tests here, and each example solves several problems."""
    return lambda test: settings(max_examples=20)(hypothesis_given(*args, **kwargs)(test))


def lengths(j: Matrix) -> Matrix:
    return np.linalg.norm(j, axis=1)


def size(j: Matrix, w: Matrix) -> float:
    """Σ |w_i| n_i, the length of the direction's terms: rounding is relative to it."""
    return float(np.abs(w) @ lengths(j))


def index_order(m: int) -> Matrix:
    return np.array([[j for j in range(m) if j != i] for i in range(m)], dtype=int).reshape(m, m - 1)


def random_orders(m: int, seed: int) -> Matrix:
    rng = np.random.default_rng(seed)
    return np.array([rng.permutation(order) for order in index_order(m)], dtype=int).reshape(m, m - 1)


def direction_of(solve: Callable[[Matrix], Matrix], j: Matrix) -> tuple[Matrix, float]:
    w = solve(j)
    return j.T @ w, size(j, w)


def unit_rows(j: Matrix) -> Matrix:
    n = lengths(j)
    return j / np.where(n > 0, n, 1.0)[:, None]


def mgda(j: Matrix) -> Matrix:
    return geometry.min_norm(j @ j.T, lambda: j)[0]


def mgda_gram(j: Matrix) -> Matrix:
    return geometry.min_norm(j @ j.T)[0]


def upgrad(j: Matrix) -> Matrix:
    return geometry.dual_cone(j @ j.T, np.eye(len(j)) / len(j), lambda: j).sum(axis=0)


def dualproj(j: Matrix) -> Matrix:
    return geometry.dual_cone(j @ j.T, np.full(len(j), 1 / len(j)), lambda: j)


def config(j: Matrix) -> Matrix:
    y, _, degenerate = geometry.equal_projection(j @ j.T, lambda: j)
    n = lengths(j)
    v = unit_rows(j).T @ y
    return y * 0.0 if degenerate else y / np.where(n > 0, n, 1.0) * (j @ v).sum() / (v @ v)


def fairgrad(alpha: float) -> Callable[[Matrix], Matrix]:
    return lambda j: geometry.power_fixed_point(j @ j.T, alpha, lambda: j)[0]


def cagrad(c: float) -> Callable[[Matrix], Matrix]:
    return lambda j: geometry.cagrad(j @ j.T, c, lambda: j)[0]


def pcgrad(j: Matrix) -> Matrix:
    return geometry.pcgrad_mixing(j @ j.T, index_order(len(j))).sum(axis=0)


def assert_min_norm_kkt(solve: Callable[[Matrix], Matrix], j: Matrix, squared: bool = False) -> None:
    """⟨g_i, d⟩ ≥ ‖d‖² for every row, w on the simplex: the optimality conditions, row by row to rounding.

    ``squared``: the solver saw the Gram alone, so that rounding grows by the ratio of the terms to their sum.
    """
    w = solve(j)
    assert (w >= 0).all()
    assert abs(w.sum() - 1) <= 8 * len(j) * EPS
    d, n = j.T @ w, lengths(j)
    rounding = 64 * len(j) * EPS * size(j, w)
    if squared and d.any():
        rounding *= min(size(j, w) / np.linalg.norm(d), EPS**-0.5)
    assert (j @ d >= d @ d - rounding * (n + np.linalg.norm(d))).all()


def assert_not_longer_than_the_shortest_row(solve: Callable[[Matrix], Matrix], j: Matrix) -> None:
    d = j.T @ solve(j)
    assert np.linalg.norm(d) <= lengths(j).min() * (1 + 1e-12)


def assert_homogeneous(
    solve: Callable[[Matrix], Matrix], j: Matrix, degree: float = 1.0, scale: float = 10.0**-7
) -> None:
    """d(s·J) = s^degree · d(J)."""
    plain, terms = direction_of(solve, j)
    moved, _ = direction_of(solve, scale * j)
    assert np.linalg.norm(moved / scale**degree - plain) <= 1e-9 * terms


def assert_permutation_equivariant(solve: Callable[[Matrix], Matrix], j: Matrix) -> None:
    plain, terms = direction_of(solve, j)
    moved, _ = direction_of(solve, np.roll(j, 1, axis=0))
    assert np.linalg.norm(moved - plain) <= 1e-9 * terms


def assert_row_scaling_changes_nothing(solve: Callable[[Matrix], Matrix], j: Matrix) -> None:
    plain, terms = direction_of(solve, j)
    moved, _ = direction_of(solve, j * 2.0 ** (np.arange(len(j)) % 5 - 2)[:, None])
    assert np.linalg.norm(moved - plain) <= 1e-9 * terms


def assert_duplicates_ignored(solve: Callable[[Matrix], Matrix], j: Matrix) -> None:
    plain, terms = direction_of(solve, j)
    doubled, _ = direction_of(solve, np.vstack((j, j[:1])))
    assert np.linalg.norm(doubled - plain) <= 1e-9 * terms


def assert_dual_cone_kkt(project: Callable[[Matrix, Matrix], Matrix], j: Matrix, u: Matrix) -> None:
    """w = u + λ with λ ≥ 0, J d ≥ 0 and λ_i ⟨g_i, d⟩ = 0: the projection of Jᵀ u, row by row to rounding."""
    w = project(j, u)
    added = w - u
    products = unit_rows(j) @ (j.T @ w)
    terms = size(j, u) + size(j, w)
    assert (added >= -4 * EPS * np.abs(u)).all()
    assert (products >= -64 * len(j) * EPS * terms).all()
    assert (np.abs(added * lengths(j) * products) <= 64 * len(j) * EPS * terms**2).all()


def assert_equal_projections(solve: Callable[[Matrix], tuple[Matrix, int, bool]], j: Matrix) -> None:
    """Of full rank: ⟨u_i, v⟩ = 1 for every row."""
    y, rank, degenerate = solve(j)
    u = unit_rows(j)
    assert rank == len(j)
    assert not degenerate
    np.testing.assert_allclose(u @ (u.T @ y), 1.0, atol=1e-11 * max(1.0, float(np.abs(y).sum())))


def assert_fixed_point(solve: Callable[[Matrix], Matrix], j: Matrix, alpha: float) -> None:
    """⟨g_i, d⟩ = w_i^(−1/α) with w > 0, relative to its own size, to 1e-10 or to the rounding of w."""
    w = solve(j)
    kept = lengths(j) > 0
    assert (w[kept] > 0).all()
    assert (w[~kept] == 0).all()
    u, d = unit_rows(j)[kept], j.T @ w
    wanted = w[kept] ** (-1 / alpha) / lengths(j)[kept]
    # Rounding of w moves ⟨u_i, d⟩ by eps Σ |⟨u_i, u_j⟩| w_j n_j.
    rounding = 8 * len(j) * EPS * np.abs(u @ u.T) @ (w[kept] * lengths(j)[kept])
    assert (np.abs(u @ d - wanted) <= 1e-10 * wanted + rounding).all()


def assert_cagrad_optimal(solve: Callable[[Matrix], Matrix], j: Matrix, c: float) -> None:
    """‖d − g_0‖ = c ‖g_0‖, and no ⟨g_i, d⟩ is below the value of the dual at the multipliers: no d is better.

    For every w on the simplex max_d min_i ⟨g_i, d⟩ ≤ ⟨g_w, g_0⟩ + c ‖g_0‖ ‖g_w‖, so this proves both optimal.
    """
    weights = solve(j)
    mean = j.mean(axis=0)
    radius = c * np.linalg.norm(mean)
    d = j.T @ weights
    terms = size(j, weights) + lengths(j).mean()
    assert np.linalg.norm(d - mean) == pytest.approx(radius, abs=1e-11 * terms)
    kept = lengths(j) > 0
    multipliers = np.where(kept, weights - 1 / len(j), 0.0)
    assert (multipliers >= -4 * EPS).all()
    w = multipliers / multipliers.sum()
    dual = w @ j @ mean + radius * np.linalg.norm(j.T @ w)
    assert (j[kept] @ d >= dual - 1e-11 * terms * (lengths(j)[kept] + size(j, w))).all()


def assert_orthogonal_rows(solve: Callable[[Matrix], tuple[Matrix, int]], j: Matrix) -> None:
    """Of full rank: B J has orthogonal rows of the length of J's smallest singular value, and B J Jᵀ B is σ²."""
    balance, rank = solve(j)
    assert rank == len(j)
    rows = balance @ j
    sigma = np.linalg.svd(j, compute_uv=False)[-1]
    np.testing.assert_allclose(rows @ rows.T, sigma**2 * np.eye(len(j)), atol=1e-9 * sigma**2)
    # Among all such rows the paper wants the closest ones: those for which the overlap with J is symmetric.
    overlap = rows @ j.T
    np.testing.assert_allclose(overlap, overlap.T, atol=1e-9 * np.linalg.norm(j) * sigma)


def assert_closest_point(solve: Callable[..., tuple[Matrix, float, float]], j: Matrix, demand: Matrix) -> None:
    """The Karush-Kuhn-Tucker conditions, which suffice here; where there is no point, a linear program finds none."""
    y, length, along = solve(j, demand)
    u, bound = unit_rows(j), (demand > -np.inf) & (lengths(j) > 0)
    start, wanted = u[0], demand[bound]
    if not y.any():
        limits = {"A_ub": -u[bound], "b_ub": -wanted, "bounds": [(-1e6, 1e6)] * len(start)}
        assert linprog(np.zeros(len(start)), **limits).status == 2
        return
    multipliers = y - np.eye(len(j))[0]
    point, rounding = u.T @ y, 1e-10 * np.abs(y).sum()
    slack = u[bound] @ point - wanted
    assert (multipliers[~bound] == 0).all()
    assert (multipliers >= -rounding).all()
    assert (slack >= -rounding).all()
    assert (np.minimum(multipliers[bound], slack) <= rounding).all()
    assert length == pytest.approx(np.linalg.norm(point), rel=1e-9, abs=rounding)
    if length > 1e3 * rounding:
        assert along == pytest.approx(start @ point / length, abs=1e-7)


def assert_simplex_projection(project: Callable[[Matrix], Matrix], v: Matrix) -> None:
    """On the simplex, v − w is constant where w > 0 and no larger elsewhere: the projection's optimality conditions."""
    w = project(v)
    rounding = 16 * len(v) * EPS * (1 + np.abs(v).max())
    assert (w >= 0).all()
    assert abs(w.sum() - 1) <= 8 * len(v) * EPS
    level = (v - w)[w > 0]
    assert np.ptp(level) <= rounding
    assert (v - w <= level.max() + rounding).all()


def literal_pcgrad(j: Matrix, orders: Matrix) -> Matrix:
    """Algorithm 1 of Yu et al., on vectors; rows are the projected gradients."""
    out = []
    for i, order in enumerate(orders):
        p = j[i].copy()
        for k in order:
            dot = p @ j[k]
            if dot < 0:
                p = p - dot / (j[k] @ j[k]) * j[k]
        out.append(p)
    return np.array(out)


def assert_pcgrad(mix: Callable[[Matrix, Matrix], Matrix], j: Matrix, seed: int) -> None:
    orders = random_orders(len(j), seed)
    mixing = mix(j, orders)
    terms = np.abs(mixing) @ lengths(j)
    assert (np.linalg.norm(mixing @ j - literal_pcgrad(j, orders), axis=1) <= 1e-11 * terms).all()


def literal_gradvac(j: Matrix, orders: Matrix, targets: Matrix, beta: float) -> tuple[Matrix, Matrix]:
    """Algorithm 1 of Wang et al., on vectors, for rows that do not vanish on the way."""
    targets, out = targets.copy(), []
    for i, order in enumerate(orders):
        p = j[i].copy()
        for k in order:
            length, other = np.linalg.norm(p), np.linalg.norm(j[k])
            phi = p @ j[k] / (length * other)
            t = targets[i, k]
            if phi < t:
                gain = length * (t * np.sqrt(1 - phi**2) - phi * np.sqrt(1 - t**2)) / (other * np.sqrt(1 - t**2))
                p = p + gain * j[k]
                assert p @ j[k] / np.linalg.norm(p) / other == pytest.approx(t, abs=1e-7)
            targets[i, k] = (1 - beta) * t + beta * phi
        out.append(p)
    return np.array(out), targets


def assert_gradvac(mix: Callable[..., tuple[Matrix, Matrix]], j: Matrix, seed: int) -> None:
    m = len(j)
    orders = random_orders(m, seed)
    targets = np.random.default_rng(seed).uniform(-0.5, 0.5, (m, m))
    mixing, moved = mix(j @ j.T, orders, targets, 0.3)
    rows, expected = literal_gradvac(j, orders, targets, 0.3)
    terms = np.abs(mixing) @ lengths(j)
    assert (np.linalg.norm(mixing @ j - rows, axis=1) <= 1e-7 * terms).all()
    np.testing.assert_allclose(moved, expected, atol=1e-6)


def assert_frank_wolfe(solve: Callable[..., tuple[Matrix, int]], j: Matrix) -> None:
    """On the simplex, never above the limit, never longer for more rounds, close to the min-norm point in the end."""
    gram = j @ j.T
    previous = np.inf
    for limit in (1, 2, 5, 50, 2000):
        w, rounds = solve(gram, limit, 0.0)
        assert rounds <= limit
        assert (w >= 0).all()
        assert abs(w.sum() - 1) <= 1e-12
        reached = np.linalg.norm(j.T @ w)
        assert reached <= previous * (1 + 1e-12) + 1e-12 * lengths(j).max()
        previous = reached
    best = np.linalg.norm(j.T @ mgda(j))
    # Frank-Wolfe's bound on the square after k rounds: 2 · diameter² / (k + 2), with diameter ≤ 2 n_max.
    assert previous**2 - best**2 <= 8 * lengths(j).max() ** 2 / 2002


def project(j: Matrix, u: Matrix) -> Matrix:
    return geometry.dual_cone(j @ j.T, u, lambda: j)


def equal(j: Matrix) -> tuple[Matrix, int, bool]:
    return geometry.equal_projection(j @ j.T, lambda: j)


def toward(j: Matrix, losses: Matrix, ratio: Matrix, rate: float = 1.0) -> tuple[Matrix, bool]:
    return geometry.toward_ratio(j @ j.T, losses, ratio, rate, lambda: j)


def closest(j: Matrix, demand: Matrix, power: int = 0) -> tuple[Matrix, float, float]:
    j = 10.0**power * j
    return geometry.closest_point(j @ j.T, 0, demand, lambda: j)


def balance(j: Matrix) -> tuple[Matrix, int]:
    return geometry.align(j @ j.T, "min", lambda: j)


def mix(j: Matrix, orders: Matrix) -> Matrix:
    return geometry.pcgrad_mixing(j @ j.T, orders)
