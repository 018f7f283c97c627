"""Methods that act coordinate by coordinate, keep rows of their own, or look at several batches."""

from __future__ import annotations

import copy
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import nn

from gradsurgery import geometry, testing
from gradsurgery.surgery.and_mask import AndMask
from gradsurgery.surgery.bloop import Bloop
from gradsurgery.surgery.config import ConFIG
from gradsurgery.surgery.dbmtl import DBMTL
from gradsurgery.surgery.excessmtl import ExcessMTL
from gradsurgery.surgery.gcond import GCond
from gradsurgery.surgery.graddrop import GradDrop
from gradsurgery.surgery.gru import GRU
from gradsurgery.surgery.mconfig import MConFIG
from gradsurgery.surgery.mgda import MGDA
from gradsurgery.surgery.moco import MoCo
from gradsurgery.surgery.modo import MoDo
from gradsurgery.surgery.sago import SAGO
from gradsurgery.surgery.sand_mask import SandMask
from gradsurgery.surgery.sdmgrad import SDMGrad
from gradsurgery.surgery.trimmed_mean import TrimmedMean
from gradsurgery.weighting.base import Weighter
from tests.support.catalogue import any_optimizer

REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "reference.json").read_text())
SEQUENCES = REFERENCE["sequences"]
JS = torch.tensor(SEQUENCES["_inputs"]["JS"], dtype=torch.float64)  # nine matrices (3, 4)
LOSSES = np.array(SEQUENCES["_inputs"]["A"])  # eight steps of three positive losses


def double(rows):
    return torch.tensor(rows, dtype=torch.float64)


def lossy(rows, p, values=None):
    """Losses with the given gradients at p, and the given values."""
    values = range(1, len(rows) + 1) if values is None else values
    return [g @ p - (g @ p).detach() + v for g, v in zip(rows, values, strict=True)]


def run(method, matrices=JS, values=None, present=None, **options):
    """Directions of a run through ``backward``: one matrix a step, all tasks present unless told otherwise."""
    p = nn.Parameter(torch.zeros(matrices[0].shape[1], dtype=matrices[0].dtype))
    optimizer = method(torch.optim.SGD([p], lr=0.0), **options)
    found = []
    for t, rows in enumerate(matrices):
        losses = lossy(rows, p, None if values is None else values[t])
        here = range(len(rows)) if present is None else present[t]
        optimizer.zero_grad()
        optimizer.backward({f"t{i}": loss if i in here else None for i, loss in enumerate(losses)})
        optimizer.step()
        found.append(p.grad.clone())
    return torch.stack(found)


def simplex(v):
    """Projection on the simplex, by bisection of the shift."""
    low, high = v.min() - 1, v.max()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(v - middle, 0).sum() > 1 else (low, middle)
    return np.maximum(v - high, 0)


# -------------------------------------------------------------------------------------------------- GradDrop


def with_draws(draws, **options):
    optimizer = GradDrop(any_optimizer(), **options)
    optimizer.uniform = lambda like: draws
    return optimizer


@pytest.mark.parametrize("name", REFERENCE["methods"]["GradDrop fixed U"]["truth"])
def test_graddrop_reference(name):
    rows = double(REFERENCE["inputs"][name]["J"])
    draws = double([((7 * k + 3) % 11) / 11 + 0.013 for k in range(rows.shape[1])])
    expected = double(REFERENCE["methods"]["GradDrop fixed U"]["truth"][name]["direction"])
    torch.testing.assert_close(with_draws(draws).combine(rows), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("leak", [0.0, 0.3])
def test_graddrop_expectation_has_a_closed_form(leak):
    rows = JS[0]
    up, down = rows.clamp(min=0).sum(0), -rows.clamp(max=0).sum(0)
    purity = up / (up + down)
    expected = leak * rows.sum(0) + (1 - leak) * (purity * up - (1 - purity) * down)
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000  # every draw as often as every other
    d = with_draws(grid.repeat_interleave(4), leak=leak).combine(rows.repeat(1, 10_000))
    torch.testing.assert_close(d.reshape(-1, 4).mean(0), expected, rtol=0, atol=1e-3)


def test_graddrop_expectation_of_its_own_draws():
    rows = torch.randn(3, 1, dtype=torch.float64).expand(3, 20_000)
    up, down = rows.clamp(min=0).sum(0), -rows.clamp(max=0).sum(0)
    purity = (up / (up + down))[0]
    assert 0.05 < purity < 0.95
    kept = (GradDrop(any_optimizer()).combine(rows) > 0).double().mean()
    assert abs(kept - purity) < 5 * (purity * (1 - purity) / 20_000) ** 0.5


def test_graddrop_leak_is_what_stays():
    # Seen: the other way round, so that no leak gave the plain sum.
    rows = double([[1, 2, 3], [-1, -2, -3.1]])
    low = double([0.2, 0.2, 0.2])
    assert with_draws(low, leak=1.0).combine(rows).tolist() == pytest.approx([0, 0, -0.1])
    assert with_draws(low, leak=0.0).combine(rows).tolist() == [1, 2, 3]
    assert with_draws(low + 0.6, leak=0.0).combine(rows).tolist() == [-1, -2, -3.1]
    assert with_draws(low, leak=0.25).combine(rows).tolist() == pytest.approx([0.75, 1.5, 2.225])
    assert with_draws(low, leak={"0": 0.0, "1": 0.25}).combine(rows).tolist() == pytest.approx([0.75, 1.5, 2.225])
    assert with_draws(low, leak={"0": 0.5, "1": 0.0}).combine(rows).tolist() == [1, 2, 3]


def test_graddrop_draws_for_every_coordinate():
    # Seen: one draw per tensor, all coordinates kept or dropped together.
    d = GradDrop(any_optimizer()).combine(torch.tensor([1.0, -1.0])[:, None].expand(2, 1000))
    assert 400 < int((d > 0).sum()) < 600
    assert set(d.tolist()) == {1.0, -1.0}


def test_graddrop_keeps_what_agrees():
    for rows in (JS[0].abs(), -JS[0].abs()):
        testing.assert_plain_sum_without_conflict(
            lambda j: GradDrop(any_optimizer()).combine(torch.from_numpy(j)).numpy(), rows.numpy()
        )
    nothing = torch.zeros(2, 5)
    nothing[:, 0] = torch.tensor([2.0, 3.0])
    assert GradDrop(any_optimizer()).combine(nothing).tolist() == [5, 0, 0, 0, 0]
    edges = with_draws(double([0.0, 0.0, 1 - 2**-24, 1 - 2**-24]))
    assert edges.combine(double([[3, -3, 3, -3]])).tolist() == [3, -3, 3, -3], "whatever the draw"


def test_graddrop_draws_depend_on_seed_step_and_parameter_alone():
    rows = torch.tensor([1.0, -1.0])[:, None].expand(2, 200)
    optimizer = GradDrop(any_optimizer())
    state = torch.get_rng_state()
    first = optimizer.combine(rows)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, optimizer.combine(rows, update=True)), "the same in every evaluation of a step"
    assert not torch.equal(first, optimizer.combine(rows)), "anew in every step"
    assert not torch.equal(first, GradDrop(any_optimizer(), seed=1).combine(rows))
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(first, GradDrop(any_optimizer()).combine(rows.to(dtype)).float())
    twins = [nn.Parameter(torch.zeros(200)) for _ in range(2)]
    GradDrop(torch.optim.SGD(twins, lr=0.1)).backward([(twins[0] + twins[1]).sum(), -(twins[0] + twins[1]).sum()])
    assert torch.equal(twins[0].grad, first)
    assert not torch.equal(twins[1].grad, first)


def test_graddrop_arguments():
    for leak in (-0.1, 1.1, math.nan, {"a": 2.0}):
        with pytest.raises(ValueError, match=r"GradDrop: `leak"):
            GradDrop(any_optimizer(), leak=leak)
    with pytest.raises(ValueError, match=r"GradDrop: `leak` must name every loss, \['1'\] is missing"):
        GradDrop(any_optimizer(), leak={"0": 0.5}).combine(torch.ones(2, 3))


