"""Every solver on gradients of small networks: the conditions of its answer, whatever the order of the losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

import gradsurgery
from gradsurgery import geometry
from gradsurgery.geometry import balance, bargaining, linear
from tests.support.samplers import Matrix

EPS = geometry.EPS
GRADIENTS = dict(np.load(Path(__file__).parents[1] / "data" / "gradients.npz"))


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


def conic(s: Setting) -> Matrix:
    w, degenerate = geometry.conic(s.j @ s.j.T, 0.5, lambda: s.j)
    mean, d = s.j.mean(axis=0), s.j.T @ w
    size = float(np.abs(w) @ s.lengths)
    close(np.linalg.norm(d) - np.linalg.norm(mean), size)
    if not degenerate:
        cosine = d @ mean / (np.linalg.norm(d) * np.linalg.norm(mean))
        close(min(cosine - 0.5, 0.0), size / float(np.linalg.norm(d)))
        x = w - (w.min() if cosine < 0.5 + 1e-9 else 0.0)
        x[np.abs(x) <= 4 * EPS * w.max()] = 0
        assert (x >= 0).all()
        products = s.j @ d
        slack = (products - products[x > 0].max()) / s.lengths
        close(np.minimum(slack, 0), size)
        close(slack[x > 0], size)
    return w


SOLVERS: dict[str, Callable[[Setting], Matrix]] = {
    "min_norm": mgda,
    "dual_cone of each row": lambda s: projections(s, np.eye(len(s.j))),
    "dual_cone of the sum": lambda s: projections(s, np.ones(len(s.j))),
    "closest_point": closest,
    "cagrad": cagrad,
    "conic": conic,
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
    "CAGrad, c = 1.5": lambda base: gradsurgery.CAGrad(base, c=1.5),
    "ConicGrad": gradsurgery.ConicGrad,
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


def rows_near(angle: float, m: int = 6, n: int = 20) -> Matrix:
    """Half of the rows lie this close to the others."""
    rng = np.random.default_rng(m)
    rows = rng.standard_normal((m, n))
    rows[m // 2 :] = rows[: m - m // 2] + angle * rows[m // 2 :]
    return rows * 10.0 ** rng.uniform(-0.5, 0.5, (m, 1))


def program(j: Matrix, flag: Callable[[str], None]) -> Matrix:
    """The point of the rows' hull that helps the last one most, and harms none."""
    units = j / np.linalg.norm(j, axis=1)[:, None]
    cosines = units @ units.T
    x = geometry.best_corner(cosines[-1], cosines, np.zeros(len(j)), np.ones(len(j)), flag)
    return np.zeros(len(j)) if x is None else x / np.linalg.norm(j, axis=1)


def fixed_point(alpha: float) -> Callable[[Matrix, Callable[[str], None]], Matrix]:
    return lambda j, flag: geometry.power_fixed_point(j @ j.T, alpha, lambda: j, flag=flag)[0]


CHECKED: dict[str, Callable[[Matrix, Callable[[str], None]], Matrix]] = {
    "equal_projection": lambda j, flag: (
        geometry.equal_projection(j @ j.T, lambda: j, flag=flag)[0] / np.linalg.norm(j, axis=1)
    ),
    "equal_projection by length": lambda j, flag: (
        geometry.equal_projection(j @ j.T, lambda: j, by_length=True, flag=flag)[0] / np.linalg.norm(j, axis=1)
    ),
    "align": lambda j, flag: geometry.align(j @ j.T, "min", lambda: j, flag=flag)[0].sum(axis=1),
    "align median": lambda j, flag: geometry.align(j @ j.T, "median", lambda: j, flag=flag)[0].sum(axis=1),
    "power_fixed_point 0.5": fixed_point(0.5),
    "power_fixed_point 1": fixed_point(1.0),
    "power_fixed_point 2": fixed_point(2.0),
    "best_corner": program,
}

