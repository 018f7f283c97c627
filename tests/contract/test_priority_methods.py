"""Methods with a primary task, with two groups of tasks, or with a target ratio of the losses."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn

from gradsurgery.surgery.agem import AGEM
from gradsurgery.surgery.config import ConFIG
from gradsurgery.surgery.dcgd import DCGD
from gradsurgery.surgery.dualproj import DualProj
from gradsurgery.surgery.epo import EPO
from gradsurgery.surgery.metabalance import MetaBalance
from gradsurgery.surgery.mgda import MGDA
from gradsurgery.surgery.pcd import PCD
from gradsurgery.surgery.pmgda import PMGDA
from tests.support.catalogue import any_optimizer
from tests.support.samplers import badly_scaled, descending, integer_matrices, of_rank, scales

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "reference.json").read_text())


def rows_of(*table) -> torch.Tensor:
    return torch.tensor(table, dtype=torch.float64)


def random_rows(seed: int, m: int = 3, n: int = 6) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((m, n))


def direction(method, rows, losses=None, **options) -> np.ndarray:
    return method(any_optimizer(), **options).combine(torch.as_tensor(rows, dtype=torch.float64), losses=losses).numpy()


def backward(optimizer, rows, losses=None, names=None):
    """One ``backward`` of losses with the given gradients and values; None for a row marks an absent task."""
    (p,) = (p for group in optimizer.param_groups for p in group["params"])
    values = np.ones(len(rows)) if losses is None else losses
    tensors = [None if g is None else torch.as_tensor(g) @ p + v for g, v in zip(rows, values, strict=True)]
    p.grad = None
    report = optimizer.backward(tensors if names is None else dict(zip(names, tensors, strict=True)))
    return report, p.grad


def sgd(n: int) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(n, dtype=torch.float64))], lr=0.0)


# ------------------------------------------------------------------------------------------------ the primary task

SHARED = pytest.mark.parametrize("method", [PCD, AGEM])


@SHARED
def test_primary_is_named(method):
    rows = random_rows(0)
    expected = direction(method, rows[[2, 0, 1]])
    _, grad = backward(method(sgd(6), primary="c"), rows, names="abc")
    np.testing.assert_allclose(grad, expected, rtol=1e-12)
    assert not np.allclose(expected, direction(method, rows))


@SHARED
@pytest.mark.parametrize("primary", ["a", None])
def test_absent_primary_gives_the_plain_sum(method, primary):
    rows = random_rows(1)
    report, grad = backward(method(sgd(6), primary=primary), [None, *rows[1:]], names="abc")
    np.testing.assert_allclose(grad, rows[1:].sum(axis=0), rtol=1e-12)
    assert report.flags == ("primary-absent",)


@SHARED
def test_unknown_primary_is_an_error(method):
    with pytest.raises(ValueError, match=r"`primary` must be the name of a loss, one of \['0', '1'\], got 'main'"):
        direction(method, random_rows(2, m=2), primary="main")


@SHARED
def test_zero_primary_gives_zero(method):
    report, grad = backward(method(sgd(2)), rows_of([0, 0], [1, 2]))
    assert not grad.any()
    assert report.flags == (("primary-zero",) if method is PCD else ())


@SHARED
def test_one_equal_and_zero_rows(method):
    g = np.array([3.0, -4.0])
    np.testing.assert_array_equal(direction(method, g[None]), g)
    np.testing.assert_allclose(direction(method, np.stack([g, g, g])), g, rtol=1e-14)
    np.testing.assert_allclose(direction(method, np.stack([g, 0 * g])), g, rtol=1e-14)


# ---------------------------------------------------------------------------------------------------------- A-GEM


@given(rows=integer_matrices(columns=4) | badly_scaled(of_rank(), largest=6), factor=scales())
@example(rows=np.array([[1.0, 0.0], [64.0, 0.0], [-64.0, 0.0]]), factor=2.0**40)  # the others cancel each other
def test_agem_is_a_projection(rows, factor):
    g, reference = rows[0] * factor, rows[1:].sum(axis=0) * factor
    d = direction(AGEM, rows * factor)
    size = np.linalg.norm(g)
    if g @ reference >= 0:
        np.testing.assert_array_equal(d, g)
    else:  # then neither is zero
        unit = reference / np.linalg.norm(reference)
        terms = np.linalg.norm(rows[1:] * factor, axis=1).sum()
        tolerance = 1e-12 * size * (1 + terms / np.linalg.norm(reference))
        assert abs(d @ unit) <= tolerance
        assert np.linalg.norm(d - (g - (g @ unit) * unit)) <= tolerance
        assert d @ g >= -tolerance * size


def test_agem_may_hurt_one_of_several():
    """Only the mean of the others is protected: the docstring promises no more."""
    rows = rows_of([1, 0], [-1, 0.1], [3, 0])
    d = direction(AGEM, rows)
    np.testing.assert_array_equal(d, [1, 0])
    assert rows[1].numpy() @ d < 0


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_agem_at_the_edges(scale):
    opposed = scale * rows_of([0.1, 0.7, 0.2], [-0.3, -2.1, -0.6])
    report, grad = backward(AGEM(sgd(3)), opposed)
    assert not grad.any()
    assert report.flags == ("stationary",)
    # 0.1 + 0.2 − 0.3 is not 0 in binary; the sum of the others is rounding and must not be projected on.
    for sign in (1, -1):
        cancelling = scale * rows_of([1, 1], [0.1 * sign, 0], [0.2 * sign, 0], [-0.3 * sign, 0])
        np.testing.assert_array_equal(direction(AGEM, cancelling), cancelling[0])


def test_agem_keeps_what_little_is_left():
    d = direction(AGEM, rows_of([1, 1e-9], [-1, 0]))
    np.testing.assert_allclose(d, [0, 1e-9], rtol=1e-6, atol=1e-24)


# ------------------------------------------------------------------------------------------------------------ PCD


@pytest.mark.parametrize("key", REFERENCE["methods"]["PCD first call tau=0.02"]["truth"])
def test_pcd_reference(key):
    case = REFERENCE["methods"]["PCD first call tau=0.02"]
    allowed = case["tolerance"]["exceptions"].get(key, case["tolerance"]["relative"])
    expected = np.array(case["truth"][key]["direction"])
    found = direction(PCD, REFERENCE["inputs"][key]["J"], eps=1e-8)
    assert np.linalg.norm(found - expected) <= allowed * np.linalg.norm(expected)


def enumerated(rows: np.ndarray, tau: np.ndarray) -> np.ndarray | None:
    """The paper's appendix B.2, literally: the working set of constraints that meets the KKT conditions."""
    first, others = rows[0], rows[1:]
    demand = tau * (others**2).sum(axis=1)
    for size in range(len(others) + 1):
        for chosen in itertools.combinations(range(len(others)), size):
            a = others[list(chosen)]
            if np.linalg.matrix_rank(a) < size:
                continue
            mu = np.linalg.solve(a @ a.T, demand[list(chosen)] - a @ first)
            d = first + a.T @ mu
            if (mu >= -1e-9).all() and (others @ d >= demand - 1e-9).all():
                return d
    return None


