"""What all methods with rows of their own keep: checkpoints, scalers, absent losses, order and scale."""

from __future__ import annotations

import copy
import io
import math

import numpy as np
import pytest
import torch
from torch import nn

from gradsurgery import geometry
from gradsurgery.surgery.and_mask import AndMask
from gradsurgery.surgery.bloop import Bloop
from gradsurgery.surgery.dbmtl import DBMTL
from gradsurgery.surgery.excessmtl import ExcessMTL
from gradsurgery.surgery.gcond import GCond
from gradsurgery.surgery.graddrop import GradDrop
from gradsurgery.surgery.gru import GRU
from gradsurgery.surgery.mconfig import MConFIG
from gradsurgery.surgery.moco import MoCo
from gradsurgery.surgery.modo import MoDo
from gradsurgery.surgery.sago import SAGO
from gradsurgery.surgery.sand_mask import SandMask
from gradsurgery.surgery.sdmgrad import SDMGrad
from gradsurgery.surgery.trimmed_mean import TrimmedMean
from gradsurgery.weighting.base import Weighter
from tests.support.catalogue import any_optimizer
from tests.support.row_methods import JS, LOSSES, Net, lossy, memory_of, simplex, tensors_in

# ---------------------------------------------------------------------------------------------------- all of them alike


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


class Counting(Weighter):
    """Counts how often it is asked, as one that remembers would notice."""

    asked = 0

    def weights(self, losses):
        self.asked += 1
        return np.full(len(losses), 2.0)


@pytest.mark.parametrize("build", [MoCo, AndMask])
def test_a_weighter_inside_is_asked_once_a_step(build):
    p = nn.Parameter(torch.ones(2))
    inner = Counting(torch.optim.SGD([p], lr=0.1))
    build(inner).backward([(p - 3).square().sum(), p.sum() + 9])
    assert inner.asked == 1


def test_a_gradient_that_is_not_finite_is_named_beside_rows_of_absent_losses():
    """There are more rows than losses, and the others are fine."""
    p = nn.Parameter(torch.zeros(2))
    optimizer = MConFIG(torch.optim.SGD([p], lr=0.0))
    optimizer.backward({"a": (p - 1).square().sum(), "b": None})
    optimizer.step()
    optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="the gradient of 'b' is not finite"):
        optimizer.backward({"a": None, "b": p[0].sqrt() + p[1]})
    assert p.grad is None


def test_a_scaler_sees_a_value_that_is_not_finite_where_nothing_is_shared():
    """Gradients are finite, and so is what the method has averaged: the step is skipped all the same."""
    p, q = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = MoCo(torch.optim.SGD([p, q], lr=0.1), log_losses=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer.backward([p.square().sum(), q.square().sum() + torch.tensor(torch.nan)], scaler=scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert torch.equal(p, torch.ones(2))
