"""Methods that keep averages of rows: MoCo, DB-MTL, M-ConFIG, ExcessMTL, Bloop and GCond."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from gradsurgery.surgery.bloop import Bloop
from gradsurgery.surgery.config import ConFIG
from gradsurgery.surgery.dbmtl import DBMTL
from gradsurgery.surgery.excessmtl import ExcessMTL
from gradsurgery.surgery.gcond import GCond
from gradsurgery.surgery.mconfig import MConFIG
from gradsurgery.surgery.mgda import MGDA
from gradsurgery.surgery.moco import MoCo
from gradsurgery.surgery.modo import MoDo
from tests.support.catalogue import any_optimizer
from tests.support.row_methods import (
    JS,
    LOSSES,
    REFERENCE,
    SEQUENCES,
    Net,
    double,
    lossy,
    memory_of,
    simplex,
    tensors_in,
)


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


# ----------------------------------------------------------------------------------------------------------------- MoCo


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


# --------------------------------------------------------------------------------------------------------------- DB-MTL


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


# ------------------------------------------------------------------------------------------------------------- M-ConFIG


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


# ------------------------------------------------------------------------------------------------------------ ExcessMTL


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


# ---------------------------------------------------------------------------------------------------------------- Bloop


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


# ---------------------------------------------------------------------------------------------------------------- GCond


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_averages_of_half_precision_gradients_are_kept_in_single_precision(dtype):
    p = nn.Parameter(torch.ones(3, dtype=dtype))
    optimizer = MoCo(torch.optim.SGD([p], lr=0.1))
    optimizer.backward([p.sum(), p.square().sum()])
    optimizer.step()
    tracked = torch.utils._pytree.tree_leaves(optimizer.state_dict()["gradsurgery"]["memory"]["tracked"])
    assert {x.dtype for x in tracked if isinstance(x, torch.Tensor)} == {torch.float32}
    assert p.grad.dtype == dtype
