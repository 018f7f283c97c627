"""The solvers on as many rows as there are samples in a batch: the conditions of each answer, and how it is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import gradsurgery
from gradsurgery import geometry
from gradsurgery.geometry import exchange as exchange_module
from gradsurgery.geometry.exchange import exchange
from gradsurgery.geometry.nonnegative import by_active_sets, nonnegative
from gradsurgery.geometry.units import EPS, bound, half, unit

SIZES = (128, 256)


def drawn(m, rank, seed=0):
    return np.random.default_rng([seed, m, rank]).standard_normal((m, rank))


def gathered(m, seed=0):
    """Rows around ten centres, with a hundredfold range of eigenvalues, as samples of ten classes have."""
    rng = np.random.default_rng([seed, m])
    rows = 3 * rng.standard_normal((10, 4 * m))[rng.integers(10, size=m)] + rng.standard_normal((m, 4 * m))
    return rows * 10.0 ** rng.uniform(-2, 2, (m, 1))


KINDS = {
    "2m": lambda m: drawn(m, 2 * m),
    "4m": lambda m: drawn(m, 4 * m),
    "m": lambda m: drawn(m, m),
    "classes": gathered,
}


def unit_columns(rows):
    return half(unit(rows @ rows.T)[1])[0]


def is_optimal(columns, targets, x):
    """The conditions of non-negative least squares, for one problem per row."""
    slope = (targets - x @ columns.T) @ columns
    off = np.where(x > 0, np.abs(slope), slope).max(axis=1)
    return (x >= 0).all(axis=1) & (off <= bound(columns.shape[1]) * np.linalg.norm(targets, axis=1))


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_nearly_all_answers_meet_their_conditions_without_active_sets(kind, m):
    columns = unit_columns(KINDS[kind](m))
    targets = -columns.T * 10.0 ** np.linspace(-30, 30, m)[:, None]
    assert is_optimal(columns, targets, exchange(columns, targets)).mean() > 0.98  # active sets find the others


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_those_of_active_sets(kind):
    columns = unit_columns(KINDS[kind](128))
    targets = -columns.T[::16]
    found = exchange(columns, targets)
    for target, x in zip(targets, found, strict=True):
        exact = by_active_sets(columns, target)[0]
        np.testing.assert_allclose(columns @ x, columns @ exact, rtol=0, atol=1e-9)
        np.testing.assert_allclose(exchange(columns, target[None])[0], x, rtol=0, atol=1e-9)


def test_dependent_columns_are_left_out():
    rows = drawn(64, 256)
    rows = np.concatenate((rows, rows[:40], np.zeros((8, 256))))
    columns = unit_columns(rows)
    assert is_optimal(columns, -columns.T, exchange(columns, -columns.T)).all()


def test_a_similar_answer_is_a_beginning(monkeypatch):
    columns = unit_columns(drawn(128, 256))
    target = -columns.sum(axis=1)
    exact = exchange(columns, target[None])
    calls = []
    steps = exchange_module._steps
    monkeypatch.setattr(exchange_module, "_steps", lambda *args: calls.append(1) or steps(*args))
    exchange(columns, target[None])
    alone = len(calls)
    calls.clear()
    found = exchange(columns, 1.001 * target[None], exact)
    assert len(calls) < alone
    np.testing.assert_allclose(found, 1.001 * exact, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("broken", [np.nan, -1.0, 0.0, 1e-3])
def test_a_wrong_beginning_is_noticed(monkeypatch, broken):
    columns = unit_columns(drawn(64, 128))
    target = -columns[:, 0]
    right = by_active_sets(columns, target)[0]
    for module in ("nonnegative", "cones"):
        monkeypatch.setattr(
            f"gradsurgery.geometry.{module}.exchange",
            lambda columns, targets, begin=None: np.full((len(targets), columns.shape[1]), broken),
        )
    with np.errstate(invalid="ignore"):
        np.testing.assert_allclose(nonnegative(columns, target)[0], right, rtol=1e-9, atol=1e-12)
        w = geometry.dual_cone(columns.T @ columns, np.eye(64)[:2])
    np.testing.assert_allclose(w[0], np.eye(64)[0] + right, rtol=1e-9, atol=1e-12)


def direction_of(method, rows):
    optimizer = method(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1))
    return optimizer.combine(torch.from_numpy(rows)).numpy()


def products(rows, direction):
    """⟨g_i, d⟩ relative to the lengths of both."""
    return rows @ direction / np.linalg.norm(rows, axis=1) / np.linalg.norm(direction)


@pytest.mark.parametrize("m", SIZES)
@pytest.mark.parametrize("kind", ["2m", "4m", "classes"])
class TestConditions:
    def rows(self, kind, m):
        return KINDS[kind](m)

    def test_upgrad(self, kind, m):
        rows = self.rows(kind, m)
        gram = rows @ rows.T
        w = geometry.dual_cone(gram, np.eye(m))
        lengths = np.sqrt(gram.diagonal())
        multipliers, along = (w - np.eye(m)) * lengths / lengths[:, None], w @ gram / lengths / lengths[:, None]
        assert multipliers.min() >= -1e-12
        assert along.min() >= -1e-12
        assert np.abs(multipliers * along).max() < 1e-12
        assert (multipliers > 0).sum() > m
        assert products(rows, direction_of(gradsurgery.UPGrad, rows)).min() >= -1e-12

    def test_dualproj(self, kind, m):
        rows = self.rows(kind, m)
        lengths = np.linalg.norm(rows, axis=1)
        wanted = np.where(np.arange(m) % 2, 1.0, -1.0) / lengths
        w = geometry.dual_cone(rows @ rows.T, wanted)
        multipliers, along = (w - wanted) * lengths, products(rows, w @ rows)
        assert multipliers.min() >= -1e-12
        assert along.min() >= -1e-12
        assert np.abs(multipliers * along).max() < 1e-12
        assert (multipliers > 1e-9).any()
        assert products(rows, direction_of(gradsurgery.DualProj, rows)).min() >= -1e-12

    def test_mgda(self, kind, m):
        rows = self.rows(kind, m)
        w, stationary = geometry.min_norm(rows @ rows.T)
        point = w @ rows
        ahead = (rows @ point - point @ point) / np.linalg.norm(rows, axis=1) / np.linalg.norm(point)
        assert not stationary
        assert w.min() >= 0
        assert abs(w.sum() - 1) < 1e-12
        assert ahead.min() >= -1e-12
        assert np.abs(ahead[w > 0]).max() < 1e-12

    def test_cagrad(self, kind, m):
        rows = self.rows(kind, m)
        mean = rows.mean(axis=0)
        w, _ = geometry.cagrad(rows @ rows.T, 0.4)
        extra, direction = w - 1 / m, w @ rows
        along = rows @ direction
        worst = along.min()
        assert extra.min() >= -1e-12 * np.abs(w).max()
        assert abs(np.linalg.norm(direction - mean) - 0.4 * np.linalg.norm(mean)) < 1e-9 * np.linalg.norm(mean)
        lengths = np.linalg.norm(rows, axis=1) * np.linalg.norm(direction)
        active = extra * np.linalg.norm(rows, axis=1) > 1e-9 * np.linalg.norm(mean)
        assert active.any()
        assert np.abs((along - worst) / lengths)[active].max() < 1e-9

    def test_nash_mtl_and_fairgrad(self, kind, m):
        rows = self.rows(kind, m)
        gram = rows @ rows.T
        for alpha in (1.0, 2.0):
            w, solved = geometry.power_fixed_point(gram, alpha)
            assert solved
            assert np.abs(gram @ w * w ** (1 / alpha) - 1).max() < 1e-9

    def test_config_and_imtlg(self, kind, m):
        rows = self.rows(kind, m)
        y, rank, degenerate = geometry.equal_projection(rows @ rows.T)
        units = rows / np.linalg.norm(rows, axis=1)[:, None]
        assert rank == m
        assert not degenerate
        assert np.abs(units @ (y @ units) - 1).max() < 1e-10

    def test_aligned_mtl(self, kind, m):
        rows = self.rows(kind, m)
        balance, rank = geometry.align(rows @ rows.T)
        aligned = balance @ rows
        square = aligned @ aligned.T
        assert rank == m
        assert np.abs(square / square[0, 0] - np.eye(m)).max() < 1e-6


def flags_of(method, rows):
    p = torch.nn.Parameter(torch.zeros(rows.shape[1], dtype=torch.float64))
    return method(torch.optim.SGD([p], lr=0.1)).backward(torch.from_numpy(rows) @ p).flags


@pytest.mark.parametrize("method", [gradsurgery.UPGrad, gradsurgery.DualProj])
def test_many_rows_of_low_rank_are_remarked(method):
    assert "rank-deficient" in flags_of(method, drawn(64, 32))
    assert "rank-deficient" in flags_of(method, np.repeat(drawn(32, 80), 2, axis=0))
    assert flags_of(method, drawn(64, 33)) == ()
    assert flags_of(method, drawn(40, 10)) == ()


def test_noise_and_zero_rows_are_no_dimensions():
    rows = drawn(64, 30)
    gram = (rows @ rows.T) * (1 + 1e-8 * drawn(64, 64))
    assert geometry.is_crowded((gram + gram.T) / 2, noise=1e-7)
    assert not geometry.is_crowded((gram + gram.T) / 2, noise=EPS)
    padded = np.concatenate((drawn(40, 20), np.zeros((24, 20))))
    assert not geometry.is_crowded(padded @ padded.T)