@pytest.mark.parametrize("m", [2, 3, 5])
@pytest.mark.parametrize("tau", [0.0, 0.02, 0.5])
def test_pcd_against_enumeration(m, tau):
    for seed in range(8):
        rows = random_rows(seed, m, n=m + 1) * 10.0 ** np.arange(m)[:, None]
        units = rows / np.linalg.norm(rows, axis=1)[:, None]
        expected = enumerated(units, np.full(m - 1, tau))
        expected *= np.linalg.norm(rows[0]) / np.linalg.norm(expected)
        found = direction(PCD, rows, tau=tau)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * np.linalg.norm(expected))
        assert (units[1:] @ found >= -1e-12 * np.linalg.norm(found)).all()


def test_pcd_follows_the_moving_average():
    beta, tau = 0.9, 0.3
    optimizer = PCD(any_optimizer(), beta=beta, tau=tau)
    squares = np.zeros(3)
    for step in range(1, 6):
        rows = random_rows(step) * np.array([[1.0], [step], [1.0 / step]])
        squares = beta * squares + (1 - beta) * (rows**2).sum(axis=1)
        normalised = rows / np.sqrt(squares / (1 - beta**step))[:, None]
        expected = enumerated(normalised, np.full(2, tau))
        expected *= np.linalg.norm(rows[0]) / np.linalg.norm(expected)
        found = optimizer.combine(torch.from_numpy(rows), update=True).numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-10)
    assert not np.allclose(found, direction(PCD, rows, beta=beta, tau=tau)), "the average must matter here"


