"""Small-matrix mathematics against exact answers, literal transcriptions, scipy's SLSQP, and the definitions."""

from __future__ import annotations

import decimal
import itertools
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path

import numpy as np
import pytest
from hypothesis import assume, settings
from hypothesis import given as hypothesis_given
from hypothesis import strategies as st
from scipy.optimize import linprog, minimize

from gradsurgery import geometry
from tests.support import samplers
from tests.support.samplers import Matrix

EPS = geometry.EPS
REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "reference.json").read_text())
INPUTS = {name: np.array(entry["J"]) for name, entry in REFERENCE["inputs"].items()}


def given(*args: object, **kwargs: object) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Hypothesis with 20 examples a test: there are many tests here, and each example solves several problems."""
    return lambda test: settings(max_examples=20)(hypothesis_given(*args, **kwargs)(test))


# --- helpers ---


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


# --- the functions under test as maps from J to the weights of its rows ---


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


def imtlg(j: Matrix) -> Matrix:
    y, _, _ = geometry.equal_projection(j @ j.T, lambda: j, by_length=True)
    n = lengths(j)
    w = y / np.where(n > 0, n, 1.0)
    return w / w.sum()


def aligned(mode: str) -> Callable[[Matrix], Matrix]:
    return lambda j: geometry.align(j @ j.T, mode, lambda: j)[0].sum(axis=1) / len(j)


def fairgrad(alpha: float) -> Callable[[Matrix], Matrix]:
    return lambda j: geometry.power_fixed_point(j @ j.T, alpha, lambda: j)[0]


def cagrad(c: float) -> Callable[[Matrix], Matrix]:
    return lambda j: geometry.cagrad(j @ j.T, c, lambda: j)[0]


def pcgrad(j: Matrix) -> Matrix:
    return geometry.pcgrad_mixing(j @ j.T, index_order(len(j))).sum(axis=0)


def gradvac(j: Matrix) -> Matrix:
    m = len(j)
    return geometry.gradvac_mixing(j @ j.T, index_order(m), np.zeros((m, m)), 0.5)[0].sum(axis=0)


# --- exact answers ---

SOLVERS = {
    "MGDA": mgda,
    "UPGrad": upgrad,
    "DualProj": dualproj,
    "CAGrad c=0.4": cagrad(0.4),
    "CAGrad c=0.5": cagrad(0.5),
    "IMTL-G": imtlg,
    "Aligned-MTL min": aligned("min"),
    "Aligned-MTL median": aligned("median"),
    "Aligned-MTL rmse": aligned("rmse"),
    "ConFIG": config,
    "Nash-MTL": fairgrad(1.0),
    "FairGrad alpha=0.5": fairgrad(0.5),
    "FairGrad alpha=1.0": fairgrad(1.0),
    "FairGrad alpha=2.0": fairgrad(2.0),
    "PCGrad fixed order": pcgrad,
    "GradVac first call, fixed order": gradvac,
}
# These reach the tolerance even from a Gram without its rows; the others need the factor on near-parallel rows.
GRAM_SOLVERS = {
    "MGDA": mgda_gram,
    "UPGrad": lambda j: geometry.dual_cone(j @ j.T, np.eye(len(j)) / len(j)).sum(axis=0),
    "DualProj": lambda j: geometry.dual_cone(j @ j.T, np.full(len(j), 1 / len(j))),
    "CAGrad c=0.4": lambda j: geometry.cagrad(j @ j.T, 0.4)[0],
    "Nash-MTL": lambda j: geometry.power_fixed_point(j @ j.T, 1.0)[0],
    "FairGrad alpha=2.0": lambda j: geometry.power_fixed_point(j @ j.T, 2.0)[0],
}


def cases(solvers: dict[str, Callable[[Matrix], Matrix]]) -> list[tuple[str, str]]:
    return [(method, name) for method in solvers for name in REFERENCE["methods"][method]["truth"]]


def assert_reference(solve: Callable[[Matrix], Matrix], method: str, name: str) -> None:
    entry = REFERENCE["methods"][method]
    truth, j = np.array(entry["truth"][name]["direction"]), INPUTS[name]
    unit = np.linalg.norm(truth) or lengths(j).max()
    tolerance = entry["tolerance"]["exceptions"].get(name, entry["tolerance"]["relative"])
    if isinstance(tolerance, str):  # prose about what is attainable; the solvers here do reach the plain tolerance
        tolerance = entry["tolerance"]["relative"]
    assert np.linalg.norm(j.T @ solve(j) - truth) <= tolerance * unit


@pytest.mark.parametrize(("method", "name"), cases(SOLVERS))
def test_reference(method: str, name: str) -> None:
    assert_reference(SOLVERS[method], method, name)


@pytest.mark.parametrize(("method", "name"), cases(GRAM_SOLVERS))
def test_reference_from_the_gram_alone(method: str, name: str) -> None:
    assert_reference(GRAM_SOLVERS[method], method, name)


@pytest.mark.parametrize("name", INPUTS)
def test_reference_stationarity(name: str) -> None:
    j, truth = INPUTS[name], REFERENCE["inputs"][name]["pareto_stationary"]
    assert geometry.min_norm(j @ j.T, lambda: j)[1] == truth
    assert geometry.min_norm(j @ j.T)[1] == truth


@pytest.mark.parametrize("name", REFERENCE["methods"]["PCGrad expectation"]["truth"])
def test_reference_pcgrad_expectation(name: str) -> None:
    j = INPUTS[name]
    m = len(j)
    # Task i's projection depends on its own order only, so the mean over orders is taken task by task.
    orders = [list(itertools.permutations([k for k in range(m) if k != i])) for i in range(m)]
    count = len(orders[0])
    mixing = sum(geometry.pcgrad_mixing(j @ j.T, [orders[i][k] for i in range(m)]) for k in range(count)) / count
    truth = np.array(REFERENCE["methods"]["PCGrad expectation"]["truth"][name]["direction"])
    unit = np.linalg.norm(truth) or lengths(j).max()
    assert np.linalg.norm(j.T @ mixing.sum(axis=0) - truth) <= 1e-9 * unit


@pytest.mark.parametrize("name", [n for n in INPUTS if n in REFERENCE["methods"]["MGDA normalised l2"]["truth"]])
def test_reference_mgda_of_unit_rows(name: str) -> None:
    u = unit_rows(INPUTS[name])
    truth = REFERENCE["methods"]["MGDA normalised l2"]["truth"][name]["direction"]
    np.testing.assert_allclose(u.T @ mgda(u), truth, atol=1e-9)


# --- properties: each takes the function under test, so that broken ones can be handed in ---


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


# --- unit rows ---


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


# --- min-norm point ---


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


# --- Frank-Wolfe ---


@given(samplers.scaled(samplers.integer_matrices()))
def test_frank_wolfe(j: Matrix) -> None:
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


# --- dual cone ---


def project(j: Matrix, u: Matrix) -> Matrix:
    return geometry.dual_cone(j @ j.T, u, lambda: j)


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


# --- equal projections ---


def equal(j: Matrix) -> tuple[Matrix, int, bool]:
    return geometry.equal_projection(j @ j.T, lambda: j)


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


# --- Nash-MTL and FairGrad ---

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


# --- CAGrad ---


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


# --- ConicGrad ---


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


# --- FERERO ---


def toward(j: Matrix, losses: Matrix, ratio: Matrix, rate: float = 1.0) -> tuple[Matrix, bool]:
    return geometry.toward_ratio(j @ j.T, losses, ratio, rate, lambda: j)


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


# --- the closest point with given products ---


def closest(j: Matrix, demand: Matrix, power: int = 0) -> tuple[Matrix, float, float]:
    j = 10.0**power * j
    return geometry.closest_point(j @ j.T, 0, demand, lambda: j)


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


# --- Aligned-MTL ---


def balance(j: Matrix) -> tuple[Matrix, int]:
    return geometry.align(j @ j.T, "min", lambda: j)


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


# --- simplex ---


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=20))
def test_project_simplex(v: list[float]) -> None:
    assert_simplex_projection(geometry.project_simplex, np.array(v))


# --- PCGrad and GradVac ---


def mix(j: Matrix, orders: Matrix) -> Matrix:
    return geometry.pcgrad_mixing(j @ j.T, orders)


@pytest.mark.parametrize("small", [0, 99])
@given(j=samplers.matrices(), seed=st.integers(0, 99))
def test_pcgrad_mixing(small: int, j: Matrix, seed: int) -> None:
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
def test_gradvac_mixing(small: int, j: Matrix, seed: int) -> None:
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


# --- every property rejects a function that breaks it ---

WITNESSES = [
    np.array([[1.0, 0.2, -0.5], [-0.7, 1.0, 0.3], [0.1, -0.6, 1.2]]),
    np.array([[2.0, 1.0, 0.0, 1.0], [-10.0, 1.0, 1.0, 0.0], [1.0, 3.0, -2.0, 1.0]]),
    np.array([[2e-4, 1e-4, 0.0], [-1e-3, 1e-4, 1e-4], [1e-4, 1e-4, -3e-4]]),
    np.array([[3.0, -2.0, 0.1], [2.0, 1.0, 0.0], [-3.0, -1.0, 0.4]]),
]


def plain_sum(j: Matrix) -> Matrix:
    return np.ones(len(j))


def min_norm_with_epsilon(j: Matrix) -> Matrix:
    return geometry.min_norm(j @ j.T + 1e-8 * np.eye(len(j)))[0]


def few_frank_wolfe_rounds(j: Matrix) -> Matrix:
    return geometry.frank_wolfe(j @ j.T, 20)[0]


def shortest_row_only(j: Matrix) -> Matrix:
    return np.eye(len(j))[lengths(j).argmin()]


def first_row_only(j: Matrix) -> Matrix:
    return np.eye(len(j))[0]


def mean_weights(j: Matrix) -> Matrix:
    return np.full(len(j), 1 / len(j))


def projection_with_epsilon(j: Matrix, u: Matrix) -> Matrix:
    return geometry.dual_cone(j @ j.T + 1e-4 * np.trace(j @ j.T) * np.eye(len(j)), u)


def no_projection(j: Matrix, u: Matrix) -> Matrix:
    return u


def projection_too_far(j: Matrix, u: Matrix) -> Matrix:
    return 2 * project(j, u) - u


def pinv_with_threshold(j: Matrix) -> tuple[Matrix, int, bool]:
    u = unit_rows(j)
    return np.linalg.pinv(u @ u.T, rcond=0.5) @ np.ones(len(j)), len(j), False


def negated_projection(j: Matrix) -> tuple[Matrix, int, bool]:
    y, rank, degenerate = equal(j)
    return -y, rank, degenerate


def nash_start_value(j: Matrix) -> Matrix:
    return np.ones(len(j))


def nash_of_the_wrong_power(j: Matrix) -> Matrix:
    return fairgrad(2.0)(j)


def cagrad_of_the_min_norm_weights(j: Matrix) -> Matrix:
    """The radius is right, the direction is MGDA's."""
    w = mgda(j)
    return mean_weights(j) + 0.4 * np.linalg.norm(j.mean(axis=0)) / np.linalg.norm(j.T @ w) * w