# ---------------------------------------------------------------------------------------------- trimmed mean


@pytest.mark.parametrize("k", [0, 1, 2])
def test_trimmed_mean_reference(k):
    case = REFERENCE["methods"][f"TrimmedMean k={k}"]["truth"]
    assert case
    for name, truth in case.items():
        found = TrimmedMean(any_optimizer(), trim_number=k, reduction="mean").combine(
            double(REFERENCE["inputs"][name]["J"])
        )
        torch.testing.assert_close(found, double(truth["direction"]), rtol=1e-9, atol=1e-12)


def test_trimmed_mean_is_bounded_by_honest_rows():
    rows = torch.randn(5, 50)
    rows[2] *= 1e30
    d = TrimmedMean(any_optimizer(), reduction="mean").combine(rows)
    honest = rows[[0, 1, 3, 4]]
    assert (d <= honest.max(0).values).all()
    assert (d >= honest.min(0).values).all()


def test_trimmed_mean_of_too_few_tasks_is_the_plain_sum():
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = TrimmedMean(torch.optim.SGD([p], lr=0.1), trim_number=1)
    report = optimizer.backward(lossy(JS[0][:2], p))
    assert report.flags == ("too-few-tasks",)
    assert report.weights is None
    torch.testing.assert_close(p.grad, JS[0][:2].sum(0), rtol=1e-13, atol=0)
    p.grad = None
    assert optimizer.backward(lossy(JS[0], p)).flags == ()
    torch.testing.assert_close(p.grad, 3 * JS[0].median(0).values, rtol=1e-13, atol=0)


def test_trimmed_mean_counts_a_loss_that_does_not_reach_a_parameter_as_zero():
    p, q = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    TrimmedMean(torch.optim.SGD([p, q], lr=0.1)).backward([(p + q).sum(), (2 * p + 5 * q).sum(), (4 * p).sum()])
    assert p.grad.item() == 6  # 3 · median(1, 2, 4)
    assert q.grad.item() == 3  # 3 · median(1, 5, 0)


# ------------------------------------------------------------------------------------------------------ MoCo


def test_moco_converges_to_mgda():
    rows = double(REFERENCE["inputs"]["m3_n3_conflict"]["J"])
    optimizer = MoCo(any_optimizer(), beta=1.0, gamma_sigma=0.0, reduction="mean")
    for _ in range(400):
        d = optimizer.combine(rows, update=True)
    torch.testing.assert_close(d, MGDA(any_optimizer(), reduction="mean").combine(rows), rtol=0, atol=1e-6)


def test_moco_reaches_a_corner():
    # Seen: softmax in place of the projection, which ends at (0.657, 0.343).
    rows = double([[1, 0], [3, 0.4]])
    rows = rows / rows.norm(dim=1)[:, None] * double([[1], [3]])
    optimizer = MoCo(any_optimizer(), gamma_sigma=0.0, reduction="mean")
    for _ in range(400):
        d = optimizer.combine(rows, update=True)
    assert d.tolist() == pytest.approx([1, 0], abs=1e-12)
    assert optimizer.state_dict()["gradsurgery"]["memory"]["shares"] == {"0": 1.0, "1": 0.0}


def moco_by_hand(present=None, beta=0.5, gamma=0.1, rho=0.2):
    tracked, counts, shares, found = {}, [0] * 3, np.full(3, 1 / 3), []
    for t, rows in enumerate(JS.numpy()):
        here = list(range(3)) if present is None else present[t]
        for i in here:
            counts[i] += 1
            step = beta / counts[i] ** 0.5
            tracked[i] = rows[i] if i not in tracked else tracked[i] - step * (tracked[i] - rows[i])
        y, total = np.array([tracked[i] for i in here]), shares[here].sum()
        own = shares[here] / total
        own = simplex(own - gamma / (t + 1) ** 0.5 * (y @ y.T + rho * np.eye(len(here))) @ own)
        shares[here] = total * own
        found.append(len(here) * own @ y)
    return torch.from_numpy(np.array(found))


ABSENT = [[0, 1, 2], [0, 2], [0, 1, 2], [1, 2], [1, 2], [0, 1, 2], [0, 1], [0, 1, 2], [0, 1, 2]]