def test_pcd_absent_tasks_keep_their_average_and_a_checkpoint_continues():
    batches = [random_rows(seed) for seed in range(6)]
    present = [batches[0], [*batches[1][:2], None], batches[2], [batches[3][0], None, batches[3][2]], *batches[4:]]

    def run(optimizer, steps):
        grads = []
        for rows in steps:
            grads.append(backward(optimizer, rows, names="abc")[1].clone())
            optimizer.step()
        return grads

    whole = PCD(sgd(6), beta=0.5, tau=0.4)
    expected = run(whole, present)
    half = PCD(sgd(6), beta=0.5, tau=0.4)
    run(half, present[:3])
    resumed = PCD(sgd(6), beta=0.5, tau=0.4)
    resumed.load_state_dict(half.state_dict())
    for found, wanted in zip(run(resumed, present[3:]), expected[3:], strict=True):
        assert torch.equal(found, wanted)
    memory = whole.state_dict()["gradsurgery"]["memory"]
    assert memory["counts"] == {"a": 6.0, "b": 5.0, "c": 5.0}
    b = 0.0
    for i in (0, 1, 2, 4, 5):
        b = 0.5 * b + 0.5 * float(batches[i][1] @ batches[i][1])
    assert memory["squares"]["b"] == pytest.approx(b, rel=1e-13)
    fresh = PCD(sgd(6), beta=0.5, tau=0.4)
    assert not torch.equal(run(fresh, present[3:])[0], expected[3])


PD1 = rows_of([1, 0], [-0.9987, 0.051])


def test_pcd_may_hurt_the_primary_and_says_so():
    report, grad = backward(PCD(sgd(2)), PD1)
    np.testing.assert_allclose(grad, [-0.317, 0.948], atol=2e-3)
    assert report.flags == ("primary-rises",)


def test_pcd_protects_the_primary_on_request():
    report, grad = backward(PCD(sgd(2), protect_primary=True), PD1)
    np.testing.assert_allclose(grad, [0, 1], atol=1e-12)
    assert report.flags == ()
    for seed in range(20):
        rows = random_rows(seed, m=4, n=4)
        rows[1] -= 2 * rows[0]
        d = direction(PCD, rows, protect_primary=True)
        assert (rows @ d >= -1e-12 * np.linalg.norm(rows, axis=1) * np.linalg.norm(d)).all()
        free = direction(PCD, rows)
        if free @ rows[0] > 1e-9:
            np.testing.assert_allclose(d, free, rtol=1e-9, atol=1e-12)


def test_pcd_is_the_closest_protected_direction():
    """SLSQP on the same problem; the method's direction may be scaled freely."""
    rows = random_rows(3)
    rows[1] -= 3 * rows[0]
    rows /= np.linalg.norm(rows, axis=1)[:, None]
    limits = [{"type": "ineq", "fun": lambda d, g=g, t=t: g @ d - t} for g, t in zip(rows, (0, 0.1, 0.1), strict=True)]
    best = minimize(lambda d: ((d - rows[0]) ** 2).sum(), rows.sum(axis=0), constraints=limits, tol=1e-14).x
    found = direction(PCD, rows, tau=0.1, protect_primary=True)
    np.testing.assert_allclose(found, best / np.linalg.norm(best), atol=1e-6)
    assert abs(rows[0] @ found) <= 1e-9, "the protection must be needed here"


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_pcd_without_a_solution_follows_the_primary(scale):
    rows = scale * rows_of([1, 1], [0.3, 0], [-0.7, 0])
    report, grad = backward(PCD(sgd(2)), rows)
    np.testing.assert_array_equal(grad, rows[0])
    assert report.flags == ("infeasible",)


def test_pcd_tells_hard_from_impossible():
    """Two secondary rows 1e-5 short of opposing each other can still be served."""
    rows = rows_of([1, 0], [1, 1e-5], [-1, 1e-5])
    report, grad = backward(PCD(sgd(2), tau=0.01), rows)
    assert "infeasible" not in report.flags
    assert (rows[1:] @ grad > 0).all()
    np.testing.assert_allclose(grad, [0, 1], atol=2e-5)


def test_pcd_with_nothing_left_is_zero():
    report, grad = backward(PCD(sgd(3), tau=0.0), rows_of([0.1, 0.7, 0.2], [-0.3, -2.1, -0.6]))
    assert not grad.any()
    assert report.flags == ("stationary",)


