"""Every solver on gradients of small networks: the conditions of its answer, whatever the order of the losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from samplers import Matrix

import gradsurgery
from gradsurgery import geometry

EPS = geometry.EPS
GRADIENTS = dict(np.load(Path(__file__).parent / "data" / "gradients.npz"))


class Setting(NamedTuple):
    """Rows in some order, and the same rows divided by their lengths."""

    j: Matrix
    lengths: Matrix
    units: Matrix


def setting(j: Matrix) -> Setting:
    lengths = np.linalg.norm(j, axis=1)
    return Setting(j, lengths, j / lengths[:, None])


def close(values: Matrix, size: float | Matrix) -> None:
    """Zero, to rounding of terms of this size."""
    assert (np.abs(values) <= 1e-13 * np.asarray(size)).all(), np.abs(values / size).max()


def mgda(s: Setting) -> Matrix:
    w, stationary = geometry.min_norm(s.j @ s.j.T, lambda: s.j)
    d, size = s.j.T @ w, float(w @ s.lengths)
    slack = s.units @ d - d @ d / s.lengths
    assert (w >= 0).all()
    close(w.sum() - 1, 1)
    close(np.minimum(slack, 0), size)
    close(slack[w > 0], size)
    assert not stationary or np.linalg.norm(d) <= 1e-12 * size
    return np.zeros_like(w) if stationary else w


def projections(s: Setting, u: Matrix) -> Matrix:
    w = geometry.dual_cone(s.j @ s.j.T, u, lambda: s.j).reshape(-1, len(s.j))
    pushed = w - u.reshape(w.shape)
    assert (pushed >= 0).all()
    size = (np.abs(w) @ s.lengths)[:, None]
    products = w @ s.j @ s.units.T
    close(np.minimum(products, 0), size)
    close(np.where(pushed > 0, products, 0), size)
    return w.sum(axis=0)


def closest(s: Setting) -> Matrix:
    # The same row comes first, whatever the order.
    m, first = len(s.j), int((s.units @ np.sin(np.arange(s.j.shape[1]))).argmax())
    demand = np.full(m, 0.02)
    demand[first] = -np.inf
    y, length, _ = geometry.closest_point(s.j @ s.j.T, first, demand, lambda: s.j)
    if y.any() and length > 0:
        pushed = y - np.eye(m)[first]
        slack = np.delete(s.units @ (s.units.T @ y) - 0.02, first)
        size = float(np.abs(y).sum())
        assert (pushed >= 0).all()
        close(np.minimum(slack, 0), size)
        close(np.where(np.delete(pushed, first) > 0, slack, 0), size)
    return y / s.lengths


def cagrad(s: Setting) -> Matrix:
    m = len(s.j)
    w, degenerate = geometry.cagrad(s.j @ s.j.T, 0.4, lambda: s.j)
    mean = s.j.mean(axis=0)
    x = w - 1 / m
    # Rounding of w leaves up to eps / m where nothing was added.
    x[np.abs(x) <= 4 * EPS / m] = 0
    size = float(np.abs(w) @ s.lengths)
    assert (x >= 0).all()
    if not degenerate:
        close(np.linalg.norm(x @ s.j) - 0.4 * np.linalg.norm(mean), size)
        products = s.j @ (s.j.T @ w)
        slack = (products - products[x > 0].max()) / s.lengths
        close(np.minimum(slack, 0), size)
        close(slack[x > 0], size)
    return w


def fairgrad(alpha: float) -> Callable[[Setting], Matrix]:
    def solve(s: Setting) -> Matrix:
        w, solved = geometry.power_fixed_point(s.j @ s.j.T, alpha, lambda: s.j)
        if solved:
            assert (w > 0).all()
            products = s.units @ (s.j.T @ w)
            close(products - w ** (-1 / alpha) / s.lengths, float(w @ s.lengths))
        return w

    return solve


def equal(by_length: bool) -> Callable[[Setting], Matrix]:
    def solve(s: Setting) -> Matrix:
        y, _, degenerate = geometry.equal_projection(s.j @ s.j.T, lambda: s.j, by_length=by_length)
        if not degenerate:
            scale = s.lengths if by_length else np.ones(len(y))
            v = s.units.T @ y
            off = ((s.units @ v - 1) * scale**2) @ s.units
            close(off, float(scale.max() ** 2 * max(np.abs(y).sum(), 1)) * len(y))
        return y / s.lengths

    return solve


def aligned(s: Setting) -> Matrix:
    balance, rank = geometry.align(s.j @ s.j.T, "min", lambda: s.j)
    rows = balance.T @ s.j
    square = rows @ rows.T
    sigma = square.trace() / rank
    # σ² times a projection, as far as the rounding of the matrix allows.
    size = float((np.abs(balance).T @ s.lengths).max()) / np.sqrt(sigma)
    close(square @ square / sigma - square, sigma * max(size, 1) * len(s.j))
    return balance.sum(axis=1)


SOLVERS: dict[str, Callable[[Setting], Matrix]] = {
    "min_norm": mgda,
    "dual_cone of each row": lambda s: projections(s, np.eye(len(s.j))),
    "dual_cone of the sum": lambda s: projections(s, np.ones(len(s.j))),
    "closest_point": closest,
    "cagrad": cagrad,
    "power_fixed_point 1": fairgrad(1.0),
    "power_fixed_point 2": fairgrad(2.0),
    "equal_projection": equal(False),
    "equal_projection by length": equal(True),
    "align": aligned,
}


@pytest.mark.parametrize(
    ("solver", "name"),
    [
        # 256 projections of 256 rows each take up to twenty seconds.
        pytest.param(s, n, marks=[pytest.mark.slow] if s == "dual_cone of each row" and n.startswith("wide") else [])
        for s in SOLVERS
        for n in GRADIENTS
    ],
)
def test_conditions_in_every_order(solver: str, name: str) -> None:
    j = GRADIENTS[name]
    m, rng = len(j), np.random.default_rng(0)
    w = SOLVERS[solver](setting(j))
    d, size = j.T @ w, float(np.abs(w) @ np.linalg.norm(j, axis=1))
    for _ in range(20 if m < 64 else 3 if m < 256 else 1):
        order = rng.permutation(m)
        other = np.ascontiguousarray(j[order])
        moved = other.T @ SOLVERS[solver](setting(other)) - d
        assert np.linalg.norm(moved) <= 1e-12 * np.linalg.norm(d) + 16 * EPS * size


METHODS = {
    "MGDA": gradsurgery.MGDA,
    "UPGrad": gradsurgery.UPGrad,
    "DualProj": gradsurgery.DualProj,
    "CAGrad": gradsurgery.CAGrad,
    "NashMTL": gradsurgery.NashMTL,
    "FairGrad": lambda base: gradsurgery.FairGrad(base, alpha=0.5),
    "IMTLG": gradsurgery.IMTLG,
    "ConFIG": gradsurgery.ConFIG,
    "AlignedMTL": gradsurgery.AlignedMTL,
}


@pytest.mark.parametrize("angle", [1.0, 1e-2, 1e-4, 1e-6, 1e-8, 1e-10, 0.0])
@pytest.mark.parametrize("method", list(METHODS))
def test_nearly_dependent_losses_in_every_order(method: str, angle: float) -> None:
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((8, 40))
    rows[4:] = rows[:4] + angle * rows[4:]
    rows *= 10.0 ** rng.uniform(-1, 1, (8, 1))

    def step(order: Matrix) -> tuple[Matrix, float]:
        """The direction, and the length of its terms, whose sum is rounded."""
        theta = torch.zeros(40, dtype=torch.float64, requires_grad=True)
        optimizer = METHODS[method](torch.optim.SGD([theta], lr=0.1))
        weights = optimizer.backward({str(i): torch.from_numpy(rows[i]) @ theta for i in order}).weights
        return theta.grad.numpy(), sum(abs(w) * np.linalg.norm(rows[int(i)]) for i, w in weights.items())

    d, size = step(np.arange(8))
    for _ in range(20):
        moved = step(rng.permutation(8))[0] - d
        assert np.linalg.norm(moved) <= 1e-12 * np.linalg.norm(d) + 4 * EPS * size, np.linalg.norm(moved)