def cagrad_with_half_the_radius(j: Matrix) -> Matrix:
    return cagrad(0.2)(j)


def whitened_by_cholesky(j: Matrix) -> tuple[Matrix, int]:
    """Orthogonal rows of the right length, but not the closest ones."""
    inverse = np.linalg.inv(np.linalg.cholesky(j @ j.T))
    return inverse * np.linalg.svd(j, compute_uv=False)[-1], len(j)


def aligned_with_epsilon(j: Matrix) -> tuple[Matrix, int]:
    values, vectors = np.linalg.eigh(j @ j.T)
    return vectors * np.sqrt(values[0] / (values + 1e-8)) @ vectors.T, len(j)


def the_row_itself(j: Matrix, demand: Matrix) -> tuple[Matrix, float, float]:
    return np.eye(len(j))[0], 1.0, 1.0


def closest_with_equal_constraints(j: Matrix, demand: Matrix) -> tuple[Matrix, float, float]:
    """Demands are met to the letter, also where more would be free."""
    u = unit_rows(j)
    y = np.eye(len(j))[0]
    y[1:] += np.linalg.lstsq(u[1:] @ u[1:].T, demand[1:] - u[1:] @ u[0], rcond=None)[0]
    point = u.T @ y
    return y, float(np.linalg.norm(point)), float(u[0] @ point / np.linalg.norm(point))