@pytest.mark.parametrize("present", [None, ABSENT])
def test_moco_by_hand(present):
    torch.testing.assert_close(run(MoCo, present=present, rho=0.2), moco_by_hand(present), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(run(MoCo, present=present, rho=0.2), moco_by_hand(present, beta=0.6), rtol=1e-3)


@pytest.mark.parametrize("method", [MoCo, MoDo])
def test_relative_makes_it_homogeneous(method):
    plain, scaled = run(method, relative=True), run(method, 2.0**-30 * JS, relative=True)
    torch.testing.assert_close(scaled * 2.0**30, plain, rtol=1e-12, atol=0)
    absolute = run(method, 2.0**-30 * JS) * 2.0**30
    assert not torch.allclose(absolute, run(method), rtol=1e-3)


# ----------------------------------------------------------------------------------------------------- DB-MTL


def dbmtl_by_hand(beta, sigma, present=None, scale=1.0):
    averages, corrections, counts, found = np.zeros((3, 4)), np.zeros(3), np.zeros(3), []
    for t, (rows, losses) in enumerate(zip(JS.numpy()[:8], LOSSES, strict=True)):
        here = list(range(3)) if present is None else present[t]
        for i in here:
            counts[i] += 1
            b = beta / counts[i] ** sigma
            averages[i] = (1 - b) * rows[i] / losses[i] + b * averages[i]
            corrections[i] = 1 - b + b * corrections[i]
        y = averages[here] / corrections[here, None]
        n = np.linalg.norm(y, axis=1)
        found.append(n.max() * (y / n[:, None]).sum(axis=0))
    return torch.from_numpy(np.array(found))


@pytest.mark.parametrize("present", [None, ABSENT])
@pytest.mark.parametrize(("beta", "sigma"), [(0.9, 0.0), (0.9, 0.5), (0.0, 0.0)])
def test_dbmtl_by_hand(beta, sigma, present):
    found = run(DBMTL, JS[:8], LOSSES, present=present, beta=beta, sigma=sigma)
    torch.testing.assert_close(found, dbmtl_by_hand(beta, sigma, present), rtol=1e-11, atol=1e-13)


def test_dbmtl_does_not_see_the_scale_of_a_loss():
    factors = double([1e-6, 1.0, 1e8])
    found = run(DBMTL, JS[:8] * factors[:, None], LOSSES * factors.numpy())
    torch.testing.assert_close(found, run(DBMTL, JS[:8], LOSSES), rtol=1e-11, atol=1e-13)


def test_dbmtl_divides_private_gradients_on_request_only():
    net, x = Net(), torch.randn(8, 5, dtype=torch.float64)
    losses = net(x)
    DBMTL(torch.optim.SGD(net.parameters(), lr=0.1)).backward(losses)
    plain = [torch.autograd.grad(loss, h.weight)[0] for loss, h in zip(net(x).values(), net.heads, strict=True)]
    trunk = net.trunk[0].weight.grad.clone()
    for head, g in zip(net.heads, plain, strict=True):
        assert torch.equal(head.weight.grad, g)
    net.zero_grad()
    DBMTL(torch.optim.SGD(net.parameters(), lr=0.1), log_losses=True).backward(net(x))
    torch.testing.assert_close(net.trunk[0].weight.grad, trunk, rtol=1e-12, atol=0)
    for head, g, loss in zip(net.heads, plain, losses.values(), strict=True):
        torch.testing.assert_close(head.weight.grad, g / loss.item(), rtol=1e-12, atol=0)


def test_dbmtl_needs_positive_losses():
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = DBMTL(torch.optim.SGD([p], lr=0.1))
    with pytest.raises(ValueError, match=r"DBMTL: every loss must be > 0, since the method takes its log.*'1': 0.0"):
        optimizer.backward(lossy(JS[0], p, [1.0, 0.0, 2.0]))
    assert p.grad is None
    optimizer.step()
    assert optimizer.state_dict()["gradsurgery"]["memory"] == {"step": 0}
    with pytest.raises(ValueError, match="DBMTL: `normalize` has no effect here"):
        DBMTL(any_optimizer(), normalize="l2")


def test_dbmtl_leaves_out_zero_rows_and_honours_preference():
    rows, losses = double([[2, 0], [0, 8], [0, 0]]), [1.0, 2.0, 1.0]
    assert DBMTL(any_optimizer()).combine(rows, losses).tolist() == [4, 4]
    assert DBMTL(any_optimizer(), preference=[3, 1, 1]).combine(rows, losses).tolist() == [12, 4]


# --------------------------------------------------------------------------------------------------- M-ConFIG


def mconfig_run(matrices=JS, **options):
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = MConFIG(torch.optim.SGD([p], lr=0.1), **options)
    found, flags = [], []
    for t, rows in enumerate(matrices):
        optimizer.zero_grad()
        report = optimizer.backward([rows[i] @ p if i == t % 3 else None for i in range(3)])
        optimizer.step()
        found.append(p.grad.clone())
        flags.append(report.flags)
    return torch.stack(found), flags


def test_mconfig_reference():
    found, flags = mconfig_run()
    expected = double(SEQUENCES["M-ConFIG"]["conflictfree"])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert flags == [("incomplete",)] * 2 + [()] * 7


def test_mconfig_without_epsilon_does_not_depend_on_length():
    small = mconfig_run(JS * 2.0**-40, eps=0.0)[0]
    torch.testing.assert_close(small, mconfig_run(eps=0.0)[0], rtol=1e-12, atol=1e-14)
    assert not torch.allclose(mconfig_run(JS * 2.0**-40)[0], small, rtol=1e-2), "the published epsilon does"


def test_mconfig_with_all_losses_in_every_step():
    # By hand: momenta of constant gradients are these gradients, and so is the pseudo gradient constant.
    rows = JS[0]
    for d in run(MConFIG, [rows] * 5, eps=0.0):
        torch.testing.assert_close(d, ConFIG(any_optimizer()).combine(rows).sign(), rtol=1e-9, atol=0)


def test_mconfig_shares_what_any_loss_has_ever_reached():
    a, b, both, one = (nn.Parameter(torch.ones(2, dtype=torch.float64)) for _ in range(4))

    def losses(turn):
        return {
            "a": ((both * a).sum() + (one * a).sum()) if turn == "a" else None,
            "b": (both * b).square().sum() if turn == "b" else None,
            "c": (both.sum() * one.sum()) if turn == "c" else None,
        }

    optimizer = MConFIG(torch.optim.SGD([a, b, both, one], lr=0.01))
    for turn in "ab":
        optimizer.zero_grad()
        optimizer.backward(losses(turn))
        optimizer.step()
        assert not both.grad.any()
    assert not b.grad.any(), "what is private is not known yet"
    for turn in "cabc":
        optimizer.zero_grad()
        expected = torch.autograd.grad(losses(turn)[turn], [a, b], allow_unused=True)
        report = optimizer.backward(losses(turn))
        assert both.grad.any()
        assert one.grad.any(), "momenta of absent losses move what no present loss reaches"
        for p, g in zip((a, b), expected, strict=True):
            assert p.grad is None if g is None else torch.equal(p.grad, g)
        optimizer.step()
        assert "incomplete" not in report.flags
    momentum = optimizer.state_dict()["gradsurgery"]["memory"]["momentum"]
    assert {name: set(kept) for name, kept in momentum.items()} == {"a": {2, 3}, "b": {2}, "c": {2, 3}}


def test_mconfig_arguments():
    MConFIG(any_optimizer())  # seen: a constructor that cannot run
    for options in ({"beta_1": 1.0}, {"beta_2": -0.1}, {"eps": -1.0}, {"normalize": "l2"}, {"preference": [1, 2]}):
        with pytest.raises(ValueError, match=f"MConFIG: `{next(iter(options))}`"):
            MConFIG(any_optimizer(), **options)


# -------------------------------------------------------------------------------------------------- ExcessMTL


def excess_by_hand(matrices, eta):
    sums, first, weights, found = np.zeros(matrices[0].shape), None, np.ones(3), []
    for rows in matrices.numpy():
        sums = sums + rows**2
        excess = (rows**2 / np.sqrt(sums)).sum(axis=1)
        if first is None:
            first = excess
        else:
            weights = weights * np.exp(eta * excess / first)
            weights = weights / weights.sum() * 3
        found.append(weights @ rows)
    return torch.from_numpy(np.array(found))


@pytest.mark.parametrize("eta", [0.01, 1.0])
def test_excessmtl_by_hand(eta):
    torch.testing.assert_close(run(ExcessMTL, eta=eta), excess_by_hand(JS, eta), rtol=1e-12, atol=1e-13)
    # The sums outlive squares that single precision has no numbers for.
    for scale in (1e-25, 1e25):
        small = run(ExcessMTL, (JS * scale).float(), eta=eta).double() / scale
        torch.testing.assert_close(small, excess_by_hand(JS, eta), rtol=1e-5, atol=1e-5)


def test_excessmtl_with_a_zero_first_gradient():
    # Seen: nan.
    rows = JS[:3].clone()
    rows[:2, 0] = 0
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = ExcessMTL(torch.optim.SGD([p], lr=0.1), eta=1.0)
    weights = []
    for matrix in rows:
        optimizer.zero_grad()
        weights.append(list(optimizer.backward(lossy(matrix, p)).weights.values()))
        optimizer.step()
    assert weights[0] == [1, 1, 1]
    sums = (rows[:2] ** 2).cumsum(0)
    e = (rows[1] ** 2 / sums[1].sqrt()).nan_to_num().sum(1) / rows[0].abs().sum(1)
    factors = np.exp([0.0, float(e[1]), float(e[2])])  # no excess, as long as there is no gradient
    assert weights[1] == pytest.approx(3 * factors / factors.sum(), rel=1e-12)
    third = rows[2] ** 2 / (rows**2).sum(0).sqrt()
    factors *= np.exp([1.0, *(third.sum(1) / rows[0].abs().sum(1))[1:].tolist()])
    assert weights[2] == pytest.approx(3 * factors / factors.sum(), rel=1e-12)


def test_excessmtl_first_call_only_stores():
    # Seen: weights (1, 1e-43) for rows of lengths 100 and 1.
    for scale in (1.0, 1e-5):
        rows = double([[100, 0], [0, 1]]) * scale
        d = ExcessMTL(any_optimizer(), eta=1.0, reduction="mean").combine(rows)
        assert d.tolist() == pytest.approx([50 * scale, 0.5 * scale], rel=1e-12)


def test_excessmtl_leaves_absent_weights_alone():
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = ExcessMTL(torch.optim.SGD([p], lr=0.1), eta=1.0)
    for present in ([0, 1, 2], [0, 1, 2], [0, 1]):
        optimizer.zero_grad()
        losses = lossy(JS[0], p)
        report = optimizer.backward([loss if i in present else None for i, loss in enumerate(losses)])
        optimizer.step()
        logs = optimizer.state_dict()["gradsurgery"]["memory"].get("log_weights", {"2": 0.0})
        assert sum(report.weights.values()) == pytest.approx(len(present))
        if len(present) == 3:
            alone = logs["2"]
    assert logs["2"] == alone
    assert math.isclose(sum(map(math.exp, logs.values())), 3)


def test_excessmtl_by_parameter():
    p, q = (nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2))
    optimizer = ExcessMTL(torch.optim.SGD([p, q], lr=0.1), eta=1.0, granularity="parameter")
    for t in range(4):
        optimizer.zero_grad()
        optimizer.backward([g @ p + h @ q for g, h in zip(JS[t], JS[t + 4], strict=True)])
        optimizer.step()
    torch.testing.assert_close(p.grad, excess_by_hand(JS[:4], 1.0)[-1], rtol=1e-12, atol=0)
    torch.testing.assert_close(q.grad, excess_by_hand(JS[4:8], 1.0)[-1], rtol=1e-12, atol=0)