SPOIL: dict[str, Callable[[Any], Any]] = {
    "zeros": lambda a: 0 * a,
    "a tenth off": lambda a: a * (1 + 0.1 * np.sin(1.0 + np.arange(np.size(a)))).reshape(np.shape(a)),
    "upside down": lambda a: -a,
    "backwards": lambda a: a[::-1].copy(),
}


def spoiled(routine: Callable[..., Any], place: int | None, spoil: Callable[[Any], Any]) -> Callable[..., Any]:
    """The routine, with one part of what it returns spoiled, or all if it returns one array."""

    def wrong(*args: Any, **options: Any) -> Any:
        found = routine(*args, **options)
        if place is None:
            return spoil(found)
        parts = list(found)
        parts[place] = spoil(parts[place])
        return tuple(parts)

    return wrong


def wrong_corner(kind: str) -> Callable[..., Any]:
    def wrong(*args: Any, **options: Any) -> Any:
        found = WRONG_LINPROG(*args, **options)
        if kind in SPOIL:
            found.x = SPOIL[kind](found.x)
        elif kind == "prices":
            found.ineqlin.marginals = 0 * found.ineqlin.marginals - 1
        else:
            found.status = 2
        return found

    return wrong


WRONG_LINPROG = linear.linprog

WELL, NEAR, DEPENDENT = rows_near(1.0), rows_near(1e-6), rows_near(0.0)
# A sum of weights of either sign is next to nothing: the Gram cannot tell the fixed point.
OPPOSED = np.vstack((NEAR[:3], 1e-4 * WELL[3:] - WELL[:3]))

# Which routine, what of its answer, whose it is, and rows for which it is called.
ROUTINES = [
    (balance, "dpotrs", 0, "equal_projection", WELL),
    (balance, "_foot", None, "equal_projection", NEAR),
    (np.linalg, "svd", 0, "equal_projection", DEPENDENT),
    (np.linalg, "svd", 1, "equal_projection by length", DEPENDENT),
    (balance, "dgesdd", 0, "align", WELL),
    (balance, "dgesdd", 1, "align median", WELL),
    (balance, "dgesdd", 2, "align", WELL),
    (balance, "dgejsv", 0, "align", NEAR),
    (balance, "dgejsv", 1, "align", NEAR),
    (balance, "dgejsv", 2, "align", DEPENDENT),
    (balance, "dgesv", 2, "align", WELL),
    (np.linalg, "lstsq", 0, "align", DEPENDENT),
]


@pytest.mark.parametrize("kind", list(SPOIL))
@pytest.mark.parametrize("case", range(len(ROUTINES)))
def test_a_wrong_factorisation_is_replaced(monkeypatch: pytest.MonkeyPatch, case: int, kind: str) -> None:
    module, name, place, solver, j = ROUTINES[case]
    right = j.T @ CHECKED[solver](j, pytest.fail)
    calls: list[int] = []

    def spoil(a: Any) -> Any:
        calls.append(1)
        return SPOIL[kind](a)

    monkeypatch.setattr(module, name, spoiled(getattr(module, name), place, spoil))
    with np.errstate(all="ignore"):
        found = j.T @ CHECKED[solver](j, pytest.fail)
    assert calls
    assert np.linalg.norm(found - right) <= 1e-8 * np.linalg.norm(right)


@pytest.mark.parametrize("kind", list(SPOIL))
@pytest.mark.parametrize("alpha", ["0.5", "1", "2"])
def test_a_wrong_step_towards_the_fixed_point(monkeypatch: pytest.MonkeyPatch, alpha: str, kind: str) -> None:
    solver = CHECKED[f"power_fixed_point {alpha}"]
    right = OPPOSED.T @ solver(OPPOSED, pytest.fail)
    flags: list[str] = []
    monkeypatch.setattr(bargaining, "lstsq", spoiled(bargaining.lstsq, 0, SPOIL[kind]))
    found = OPPOSED.T @ solver(OPPOSED, flags.append)
    if kind != "a tenth off":
        assert flags == ["not-converged"]
    assert flags or np.linalg.norm(found - right) <= 1e-8 * np.linalg.norm(right)