def closest_of_raw_rows(j: Matrix, demand: Matrix) -> tuple[Matrix, float, float]:
    """The demand is taken for the rows instead of the unit rows."""
    return closest(j, demand / lengths(j))


def closest_never(j: Matrix, demand: Matrix) -> tuple[Matrix, float, float]:
    return np.zeros(len(j)), 0.0, 0.0


def clipped_and_normalised(v: Matrix) -> Matrix:
    w = np.maximum(v, 1e-300)
    return w / w.sum()


def softmax(v: Matrix) -> Matrix:
    w = np.exp(v - v.max())
    return w / w.sum()


def pcgrad_that_visits_itself(j: Matrix, orders: Matrix) -> Matrix:
    """Row i meets g_i as well, which matters once p_i has turned against it."""
    rows = []
    for i, order in enumerate(orders):
        c = np.eye(len(j))[i]
        for k in [*order, i]:
            dot = c @ j @ j[k]
            if dot < 0:
                c[k] -= dot / (j[k] @ j[k])
        rows.append(c)
    return np.array(rows)


def pcgrad_with_epsilon(j: Matrix, orders: Matrix) -> Matrix:
    gram = j @ j.T
    return geometry.pcgrad_mixing(gram + 1e-8 * np.eye(len(j)), orders)