# ------------------------------------------------------------------------------------------------------ Bloop


def bloop_by_hand(primary, strength, beta, present=None):
    average, found = None, []
    for t, rows in enumerate(JS.numpy()):
        here = range(3) if present is None else present[t]
        if primary in here:
            average = rows[primary] if average is None else (1 - beta) * average + beta * rows[primary]
        d = np.zeros(4)
        for i in here:
            g = rows[i]
            d += g if i == primary else strength * (g - g @ average / (average @ average) * average)
        found.append(d)
    return torch.from_numpy(np.array(found))


@pytest.mark.parametrize("present", [None, ABSENT])
@pytest.mark.parametrize("primary", [0, 2])
def test_bloop_by_hand(primary, present):
    found = run(Bloop, primary=f"t{primary}", strength=0.7, beta=0.3, present=present)
    torch.testing.assert_close(found, bloop_by_hand(primary, 0.7, 0.3, present), rtol=1e-12, atol=1e-13)
    if primary == 0:
        assert torch.equal(found, run(Bloop, strength=0.7, beta=0.3, present=present)), "the first by default"


def test_bloop_is_orthogonal_to_the_average():
    for rows in JS:
        d = Bloop(any_optimizer(), strength=5.0).combine(rows)
        assert float(d @ rows[0]) == pytest.approx(float(rows[0] @ rows[0]), rel=1e-12)


def test_bloop_without_a_main_gradient():
    rows = double([[0, 0], [1, 2]])
    assert Bloop(any_optimizer(), strength=0.5).combine(rows).tolist() == [0.5, 1]
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = Bloop(torch.optim.SGD([p], lr=0.1), strength=0.5)
    losses = lossy(JS[0], p)
    optimizer.backward([None, *losses[1:]])
    torch.testing.assert_close(p.grad, JS[0][1:].sum(0) / 2, rtol=1e-12, atol=0)


def test_bloop_arguments():
    with pytest.raises(
        ValueError, match=r"Bloop: `primary` must be the name of a loss, one of \['0', '1', '2'\], got 'x'"
    ):
        Bloop(any_optimizer(), primary="x").combine(JS[0])
    for options in ({"strength": -1.0}, {"beta": 0.0}, {"beta": 1.5}):
        with pytest.raises(ValueError, match=f"Bloop: `{next(iter(options))}`"):
            Bloop(any_optimizer(), **options)


# ----------------------------------------------------------------------------------------------------- GCond


def gcond_by_hand(present=None, thresholds=(-0.8, -0.5, 0.0), power=2.0, beta=0.95, rounds=3, dominance_window=0):
    """Algorithm of the paper, step by step on the vectors themselves."""
    critical, main, weak = thresholds
    usual, count, last, winners, found = {}, {}, {}, [], []
    for t, rows in enumerate(JS.numpy()):
        names = range(3) if present is None else present[t]
        raw = {i: rows[i] for i in names}
        for i in names:
            count[i] = count.get(i, 0) + 1
            usual[i] = beta * usual.get(i, 0.0) + (1 - beta) * np.linalg.norm(raw[i])
        usually = {i: usual[i] / (1 - beta ** count[i]) for i in names}
        g = {i: raw[i].copy() for i in names}
        for _ in range(rounds):
            pairs = [(i, j) for i in names for j in names if i < j]
            cosines = [g[i] @ g[j] / np.linalg.norm(g[i]) / np.linalg.norm(g[j]) for i, j in pairs]
            if not pairs or min(cosines) >= weak:
                break
            c = min(cosines)
            i, j = pairs[cosines.index(c)]
            if dominance_window and len(winners) >= dominance_window and set(winners[-dominance_window:]) == {i}:
                winner = j
            elif dominance_window and len(winners) >= dominance_window and set(winners[-dominance_window:]) == {j}:
                winner = i
            else:
                strength = {k: np.linalg.norm(g[k]) / usually[k] for k in (i, j)}
                score = {}
                for k in (i, j):
                    steady = 0.0
                    if k in last:
                        steady = g[k] @ last[k] / np.linalg.norm(g[k]) / np.linalg.norm(last[k])
                    score[k] = 0.8 * max(0, steady) + 0.2 * strength[k] / (strength[i] + strength[j])
                winner = j if score[j] > score[i] + 1e-12 else i
            winners.append(winner)
            loser = i + j - winner
            if c < critical:
                angle = math.pi
            elif c < main:
                angle = math.pi / 2 + math.pi / 2 * ((c - main) / (critical - main)) ** power
            else:
                angle = math.pi / 2 * (1 - (c - main) / (weak - main))
            w, l = g[winner], g[loser]  # noqa: E741
            g[winner] = w - math.sin(angle) * (w @ l) / (l @ l) * l
            g[loser] = l - math.sin(min(angle, math.pi / 2)) * (w @ l) / (w @ w) * w
        last.update(raw)
        found.append(sum(g.values()))
    return double(np.array(found))


@pytest.mark.parametrize("present", [None, ABSENT])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dominance_window": 1},
        {"dominance_window": 2, "rounds": 6},
        {"thresholds": (-0.9, -0.1, 0.3), "power": 0.5, "beta": 0.5, "rounds": 10},
        {"thresholds": (-0.3, -0.3, -0.3)},
        {"thresholds": (-1.0, 0.0, 0.0), "rounds": 1},
    ],
)
def test_gcond_by_hand(options, present):
    found = run(GCond, present=present, **options)
    torch.testing.assert_close(found, gcond_by_hand(present, **options), rtol=1e-10, atol=1e-12)


def gcond_of(c, **options):
    """What becomes of (1, 0), which wins, and of a unit vector at the cosine c."""
    return GCond(any_optimizer(), **options).combine(double([[1, 0], [c, (1 - c * c) ** 0.5]]))


def test_gcond_in_its_four_zones():
    height = lambda c: (1 - c * c) ** 0.5  # noqa: E731
    assert gcond_of(0.1).tolist() == pytest.approx([1.1, height(0.1)])
    # mild, halfway: α = π/4, and both lose √½ of their shadow on each other
    c, s = -0.25, 0.5**0.5
    assert gcond_of(c, rounds=1).tolist() == pytest.approx([1 - s * c * c + c - s * c, height(c) * (1 - s * c)])
    # moderate, halfway: α = π/2 (1 + ¼), so that the loser loses all and the winner sin(5π/8)
    c, s = -0.65, math.sin(5 * math.pi / 8)
    assert gcond_of(c).tolist() == pytest.approx([1 - s * c * c, height(c) * (1 - s * c)])
    # critical: the winner stays
    assert gcond_of(-0.9).tolist() == pytest.approx([1.0, height(0.9)])


def test_gcond_of_opposite_gradients_is_the_winner():
    rows = double([[3, -1], [-6, 2], [-3, 1]])
    assert GCond(any_optimizer()).combine(rows).tolist() == pytest.approx([3, -1])


def test_gcond_lets_the_steady_task_win():
    optimizer = GCond(any_optimizer())
    optimizer.combine(double([[0, 1], [-1, 0.2]]), update=True)
    rows = double([[1, 0], [-1, 0.2]])  # the second has kept its course
    kept = rows[1] + rows[0] - rows[0] @ rows[1] / (rows[1] @ rows[1]) * rows[1]
    torch.testing.assert_close(optimizer.combine(rows), kept, rtol=1e-12, atol=1e-15)