def test_pcd_takes_a_tau_for_each_task():
    rows = random_rows(4)
    units = rows / np.linalg.norm(rows, axis=1)[:, None]
    expected = enumerated(units, np.array([0.9, 0.1]))
    expected *= np.linalg.norm(rows[0]) / np.linalg.norm(expected)
    np.testing.assert_allclose(direction(PCD, rows, tau={"1": 0.9, "2": 0.1}), expected, rtol=1e-10)
    with pytest.raises(ValueError, match=r"`tau` must name every secondary loss, \['2'\] is missing"):
        direction(PCD, rows, tau={"1": 0.9})


@given(rows=of_rank(conflict=True), factor=scales(), data=st.data())
def test_pcd_does_not_care_about_the_scale_of_secondary_losses(rows, factor, data):
    each = np.array([1.0, *(data.draw(scales(20)) for _ in rows[1:])])
    expected = direction(PCD, rows) * factor
    found = direction(PCD, rows * each[:, None] * factor)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * factor * np.linalg.norm(rows[0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": 1.5}, "PCD: `tau` must be <= 1, got 1.5"),
        ({"tau": {"a": -0.1}}, r"PCD: `tau\['a'\]` must be >= 0"),
        ({"beta": 1.0}, "PCD: `beta` must be < 1"),
        ({"eps": -1e-8}, "PCD: `eps` must be >= 0"),
        ({"preference": [1.0, 2.0]}, "PCD: `preference` has no effect here"),
    ],
)
def test_pcd_checks_its_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        PCD(any_optimizer(), **options)


# ---------------------------------------------------------------------------------------------------- MetaBalance


def metabalance_by_hand(params, losses, norms, relax, beta):
    """One call of the authors' code: parameter by parameter, with averages that start at zero."""
    total = [torch.zeros_like(p) for p in params]
    for i, loss in enumerate(losses):
        for j, g in enumerate(torch.autograd.grad(loss, params, retain_graph=True)):
            norms[j, i] = norms[j, i] * beta + (1 - beta) * torch.linalg.vector_norm(g)
            total[j] += (norms[j, 0] * g / norms[j, i]) * relax + g * (1 - relax)
    return total


@pytest.mark.parametrize(("relax", "beta"), [(0.7, 0.9), (1.0, 0.0), (0.0, 0.5)])
def test_metabalance_by_hand(relax, beta):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    params = [nn.Parameter(draw(3, 4)), nn.Parameter(draw(4))]
    optimizer = MetaBalance(torch.optim.SGD(params, lr=0.1), relax=relax, beta=beta)
    norms = np.zeros((2, 3))
    for _ in range(5):
        x, y = draw(8, 3), draw(3, 8, 4)
        out = torch.tanh(x @ params[0] + params[1])
        losses = [10.0**i * (out - t).square().mean() for i, t in enumerate(y)]
        expected = metabalance_by_hand(params, losses, norms, relax, beta)
        optimizer.zero_grad()
        optimizer.backward(losses)
        for p, g in zip(params, expected, strict=True):
            torch.testing.assert_close(p.grad, g, rtol=1e-12, atol=0)
        optimizer.step()


def test_metabalance_over_all_parameters_together():
    rows = rows_of([3, 0, 4, 0], [0, 6, 0, 8])
    params = [nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(2)]
    optimizer = MetaBalance(torch.optim.SGD(params, lr=0.1), relax=1.0, granularity="all")
    optimizer.backward([g @ torch.cat(params) for g in rows])
    np.testing.assert_allclose(torch.cat([p.grad for p in params]), [3, 3, 4, 4])


def test_metabalance_without_some_gradients():
    assert direction(MetaBalance, rows_of([0, 0], [3, 4]), relax=0.75).tolist() == [0.75, 1.0]
    assert direction(MetaBalance, rows_of([3, 4], [0, 0])).tolist() == [3.0, 4.0]
    optimizer = MetaBalance(sgd(2), primary="main")
    report, grad = backward(optimizer, rows_of([1, 0], [3, 4], [10, 0]), names=("main", "other", "more"))
    optimizer.step()
    report, grad = backward(optimizer, [None, *rows_of([3, 4], [10, 0])], names=("main", "other", "more"))
    assert grad.tolist() == [13.0, 4.0]
    assert report.flags == ("primary-absent",)


def test_metabalance_names_what_it_does_not_know():
    with pytest.raises(ValueError, match="MetaBalance: `primary` must be the name of a loss"):
        backward(MetaBalance(sgd(2), primary="b"), rows_of([1, 0], [0, 1]))
    with pytest.raises(ValueError, match=r"MetaBalance: `relax` must be <= 1, got 1\.5"):
        MetaBalance(any_optimizer(), relax=1.5)
    with pytest.raises(ValueError, match='MetaBalance: `every` > 1 needs granularity="all"'):
        MetaBalance(any_optimizer(), every=2)
    MetaBalance(any_optimizer(), every=2, granularity="all")


