"""ConicGrad, CAGrad beyond a radius of 1, FairGrad's limit, PIVRG, FERERO, GCS, AGDA and the lengths of ConFIG."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from gradsurgery import AGDA, FERERO, GCS, PIVRG, CAGrad, ConFIG, ConicGrad, DualProj, FairGrad
from gradsurgery.geometry import worst_case
from tests.support.answers import answers
from tests.support.catalogue import any_optimizer
from tests.support.samplers import badly_scaled, descending, matrices, of_rank, scaled


def rows_of(*table) -> torch.Tensor:
    return torch.tensor(table, dtype=torch.float64)


def direction(method, rows, losses=None, **options) -> np.ndarray:
    return method(any_optimizer(), **options).combine(torch.as_tensor(rows, dtype=torch.float64), losses=losses).numpy()


def sgd(n: int, lr: float = 0.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(n, dtype=torch.float64))], lr=lr)


def backward(optimizer, rows, losses=None, names="abcdef"):
    """One ``backward`` of losses with the given gradients and values; None for a row marks an absent task."""
    (p,) = (p for group in optimizer.param_groups for p in group["params"])
    values = np.ones(len(rows)) if losses is None else losses
    tensors = [
        None if g is None else torch.as_tensor(g) @ (p - p.detach()) + v for g, v in zip(rows, values, strict=True)
    ]
    p.grad = None
    return optimizer.backward(dict(zip(names, tensors, strict=False))), p.grad


CONFLICT = rows_of([2, 1, 0], [-10, 1, 1], [1, -1, 3])

# -------------------------------------------------------------------------------------------------- ConicGrad, CAGrad


@given(rows=matrices(), c=st.sampled_from([0.1, 0.5, 0.9]))
def test_the_mean_loss_falls_along_conicgrad(rows, c):
    d, mean = direction(ConicGrad, rows, c=c, reduction="mean"), rows.mean(axis=0)
    terms = np.linalg.norm(rows, axis=1).mean()
    assert d @ mean >= c * (mean @ mean) - 1e-9 * terms * np.linalg.norm(mean) - 1e-13 * terms**2


def test_conicgrad_says_where_nothing_is_left():
    report, grad = backward(ConicGrad(sgd(2), reduction="mean"), rows_of([1, 2], [-3, -6]))
    np.testing.assert_allclose(grad, [-1, -2], rtol=1e-14)
    assert report.flags == ("stationary",)


@pytest.mark.parametrize("m", [2, 3, 4, 6])
def test_conicgrad_solves_few_small_problems(m, monkeypatch):
    """They are what takes its time."""
    solved, real = [], worst_case.least_distance
    monkeypatch.setattr(worst_case, "least_distance", lambda *args: solved.append(1) or real(*args))
    rng, counts = np.random.default_rng(m), []
    for _ in range(100):
        rows = rng.standard_normal((m, m + 2)) * 10.0 ** rng.uniform(-2, 2, (m, 1))
        solved.clear()
        direction(ConicGrad, rows - rng.uniform(0, 1) * rows.mean(axis=0), c=rng.uniform(0.05, 0.99))
        counts.append(len(solved))
    assert np.median(counts) <= 5
    assert max(counts) <= 12


@pytest.mark.parametrize(
    ("method", "c", "message"),
    [
        (ConicGrad, -0.1, "ConicGrad: `c` must be >= 0, got -0.1"),
        (ConicGrad, 1.1, "ConicGrad: `c` must be <= 1, got 1.1"),
        (CAGrad, -1.0, "CAGrad: `c` must be >= 0, got -1.0"),
        (CAGrad, math.inf, "CAGrad: `c` must be a finite number"),
    ],
)
def test_widths_are_checked(method, c, message):
    with pytest.raises(ValueError, match=message):
        method(any_optimizer(), c=c)


def test_cagrad_promises_descent_from_a_radius_of_one_on():
    assert CAGrad(any_optimizer(), c=0.999).descends == 0
    assert CAGrad(any_optimizer(), c=1.0).promises(0)
    assert (CONFLICT.numpy() @ direction(CAGrad, CONFLICT, c=0.2)).min() < 0
    for rescale in (0, 1, 2):
        assert (CONFLICT.numpy() @ direction(CAGrad, CONFLICT, c=1.0, rescale=rescale)).min() >= 0


# ------------------------------------------------------------------------------------------------------ FairGrad, PIVRG


def test_fairgrad_goes_to_dualproj_and_not_to_the_sum():
    limit = direction(FairGrad, CONFLICT, alpha=0.0, scale="paper")
    np.testing.assert_array_equal(limit, direction(DualProj, CONFLICT))
    np.testing.assert_array_equal(limit, direction(FairGrad, CONFLICT, alpha=0))
    off = [np.linalg.norm(direction(FairGrad, CONFLICT, alpha=a, scale="paper") - limit) for a in (1e-1, 1e-2, 1e-3)]
    assert off[0] > 3 * off[1] > 9 * off[2]
    assert off[2] < 0.03 * np.linalg.norm(limit)
    assert np.linalg.norm(CONFLICT.sum(dim=0).numpy() - limit) > 0.3 * np.linalg.norm(limit)


@pytest.mark.parametrize("preference", [[1.0, 2.0, 0.5]])
def test_fairgrad_at_zero_takes_a_preference(preference):
    found = direction(FairGrad, CONFLICT, alpha=0.0, preference=preference)
    np.testing.assert_allclose(found, direction(DualProj, CONFLICT, preference=preference), rtol=1e-12)


def test_alpha_is_checked():
    with pytest.raises(ValueError, match="FairGrad: `alpha` must be >= 0, got -1"):
        FairGrad(any_optimizer(), alpha=-1.0)


def shares(scores, bound=2.0, temperature=10.0):
    scores = np.array(scores)
    powers = np.exp(scores / max(np.ptp(scores) / math.log(bound), temperature))
    return len(scores) * powers / powers.sum()


@pytest.mark.parametrize("scores", [[0.0, 3.0, -2.0], [40.0, -30.0, 5.0], [1e4, 0.0, 0.0]])
@pytest.mark.parametrize("scale", ["sum", "paper"])
def test_pivrg_is_fairgrad_with_a_preference(scores, scale):
    p = shares(scores)
    assert p.max() <= 2 * p.min() * (1 + 1e-12)
    found = direction(PIVRG, CONFLICT, scores=scores, scale="paper")
    np.testing.assert_allclose(
        found, direction(FairGrad, CONFLICT, scale="paper", preference=(1 / p).tolist()), rtol=1e-11
    )
    found = direction(PIVRG, CONFLICT, scores=scores, scale=scale)
    unequal = direction(FairGrad, CONFLICT, scale=scale)
    assert np.linalg.norm(found - unequal) > 1e-3 * np.linalg.norm(unequal)
    np.testing.assert_array_equal(direction(PIVRG, CONFLICT, scale=scale), unequal)


def test_scores_are_set_while_it_trains_and_saved():
    optimizer = PIVRG(sgd(3), scores=[0.0, 0.0, 50.0], bound=4.0, min_temperature=1.0)
    assert dict(optimizer.scores) == {"0": 0.0, "1": 0.0, "2": 50.0}
    first = backward(optimizer, CONFLICT)[1].clone()
    assert not torch.equal(first, backward(PIVRG(sgd(3)), CONFLICT)[1])
    optimizer.scores = {"a": 50.0, "b": 0.0, "c": 0.0}  # with a step still to come
    optimizer.step()
    assert optimizer.scores == {"a": 50.0, "b": 0.0, "c": 0.0}
    second = backward(optimizer, CONFLICT)[1].clone()
    optimizer.step()
    assert not torch.equal(first, second)
    p = shares([50.0, 0.0, 0.0], bound=4.0, temperature=1.0)
    expected = direction(FairGrad, CONFLICT, preference=(1 / p).tolist())
    np.testing.assert_allclose(second / second.norm(), expected / np.linalg.norm(expected), rtol=1e-11)
    resumed = PIVRG(sgd(3), bound=4.0, min_temperature=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.scores == optimizer.scores
    assert torch.equal(backward(resumed, CONFLICT)[1], second)


def test_scores_in_order_belong_to_the_names_of_the_first_call():
    optimizer = PIVRG(sgd(3))
    assert optimizer.scores is None
    optimizer.scores = [0.0, 0.0, 0.0]
    optimizer.scores = [1.0, 2.0, 3.0]
    backward(optimizer, CONFLICT, names="bca")
    optimizer.step()
    assert optimizer.scores == {"b": 1.0, "c": 2.0, "a": 3.0}
    optimizer.scores = [4.0, 5.0, 6.0]
    assert optimizer.scores == {"b": 4.0, "c": 5.0, "a": 6.0}
    optimizer.zero_grad()
    backward(optimizer, CONFLICT, names="abc")
    optimizer.scores = [7.0, 8.0, 9.0]
    optimizer.step()
    assert optimizer.scores == {"b": 7.0, "c": 8.0, "a": 9.0}
    early = PIVRG(sgd(3))
    backward(early, CONFLICT)
    early.scores = [1.0, 2.0, 3.0]
    assert early.scores == {"a": 1.0, "b": 2.0, "c": 3.0}
    with pytest.raises(ValueError, match=r"PIVRG: `scores` must have one entry for each of \['b', 'c', 'a'\], got 2"):
        optimizer.scores = [1.0, 2.0]


def test_scores_of_absent_tasks_do_not_count():
    optimizer = PIVRG(sgd(3), scores={"a": 0.0, "b": 30.0, "c": 500.0})
    _, grad = backward(optimizer, [CONFLICT[0], CONFLICT[1], None])
    expected = direction(PIVRG, CONFLICT[:2], scores=[0.0, 30.0])
    np.testing.assert_allclose(grad, expected, rtol=1e-12)


def test_scores_act_in_every_part():
    optimizer = PIVRG(sgd(3), granularity="parameter")
    backward(optimizer, CONFLICT)
    optimizer.step()
    optimizer.scores = {"a": 0.0, "b": 30.0, "c": 500.0}
    _, grad = backward(optimizer, CONFLICT)
    np.testing.assert_allclose(grad, direction(PIVRG, CONFLICT, scores=[0.0, 30.0, 500.0]), rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": [1.0, math.nan]}, r"PIVRG: `scores\['1'\]` must be a finite number"),
        ({"scores": 3.0}, "PIVRG: `scores` must be numbers by name or in order"),
        ({"bound": 1.0}, "PIVRG: `bound` must be > 1"),
        ({"min_temperature": 0.0}, "PIVRG: `min_temperature` must be > 0"),
    ],
)
def test_pivrg_checks_its_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        PIVRG(any_optimizer(), **options)


def test_a_missing_score_is_named():
    with pytest.raises(ValueError, match=r"PIVRG: `scores` must name every loss, \['c'\] is missing"):
        backward(PIVRG(sgd(3), scores={"a": 0.0, "b": 1.0}), CONFLICT)
    with pytest.raises(ValueError, match="PIVRG: `scores` has an entry for"):
        backward(PIVRG(sgd(3), scores={"a": 0.0, "b": 1.0, "c": 2.0, "d": 3.0}), CONFLICT)


# ------------------------------------------------------------------------------------------------------------- FERERO


@pytest.mark.parametrize("kappa", [0.0, 0.5, 2.0])
def test_ferero_corrects_the_ratio_at_its_rate(kappa):
    """On linear losses exactly: what is orthogonal to the ratio shrinks by 1 − η κ in every step."""
    lr, preference = 0.1, [1.0, 2.0, 0.5]
    p = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    optimizer = FERERO(torch.optim.SGD([p], lr=lr), kappa=kappa, preference=preference)
    unit = np.array(preference) / np.linalg.norm(preference)
    across = np.eye(3) - np.outer(unit, unit)
    values = CONFLICT @ p + rows_of([4, -1, 2])[0]
    for _ in range(4):
        before = across @ values.detach().numpy()
        optimizer.zero_grad()
        optimizer.backward(list(values))
        optimizer.step()
        values = CONFLICT @ p + rows_of([4, -1, 2])[0]
        np.testing.assert_allclose(across @ values.detach().numpy(), (1 - lr * kappa) * before, atol=1e-12)


def test_ferero_ends_where_the_losses_have_the_ratio():
    p = nn.Parameter(torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64))
    optimizer = FERERO(torch.optim.SGD([p], lr=0.2), preference={"near": 1.0, "far": 3.0})
    targets = rows_of([0, 0, 0], [2, 0, 1])
    for _ in range(300):
        optimizer.zero_grad()
        near, far = (p - targets).square().sum(dim=1)
        report = optimizer.backward({"near": near, "far": far})
        optimizer.step()
    assert report.losses["far"] == pytest.approx(3 * report.losses["near"], rel=1e-6)
    np.testing.assert_allclose(np.cross(p.detach(), targets[1]), 0, atol=1e-6)  # on the line between: Pareto optimal


def test_ferero_says_where_rows_are_dependent():
    report, grad = backward(FERERO(sgd(3)), rows_of([1, 2, 0], [2, 4, 0]), losses=[1.0, 1.0])
    assert report.flags == ("rank-deficient",)
    assert torch.isfinite(grad).all()
    report, grad = backward(FERERO(sgd(3)), rows_of([1, 2, 0], [0, 0, 0]), losses=[3.0, 1.0])
    assert report.flags == ("rank-deficient",)
    assert grad @ CONFLICT[0] > 0  # the first loss lies above its share
    with pytest.raises(ValueError, match="FERERO: `kappa` must be >= 0"):
        FERERO(any_optimizer(), kappa=-1.0)


# ---------------------------------------------------------------------------------------------------------- GCS, AGDA


@pytest.mark.parametrize("switched", [False, True])
@given(rows=scaled(badly_scaled(of_rank(), largest=6)))
def test_the_main_loss_falls_as_fast_as_alone(rows, switched):
    d = direction(GCS, rows, switched=switched)
    terms = np.linalg.norm(rows, axis=1).sum()
    assert d @ rows[0] >= rows[0] @ rows[0] - 1e-14 * np.linalg.norm(rows[0]) * terms


def test_gcs_weights_are_cosines():
    report, _ = backward(GCS(sgd(3), primary="b"), [*CONFLICT, None])
    units = CONFLICT / CONFLICT.norm(dim=1, keepdim=True)
    expected = (units @ units[1]).clamp(min=0)
    assert list(report.weights.values()) == pytest.approx(expected.tolist(), rel=1e-12)
    report, _ = backward(GCS(sgd(3), primary="c", switched=True), CONFLICT)
    assert report.weights == {"a": 1.0, "b": 0.0, "c": 1.0}
    aside = rows_of([1, 1, 1], [1, -1, 0], [0.1, 0.2, -0.3])
    report, _ = backward(GCS(sgd(3), switched=True), aside)  # 0.1 + 0.2 − 0.3 is rounding
    assert report.weights == {"a": 1.0, "b": 0.0, "c": 0.0}


@pytest.mark.parametrize(
    ("rows", "flag", "expected"),
    [
        (rows_of([0, 0, 0], [1, 2, 0]), "primary-zero", [0, 0, 0]),
        ([None, *rows_of([1, 2, 0], [0, 1, 0])], "primary-absent", [1, 3, 0]),
    ],
)
def test_gcs_without_its_main_gradient(rows, flag, expected):
    report, grad = backward(GCS(sgd(3), primary="a"), rows)
    assert report.flags == (flag,)
    assert grad.tolist() == expected


def test_gcs_leaves_a_zero_row_out():
    np.testing.assert_array_equal(direction(GCS, rows_of([1, 2], [0, 0]), switched=True), [1, 2])


SEQUENCE = answers()["sequences"]["AGDA"]


def agda(resume=None):
    optimizer = AGDA(sgd(8), gamma=SEQUENCE["gamma"], period=SEQUENCE["M"])
    found = []
    for t, (rows, losses) in enumerate(zip(SEQUENCE["inputs"], SEQUENCE["losses"], strict=True)):
        if t == resume:
            state = copy.deepcopy(optimizer.state_dict())
            optimizer = AGDA(sgd(8), gamma=SEQUENCE["gamma"], period=SEQUENCE["M"])
            optimizer.load_state_dict(state)
        found.append(backward(optimizer, rows_of(*rows), losses)[1].clone())
        optimizer.step()
    return torch.stack(found)


def test_agda_follows_its_equations():
    expected = rows_of(*(step["direction"] for step in SEQUENCE["steps"]))
    off = (agda() - expected).norm(dim=1) / expected.norm(dim=1)
    assert off.max() <= 1e-12
    for step in range(1, 5):
        assert torch.equal(agda(resume=step), agda())


def test_agda_learns_nothing_from_what_is_absent():
    optimizer, twin = AGDA(sgd(3), gamma=0.5, period=2), AGDA(sgd(3), gamma=0.5, period=2)
    for losses in ([1.0, 2.0], [3.0, 1.0]):
        for one in (optimizer, twin):
            backward(one, CONFLICT[:2], losses)
            one.step()
    _, alone = backward(optimizer, [CONFLICT[0], None], [7.0, 0.0])
    optimizer.step()
    assert torch.equal(alone, CONFLICT[0])
    expected = backward(twin, CONFLICT[:2], [2.0, 2.0])[1]
    assert torch.equal(backward(optimizer, CONFLICT[:2], [2.0, 2.0])[1], expected)


def test_agda_leaves_a_zero_row_out_and_projects_off_the_primary_one():
    found = direction(AGDA, rows_of([3, 4], [0, 0]), [1.0, 1.0])
    np.testing.assert_array_equal(found, [3, 4])
    np.testing.assert_array_equal(direction(AGDA, rows_of([0, 0], [3, 4]), [1.0, 1.0]), [3, 4])
    rows = rows_of([4, 0], [-3, 3])
    _, grad = backward(AGDA(sgd(2), primary="b"), rows, [1.0, 2.0])
    length = 2 + 18**0.5 / 2
    second = length * np.array([-1.0, 1.0]) / 2**0.5
    first = np.array([length, 0.0])
    np.testing.assert_allclose(grad, second + first - (first @ second) / (second @ second) * second, rtol=1e-12)
    report, _ = backward(AGDA(sgd(2), primary="c"), [*rows, None], [1.0, 2.0, 1.0])
    assert report.flags == ("primary-absent",)


@given(rows=scaled(descending(rows=3)), seed=st.integers(0, 99))
def test_the_first_loss_falls_along_agda(rows, seed):
    optimizer, rng = AGDA(any_optimizer()), np.random.default_rng(seed)
    for _ in range(3):
        d = optimizer.combine(torch.from_numpy(rows), losses=rng.uniform(0.1, 3, len(rows)), update=True).numpy()
        assert d @ rows[0] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gamma": 1.0}, "AGDA: `gamma` must be < 1"),
        ({"period": 0}, "AGDA: `period` must be an integer >= 1"),
    ],
)
def test_agda_checks_its_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        AGDA(any_optimizer(), **options)
    with pytest.raises(ValueError, match="AGDA: every loss must be > 0"):
        backward(AGDA(sgd(3)), CONFLICT[:2], [1.0, 0.0])


# ---------------------------------------------------------------------------------------------------- ConFIG's lengths


def test_config_takes_the_length_of_a_named_loss():
    _, projected = backward(ConFIG(sgd(3)), CONFLICT)
    for name, row in zip("abc", CONFLICT, strict=True):
        _, grad = backward(ConFIG(sgd(3), length=name), CONFLICT)
        cosines = CONFLICT @ grad / CONFLICT.norm(dim=1) / grad.norm()
        torch.testing.assert_close(grad / grad.norm(), projected / projected.norm(), rtol=1e-12, atol=0)
        assert float(grad.norm()) == pytest.approx(float(row.norm() * cosines.sum()), rel=1e-12)
    report, grad = backward(ConFIG(sgd(3), length="d"), [*CONFLICT, None])
    assert report.flags == ("length-absent",)
    assert torch.equal(grad, projected)
    with pytest.raises(ValueError, match=r"ConFIG: `length` must be one of .* or the name of a loss, one of \['a',"):
        backward(ConFIG(sgd(3), length="projecton"), CONFLICT)
    with pytest.raises(TypeError, match=r"ConFIG: `length` must be one of .* got 3"):
        ConFIG(any_optimizer(), length=3)


@pytest.mark.parametrize("length", ["min", "max", "mean", "harmonic", "geometric"])
@given(rows=scaled(badly_scaled(of_rank(rank=3, rows=3))))
def test_config_of_a_length_counts_every_row_as_that_long(length, rows):
    sizes = np.linalg.norm(rows, axis=1)
    mean = {
        "min": sizes.min(),
        "max": sizes.max(),
        "mean": sizes.mean(),
        "harmonic": 3 / (1 / sizes).sum(),
        "geometric": math.exp(np.log(sizes).mean()),
    }[length]
    expected = direction(ConFIG, rows * (mean / sizes)[:, None])
    found = direction(ConFIG, rows, length=length)
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.linalg.norm(expected))
    with_zero = direction(ConFIG, np.vstack((rows, 0 * rows[:1])), length=length)
    np.testing.assert_allclose(with_zero, found, rtol=0, atol=1e-9 * np.linalg.norm(found))


def test_config_of_a_length_for_dependent_rows():
    rows = np.array([[1.0, 0.0], [0.0, 4.0], [2.0, 2.0]])
    for length in ("min", "2"):
        found, whole = direction(ConFIG, rows, length=length), direction(ConFIG, rows)
        cosines = rows @ found / np.linalg.norm(rows, axis=1) / np.linalg.norm(found)
        tracked = 1.0 if length == "min" else 8**0.5
        assert np.linalg.norm(found) == pytest.approx(tracked * cosines.sum(), rel=1e-12)
        assert np.linalg.norm(whole) == pytest.approx(float(cosines @ np.linalg.norm(rows, axis=1)), rel=1e-12)