def test_gcond_remembers_gradients_in_memory_of_its_own():
    rows = double([[1, 0], [-1, 0.2]])
    optimizer = GCond(any_optimizer())
    optimizer.combine(rows, update=True)
    rows.zero_()
    assert all(t.any() for t in tensors_in(memory_of(optimizer)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": (-0.5, -0.8, 0.0)}, "`thresholds` must be three cosines in increasing order"),
        ({"thresholds": (-0.5, 0.0)}, "`thresholds` must be three cosines"),
        ({"thresholds": (-2.0, -0.5, 0.0)}, "`thresholds` must be >= -1"),
        ({"power": 0.0}, "`power` must be > 0"),
        ({"beta": 1.0}, "`beta` must be < 1"),
        ({"scores": (1.0,)}, "`scores` must be two numbers"),
        ({"rounds": 0}, "`rounds` must be an integer >= 1"),
        ({"dominance_window": -1}, "`dominance_window` must be an integer >= 0"),
    ],
)
def test_gcond_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        GCond(any_optimizer(), **options)


# ----------------------------------------------------------------------------------------- MoDo and SDMGrad


def test_modo_reference():
    optimizer = MoDo(any_optimizer(), reduction="mean")
    for k, shares in enumerate(SEQUENCES["MoDo"]["torchjd_gamma01_rho01"]):
        first, second, third = JS[3 * k : 3 * k + 3]
        d = optimizer.combine(third, update=True, independent=[first, second])
        torch.testing.assert_close(d, double(shares) @ third, rtol=1e-11, atol=2e-12)


def test_modo_converges_to_mgda_on_one_batch():
    rows = double(REFERENCE["inputs"]["m3_n3_conflict"]["J"])
    optimizer = MoDo(any_optimizer(), rho=0.0, reduction="mean")
    for _ in range(400):
        d = optimizer.combine(rows, update=True)
    torch.testing.assert_close(d, MGDA(any_optimizer(), reduction="mean").combine(rows), rtol=0, atol=1e-6)
    equal = MoDo(any_optimizer(), gamma=1e-3, rho=1e3)
    for _ in range(50):
        d = equal.combine(rows, update=True)
    torch.testing.assert_close(d, rows.sum(0), rtol=5e-3, atol=0)


def sdmgrad_by_hand(a, shares, strength, preferred):
    w = torch.tensor(shares, dtype=torch.float64)
    sgd = torch.optim.SGD([w], lr=10, momentum=0.5)
    a = a / a.diagonal().clamp(min=0).sqrt().mean() ** 2
    for _ in range(20):
        w.grad = a @ (w + strength * double(preferred))
        sgd.step()
        w.copy_(torch.from_numpy(simplex(w.numpy())))
    return w.numpy()


@pytest.mark.parametrize("batches", [0, 1, 2])
def test_sdmgrad_by_hand(batches):
    optimizer = SDMGrad(any_optimizer(), reduction="mean", preference=[1, 2, 1])
    shares, preferred = np.full(3, 1 / 3), np.array([0.25, 0.5, 0.25])
    for k in range(3):
        last, *others = JS[3 * k], *JS[3 * k + 1 : 3 * k + 1 + batches]
        first, second = {0: (last, last), 1: (*others, last), 2: others}[batches]
        shares = sdmgrad_by_hand(first @ second.T, shares, 0.3, preferred)
        d = optimizer.combine(last, update=True, independent=others)
        torch.testing.assert_close(d, double((shares + 0.3 * preferred) / 1.3) @ last, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("solver", ["sgd", "exact"])
def test_sdmgrad_of_zero_gradients(solver):
    # Seen: a crash where the weights lie on the simplex already.
    assert not SDMGrad(any_optimizer(), solver=solver).combine(torch.zeros(3, 4)).any()
    p = nn.Parameter(torch.zeros(2))
    report = SDMGrad(torch.optim.SGD([p], lr=0.1), solver="exact", strength=0.0).backward([p.sum(), -3 * p.sum()])
    assert report.flags == ("stationary",)
    assert not p.grad.any()
    assert SDMGrad(any_optimizer(), solver=solver).combine(torch.ones(3, 4)).tolist() == pytest.approx([3] * 4)


@pytest.mark.parametrize("strength", [0.0, 0.3, 50.0])
def test_sdmgrad_exact_is_the_minimum(strength):
    for rows in JS:
        preferred, j = np.full(3, 1 / 3), rows.numpy()

        def value(w, j=j, q=preferred):
            return float(np.square((w + strength * q) @ j).sum())

        found = minimize(
            value,
            preferred,
            method="SLSQP",
            bounds=[(0, 1)] * 3,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1},
            options={"ftol": 1e-15, "maxiter": 500},
        )
        expected = (found.x + strength * preferred) @ rows.numpy() / (1 + strength)
        d = SDMGrad(any_optimizer(), solver="exact", strength=strength, reduction="mean").combine(rows)
        torch.testing.assert_close(d, torch.from_numpy(expected), rtol=0, atol=3e-6)
        assert d.norm() <= np.linalg.norm(expected) * (1 + 1e-9)
    if strength == 0:
        torch.testing.assert_close(d, MGDA(any_optimizer(), reduction="mean").combine(rows), rtol=1e-9, atol=0)
    if strength == 50:
        torch.testing.assert_close(d, rows.mean(0), rtol=0, atol=0.05)


def test_sdmgrad_exact_on_independent_batches():
    # Its own answer where all batches are the same, and a point of the simplex where J₁J₂ᵀ is anything.
    for solver in ("exact", "sgd"):
        one = SDMGrad(any_optimizer(), solver=solver).combine(JS[0])
        torch.testing.assert_close(
            SDMGrad(any_optimizer(), solver=solver).combine(JS[0], independent=[JS[0], JS[0]]),
            one,
            rtol=1e-7,
            atol=1e-9,
        )
    for rows in JS:
        p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        optimizer = SDMGrad(torch.optim.SGD([p], lr=0.1), solver="exact", strength=0.0)
        weights = optimizer.backward(lossy(rows, p), independent=[lossy(-rows, p), lossy(rows, p)]).weights
        assert min(weights.values()) >= 0
        assert sum(weights.values()) == pytest.approx(3)