# ----------------------------------------------------------------------------------------------------------- DCGD

VARIANTS = pytest.mark.parametrize("variant", ["center", "projection", "average"])


def dual_cone(a: np.ndarray, b: np.ndarray, variant: str) -> np.ndarray:
    """The three variants in vectors, as the official code has them."""
    s = a + b

    def without(x):
        return s - (s @ x) / (x @ x) * x

    if variant == "center":
        c = a / np.linalg.norm(a) + b / np.linalg.norm(b)
        return (c @ s) / (c @ c) * c
    if s @ a >= 0 and s @ b >= 0:
        return s
    if variant == "average":
        return (without(a) + without(b)) / 2
    return without(a) if s @ a < 0 else without(b)


@VARIANTS
def test_dcgd_in_vectors(variant):
    for seed in range(10):
        rows = random_rows(seed, m=2) * np.array([[1.0], [5.0 ** (seed % 3)]])
        rows[1] -= (seed % 4) * rows[0]
        expected = dual_cone(rows[0], rows[1], variant)
        found = direction(DCGD, rows, variant=variant)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-12 * np.linalg.norm(rows))
        assert (rows @ found >= -1e-12 * np.linalg.norm(rows) ** 2).all()


@VARIANTS
def test_dcgd_adds_up_each_group(variant):
    rows = random_rows(11, m=5)
    rows[3] -= 4 * rows[0]
    _, grad = backward(DCGD(sgd(6), variant=variant, first_group=("b", "d")), rows, names="abcde")
    np.testing.assert_allclose(grad, dual_cone(rows[[1, 3]].sum(0), rows[[0, 2, 4]].sum(0), variant), rtol=1e-11)
    np.testing.assert_allclose(
        direction(DCGD, rows, variant=variant), dual_cone(rows[0], rows[1:].sum(0), variant), rtol=1e-11
    )
    _, grad = backward(DCGD(sgd(6), variant=variant, first_group="ee"), rows[:2], names=("ee", "e"))
    np.testing.assert_allclose(grad, dual_cone(rows[0], rows[1], variant), rtol=1e-11)


@given(rows=badly_scaled(of_rank(rank=2, rows=2), largest=6))
def test_dcgd_equals_its_relatives(rows):
    size = np.linalg.norm(rows, axis=1).sum()
    np.testing.assert_allclose(direction(DCGD, rows), direction(ConFIG, rows), rtol=0, atol=1e-9 * size)
    found = direction(DCGD, rows, variant="projection")
    np.testing.assert_allclose(found, direction(DualProj, rows), rtol=0, atol=1e-9 * size)


@VARIANTS
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_dcgd_at_the_edges(variant, scale):
    opposed = scale * rows_of([0.1, 0.7, 0.2], [-0.3, -2.1, -0.6])
    report, grad = backward(DCGD(sgd(3), variant=variant), opposed)
    assert not grad.any()
    assert report.flags == ("stationary",)
    cancelling = scale * rows_of([1, 1], [0.1, 0], [0.2, 0], [-0.3, 0])
    report, grad = backward(DCGD(sgd(2), variant=variant), cancelling)
    np.testing.assert_allclose(grad, [scale, scale], rtol=1e-12)
    assert report.flags == ("one-group",)
    report, grad = backward(DCGD(sgd(2), variant=variant, first_group="a"), [None, *cancelling[:2]], names="abc")
    np.testing.assert_allclose(grad, cancelling[:2].sum(0), rtol=1e-12)
    assert report.flags == ("one-group",)


def test_dcgd_is_exact_next_to_opposed_rows():
    rows = rows_of([1, 0], [-1, 1e-7])
    np.testing.assert_allclose(direction(DCGD, rows), [5e-15, 1e-7], rtol=0, atol=1e-14)
    np.testing.assert_allclose(direction(DCGD, rows, variant="projection"), [0, 1e-7], rtol=0, atol=1e-14)


def test_dcgd_names_what_it_does_not_know():
    with pytest.raises(ValueError, match=r"`first_group` must name losses, some of \['0', '1'\], got \['pde'\]"):
        direction(DCGD, random_rows(0, m=2), first_group=["0", "pde"])
    with pytest.raises(ValueError, match="DCGD: `variant` must be one of"):
        DCGD(any_optimizer(), variant="mean")