def pcgrad_against_projected_rows(j: Matrix, orders: Matrix) -> Matrix:
    rows = np.eye(len(j))
    for i, order in enumerate(orders):
        for k in order:
            dot = rows[i] @ j @ (rows[k] @ j)
            if dot < 0:
                rows[i] = rows[i] - dot / (rows[k] @ j @ j.T @ rows[k]) * rows[k]
    return rows


def gradvac_with_frozen_targets(gram: Matrix, orders: Matrix, targets: Matrix, beta: float) -> tuple[Matrix, Matrix]:
    return geometry.gradvac_mixing(gram, orders, targets, beta)[0], targets


def gradvac_without_targets(gram: Matrix, orders: Matrix, targets: Matrix, beta: float) -> tuple[Matrix, Matrix]:
    return geometry.pcgrad_mixing(gram, orders), geometry.gradvac_mixing(gram, orders, targets, beta)[1]


def endless_frank_wolfe(gram: Matrix, limit: int, tolerance: float) -> tuple[Matrix, int]:
    return geometry.frank_wolfe(gram, limit + 1, tolerance)[0], limit + 1


def lazy_frank_wolfe(gram: Matrix, limit: int, tolerance: float) -> tuple[Matrix, int]:
    return np.full(len(gram), 1 / len(gram)), 0


def seeded(prop: Callable[..., None], *more: object) -> Callable[..., None]:
    return lambda function, j: prop(function, j, *more)


def demanding(solve: Callable[..., tuple[Matrix, float, float]], j: Matrix) -> None:
    assert_closest_point(solve, j, np.array([-np.inf, 0.3, 0.3]))


SIGNS = np.array([1.0, 0.5, 2.0])
VECTORS = [np.array([3.0, -1.0, 0.2]), np.array([0.1, 0.2, 0.3])]