@pytest.mark.parametrize("method", [MoDo, SDMGrad])
@pytest.mark.parametrize("batches", [0, 1, 2])
def test_independent_batches_through_backward(method, batches):
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = method(torch.optim.SGD([p], lr=0.1))
    for k in range(3):
        last, *others = JS[3 * k], *JS[3 * k + 1 : 3 * k + 1 + batches]
        expected = optimizer.combine(last, independent=others)
        optimizer.zero_grad()
        report = optimizer.backward(lossy(last, p), independent=[lossy(rows, p) for rows in others])
        torch.testing.assert_close(p.grad, expected, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(report.gram, last @ last.T, rtol=1e-12, atol=0)
        torch.testing.assert_close(double(list(report.weights.values())) @ last, p.grad, rtol=1e-12, atol=1e-14)
        optimizer.step()
    if batches and method is MoDo:
        assert not torch.allclose(expected, optimizer.combine(last, independent=[-rows for rows in others[:1]]))


@pytest.mark.parametrize("method", [MoDo, SDMGrad])
def test_independent_batches_may_be_parts_of_one_forward_pass(method):
    net, x = Net(), torch.randn(24, 5, dtype=torch.float64)
    whole = net.errors(x)
    parts = [{name: e[8 * k : 8 * k + 8].mean() for name, e in whole.items()} for k in range(3)]
    method(torch.optim.SGD(net.parameters(), lr=0.1)).backward(parts[2], independent=parts[:2])
    together = [p.grad.clone() for p in net.parameters()]
    net.zero_grad()
    batches = [{name: e.mean() for name, e in net.errors(x[8 * k : 8 * k + 8]).items()} for k in range(3)]
    method(torch.optim.SGD(net.parameters(), lr=0.1)).backward(batches[2], independent=batches[:2])
    for p, g in zip(net.parameters(), together, strict=True):
        torch.testing.assert_close(p.grad, g, rtol=1e-10, atol=1e-13)
    plain = torch.autograd.grad(net.errors(x[16:])["t1"].mean(), net.heads[1].weight)[0]
    torch.testing.assert_close(net.heads[1].weight.grad, plain, rtol=1e-12, atol=0)


def test_independent_batches_take_part_in_preference_and_normalize():
    rows, factors = JS[0], double([[1], [4], [0.5]])
    others = [JS[1], JS[2]]
    found = MoDo(any_optimizer(), preference=[1, 4, 0.5]).combine(rows, independent=others)
    expected = MoDo(any_optimizer()).combine(factors * rows, independent=[factors * j for j in others])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    found = MoDo(any_optimizer(), normalize="l2").combine(rows, independent=others)
    unit = [nn.functional.normalize(j, dim=1) for j in (rows, *others)]
    expected = MoDo(any_optimizer()).combine(unit[0], independent=unit[1:])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("batches", [1, 2])
@pytest.mark.parametrize("method", [MoDo, SDMGrad])
def test_independent_batches_have_logarithms_of_their_own_losses(method, batches):
    def losses(k, p):
        return [(k + 1 + i) * ((row @ p - 1).square() + 0.5) for i, row in enumerate(JS[k])]

    start = torch.linspace(-1, 1, JS[0].shape[1], dtype=torch.float64)
    found, wanted = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    others = range(1, batches + 1)
    optimizer = method(torch.optim.SGD([found], lr=0.1), log_losses=True)
    optimizer.backward(losses(0, found), independent=[losses(k, found) for k in others])
    plain = method(torch.optim.SGD([wanted], lr=0.1))
    logs = [[x.log() for x in losses(k, wanted)] for k in range(batches + 1)]
    plain.backward(logs[0], independent=logs[1:])
    torch.testing.assert_close(found.grad, wanted.grad, rtol=1e-10, atol=1e-12)
    for key, value in plain.state_dict()["gradsurgery"]["memory"].get("shares", {}).items():
        assert optimizer.state_dict()["gradsurgery"]["memory"]["shares"][key] == pytest.approx(value, rel=1e-10)


def test_a_further_batch_under_log_losses_is_checked():
    p = nn.Parameter(torch.ones(JS[0].shape[1], dtype=torch.float64))
    positive = [(row @ p).square() + 1 for row in JS[0]]
    optimizer = MoDo(torch.optim.SGD([p], lr=0.1), log_losses=True)
    with pytest.raises(
        ValueError, match=r"MoDo: every loss must be > 0.* in a batch of `independent` too; got {'1': -"
    ):
        optimizer.backward(positive, independent=[[positive[0], positive[1] - 1e6, positive[2]]])
    assert p.grad is None
    with pytest.raises(RuntimeError, match=r"the gradient of .* is not finite"):
        optimizer.backward(positive, independent=[[positive[0], positive[1] * math.nan, positive[2]]])
    assert p.grad is None
    with pytest.raises(
        ValueError, match=r"MoDo.combine: log_losses=True .*Divide the rows of each batch by its losses"
    ):
        optimizer.combine(JS[0], losses=[1.0, 2.0, 3.0], independent=[JS[1]])


def test_independent_batches_are_checked():
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = MoDo(torch.optim.SGD([p], lr=0.1))
    with pytest.raises(ValueError, match="MoDo: `independent` must hold at most two batches, got 3"):
        optimizer.backward(lossy(JS[0], p), independent=[lossy(JS[1], p)] * 3)
    with pytest.raises(ValueError, match=r"MoDo.backward: a batch in `independent` lacks the losses \['2'\]"):
        optimizer.backward(lossy(JS[0], p), independent=[lossy(JS[1][:2], p)])
    with pytest.raises(ValueError, match=r"MoDo.combine: `independent` must hold matrices of the shape of `rows`"):
        optimizer.combine(JS[0], independent=[JS[1][:2]])
    bad = lossy(JS[1], p)
    bad[1] = bad[1] * math.inf
    with pytest.raises(RuntimeError, match=r"the gradient of .*'1'.* is not finite"):
        optimizer.backward(lossy(JS[0], p), independent=[bad])
    assert p.grad is None
    # An absent task needs no loss in the other batches, and a failed call leaves nothing behind.
    losses = lossy(JS[0], p)
    report = optimizer.backward([losses[0], losses[1], None], independent=[lossy(JS[1], p)[:2]])
    assert list(report.weights) == ["0", "1"]
    torch.testing.assert_close(
        MoDo(any_optimizer()).combine(JS[0][:2], independent=[JS[1][:2]]), p.grad, rtol=1e-12, atol=1e-14
    )


# ----------------------------------------------------------------------------------------- all of them alike


class Net(nn.Module):
    """A trunk and one head a task."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.trunk = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))
        self.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))
        self.to(dtype)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) / 2)

    def errors(self, x):
        z = torch.tanh(self.trunk(x))
        return {f"t{i}": (h(z) - t).square() + 0.1 for i, (h, t) in enumerate(zip(self.heads, (1, -3, 9), strict=True))}

    def forward(self, x, absent=()):
        return {name: None if name in absent else e.mean() for name, e in self.errors(x).items()}


class Thirds(Weighter):
    """Weights 1, 1/3, 1/9."""

    def weights(self, losses):
        return np.array([3.0 ** -int(name[1]) for name in self.names])


METHODS = {
    "GradDrop": GradDrop,
    "TrimmedMean": TrimmedMean,
    "MoCo": MoCo,
    "DBMTL": DBMTL,
    "MConFIG": MConFIG,
    "ExcessMTL": lambda base, **options: ExcessMTL(base, eta=1.0, **options),
    "Bloop": Bloop,
    "GRU": GRU,
    "SAGO": SAGO,
    "AndMask": lambda base, **options: AndMask(base, tau=0.3, **options),
    "SandMask": lambda base, **options: SandMask(base, tau=0.3, k=1.0, relative=True, **options),
    "GCond": GCond,
    "MoDo": MoDo,
    "SDMGrad": SDMGrad,
    "SDMGrad, exact": lambda base, **options: SDMGrad(base, solver="exact", **options),
}
FORGETFUL = ("GradDrop", "TrimmedMean", "SDMGrad, exact", "SAGO", "AndMask", "SandMask")
STATEFUL = {name: build for name, build in METHODS.items() if name not in FORGETFUL}
KEEPS_ROWS = {name: build for name, build in STATEFUL.items() if name not in ("MoDo", "SDMGrad")}


def over(methods):
    return pytest.mark.parametrize("build", methods.values(), ids=methods)


def inputs(t, dtype=torch.float64):
    return torch.randn(8, 5, generator=torch.Generator().manual_seed(t), dtype=torch.float64).to(dtype)


def train(build, steps, net=None, optimizer=None, start=0, absent=lambda t: (), dtype=torch.float64, **options):
    net = Net(dtype) if net is None else net
    if optimizer is None:
        optimizer = build(torch.optim.SGD(net.parameters(), lr=0.01), **options)
    for t in range(start, start + steps):
        optimizer.zero_grad()
        optimizer.backward(net(inputs(t, dtype), absent(t)))
        optimizer.step()
    return net, optimizer


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def tensors_in(memory):
    if isinstance(memory, torch.Tensor):
        return [memory]
    values = memory.values() if isinstance(memory, dict) else memory if isinstance(memory, list) else ()
    return [t for value in values for t in tensors_in(value)]


def memory_of(optimizer):
    return optimizer.state_dict()["gradsurgery"]["memory"]


def check_round_trip(build):
    """A run that was saved and loaded goes on as if it had not been, bit for bit."""
    absent = lambda t: ("t1",) if t in (3, 6) else ()  # noqa: E731
    whole, _ = train(build, 8, absent=absent)
    net, optimizer = train(build, 4, absent=absent)
    file = io.BytesIO()
    torch.save({"net": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again = Net()
    again.load_state_dict(saved["net"])
    fresh = build(torch.optim.SGD(again.parameters(), lr=0.01))
    fresh.load_state_dict(saved["optimizer"])
    train(build, 4, again, fresh, start=4, absent=absent)
    assert same(again, whole)


def check_zero_grad_discards(build):
    """What a call proposed and no step took is gone, down to the last bit of every tensor that is kept."""
    net, optimizer = train(build, 3)
    before = copy.deepcopy(optimizer.state_dict()["gradsurgery"])
    optimizer.zero_grad()
    optimizer.backward(net(inputs(99)))
    optimizer.zero_grad()
    after = optimizer.state_dict()["gradsurgery"]
    kept, now = tensors_in(before["memory"]), tensors_in(after["memory"])
    assert len(kept) == len(now)
    assert all(torch.equal(a, b) for a, b in zip(kept, now, strict=True))
    plain = {k: v for k, v in before["memory"].items() if not tensors_in(v)}
    assert plain == {k: v for k, v in after["memory"].items() if not tensors_in(v)}
    train(build, 2, net, optimizer, start=3)
    assert same(net, train(build, 5)[0])


def check_scaler(build):
    """With a gradient scaler everything is as without, but for the factor in ``.grad``."""
    plain, _ = train(build, 3)
    net = Net()
    optimizer = build(torch.optim.SGD(net.parameters(), lr=0.01))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=2)
    for t in range(3):
        optimizer.zero_grad()
        optimizer.backward(net(inputs(t)), scaler=scaler)
        scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**13
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


@over(STATEFUL)
def test_round_trip_in_the_middle_of_a_run(build):
    check_round_trip(build)


@over(METHODS)
def test_zero_grad_discards(build):
    check_zero_grad_discards(build)


@over(METHODS)
def test_with_a_scaler(build):
    check_scaler(build)


class InPlace(MoCo):
    """Broken: changes what it has kept."""

    def observe(self, rows, losses, params):
        for name in self.names:
            for y in self.row_state("tracked", name, params):
                if y is not None:
                    y.mul_(0.5)
        return super().observe(rows, losses, params)


class Outside(MoCo):
    """Broken: keeps something that no checkpoint knows."""

    def observe(self, rows, losses, params):
        self.calls = getattr(self, "calls", 0) + 1
        return [[None if g is None else g * self.calls for g in row] for row in super().observe(rows, losses, params)]


class Scaled(MoCo):
    """Broken: sees the loss scale."""

    def observe(self, rows, losses, params):
        scale = 1.0 if self._now.batch is None else self._now.batch.loss_scale
        return super().observe([[g if g is None else g * scale for g in row] for row in rows], losses, params)


@pytest.mark.parametrize(
    ("check", "broken"),
    [(check_zero_grad_discards, InPlace), (check_round_trip, Outside), (check_scaler, Scaled)],
)
def test_the_checks_reject_broken_methods(check, broken):
    with pytest.raises(AssertionError):
        check(broken)


@over(METHODS)
def test_combine_agrees_with_backward(build):
    p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    optimizer = build(torch.optim.SGD([p], lr=0.0))
    again = build(any_optimizer())
    for t, rows in enumerate(JS[:5]):
        optimizer.zero_grad()
        expected = optimizer.combine(rows, losses=LOSSES[t])
        assert torch.equal(expected, optimizer.combine(rows, losses=LOSSES[t])), "pure"
        optimizer.backward(lossy(rows, p, LOSSES[t]))
        torch.testing.assert_close(p.grad, expected, rtol=1e-11, atol=1e-13)
        optimizer.step()
        torch.testing.assert_close(again.combine(rows, losses=LOSSES[t], update=True), expected, rtol=1e-11, atol=1e-13)


@over(METHODS)
def test_mean_is_the_sum_divided(build):
    for t, rows in enumerate(JS[:3]):
        found = build(any_optimizer(), reduction="mean").combine(rows, losses=LOSSES[t])
        expected = build(any_optimizer()).combine(rows, losses=LOSSES[t]) / 3
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


@over(STATEFUL)
def test_a_step_that_the_scaler_skips_teaches_nothing(build):
    net, optimizer = train(build, 2)
    before = copy.deepcopy(memory_of(optimizer))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer.zero_grad()
    losses = net(inputs(7))
    losses["t1"] = losses["t1"] * math.inf
    optimizer.backward(losses, scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1.0, "it saw inf or nan"
    after = memory_of(optimizer)
    assert after["step"] == before["step"]
    assert all(torch.equal(a, b) for a, b in zip(tensors_in(before), tensors_in(after), strict=True))
    train(build, 2, net, optimizer, start=2)
    assert same(net, train(build, 4)[0])


@over(STATEFUL)
def test_under_logarithms_a_skipped_step_teaches_nothing(build):
    net, optimizer = train(build, 2, log_losses=True)
    before = copy.deepcopy(memory_of(optimizer))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    optimizer.zero_grad()
    losses = net(inputs(7))
    losses["t1"] = losses["t1"] * math.inf
    optimizer.backward(losses, scaler=scaler)
    scaler.step(optimizer)
    after = memory_of(optimizer)
    assert len(tensors_in(before)) == len(tensors_in(after))
    assert all(torch.equal(a, b) for a, b in zip(tensors_in(before), tensors_in(after), strict=True))


@over(STATEFUL)
def test_a_failed_call_leaves_memory_and_grad_alone(build):
    net, optimizer = train(build, 2)
    optimizer.zero_grad()
    losses = net(inputs(7))
    losses["t2"] = losses["t2"] * math.nan
    with pytest.raises(RuntimeError, match="'t2' is not finite"):
        optimizer.backward(losses)
    assert all(p.grad is None for p in net.parameters())
    train(build, 2, net, optimizer, start=2)
    assert same(net, train(build, 4)[0])


# The average of GRU belongs to all retained losses: see test_unlearning.py.
@over({name: build for name, build in KEEPS_ROWS.items() if name != "GRU"})
def test_an_absent_task_keeps_its_rows_and_the_trunk_stays_shared(build):
    net, optimizer = train(build, 2)
    before = copy.deepcopy(memory_of(optimizer))
    optimizer.zero_grad()
    losses = net(inputs(5), absent=("t0", "t1"))
    plain = torch.autograd.grad(losses["t2"], net.trunk[0].weight, retain_graph=True)[0]
    optimizer.backward(losses)
    assert net.heads[1].weight.grad is None
    assert net.trunk[0].weight.grad is not None
    optimizer.step()
    after = memory_of(optimizer)
    key = next(k for k in ("tracked", "average", "momentum", "roots", "last") if k in before)
    names = ("t0", "t1") if "t0" in before[key] else ("main",)
    for name in names:
        for j, kept in before[key][name].items():
            assert torch.equal(kept, after[key][name][j])
    if "t2" in before[key]:
        assert any(not torch.equal(kept, after[key]["t2"][j]) for j, kept in before[key]["t2"].items())
    if build in (MoCo, DBMTL, MConFIG, Bloop):
        assert not torch.allclose(net.trunk[0].weight.grad, plain, rtol=1e-3), "still what the method makes of it"
    with pytest.raises(ValueError, match="the names of the losses must stay the same"):
        optimizer.backward({"t0": net(inputs(5))["t0"]})


@over(KEEPS_ROWS)
def test_freezing_a_parameter_does_not_exchange_the_rows_of_others(build):
    net, optimizer = train(build, 2)
    net.trunk[0].weight.requires_grad_(False)
    train(build, 2, net, optimizer, start=2)
    net.trunk[0].weight.requires_grad_(True)
    train(build, 1, net, optimizer, start=4)
    key = next(k for k in ("tracked", "average", "momentum", "roots", "last") if k in memory_of(optimizer))
    kept = next(iter(memory_of(optimizer)[key].values()))
    shapes = {j: p.shape for j, p in enumerate(net.parameters())}
    assert {j: row.shape for j, row in kept.items()} == {j: shapes[j] for j in range(4)}


@over(METHODS)
def test_half_precision_parameters(build):
    net, optimizer = train(build, 3, dtype=torch.bfloat16)
    assert all(p.grad.dtype == torch.bfloat16 for p in net.parameters() if p.grad is not None)
    assert all(t.dtype == torch.float32 for t in tensors_in(memory_of(optimizer)) if t.dim()), "averages lose nothing"


@over(METHODS)
def test_zero_rows_and_one_task(build):
    rows = JS[0].clone()
    rows[1] = 0
    optimizer = build(any_optimizer())
    for _ in range(3):
        assert torch.isfinite(optimizer.combine(rows, losses=[1.0, 2.0, 3.0], update=True)).all()
    alone = build(any_optimizer()).combine(JS[0][:1], losses=[1.0])
    assert torch.isfinite(alone).all()
    expected = JS[0][0].sign() if build is MConFIG else JS[0][0]
    torch.testing.assert_close(alone, expected, rtol=1e-5, atol=0)
    assert not build(any_optimizer()).combine(torch.zeros(3, 4), losses=[1.0, 2.0, 3.0]).any()


@over(METHODS)
def test_a_weighter_inside(build):
    net = Net()
    optimizer = build(Thirds(torch.optim.SGD(net.parameters(), lr=0.01)))
    for t in range(3):
        optimizer.zero_grad()
        optimizer.backward(net(inputs(t)))
        optimizer.step()
    other = Net()
    scaled = build(torch.optim.SGD(other.parameters(), lr=0.01))
    for t in range(3):
        scaled.zero_grad()
        losses = {name: loss * 3.0 ** -int(name[1]) for name, loss in other(inputs(t)).items()}
        scaled.backward(losses)
        scaled.step()
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11)


@over(METHODS)
def test_features_and_weights_are_refused_where_they_mean_nothing(build):
    net = Net()
    base = torch.optim.SGD(net.parameters(), lr=0.01)
    z = net.trunk(inputs(0))
    losses = {f"t{i}": h(z).square().mean() for i, h in enumerate(net.heads)}
    with pytest.raises(ValueError, match=r"\.backward: `features` needs a method that finds one weight per loss"):
        build(base).backward(losses, features=z)
    if build(base).has_weights:
        optimizer = build(base, every=2)
        train(build, 3, net, optimizer)
        assert "reused" not in optimizer.report.flags
        train(build, 1, net, optimizer, start=3)
        assert "reused" in optimizer.report.flags
    else:
        assert build(base).backward(losses).weights is None
        for option in ({"every": 2}, {"min_weight": 0.1}, {"max_weight": 2.0}, {"weight_momentum": 0.5}):
            with pytest.raises(ValueError, match="need a method that works by one weight per loss"):
                build(base, **option)


@over(METHODS)
def test_warmup_is_the_plain_sum_and_teaches_nothing(build):
    net, optimizer = train(build, 2, warmup=2)
    plain = Net()
    sgd = torch.optim.SGD(plain.parameters(), lr=0.01)
    for t in range(2):
        sgd.zero_grad()
        sum(plain(inputs(t)).values()).backward()
        sgd.step()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-13, atol=1e-15)
    assert set(memory_of(optimizer)) <= {"step", "tasks"}
    train(build, 2, net, optimizer, start=2)
    assert "warmup" not in optimizer.report.flags


@over(METHODS)
def test_granularity_by_parameter(build):
    net, _ = train(build, 3, granularity="parameter")
    assert all(torch.isfinite(p).all() for p in net.parameters())
    p, q = (nn.Parameter(torch.zeros(4, dtype=torch.float64)) for _ in range(2))
    both = build(torch.optim.SGD([p, q], lr=0.0), granularity="parameter")
    alone = build(any_optimizer())
    for t in range(3):
        both.zero_grad()
        both.backward([g @ p + h @ q + v for g, h, v in zip(JS[t], JS[t + 4], LOSSES[t], strict=True)])
        both.step()
        expected = alone.combine(JS[t], losses=LOSSES[t], update=True)
        torch.testing.assert_close(p.grad, expected, rtol=1e-11, atol=1e-13)


# A trimmed mean counts it as zero.
@over({name: build for name, build in METHODS.items() if name != "TrimmedMean"})
def test_a_loss_that_reaches_nothing_shared_takes_no_part(build):
    def train_with(extra):
        net, lone = Net(), nn.Parameter(torch.ones(2, dtype=torch.float64))
        optimizer = build(torch.optim.SGD([*net.parameters(), lone], lr=0.01), seed=3)
        for t in range(3):
            optimizer.zero_grad()
            losses = net(inputs(t))
            more = [dict(losses)] * (2 if isinstance(optimizer, MoDo) else 0)
            if extra:
                losses["lone"] = lone.square().sum()
                more = [{**batch, "lone": lone.square().sum()} for batch in more]
            optimizer.backward(losses, **({"independent": more} if more else {}))
            optimizer.step()
        assert not extra or lone.grad is not None
        return net

    for p, q in zip(train_with(True).parameters(), train_with(False).parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


# The scale that the catalogue declares, and the order of the tasks.
EQUAL = {
    "GradDrop": 3,
    "TrimmedMean": 3,
    "MoCo": 3,
    "ExcessMTL": 3,
    "Bloop": 1,
    "GRU": 3,
    "SAGO": 1,
    "AndMask": 3,
    "SandMask": 3,
    "GCond": 3,
    "MoDo": 3,
    "SDMGrad": 3,
    "DBMTL": 3,
}


@pytest.mark.parametrize("name", EQUAL)
def test_equal_rows_show_the_scale(name):
    optimizer = METHODS[name](any_optimizer())
    for _ in range(4):
        d = optimizer.combine(JS[0][:1].expand(3, 4), losses=[1.0, 1.0, 1.0], update=True)
        torch.testing.assert_close(d, EQUAL[name] * JS[0][0], rtol=1e-12, atol=0)


ANY_ORDER = (
    "GradDrop",
    "TrimmedMean",
    "AndMask",
    "SandMask",
    "MoCo",
    "DBMTL",
    "MConFIG",
    "ExcessMTL",
    "SDMGrad, exact",
)


@pytest.mark.parametrize("name", ANY_ORDER)
def test_the_order_of_the_tasks_does_not_matter(name):
    order = [2, 0, 1]
    plain, turned = METHODS[name](any_optimizer()), METHODS[name](any_optimizer())
    for t in range(4):
        d = plain.combine(JS[t], losses=LOSSES[t], update=True)
        e = turned.combine(JS[t][order], losses=LOSSES[t][order], update=True)
        torch.testing.assert_close(d, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    "name", ["GradDrop", "TrimmedMean", "DBMTL", "ExcessMTL", "Bloop", "GCond", "SDMGrad", "SDMGrad, exact"]
)
@pytest.mark.parametrize("factor", [2.0**-40, 2.0**40])
def test_homogeneous(name, factor):
    plain, scaled = METHODS[name](any_optimizer()), METHODS[name](any_optimizer())
    for t in range(4):
        d = plain.combine(JS[t], losses=LOSSES[t], update=True)
        e = scaled.combine(JS[t] * factor, losses=LOSSES[t], update=True)
        torch.testing.assert_close(e / factor, d, rtol=1e-10, atol=1e-12)


def test_projection_oracle():
    for _ in range(20):
        v = np.random.default_rng(_).normal(size=4)
        np.testing.assert_allclose(simplex(v), geometry.project_simplex(v), atol=1e-12)