# ------------------------------------------------------------------------------------------- linear programs by hand


def best_corner(gain, at_least, floors, equal, value):
    """max gainᵀx subject to at_least x ≥ floors, equalᵀx = value, by trying every corner."""
    n = len(gain)
    best, where = -np.inf, None
    for chosen in itertools.combinations(range(len(at_least)), n - 1):
        system = np.vstack((equal, at_least[list(chosen)]))
        if abs(np.linalg.det(system)) < 1e-12:
            continue
        x = np.linalg.solve(system, np.append(value, floors[list(chosen)]))
        if (at_least @ x >= floors - 1e-9).all() and gain @ x > best + 1e-10:
            best, where = gain @ x, x
    return where


def epo_by_hand(rows, losses, r, epsilon=1e-4):
    """α and the mode, from the definitions."""
    m = len(rows)
    gram = rows @ rows.T
    shares = r * losses / (r @ losses)
    mu = float(shares @ np.log(m * shares))
    a = r * (np.log(m * shares) - mu)
    ga = gram @ a
    table, floors = [*np.eye(m)], [0.0] * m
    if mu > epsilon:
        for j in range(m):
            if not (ga > 0).any() or r[j] * losses[j] == (r * losses).max():
                table.append(gram[j])
                floors.append(0.0)
            elif ga[j] <= 0:
                table.append(gram[j])
                floors.append(ga[j])
        return best_corner(ga, np.array(table), np.array(floors), np.ones(m), 1.0), "balance"
    table += [*gram, ga]
    floors += [0.0] * m + [min(ga.max(), 0.0)]
    return best_corner(gram.sum(axis=0), np.array(table), np.array(floors), np.ones(m), 1.0), "descent"


@pytest.mark.parametrize("m", [2, 3, 4])
@pytest.mark.parametrize("balanced", [False, True])
def test_epo_against_every_corner(m, balanced):
    solved = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        rows = random_rows(seed + 100, m, n=m + 1)
        r = np.exp(rng.standard_normal(m))
        losses = (1 + 1e-3 * rng.random(m)) / r if balanced else np.exp(rng.standard_normal(m))
        alpha, mode = epo_by_hand(rows, losses, r)
        report, grad = backward(EPO(sgd(m + 1), reduction="mean", preference=list(r)), rows, losses)
        assert report.flags[0] == mode
        if alpha is None:
            assert report.flags == ("descent", "relaxed")
            continue
        solved += 1
        assert report.flags == (mode,)
        np.testing.assert_allclose(list(report.weights.values()), alpha, rtol=0, atol=1e-8)
        np.testing.assert_allclose(grad, alpha @ rows, rtol=0, atol=1e-8)
        if mode == "descent":
            assert (rows @ grad.numpy() >= -1e-9).all()
        else:
            highest = int(np.argmax(r * losses))
            assert rows[highest] @ grad.numpy() >= -1e-9
    assert solved >= 8


def test_epo_in_numbers():
    # Equal losses: descend by the row with the largest column sum, 4 against 1.
    np.testing.assert_allclose(direction(EPO, rows_of([2, 0], [0, 1]), losses=[3.0, 3.0]), [4, 0], atol=1e-12)
    # Loss 1 lies low: only the other may be followed, although its row is the shorter one.
    np.testing.assert_allclose(direction(EPO, rows_of([2, 0], [0, 1]), losses=[1.0, 3.0]), [0, 2], atol=1e-12)
    # The same, balanced by the priorities.
    found = direction(EPO, rows_of([2, 0], [0, 1]), losses=[1.0, 3.0], preference=[3.0, 1.0])
    np.testing.assert_allclose(found, [4, 0], atol=1e-12)