@pytest.mark.parametrize("alpha", ["0.5", "1", "2"])
def test_the_other_problem_has_the_same_fixed_point(monkeypatch: pytest.MonkeyPatch, alpha: str) -> None:
    solver, search = CHECKED[f"power_fixed_point {alpha}"], bargaining._power_search
    right = OPPOSED.T @ solver(OPPOSED, pytest.fail)
    asked = []

    def once_wrong(*args: Any) -> tuple[Matrix, bool]:
        v, solved = search(*args)
        asked.append(args[3])
        return (v * 1.001 if len(asked) == 1 else v), solved

    monkeypatch.setattr(bargaining, "_power_search", once_wrong)
    found = OPPOSED.T @ solver(OPPOSED, pytest.fail)
    assert sorted(asked) == [False, True]
    assert np.linalg.norm(found - right) <= 1e-8 * np.linalg.norm(right)


@pytest.mark.parametrize("kind", [*SPOIL, "prices", "impossible"])
def test_a_wrong_corner_is_replaced(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    right = [program(j, pytest.fail) for j in (WELL, NEAR, DEPENDENT)]
    monkeypatch.setattr(linear, "linprog", wrong_corner(kind))
    for j, expected in zip((WELL, NEAR, DEPENDENT), right, strict=True):
        gain = j[-1] @ j.T
        found = program(j, pytest.fail)
        np.testing.assert_allclose(gain @ found, gain @ expected, rtol=1e-8)
        assert (found >= 0).all()
        assert (j @ j.T @ found >= -1e-8).all()


def test_what_is_impossible_is_proved(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = np.ones(2), -np.eye(2), np.array([-0.4, -0.5]), np.ones(2)
    assert geometry.best_corner(*arguments) is None
    monkeypatch.setattr(
        linear,
        "linprog",
        lambda *a, **k: WRONG_LINPROG([-1.0, -1.0], A_ub=np.eye(2), b_ub=[1, 1], A_eq=[[1.0, 1.0]], b_eq=[1.0]),
    )
    assert geometry.best_corner(*arguments) is None


ALL_WRONG: dict[str, list[tuple[Any, str, int | None]]] = {
    "equal_projection": [
        (balance, "dpotrs", 0),
        (balance, "_foot", None),
        (balance, "_by_qr", None),
        (np.linalg, "svd", 0),
    ],
    "align": [(balance, "dgesdd", 0), (balance, "dgejsv", 1)],
    "align median": [(balance, "dgesv", 2), (np.linalg, "lstsq", 0), (balance, "solve_triangular", None)],
    "best_corner": [(linear, "settle", 0)],
}


@pytest.mark.parametrize("name", list(ALL_WRONG))
@pytest.mark.parametrize("j", [WELL, NEAR, DEPENDENT], ids=["well", "near", "dependent"])
def test_what_no_routine_finds_is_flagged(monkeypatch: pytest.MonkeyPatch, name: str, j: Matrix) -> None:
    for module, routine, place in ALL_WRONG[name]:
        monkeypatch.setattr(module, routine, spoiled(getattr(module, routine), place, SPOIL["zeros"]))
    monkeypatch.setattr(linear, "linprog", wrong_corner("zeros"))
    flags: list[str] = []
    CHECKED[name](j, flags.append)
    assert set(flags) == {"not-converged"}
    with pytest.raises(ArithmeticError, match="not-converged"):
        CHECKED[name](j, geometry.nonnegative.refuse)


@pytest.mark.parametrize("solver", list(CHECKED))
def test_no_flag_without_a_reason(solver: str) -> None:
    rows = [j for j in GRADIENTS.values() if len(j) <= 64]
    for seed in range(60):
        rng = np.random.default_rng(seed)
        m = int(rng.integers(2, 12))
        j = rng.standard_normal((m, int(rng.integers(m - 1, m + 4)))) * 10.0 ** rng.uniform(-2, 2, (m, 1))
        if seed % 3:
            j[m // 2 :] = j[: m - m // 2] + 10.0 ** -(seed % 10) * j[m // 2 :]
        rows.append(j)
    for j in rows:
        CHECKED[solver](j, pytest.fail)
