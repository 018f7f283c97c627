"""Non-negative least squares, and all that is built on it: the answer is optimal whatever the first guess was."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
import torch

import gradsurgery
from gradsurgery import geometry
from gradsurgery.geometry import cones
from gradsurgery.geometry import nonnegative as solver
from gradsurgery.problems.problem import relative_min_norm
from gradsurgery.testing import properties
from tests.support.samplers import Matrix

EPS = geometry.EPS

# For this one `scipy.optimize.nnls` 1.17.1 returns a point whose gradient is off by 8e-3.
COSINES = np.array(
    [
        [1, 0, 0, -0.16443594138796822, -7.1452711387e-7, 0],
        [0, 1, 0.5813601744464657, 0, 0, 0.11756264700971555],
        [0, 0.5813601744464657, 1, 0, 0, -0.19736441876699337],
        [-0.16443594138796822, 0, 0, 1, 7.0391647647e-7, 0],
        [-7.1452711387e-7, 0, 0, 7.0391647647e-7, 1, 0],
        [0, 0.11756264700971555, -0.19736441876699337, 0, 0, 1],
    ]
)


def violation(columns: Matrix, target: Matrix, x: Matrix) -> float:
    """How far x is from optimal: gradients in unit columns, relative to the lengths of their terms."""
    sizes, length = np.linalg.norm(columns, axis=0), np.linalg.norm(target)
    units, y = columns / sizes, x * sizes / length
    gradient = units.T @ (target / length - units @ y)
    assert (x >= 0).all()
    return float(max(gradient.max(), np.abs(gradient[x > 0]).max(initial=0.0))) / (1 + y.sum())


def problems(m: int, seed: int) -> tuple[Matrix, Matrix]:
    """Well-conditioned columns, some of them repeated or opposed in every third problem, and a target."""
    rng = np.random.default_rng([m, seed])
    columns = rng.standard_normal((m + 2, m))
    if seed % 3 == 1:
        columns[:, m // 2 :] = columns[:, : m - m // 2]
    if seed % 3 == 2:
        columns[:, m // 2 :] = -columns[:, : m - m // 2] + 0.1 * columns[:, m // 2 :]
    columns *= 10.0 ** rng.uniform(0, 3, m)
    return columns, rng.standard_normal(m + 2)


def test_the_answer_that_scipy_misses() -> None:
    columns = np.linalg.cholesky(COSINES).T
    x, _ = solver.nonnegative(columns, -columns[:, 5])
    assert violation(columns, -columns[:, 5], x) < 1e-15
    assert x[3] == 0
    np.testing.assert_allclose(x[2], 0.19736441876699337, rtol=1e-14)


def test_projections_that_scipy_misses() -> None:
    for order in itertools.permutations(range(6)):
        d = geometry.dual_cone(COSINES[np.ix_(order, order)], np.eye(6))
        products = d @ COSINES[np.ix_(order, order)]
        assert products.min() > -1e-14
        # What was added is at right angles to the projection.
        assert np.abs((d - np.eye(6)) * products).max() < 1e-14


def test_two_columns_of_which_one_has_to_leave() -> None:
    # The least squares solution is (−1, 3).
    columns, target = np.array([[1.0, 1.0], [3.0, 2.0]]), np.array([2.0, 3.0])
    for rows in range(2, 6):
        q = np.linalg.qr(np.random.default_rng(rows).standard_normal((rows, 2)))[0]
        x, _ = solver.nonnegative(q @ columns, q @ target)
        np.testing.assert_allclose(x, [0.0, 1.6], rtol=1e-14)


GARBAGE: dict[str, Callable[[Matrix, Matrix], Matrix]] = {
    "zeros": lambda a, b: np.zeros(a.shape[1]),
    "ones": lambda a, b: np.ones(a.shape[1]),
    "huge": lambda a, b: np.full(a.shape[1], 1e300),
    "negative": lambda a, b: -np.ones(a.shape[1]),
    "nan": lambda a, b: np.full(a.shape[1], np.nan),
    "the last column": lambda a, b: np.eye(a.shape[1])[-1],
    "least squares, cut off": lambda a, b: np.maximum(np.linalg.lstsq(a, b)[0], 0.0),
}


def garbage(kind: str) -> Callable[[Matrix, Matrix], tuple[Matrix, float]]:
    return lambda a, b: (GARBAGE[kind](a, b), 0.0)


def tired(a: Matrix, b: Matrix) -> tuple[Matrix, float]:
    raise RuntimeError("Maximum number of iterations reached.")


@pytest.mark.parametrize("kind", [*GARBAGE, "raises"])
@pytest.mark.parametrize("m", [1, 2, 5, 20, 60])
def test_a_wrong_guess_does_not_show(monkeypatch: pytest.MonkeyPatch, kind: str, m: int) -> None:
    expected = [solver.nonnegative(*problems(m, seed))[0] for seed in range(6)]
    monkeypatch.setattr(solver, "nnls", tired if kind == "raises" else garbage(kind))
    for seed, right in enumerate(expected):
        columns, target = problems(m, seed)
        x, residual = solver.nonnegative(columns, target)
        assert violation(columns, target, right) < 16 * m * EPS
        assert violation(columns, target, x) < 16 * m * EPS
        np.testing.assert_allclose(columns @ x, columns @ right, atol=1e-12 * np.linalg.norm(target))
        np.testing.assert_allclose(residual, target - columns @ x, atol=1e-13 * np.linalg.norm(target))


METHODS = {
    "MGDA": gradsurgery.MGDA,
    "UPGrad": gradsurgery.UPGrad,
    "DualProj": gradsurgery.DualProj,
    "PCD": gradsurgery.PCD,
    "CAGrad": gradsurgery.CAGrad,
    "EPO": gradsurgery.EPO,
    "PMGDA": lambda base: gradsurgery.PMGDA(base, h_eps=1.0),
    "SDMGrad": lambda base: gradsurgery.SDMGrad(base, solver="exact"),
    "NashMTL": gradsurgery.NashMTL,
    "FairGrad": lambda base: gradsurgery.FairGrad(base, alpha=2.0),
}


def directions(name: str) -> list[torch.Tensor]:
    found = []
    for m, seed in itertools.product((2, 3, 8), range(4)):
        rng = np.random.default_rng([m, seed])
        rows = torch.from_numpy(rng.standard_normal((m, m + seed)) * 10.0 ** rng.uniform(-2, 2, (m, 1)))
        optimizer = METHODS[name](torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1))
        found.append(optimizer.combine(rows, losses=torch.arange(1.0, m + 1)))
    return found


@pytest.mark.parametrize("kind", [*GARBAGE, "raises"])
@pytest.mark.parametrize("name", list(METHODS))
def test_no_method_depends_on_the_guess(monkeypatch: pytest.MonkeyPatch, name: str, kind: str) -> None:
    expected = directions(name)
    monkeypatch.setattr(solver, "nnls", tired if kind == "raises" else garbage(kind))
    for found, right in zip(directions(name), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-12 * float(right.norm() + 1e-300))


@pytest.mark.parametrize("kind", [*GARBAGE, "raises"])
def test_no_judge_depends_on_the_guess(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    rows = np.random.default_rng(0).standard_normal((4, 7))
    right = relative_min_norm(torch.from_numpy(rows))
    monkeypatch.setattr(solver, "nnls", tired if kind == "raises" else garbage(kind))
    np.testing.assert_allclose(relative_min_norm(torch.from_numpy(rows)), right, rtol=1e-13)
    properties.assert_min_norm(lambda j: j.T @ geometry.min_norm(j @ j.T)[0], rows)


def test_what_cannot_be_verified_is_flagged(monkeypatch: pytest.MonkeyPatch) -> None:
    # Nothing fulfils conditions without any room for rounding.
    for module in (solver, cones):
        monkeypatch.setattr(module, "bound", lambda m: 0.0)
    rows = torch.from_numpy(np.random.default_rng(2).standard_normal((9, 4)))
    theta = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    for name in ("MGDA", "DualProj", "UPGrad", "PCD", "CAGrad"):
        optimizer = METHODS[name](torch.optim.SGD([theta], lr=0.1))
        assert "not-converged" in optimizer.backward([row @ theta for row in rows]).flags, name
    with pytest.raises(ArithmeticError, match="not-converged"):
        geometry.min_norm((rows @ rows.T).numpy())