@given(rows=descending(), factor=scales())
def test_epo_descends_when_balanced(rows, factor):
    p = nn.Parameter(torch.zeros(rows.shape[1], dtype=torch.float64))
    optimizer = EPO(torch.optim.SGD([p], lr=0.1))
    report = optimizer.backward([torch.from_numpy(factor * g) @ p + 2.5 for g in rows])
    assert report.flags == (("descent",) if len(rows) > 1 else ())
    products = rows @ p.grad.numpy()
    assert (products >= -1e-9 * np.linalg.norm(rows, axis=1) * np.linalg.norm(p.grad)).all()


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_epo_at_the_edges(scale):
    report, grad = backward(EPO(sgd(3)), scale * rows_of([0.1, 0.7, 0.2], [-0.3, -2.1, -0.6]))
    assert not grad.any()
    assert report.flags == ("descent", "stationary")
    report, grad = backward(EPO(sgd(2)), rows_of([0, 0], [0, 0]), [1, 2])
    assert not grad.any()
    assert report.flags == ("stationary",)
    report, grad = backward(EPO(sgd(2)), scale * rows_of([0, 0], [1, 2]))
    np.testing.assert_allclose(grad, [2 * scale, 4 * scale], rtol=1e-12)
    np.testing.assert_allclose(
        direction(EPO, scale * rows_of([3, 4]), losses=[7.0]), [3 * scale, 4 * scale], rtol=1e-12
    )


def test_epo_serves_rows_of_very_different_lengths():
    """In raw weights the cut of the simplex is 1e-12 wide, far below a solver's tolerance."""
    rows = rows_of([1e-6, 0], [-1e6, 1e6])
    d = direction(EPO, rows, losses=[1.0, 1.0], reduction="mean")
    products = rows.numpy() @ d / np.linalg.norm(rows, axis=1) / np.linalg.norm(d)
    assert (products >= -1e-9).all()
    assert np.linalg.norm(d) > 1e-7


def test_epo_needs_positive_losses():
    with pytest.raises(ValueError, match=r"every loss must be > 0, since their shares.*'1': 0.0"):
        direction(EPO, np.eye(2), losses=[1.0, 0.0])
    with pytest.raises(ValueError, match="`losses` must be given"):
        direction(EPO, np.eye(2))


def two_bowls(method, steps, lr, **options):
    """Two convex losses of two parameters, (0.1 + ‖x − a‖², 0.1 + ‖x − b‖²), from a start off the segment a b."""
    x = nn.Parameter(torch.tensor([0.9, 0.8], dtype=torch.float64))
    a, b = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    optimizer = method(torch.optim.SGD([x], lr=lr), **options)
    seen = set()
    for _ in range(steps):
        optimizer.zero_grad()
        losses = [0.1 + (x - a).square().sum(), 0.1 + (x - b).square().sum()]
        seen.update(optimizer.backward(losses).flags)
        optimizer.step()
    return x.detach().numpy(), np.array([float(loss.detach()) for loss in losses]), seen


def test_epo_finds_the_preferred_pareto_point():
    x, losses, seen = two_bowls(EPO, 400, 0.01, preference=[4.0, 1.0])
    assert {"balance", "descent"} <= seen
    assert abs(x[1]) < 0.05, "on the segment between the two minima"
    assert losses[1] / losses[0] == pytest.approx(4.0, rel=0.05)


# ---------------------------------------------------------------------------------------------------------- PMGDA


def pmgda_by_hand(rows, losses, p, sigma):
    """Weights of the losses, paper's scale, from the definitions."""
    m = len(rows)
    ray = (1 / p) / np.linalg.norm(1 / p)
    off = losses - (losses @ ray) * ray
    q = off / np.linalg.norm(off)
    every = np.vstack((rows, q @ rows))
    units = every / np.linalg.norm(every, axis=1)[:, None]
    products = every @ units.T
    # x = (μ, ω): ω is free, so that it is bounded by its constraints alone.
    table = np.vstack(
        (
            np.eye(m + 1, m + 2),
            np.column_stack((products[:m], -np.ones(m))),
            np.append(products[m], 0.0),
        )
    )
    floors = np.append(np.zeros(2 * m + 1), sigma * np.linalg.norm(every[m]))
    gain = np.append(np.zeros(m + 1), 1.0)
    x = best_corner(gain, table, floors, np.append(np.ones(m + 1), 0.0), 1.0)
    mu = x[: m + 1] / np.linalg.norm(every, axis=1)
    return mu[:m] + mu[m] * q


@pytest.mark.parametrize("m", [2, 3])
@pytest.mark.parametrize("sigma", [0.95, 0.3])
def test_pmgda_against_every_corner(m, sigma):
    for seed in range(8):
        rng = np.random.default_rng(seed)
        rows = random_rows(seed + 50, m, n=m + 1)
        p, losses = np.exp(rng.standard_normal((2, m)))
        expected = pmgda_by_hand(rows, losses, p, sigma)
        optimizer = PMGDA(sgd(m + 1), sigma=sigma, scale="paper", preference=list(p))
        report, grad = backward(optimizer, rows, losses)
        assert report.flags == ("correction",)
        np.testing.assert_allclose(grad, expected @ rows, rtol=0, atol=1e-8)
        longer = direction(PMGDA, rows, losses, sigma=sigma, preference=list(p))
        np.testing.assert_allclose(longer, np.linalg.norm(rows, axis=1).sum() * grad.numpy(), rtol=0, atol=1e-7)