BROKEN = [
    (assert_min_norm_kkt, few_frank_wolfe_rounds, WITNESSES),
    (assert_min_norm_kkt, mean_weights, WITNESSES),
    (assert_min_norm_kkt, shortest_row_only, WITNESSES),
    (assert_min_norm_kkt, min_norm_with_epsilon, WITNESSES),
    (assert_not_longer_than_the_shortest_row, mean_weights, WITNESSES),
    (assert_homogeneous, min_norm_with_epsilon, WITNESSES),
    (assert_homogeneous, lambda j: projection_with_epsilon(j, 1 + 0 * j[:, 0]) * np.linalg.norm(j), WITNESSES),
    (assert_permutation_equivariant, first_row_only, WITNESSES),
    (assert_row_scaling_changes_nothing, mgda, WITNESSES),
    (assert_duplicates_ignored, plain_sum, WITNESSES),
    (assert_duplicates_ignored, upgrad, WITNESSES),
    (seeded(assert_dual_cone_kkt, SIGNS), no_projection, WITNESSES),
    (seeded(assert_dual_cone_kkt, SIGNS), projection_with_epsilon, WITNESSES),
    (seeded(assert_dual_cone_kkt, SIGNS), projection_too_far, WITNESSES),
    (assert_equal_projections, pinv_with_threshold, WITNESSES),
    (assert_equal_projections, negated_projection, WITNESSES),
    (seeded(assert_fixed_point, 1.0), nash_start_value, WITNESSES),
    (seeded(assert_fixed_point, 1.0), nash_of_the_wrong_power, WITNESSES),
    (seeded(assert_cagrad_optimal, 0.4), cagrad_of_the_min_norm_weights, WITNESSES),
    (seeded(assert_cagrad_optimal, 0.4), cagrad_with_half_the_radius, WITNESSES),
    (seeded(assert_cagrad_optimal, 0.4), mean_weights, WITNESSES),
    (assert_orthogonal_rows, whitened_by_cholesky, WITNESSES),
    (assert_orthogonal_rows, aligned_with_epsilon, WITNESSES),
    (demanding, the_row_itself, WITNESSES),
    (demanding, closest_with_equal_constraints, WITNESSES),
    (demanding, closest_of_raw_rows, WITNESSES),
    (demanding, closest_never, WITNESSES),
    (assert_simplex_projection, clipped_and_normalised, VECTORS),
    (assert_simplex_projection, softmax, VECTORS),
    (seeded(assert_pcgrad, 0), pcgrad_that_visits_itself, WITNESSES),
    (seeded(assert_pcgrad, 0), pcgrad_with_epsilon, WITNESSES),
    (seeded(assert_pcgrad, 0), pcgrad_against_projected_rows, WITNESSES),
    (seeded(assert_gradvac, 0), gradvac_with_frozen_targets, WITNESSES),
    (seeded(assert_gradvac, 0), gradvac_without_targets, WITNESSES),
    (assert_frank_wolfe, endless_frank_wolfe, WITNESSES),
    (assert_frank_wolfe, lazy_frank_wolfe, WITNESSES),
]


@pytest.mark.parametrize(("prop", "broken", "witnesses"), BROKEN)
def test_each_property_rejects_a_broken_function(
    prop: Callable[..., None], broken: Callable[..., object], witnesses: list[Matrix]
) -> None:
    rejected = 0
    for witness in witnesses:
        try:
            prop(broken, witness)
        except AssertionError:
            rejected += 1
    assert rejected > 0


def test_an_opposite_pair_is_stationary_without_a_doubt():
    """The multipliers are large, and so is what rounding of the columns does to the residual."""
    gram = [
        [1622.0028245255312, -120.69826421273189, 449.6813046886776, -2.6254936743729846],
        [-120.69826421273189, 8.981532438593556, -33.462181510514164, 0.19537113277902227],
        [449.6813046886776, -33.462181510514164, 1261.0961890219485, -11.322838273914728],
        [-2.6254936743729846, 0.19537113277902227, -11.322838273914728, 0.1030269094017468],
    ]
    weights, stationary = geometry.min_norm(gram)  # a flag is an error here
    assert stationary
    assert np.sqrt(max(weights @ gram @ weights, 0.0)) <= 1e-6 * weights @ np.sqrt(np.diagonal(gram))