def test_pmgda_on_the_ray_is_mgda():
    rows = random_rows(7)
    losses = np.array([1.0, 2.0, 4.0])
    for factor in (1e-9, 1.0, 1e9):
        found = direction(PMGDA, rows, factor * losses * 1.001 ** np.arange(3), preference=[4.0, 2.0, 1.0])
        np.testing.assert_allclose(found, direction(MGDA, rows), rtol=1e-12)
        assert not np.allclose(direction(PMGDA, rows, factor * losses), found)
    found = direction(PMGDA, rows, losses, preference=[4.0, 2.0, 1.0], scale="paper")
    np.testing.assert_allclose(found, direction(MGDA, rows, reduction="mean"), rtol=1e-12)


@pytest.mark.parametrize(("losses", "expected"), [([1, 1, 1], 3), ([8, 4, 2], 3), ([4, 1, 1], -2.4), ([9, 2, 1], -2.4)])
def test_pmgda_of_equal_rows(losses, expected):
    """g_h is a multiple of the rows: negative where the way to the ray, (4, 2, 1) / √21, is up, and then followed."""
    report, grad = backward(PMGDA(sgd(2), preference=[1, 2, 4], sigma=0.8), rows_of([3, 4], [3, 4], [3, 4]), losses)
    ray = np.array([4, 2, 1]) / 21**0.5
    off = np.array(losses) - ray @ losses * ray
    assert report.flags == (("correction",) if np.linalg.norm(off) > 1e-9 else ())
    assert off.sum() <= 1e-9 if expected < 0 else off.sum() >= -1e-9
    np.testing.assert_allclose(grad, expected * np.array([3, 4]), rtol=1e-9)


def test_pmgda_tolerance_is_an_angle():
    rows = random_rows(8, m=2)
    for h_eps, mode in ((0.21, ()), (0.19, ("correction",))):
        # sin of the angle between (1, 1) and this is 0.2
        losses = np.array([1.0, 1.0]) / 2**0.5 * 0.96**0.5 + 0.2 * np.array([1.0, -1.0]) / 2**0.5
        report, _ = backward(PMGDA(sgd(6), h_eps=h_eps), rows, 1e6 * losses)
        assert report.flags == mode


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_pmgda_at_the_edges(scale):
    # g_h = (g₁ − g₂)/√2 = 0
    report, grad = backward(PMGDA(sgd(2)), scale * rows_of([1, 2], [1, 2]), [1, 3])
    np.testing.assert_allclose(grad, [2 * scale, 4 * scale], rtol=1e-12)
    assert report.flags == ("no-correction",)
    report, grad = backward(PMGDA(sgd(2)), rows_of([0, 0], [0, 0]), [1, 2])
    assert not grad.any()
    assert report.flags == ("no-correction", "stationary")
    report, grad = backward(PMGDA(sgd(2)), scale * rows_of([1, 0], [-2, 0]), [1, 1])
    assert not grad.any()
    assert report.flags == ("stationary",)
    np.testing.assert_allclose(
        direction(PMGDA, scale * rows_of([3, 4]), losses=[7.0]), [3 * scale, 4 * scale], rtol=1e-12
    )
    # A zero row takes no part, but its loss does: l₁ is too large, and g₁ is all that can change it.
    found = direction(PMGDA, scale * rows_of([3, 4], [0, 0]), losses=[4.0, 1.0])
    np.testing.assert_allclose(found, [3 * scale, 4 * scale], rtol=1e-9)


def test_pmgda_finds_the_preferred_pareto_point():
    x, losses, seen = two_bowls(PMGDA, 400, 0.005, preference=[4.0, 1.0], h_eps=1e-3)
    assert "correction" in seen
    assert abs(x[1]) < 0.05
    assert losses[1] / losses[0] == pytest.approx(4.0, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"h_eps": 0.0}, "PMGDA: `h_eps` must be > 0"),
        ({"sigma": 1.1}, "PMGDA: `sigma` must be <= 1"),
        ({"scale": "mean"}, "PMGDA: `scale` must be one of"),
    ],
)
def test_pmgda_checks_its_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        PMGDA(any_optimizer(), **options)
